"""A further pass of the denoiser: what it shares with the pipeline's own, what it costs, and whose neighbour it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import diffusers
import pytest
import tiny
import torch
from contract_table import close, differs, trace
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, apply_first_block_cache
from toys import Guide, Push, Spy

from attnctl import attach, sites
from attnctl.engine.control import Control
from attnctl.engine.heads import pick_heads
from attnctl.errors import ControlError
from attnctl.processors import Pag, Perturb, Slg, Tpg

FAMILIES = tuple(tiny.FAMILIES)


@dataclass(frozen=True, eq=False)
class Twice(Control):
    """Runs a further pass, shared from a module on and as a whole, and keeps both predictions."""

    start: str
    shared: list = field(default_factory=list)
    whole: list = field(default_factory=list)

    def before_denoise(self, step):
        step.share(self.start)

    def after_denoise(self, step, output):
        if step.rows.cond is not None:
            self.shared.append(step.forward("shared", self.start))
            self.whole.append(step.forward("whole"))


def starts(family):
    """The first site of each block."""
    return [site.name for site in pick_heads(sites(tiny.FAMILIES[family]()), "all")]


def unguided(family):
    return {} if family == "flux" else {"guidance_scale": 1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_pass_is_the_whole_one_to_the_bit(family):
    """Also the pipeline's own prediction, since nothing differs between the two, where its rows are the same."""
    pipe = tiny.FAMILIES[family]()
    costs = []
    for start in starts(family):
        twice = Twice(start)
        with attach(pipe, Push(), twice) as run:
            tiny.draw(pipe, **unguided(family))
        for shared, whole in zip(twice.shared, twice.whole, strict=True):
            assert torch.equal(shared, whole)
        costs.append(run.run.passes["shared"] / run.run.passes["whole"])
    assert costs[0] == 1.0 and costs[-1] < 0.5 and costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_pass_with_guidance_in_one_batch(family):
    """The rows come from a larger batch then, whose sums may be added up in another order."""
    pipe = tiny.FAMILIES[family]()
    twice = Twice(starts(family)[-1])
    with attach(pipe, twice):
        tiny.draw(pipe, ["a cat", "a red dog"])
    for shared, whole in zip(twice.shared, twice.whole, strict=True):
        assert close(shared, whole, 1e-5)


def t2i_adapter(pipe):
    torch.manual_seed(3)
    adapter = diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parts = {name: it for name, it in pipe.components.items() if name != "image_encoder"}
    made = diffusers.StableDiffusionAdapterPipeline(adapter=adapter, **parts, requires_safety_checker=False)
    return tiny.quiet(made)


@pytest.mark.parametrize("start", starts("sd1"))
@pytest.mark.parametrize("neighbour", ["freeu", "controlnet", "adapter"])
def test_shared_pass_beside_what_edits_a_unet_on_its_way(neighbour, start):
    """FreeU and T2I-Adapters change tensors in place, and adapters are taken out of the list they come in."""
    pipe, settings = tiny.controlnet() if neighbour == "controlnet" else tiny.sd1(), {}
    if neighbour == "freeu":
        pipe.enable_freeu(s1=0.5, s2=0.3, b1=1.5, b2=1.6)
    else:
        settings = {"image": torch.linspace(0, 1, 3 * 32 * 48).reshape(1, 3, 32, 48)}
    if neighbour == "adapter":
        pipe = t2i_adapter(pipe)
    plain = tiny.draw(pipe, **settings, guidance_scale=1.0)
    assert differs(plain, tiny.draw(tiny.sd1(), guidance_scale=1.0))
    twice = Twice(start)
    with attach(pipe, twice):
        assert torch.equal(tiny.draw(pipe, **settings, guidance_scale=1.0), plain)
    for shared, whole in zip(twice.shared, twice.whole, strict=True):
        assert torch.equal(shared, whole)


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_pass_sees_what_the_pipeline_saw(family):
    """Nothing acts in it that did not act in the pipeline's own forward: then its prediction is that one."""
    pipe = tiny.FAMILIES[family]()

    class Same(Control):
        def after_denoise(self, step, output):
            if step.rows.cond is not None:
                assert close(step.forward("same"), step.prediction[step.rows.cond], 1e-5)
                checked.append(step.index)

    checked: list[int] = []
    with attach(pipe, Same(), Push(), Guide()):
        tiny.draw(pipe, ["a cat", "a red dog"], steps=3)
    assert checked == [0, 1, 2]


def test_pass_outside_of_its_place():
    class Early(Control):
        def before_denoise(self, step):
            step.guide(step.latents)

    class Wrong(Control):
        def after_denoise(self, step, output):
            step.guide(output[:, :1])

    class Unconditional(Control):
        def after_denoise(self, step, output):
            if step.rows.cond is None:
                step.forward("none")

    pipe = tiny.sd1()
    for control, said in ((Early(), "step.guide is for after_denoise"), (Wrong(), "has the shape of the prediction")):
        with pytest.raises(ControlError, match=said), attach(pipe, control):
            tiny.draw(pipe)
    flux = tiny.flux()
    with pytest.raises(ControlError, match="needs conditional rows"), attach(flux, Unconditional()):
        tiny.draw(flux, true_cfg_scale=2.0, negative_prompt="blue")


def test_an_exception_in_the_weak_pass_leaves_nothing():
    class Fails(Spy):
        def attend(self, call, proceed):
            if call.step.pass_name != "main":
                raise RuntimeError("weak")
            return proceed(call)

    for control in (Perturb("1"), Slg("1", window=(0, 1))):
        pipe = tiny.sd3()
        plain, before = tiny.draw(pipe), trace(pipe)
        with attach(pipe, control, Fails(where="2")):
            with pytest.raises(RuntimeError, match="weak"):
                tiny.draw(pipe)
        assert trace(pipe) == before and torch.equal(tiny.draw(pipe), plain)


@pytest.mark.parametrize("cache", ["first block", "pyramid"])
def test_step_caches_keep_the_weak_pass_apart(cache):
    """With a cache, the picture is that of the cache and the perturbation; its states are not mixed."""

    def cached():
        pipe = tiny.flux()
        if cache == "first block":
            apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.0))
        else:
            pipe.transformer.enable_cache(
                PyramidAttentionBroadcastConfig(
                    spatial_attention_block_skip_range=1,
                    spatial_attention_timestep_skip_range=(0, 1000),
                    current_timestep_callback=lambda: 500,
                )
            )
        return pipe

    pipe = tiny.flux()
    with attach(pipe, Perturb("1", scale=6.0)):
        want = tiny.draw(pipe, steps=4)
    pipe = cached()
    with attach(pipe, Perturb("1", scale=6.0)) as run:
        assert close(tiny.draw(pipe, steps=4), want, 1e-4)
    assert run.run.passes == {"main": 4.0, "perturb": 4.0}  # nothing is shared


def test_a_block_under_a_step_cache_cannot_be_skipped():
    pipe = tiny.flux()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.2))
    with (
        pytest.raises(ControlError, match="transformer_blocks.0 is under a step cache"),
        attach(pipe, Slg("0", window=(0, 1))),
    ):
        tiny.draw(pipe)


@pytest.mark.parametrize("control", [Pag("1"), Perturb("1:0", u=0.5), Slg("1", window=(0, 1)), Tpg("1")])
def test_offloaded_layer_by_layer(control):
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.sd3()
    with attach(pipe, control):
        want = tiny.draw(pipe)
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    with attach(pipe, control):
        assert torch.equal(tiny.draw(pipe), want)


def test_heun_counts_its_corrector_calls():
    pipe = tiny.sd1()
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with attach(pipe, Pag()) as run:
        drawn = tiny.draw(pipe, steps=3)
    assert differs(drawn, tiny.draw(pipe, steps=3))
    assert run.run.passes == {"main": 10.0, "pag": pytest.approx(5 * 0.6)}


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_two_calls_one_after_the_other_do_not_share_a_term(family):
    pipe = tiny.FAMILIES[family]()
    with attach(pipe, Perturb("1", window=(0.5, 1.0))):
        first, second = tiny.draw(pipe), tiny.draw(pipe)
    assert torch.equal(first, second)
