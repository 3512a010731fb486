"""Step.probe: an extra forward on the conditional rows that sees what the real one sees, and leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import tiny
import torch
from contract_table import close, differs
from toys import Bias, Identity

from attnctl.engine.attachment import attach
from attnctl.engine.control import Control, Lane
from attnctl.engine.sites import select
from attnctl.errors import ControlError


@dataclass(frozen=True, eq=False)
class Probe(Control):
    """Probes at every step with the step's own latents; compares q, k, v and the gradient of a loss on them."""

    lane = Lane.GRADIENT
    where: Any = None
    watch: Any = None
    times: int = 1
    images: Any = None
    checkpoint: bool = False
    seen: list[dict] = field(default_factory=list)
    real: list[dict] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)

    def sites(self, available):
        return select(available, self.where)

    def before_denoise(self, step):
        self.real.append({})
        for _ in range(self.times):
            seen: dict[str, Any] = {}
            leaf = step.latents if self.images is None else step.latents[self.images]
            leaf = leaf.detach().requires_grad_()
            watched = select(self.sites(step.run.family.sites(step.passes.target.model)), self.watch)

            def see(call, seen=seen):
                seen[call.site.name] = call

            step.probe(leaf, dict.fromkeys(watched, see), self.images, self.checkpoint)
            with torch.enable_grad():
                loss = sum(loss_of(call) for call in seen.values())
                self.gradients.append(torch.autograd.grad(loss, leaf)[0])
            self.seen.append(seen)

    def attend(self, call, proceed):
        if call.step.rows.cond is not None and call.step.pass_name == "main":  # FLUX's unconditional call comes after
            self.real[-1][call.site.name] = call
        return proceed(call)


def loss_of(call):
    probabilities = (call.q.float() @ call.k.float().transpose(-1, -2) * call.q.shape[-1] ** -0.5).softmax(-1)
    return (probabilities[..., 1:4] ** 2).sum()


def controlnet():
    return tiny.controlnet(), {"image": torch.linspace(0, 1, 3 * 32 * 48).reshape(1, 3, 32, 48)}


def ip_adapter():
    pipe = tiny.sd1()
    pipe.unet._load_ip_adapter_weights([tiny.ip_adapter(pipe.unet)])
    return pipe, {"ip_adapter_image_embeds": [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))]}


def inpaint():
    picture = torch.linspace(-1, 1, 3 * 32 * 48).reshape(1, 3, 32, 48)
    return tiny.inpaint(), {"image": picture, "mask_image": (picture[:, :1] > 0).float(), "strength": 1.0}


def euler():
    pipe = tiny.sd1()
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe, {}


def lora():
    from peft import LoraConfig

    pipe = tiny.sd1()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    return pipe, {"cross_attention_kwargs": {"scale": 0.3}}


def no_guidance():
    return tiny.sd1(), {"guidance_scale": 1.0}


def true_guidance():
    return tiny.flux(), {"true_cfg_scale": 2.0, "negative_prompt": "blue"}


def several():
    return tiny.sd1(), {"prompt": ["a cat and a dog", "a red dog"], "num_images_per_prompt": 2}


SETTINGS = {name: (lambda make=make: (make(), {})) for name, make in tiny.FAMILIES.items()}
SETTINGS |= {make.__name__: make for make in (controlnet, ip_adapter, inpaint, euler, lora, no_guidance, true_guidance)}
SETTINGS["several"] = several


@pytest.mark.parametrize("setting", SETTINGS)
def test_probe_sees_what_the_real_forward_sees(setting):
    """Same latents, same conditions: text, residuals, added conditions, image prompts, LoRA scale."""
    pipe, extra = SETTINGS[setting]()
    plain = tiny.draw(pipe, **extra)
    probe = Probe()
    with attach(pipe, probe):
        probed = tiny.draw(pipe, **extra)
    assert torch.equal(plain, probed)
    for seen, real in zip(probe.seen, probe.real, strict=True):
        assert seen.keys() == real.keys()
        for name, call in seen.items():
            rows = real[name].step.rows.cond
            for got, want in ((call.q, real[name].q), (call.k, real[name].k), (call.v, real[name].v)):
                scale = float(want.abs().max())
                torch.testing.assert_close(got, want[rows], rtol=1e-3, atol=1e-4 * scale)
            assert call.step.rows.cond == slice(0, call.q.shape[0]) and call.step.rows.uncond is None
            assert call.grid == real[name].grid and call.text == real[name].text


def test_gradient_equals_a_full_forward_written_by_hand():
    pipe = tiny.sd1()
    probe = Probe("up_blocks.0.*attn2")
    with attach(pipe, probe):
        tiny.draw(pipe, steps=1)
    step = probe.seen[0]["up_blocks.0.attentions.1.transformer_blocks.0.attn2"].step
    arguments = step.arguments
    leaf = step.latents.detach().requires_grad_()
    kept: dict[str, Any] = {}
    handles = []
    for name in probe.seen[0]:
        attn = pipe.unet.get_submodule(name)
        for part in ("to_q", "to_k"):

            def keep(module, inputs, output, key=(name, part)):
                kept[key] = output

            handles.append(getattr(attn, part).register_forward_hook(keep))
    with torch.enable_grad():
        pipe.unet(leaf, step.timestep, arguments["encoder_hidden_states"][1:])
        loss = 0
        for name in probe.seen[0]:
            heads = pipe.unet.get_submodule(name).heads
            q, k = (kept[name, part].unflatten(-1, (heads, -1)).transpose(1, 2) for part in ("to_q", "to_k"))
            loss = loss + ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)[..., 1:4] ** 2).sum()
        (want,) = torch.autograd.grad(loss, leaf)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(probe.gradients[0], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_gradient_of_a_batch_equals_single_ones(family):
    prompts = ["a cat and a dog", "a red dog", "a blue cat"]
    pipe = tiny.FAMILIES[family]()
    batch = Probe(("cross", "joint"))
    with attach(pipe, batch):
        tiny.draw(pipe, prompts, steps=1)
    for i, prompt in enumerate(prompts):
        single = Probe(("cross", "joint"))
        with attach(pipe, single):
            tiny.draw(pipe, prompt, seed=i, steps=1)
        want = single.gradients[0]
        torch.testing.assert_close(
            batch.gradients[0][i : i + 1], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()), msg=f"image {i}"
        )


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("images", [[1], [2, 0]])
def test_some_images_alone_have_the_gradient_they_have_among_all(family, images):
    prompts = ["a cat and a dog", "a red dog", "a blue cat"]
    pipe = tiny.FAMILIES[family]()
    every, some = Probe(("cross", "joint")), Probe(("cross", "joint"), images=images)
    with attach(pipe, every, some):
        tiny.draw(pipe, prompts, steps=1)
    want = every.gradients[0][images]
    torch.testing.assert_close(some.gradients[0], want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
    assert all(call.q.shape[0] == len(images) == call.step.rows.total for call in some.seen[0].values())


@pytest.mark.parametrize("setting", ["controlnet", "ip_adapter", "inpaint", "euler", "true_guidance", "several"])
def test_some_images_of_a_pipeline_with_company(setting):
    pipe, extra = SETTINGS[setting]()
    pictures = {name: value for name, value in extra.items() if name in ("image", "mask_image")}
    extra |= {"prompt": ["a cat and a dog", "a red dog"], "num_images_per_prompt": 1}
    extra |= {name: torch.cat([value, value.flip(-1)]) for name, value in pictures.items()}
    if "negative_prompt" in extra:
        extra["negative_prompt"] = ["blue", "red"]
    every, some = Probe(("cross", "joint")), Probe(("cross", "joint"), images=[1])
    with attach(pipe, every, some):
        tiny.draw(pipe, **extra)
    for got, want in zip(some.gradients, every.gradients, strict=True):
        torch.testing.assert_close(got, want[1:], rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_forward_stops_after_the_last_watched_site(family):
    pipe = tiny.FAMILIES[family]()
    names = [site.name for site in attach_sites(pipe)]
    ran: list[str] = []
    handles = [
        pipe_module.register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
        for name, pipe_module in ((name, tiny.denoiser(pipe).get_submodule(name)) for name in names)
    ]
    middle = names[len(names) // 2]
    with attach(pipe, Probe(watch=middle)):
        tiny.draw(pipe, steps=1)
    for handle in handles:
        handle.remove()
    position = names.index(middle)
    assert ran == names[: position + 1] + names


def attach_sites(pipe):
    from attnctl import sites

    return sites(pipe)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_is_read_is_what_is_drawn(family, checkpoint):
    """Controls that change attention act in the probe too, wherever they are listed."""
    pipe = tiny.FAMILIES[family]()
    alone, first, last = (Probe(checkpoint=checkpoint) for _ in range(3))
    for probe, controls in ((alone, [alone]), (first, [first, Bias(strength=9.0)]), (last, [Bias(strength=9.0), last])):
        with attach(pipe, *controls):
            tiny.draw(pipe, steps=1, **({} if family == "flux" else {"guidance_scale": 1.0}))
        for name, call in probe.seen[0].items():
            assert close(call.q, probe.real[0][name].q, 1e-4)
    assert torch.equal(first.gradients[0], last.gradients[0])
    assert differs(first.gradients[0], alone.gradients[0])
    assert all(call.bias is not None for call in first.seen[0].values() if call.site.kind != "self")


def test_a_control_that_does_not_proceed_is_seen_past():
    class Values(Identity):
        def attend(self, call, proceed):
            return call.v if call.v.shape == call.q.shape else proceed(call)

    pipe = tiny.flux()
    probe = Probe()
    with attach(pipe, Values(), probe):
        tiny.draw(pipe, steps=1)
    assert len(probe.seen[0]) == 4


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_ask_for_gradients_exactly_as_before(fails):
    pipe = tiny.sd1()
    for i, parameter in enumerate(pipe.unet.parameters()):
        parameter.requires_grad_(i % 3 == 0)
    before = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    inside = []

    class Look(Identity):
        def before_denoise(self, step):
            def see(call):
                inside.extend(parameter.requires_grad for parameter in pipe.unet.parameters())
                if fails:
                    raise RuntimeError("mine")

            step.probe(step.latents, {step.run.family.sites(pipe.unet)[3]: see})

    with attach(pipe, Look()):
        if fails:
            with pytest.raises(RuntimeError, match="mine"):
                tiny.draw(pipe, steps=1)
        else:
            tiny.draw(pipe, steps=1)
    assert inside and not any(inside)
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == before
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())
    tiny.draw(pipe, steps=1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_works_in_inference_mode(family):
    pipe = tiny.FAMILIES[family]()
    outside, inside = Probe(), Probe()
    with attach(pipe, outside):
        tiny.draw(pipe)
    with attach(pipe, inside), torch.inference_mode():
        tiny.draw(pipe)
    for got, want in zip(inside.gradients, outside.gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_works_with_gradient_checkpointing(family):
    pipe = tiny.FAMILIES[family]()
    plain, checkpointed = Probe(), Probe()
    with attach(pipe, plain, Bias()):
        tiny.draw(pipe)
    tiny.denoiser(pipe).enable_gradient_checkpointing()
    with attach(pipe, checkpointed, Bias()):
        tiny.draw(pipe)
    for got, want in zip(checkpointed.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("family", tiny.MODELS)
@pytest.mark.parametrize("last", [None, "middle"])
def test_checkpointing_for_the_probe_alone(family, last):
    """Equal gradients also where the forward stops in the middle of a block that has to run again."""
    pipe = tiny.MODELS[family]()
    names = [site.name for site in attach_sites(pipe) if site.kind in ("cross", "joint")]
    watch = names[: len(names) // 2 + 1] if last else names
    plain, saving = Probe(watch=watch), Probe(watch=watch, checkpoint=True)
    ran: list[int] = []
    block = tiny.denoiser(pipe).get_submodule(names[0])
    handle = block.register_forward_pre_hook(lambda module, args: ran.append(1))
    with attach(pipe, plain):
        tiny.draw(pipe, steps=1)
    once, before = len(ran), [sorted(vars(module)) for module in tiny.denoiser(pipe).modules()]
    with attach(pipe, saving):
        tiny.draw(pipe, steps=1)
    handle.remove()
    assert once == 2 and len(ran) == 2 + 3  # the block ran again
    torch.testing.assert_close(saving.gradients[0], plain.gradients[0])
    assert [sorted(vars(module)) for module in tiny.denoiser(pipe).modules()] == before
    assert not tiny.denoiser(pipe).is_gradient_checkpointing


def test_checkpointing_keeps_the_lora_scale_of_the_forward():
    pipe, extra = lora()
    plain, saving = Probe(("cross",)), Probe(("cross",), checkpoint=True)
    with attach(pipe, plain, saving):
        tiny.draw(pipe, **extra)
    for got, want in zip(saving.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_a_model_without_checkpointing_says_so(monkeypatch):
    pipe = tiny.sd1()
    monkeypatch.setattr(type(pipe.unet), "_supports_gradient_checkpointing", False)
    with attach(pipe, Probe(checkpoint=True)), pytest.raises(ControlError, match="no gradient checkpointing"):
        tiny.draw(pipe)


def test_lora_scale_is_as_before():
    pipe, extra = lora()
    layers = [module for module in pipe.unet.modules() if hasattr(module, "scaling")]
    before = [dict(layer.scaling) for layer in layers]
    with attach(pipe, Probe(watch="mid_block*attn1")):
        tiny.draw(pipe, **extra)
    assert [dict(layer.scaling) for layer in layers] == before


def test_works_with_offloading_hooks():
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.sd1()
    want, got = Probe(watch="mid_block*"), Probe(watch="mid_block*")
    with attach(pipe, want):
        plain = tiny.draw(pipe)
    accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    with attach(pipe, got):
        assert torch.equal(tiny.draw(pipe), plain)
    for one, other in zip(got.gradients, want.gradients, strict=True):
        assert torch.equal(one, other)
    assert hasattr(pipe.unet, "_hf_hook") and torch.equal(tiny.draw(pipe), plain)


def test_works_with_sequential_offloading_hooks():
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.sd1()
    plain = tiny.draw(pipe)
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
    for _ in range(2):  # the stopped forward skipped some hooks: the next must still find its weights
        probe = Probe(watch="mid_block*")
        with attach(pipe, probe):
            assert torch.equal(tiny.draw(pipe), plain)
        assert len(probe.gradients) == 2
    assert torch.equal(tiny.draw(pipe), plain)


def test_step_cache_of_the_pipeline_keeps_its_context():
    """FLUX names its passes for step caches; the probe has a name of its own and gives the old one back."""
    from diffusers import FirstBlockCacheConfig

    pipe = tiny.flux()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    plain = tiny.draw(pipe, steps=3)
    with attach(pipe, Probe(watch="transformer_blocks.0.attn", where="transformer_blocks.0.attn")):
        assert torch.equal(tiny.draw(pipe, steps=3), plain)


def test_half_precision():
    pipe = tiny.sd1().to(torch.bfloat16)
    probe = Probe()
    with attach(pipe, probe):
        tiny.draw(pipe, steps=1)
    assert probe.gradients[0].dtype == torch.bfloat16 and probe.gradients[0].isfinite().all()
    assert {call.q.dtype for call in probe.seen[0].values()} == {torch.bfloat16}


def test_site_nobody_controls_cannot_be_watched():
    class Elsewhere(Identity):
        def before_denoise(self, step):
            step.probe(step.latents, {step.run.family.sites(pipe.unet)[0]: print})

    pipe = tiny.sd1()
    with attach(pipe, Elsewhere("cross")), pytest.raises(ControlError, match=r"cannot watch down_blocks\.0.*attn1"):
        tiny.draw(pipe)


def test_site_the_forward_never_reaches_is_named():
    pipe = tiny.sd3()

    class Skip(Identity):
        def before_denoise(self, step):
            step.arguments["skip_layers"] = [2]
            step.probe(step.latents, {step.run.family.sites(pipe.transformer)[2]: print})

    with attach(pipe, Skip()), pytest.raises(ControlError, match=r"transformer_blocks\.2\.attn.*never reached"):
        tiny.draw(pipe)
