"""Perturbation guidance: its maths against materialised maps, against diffusers' own pipelines, and what is refused."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar

import diffusers
import pytest
import tiny
import torch
from contract_table import close, differs
from predictions import weak_prediction
from toys import Guide, Output, Push, Spy

from attnctl import attach
from attnctl.engine.control import Control, Lane
from attnctl.errors import AttnctlWarning, ControlError, NoSiteError
from attnctl.processors import Pag, Perturb, Seg, Segregation, Slg, TokenMaps, Tpg

FAMILIES = tuple(tiny.FAMILIES)
HEADS = {"sd1": "2:1 4", "sdxl": "2:1 4", "sd3": "1:1 2", "sd35": "1:1 2 transformer_blocks.1.attn2:0", "flux": "1:1 2"}
GUIDED = {"flux": {"true_cfg_scale": 2.0, "negative_prompt": "blue"}}


# --- the maths, by maps that are really made --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Materialised(Control):
    """The same perturbation, in the most literal way: from the whole map of every head."""

    like: Perturb

    lane: ClassVar[Lane] = Lane.PROBS

    def sites(self, available):
        return self.like.sites(available)

    def attend(self, call, proceed):
        like, picked = self.like, self.like._picked(tuple(call.step.passes.target.sites.values()))[0]
        heads = list(picked[call.site])
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        q = call.q.double()
        logits = q @ call.k.double().mT * scale
        if call.bias is not None:
            logits = logits + call.bias.double()
        probabilities = logits.softmax(-1)
        rows, keys = logits.shape[-2:]
        image = torch.zeros(rows, dtype=torch.bool)
        image[call.image] = True
        joint = call.site.kind == "joint"
        if like.kind == "identity" and joint and like.scope == "image-masked":
            inner = image[:, None] & image[None] & ~torch.eye(rows, dtype=torch.bool)
            weak = logits.masked_fill(inner, -math.inf).softmax(-1)
        elif like.kind == "identity" and joint and like.scope == "image-diagonal":
            weak = probabilities.clone()
            mass = probabilities[..., image].sum(-1)
            weak[..., image[:, None] & image[None]] = 0
            weak += torch.diag_embed(mass * image)
        elif like.kind == "identity":
            weak = torch.eye(rows).double().expand_as(probabilities)
        elif like.kind == "uniform":
            weak = torch.full_like(probabilities, 1 / keys)
        elif like.kind == "temperature":
            weak = (logits / like.tau).softmax(-1)
        else:  # blur
            mean = q.mean(2, keepdim=True) if like.scope == "whole" else q[:, :, image].mean(2, keepdim=True)
            blurred = q.clone()
            blurred[:, :, image] = mean
            if like.scope == "whole":
                blurred[:] = mean
            weak = (blurred @ call.k.double().mT * scale).softmax(-1)
        mixed = torch.lerp(probabilities, weak, like.u)
        if joint and like.scope != "whole":
            mixed[:, :, ~image] = probabilities[:, :, ~image]
        probabilities[:, heads] = mixed[:, heads]
        return (probabilities @ call.v.double()).to(call.q)


IDENTITIES = [
    Perturb(u=u, scope=scope) for u in (0.3, 1.0) for scope in ("whole", "image", "image-masked", "image-diagonal")
]
OTHERS = [
    Perturb(u=u, scope=scope, kind=kind) for u in (0.3, 1.0) for scope in ("whole", "image")
    for kind in ("uniform", "blur", "temperature")
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("control", IDENTITIES + OTHERS, ids=lambda c: f"{c.kind}-{c.scope}-{c.u}")
def test_weak_prediction_is_that_of_the_edited_map(family, control):
    control = replace(control, heads=HEADS[family])
    pipe = tiny.FAMILIES[family]().to(torch.float64)
    got = weak_prediction(pipe, control)
    with attach(pipe, Materialised(control)):
        want = weak_prediction(pipe, None)
        plain = weak_prediction(tiny.FAMILIES[family]().to(torch.float64), None)
    assert float((got - want).abs().max()) <= 1e-6 < 1e-4 < float((got - plain).abs().max())


@pytest.mark.parametrize("sigma", [0.6, 2.0, 9.0])
def test_blur_against_a_sum_over_reflected_neighbours(sigma):
    from attnctl.processors.perturbed_attention import blurred

    height, width = 5, 8
    q = torch.randn(2, 3, height * width, 4, generator=torch.Generator().manual_seed(0))

    def axis(side):
        size = min(math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2, side + 1 - side % 2)
        matrix = torch.zeros(side, side)
        for place in range(side):
            for offset in range(-(size // 2), size // 2 + 1):
                at = place + offset
                at = -at if at < 0 else 2 * (side - 1) - at if at >= side else at
                matrix[place, at] += math.exp(-0.5 * (offset / sigma) ** 2)
        return matrix / matrix.sum(1, keepdim=True)

    grid = q.unflatten(2, (height, width))
    want = torch.einsum("yi,xj,bhijc->bhyxc", axis(height), axis(width), grid).flatten(2, 3)
    assert torch.allclose(blurred(q, (height, width), sigma), want, atol=1e-5)


def test_blur_without_end_is_the_mean_and_a_wide_one_comes_close():
    from attnctl.processors.perturbed_attention import blurred

    q = torch.randn(1, 1, 12, 2)
    assert torch.allclose(blurred(q, (3, 4), math.inf), q.mean(2, keepdim=True).expand_as(q))


# --- against diffusers ------------------------------------------------------------------------------------------------


def parts_of(pipe):
    return {name: it for name, it in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}


@pytest.mark.parametrize("adaptive", [0.0, 0.005])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_pag_of_diffusers_on_a_unet(adaptive, guidance):
    theirs = tiny.quiet(
        diffusers.StableDiffusionPAGPipeline(
            **parts_of(tiny.sd1()),
            image_encoder=None,
            feature_extractor=None,
            requires_safety_checker=False,
            pag_applied_layers=["mid"],
        )  # fmt: skip
    )
    settings = {"steps": 10, "guidance_scale": guidance}
    want = tiny.draw(theirs, pag_scale=3.0, pag_adaptive_scale=adaptive, **settings)
    pipe = tiny.sd1()
    with attach(pipe, Pag(adaptive=adaptive)):
        got = tiny.draw(pipe, **settings)
    assert close(got, want, 1e-4) and differs(got, tiny.draw(pipe, **settings))


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_pag_of_diffusers_on_sd3(guidance):
    theirs = tiny.quiet(
        diffusers.StableDiffusion3PAGPipeline(**parts_of(tiny.sd3()), pag_applied_layers=["blocks.1", "blocks.2"])
    )
    want = tiny.draw(theirs, steps=10, pag_scale=3.0, guidance_scale=guidance)
    pipe = tiny.sd3()
    with attach(pipe, Pag("1-2")):
        got = tiny.draw(pipe, steps=10, guidance_scale=guidance)
    assert close(got, want, 1e-4) and differs(got, tiny.draw(pipe, steps=10, guidance_scale=guidance))


@pytest.mark.parametrize("family", ["sd3", "sd35"])
def test_skipped_layers_of_diffusers(family):
    pipe = tiny.FAMILIES[family]()
    theirs = {
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.05,
        "skip_layer_guidance_stop": 0.55,
        "skip_layer_guidance_scale": 2.8,
    }
    want = tiny.draw(pipe, steps=10, **theirs)
    with attach(pipe, Slg("1", window=(0.05, 0.55))):
        got = tiny.draw(pipe, steps=10)
        beside = tiny.draw(pipe, steps=10, **theirs)  # its third call must not count our term again
    assert close(got, want, 1e-4) and differs(got, tiny.draw(pipe, steps=10))
    with attach(pipe, Slg("1", window=(0.05, 0.55), scale=5.6)):
        assert close(tiny.draw(pipe, steps=10), beside, 1e-4)


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guided", [True, False], ids=["cfg", "nocfg"])
def test_term_passes_through_guidance_at_any_scale(family, guided):
    """One step: what the scheduler is given differs from the plain prediction by scale (c - p), whatever CFG does."""
    pipe = tiny.FAMILIES[family]()
    base = {"true_cfg_scale": 3.0, "negative_prompt": "blue"} if family == "flux" else {"guidance_scale": 4.0}
    settings = base if guided else {} if family == "flux" else {"guidance_scale": 1.0}
    control = Perturb(HEADS[family], u=0.5, scale=2.0)
    weak = weak_prediction(pipe, control, **settings)
    strong = weak_prediction(pipe, None, **settings)
    with attach(pipe, control):
        got = stepped_with(pipe, settings)
    plain = stepped_with(pipe, settings)
    torch.testing.assert_close(got - plain, 2.0 * (strong - weak), rtol=1e-3, atol=1e-5)


def stepped_with(pipe, settings):
    """The prediction that the scheduler is given at the first of two steps."""
    taken, original = [], pipe.scheduler.step
    pipe.scheduler.step = lambda prediction, *args, **kwargs: (
        taken.append(prediction) or original(prediction, *args, **kwargs)
    )
    try:
        pipe.scheduler.step.__wrapped__ = original
        tiny.draw(pipe, steps=2, **settings)
    finally:
        del pipe.scheduler.step
    return taken[0]


def test_order_of_controls_does_not_matter():
    """A term is made of what the denoiser said, not of what other controls made of it; two perturbations add up."""
    pipe = tiny.sd1()
    one, two = Perturb("2", u=0.5), Perturb("4:1", kind="uniform")
    results = []
    for controls in ([one, two, Guide()], [Guide(), two, one]):
        with attach(pipe, *controls) as run:
            results.append(tiny.draw(pipe))
        assert set(run.run.passes) == {"main", "perturb", "perturb 2"}
    assert close(*results, 1e-5)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_edits_of_other_controls_reach_the_weak_pass(family):
    """What the others do to attention and latents is the same in both passes; so is the order they are listed in."""
    pipe = tiny.FAMILIES[family]()
    names: list[str] = []
    spy = Spy(look=lambda call: names.append(call.step.pass_name))
    latents = []

    class Look(Control):
        def after_denoise(self, step, output):
            latents.append(step.latents)

    handle = tiny.denoiser(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: latents.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with attach(pipe, Perturb("1"), Push(), spy, Look()):
        tiny.draw(pipe, steps=1, guidance_scale=1.0)
    handle.remove()
    assert list(dict.fromkeys(names)) == ["main", "perturb"]
    assert torch.equal(latents[0], latents[1])


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_maps_are_those_of_the_main_pass(family):
    pipe = tiny.FAMILIES[family]()
    with attach(pipe, TokenMaps("cat")) as run:
        tiny.draw(pipe, steps=1)
        want = run.maps["cat"]
    with attach(pipe, TokenMaps("cat"), Perturb("0")) as run:
        tiny.draw(pipe, steps=1)
        assert torch.equal(run.maps["cat"], want)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_beside_segregation(family):
    pipe = tiny.FAMILIES[family]()
    drawn = []
    for controls in ([Perturb("1")], [Segregation("cat", "dog", relative=0.1)]):
        with attach(pipe, *controls):
            drawn.append(tiny.draw(pipe))
    with attach(pipe, Perturb("1"), Segregation("cat", "dog", relative=0.1)) as run:
        both = tiny.draw(pipe)
    assert differs(both, drawn[0]) and differs(both, drawn[1])
    assert len(run.report.traces) == 2 and run.report.to_dict()["passes"]["main"] == 4


def test_window_costs_nothing_outside():
    pipe = tiny.sd1()
    with attach(pipe, Perturb("2", window=(0, 0.5))) as run:
        half = tiny.draw(pipe, steps=4)
        assert run.run.passes == {"main": 8.0, "perturb": pytest.approx(2 * 3 / 5)}
    with attach(pipe, Perturb("2")):
        assert differs(tiny.draw(pipe, steps=4), half)


def test_adaptive_scale_falls_to_nothing_and_then_costs_nothing():
    pipe = tiny.sd1()
    with attach(pipe, Perturb("2", adaptive=0.008)) as run:
        tiny.draw(pipe, steps=4)  # timesteps 751, 501, 251, 1
    assert run.run.passes["perturb"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("mode", ["full", "partial"])
def test_rescaled_term(mode):
    pipe, settings = tiny.sd1(), {"guidance_scale": 4.0 if mode == "full" else 1.0}
    control = Perturb("2", scale=20.0, rescale=1.0, rescale_mode=mode)
    strong, weak = (weak_prediction(pipe, one, **settings) for one in (None, replace(control, rescale=0.0)))
    with attach(pipe, control):
        got = stepped_with(pipe, settings) - stepped_with_plain(settings)
    base = stepped_with_plain(settings)
    ratio = strong.std() / (base + 20.0 * (strong - weak)).std()
    torch.testing.assert_close(got, 20.0 * (strong - weak) * ratio, rtol=1e-3, atol=1e-4)


def stepped_with_plain(settings):
    return stepped_with(tiny.sd1(), settings)


def test_candidates_are_drawn_as_each_would_be_alone():
    for make in (tiny.sd1, tiny.sd3, tiny.flux):
        pipe = make()
        sets, us = ("1:0", "2", "1:1 2:0"), (0.5, 1.0, 0.25)
        with attach(pipe, Perturb(candidates=sets, u=us)):
            batch = tiny.draw(pipe, [tiny.TEXT] * 3)
        for image, (heads, u) in enumerate(zip(sets, us, strict=True)):
            with attach(pipe, Perturb(heads, u=u)):
                assert close(batch[image : image + 1], tiny.draw(pipe, seed=image), 2e-3)


def test_shuffle_is_new_at_each_block_and_step_and_the_same_again():
    pipe = tiny.sd3()
    drawn = []
    for seed in (0, 0, 1):
        with attach(pipe, Tpg("0-1", seed=seed)):
            drawn.append(tiny.draw(pipe))
    assert torch.equal(drawn[0], drawn[1]) and differs(drawn[0], drawn[2])


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"u": 0}, "u = 0 breaks nothing"),
        ({"u": 1.1}, "u is a number from 0 to 1"),
        ({"u": ()}, "u is a number from 0 to 1"),
        ({"u": math.nan}, "u is a number from 0 to 1"),
        ({"scale": -1}, "scale is a number from 0"),
        ({"scale": math.inf}, "scale is a number from 0"),
        ({"kind": "blurry"}, "kind is one of identity, uniform"),
        ({"scope": "text"}, "scope is one of whole, image"),
        ({"kind": "blur", "scope": "image-masked"}, "is for kind 'identity'"),
        ({"kind": "skip", "u": 0.5}, "takes whole blocks"),
        ({"kind": "shuffle", "candidates": ("1", "2")}, "takes whole blocks"),
        ({"sigma": 0}, "sigma is a number above 0"),
        ({"tau": math.inf}, "tau is finite"),
        ({"rescale": 2}, "rescale is a number from 0 to 1"),
        ({"window": (0.5, 0.5)}, "window is"),
        ({"candidates": "7:3"}, "candidates are sets of heads"),
        ({"candidates": 1}, "candidates are sets of heads"),
        ({"seed": 0.5}, "seed is a whole number"),
    ],
)
def test_settings_out_of_range(settings, said):
    with pytest.raises(ControlError, match=said):
        Perturb(**settings)


def test_heads_that_are_not_there():
    for heads, said in (("7:3", "no such block"), ("2:9", "heads 0 to 1"), ("*.attn2", "cross-attention has no heads")):
        with pytest.raises(NoSiteError, match=said):
            attach(tiny.sd1(), Perturb(heads))
    with pytest.raises(ControlError, match="takes whole blocks; '2:1' names heads"):
        attach(tiny.sd1(), Slg("2:1"))


def refused(said, control, make=tiny.sd1, prompt=tiny.TEXT, **settings):
    pipe = make()
    with pytest.raises(ControlError, match=said), attach(pipe, control):
        tiny.draw(pipe, prompt, **settings)


def test_refused_at_the_pipeline_call():
    refused("window .* holds none of the 2 steps", Perturb("2", window=(0.1, 0.4)))
    refused("2 candidates do not fit 1 images", Perturb(candidates=("1", "2")))
    refused("1 candidates do not fit 2 images", Perturb(candidates=("1",)), prompt=["a cat", "a dog"])
    refused("2 values of u do not fit 1 images", Perturb("1", u=(0.5, 1.0)))
    refused("down to 0 at every step", Perturb("1", adaptive=1.0, scale=0.01))
    refused("which lie from 0.00 to 0.50", Perturb("2", window=(0.6, 0.9)))
    refused("is not finite; try a smaller scale", Perturb("1", scale=1e6), make=half, steps=6)


def half():
    return tiny.sd1().to(torch.float16)


def test_a_scale_that_ruins_the_picture_is_not_blamed_on_the_heads():
    pipe = tiny.sd1()
    site = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1

    def saturate(*args):
        torch.nn.init.zeros_(site.to_out[0].weight)
        return {}

    with pytest.raises(ControlError, match="at step 1: .* try a smaller scale"), attach(pipe, Pag()):
        tiny.draw(pipe, callback_on_step_end=saturate)


def test_in_two_calls_rescaling_is_partial():
    pipe = tiny.flux()
    drawn = []
    for mode in ("full", "partial"):
        with attach(pipe, Perturb("1", rescale=0.5, rescale_mode=mode, scale=20.0)):
            drawn.append(tiny.draw(pipe, true_cfg_scale=2.0, negative_prompt="blue"))
    assert torch.equal(*drawn)


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    one = Perturb(np.int64(1), u=np.float32(0.5), scale=np.float64(2), seed=np.int64(1))
    pipe = tiny.sd1()
    with attach(pipe, one):
        drawn = tiny.draw(pipe)
    with attach(pipe, Perturb(1, u=0.5, scale=2.0)):
        assert torch.equal(tiny.draw(pipe), drawn)


def test_effect_is_that_of_the_broken_images():
    pipe = tiny.sd1()
    found = []
    for u, prompt in ((1.0, tiny.TEXT), ((1.0, 0.0), [tiny.TEXT] * 2)):
        with attach(pipe, Perturb("1", u=u)) as run:
            tiny.draw(pipe, prompt)
        found.append(run.report.traces[0][1].effect)
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_every_short_name_works_on_every_family_as_written():
    for make in tiny.FAMILIES.values():
        pipe = make()
        for control in (Perturb(), Pag(), Seg(), Tpg()):
            attach(pipe, control).release()


@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 1.0}], ids=["cfg", "nocfg"])
def test_heads_that_change_nothing_are_an_error(settings):
    pipe = tiny.sd1()
    site = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    torch.nn.init.zeros_(site.to_out[0].weight)
    with pytest.raises(ControlError, match="Pag changes nothing at step 0: .* heads 2 broken"), attach(pipe, Pag()):
        tiny.draw(pipe, **settings)


def test_heads_that_hardly_change_anything_are_told():
    pipe = tiny.sd1()
    site = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    site.to_out[0].weight.data *= 0.01
    said = r"Pag hardly does anything: breaking heads 2 moves the prediction by 0\.0"
    with pytest.warns(AttnctlWarning, match=said), attach(pipe, Pag()):
        pipe(tiny.TEXT, num_inference_steps=1, height=32, width=48, output_type="latent")


def test_an_image_that_is_left_out_on_purpose_is_no_error():
    pipe = tiny.sd1()
    with attach(pipe, Perturb("2", u=(0.0, 1.0))):
        drawn = tiny.draw(pipe, [tiny.TEXT] * 2, guidance_scale=1.0)
    assert close(drawn[:1], tiny.draw(pipe, guidance_scale=1.0), 1e-4)


def test_report_says_what_was_spent_and_what_it_did():
    pipe = tiny.sd3()
    with attach(pipe, Perturb("1:1", u=0.5)) as run:
        tiny.draw(pipe, steps=3)
    report = run.report
    assert report.passes == {"main": 6.0, "perturb": pytest.approx(3 * 2 / 3)}
    (trace,) = report.to_dict()["traces"]
    assert trace["control"] == "Perturb" and trace["heads"] == ["1:1"] and len(trace["effects"]) == 3
    assert 0 < trace["effect"] < 1
    assert "heads 1:1, effect" in str(report) and "2.0 perturb" in str(report)


def test_short_names_are_perturbations_with_the_defaults_of_their_papers():
    assert (Pag("3").kind, Pag().u, Pag().scale, Pag().heads) == ("identity", 1.0, 3.0, "mid")
    assert (Seg().kind, Seg().sigma) == ("blur", math.inf)
    assert (Slg().kind, Slg().heads, Slg().scale, Slg().window) == ("skip", "7-9", 2.8, (0.01, 0.2))
    assert (Tpg().kind, Tpg().heads) == ("shuffle", "mid")
    assert str(Perturb(scale=0.0)) and "did not act" in report_of(Perturb("1", scale=0.0))


def report_of(control):
    pipe = tiny.sd1()
    with attach(pipe, control) as run:
        tiny.draw(pipe)
    return str(run.report)


def test_no_warning_where_all_is_well():
    pipe = tiny.sd1()
    with warnings.catch_warnings(), attach(pipe, Output(strength=0.0), Pag()):
        warnings.simplefilter("error", AttnctlWarning)
        pipe(tiny.TEXT, num_inference_steps=1, height=32, width=48, output_type="latent")


# --- in words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("perturb(heads=7:3 12:9, u=0.5, scale=3)", Perturb("7:3 12:9", u=0.5, scale=3.0)),
        ("perturb(7:3)", Perturb("7:3")),
        ("perturb(heads=[7:3, 12:9])", Perturb(("7:3", "12:9"))),
        ("perturb(heads='7:3, 12:9')", Perturb("7:3, 12:9")),
        ("perturb(heads=7, kind=blur, sigma=inf, scope=image)", Perturb(7, kind="blur", scope="image")),
        ("perturb(candidates=[7:3, 12:9 8:1], u=[0.5, 1])", Perturb(candidates=("7:3", "12:9 8:1"), u=(0.5, 1.0))),
        ("slg(7-9, window=[0, 0.5])", Slg("7-9", window=(0.0, 0.5))),
        ("pag(up)", Pag("up")),
    ],
)
def test_written_as_text(text, want):
    from attnctl.app.cli import known_controls
    from attnctl.app.control_text import parse_control

    assert parse_control(text, known_controls()) == want


def test_text_that_is_wrong_says_how_to_write_it():
    from attnctl.app.cli import known_controls
    from attnctl.app.control_text import ControlTextError, parse_control

    for text, said in (
        ("perturb(heads=7:3, 12:9)", "'12:9' stands after a setting; .* such as heads='a, b'"),
        ("perturb(heads=7:3, kind=identiy)", "takes one of identity, uniform"),
        ("perturb(u=0)", "u = 0 breaks nothing"),
        ("perturb(nose=1)", "no setting 'nose'"),
    ):
        with pytest.raises(ControlTextError, match=said):
            parse_control(text, known_controls())
