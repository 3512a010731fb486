"""Normalized attention guidance: the maths against a loop, on every family, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import tiny
import torch
from contract_table import close, differs, trace

from attnctl import attach
from attnctl.engine.control import Control, Lane
from attnctl.errors import ControlError, NoSiteError, PhraseError
from attnctl.glyph import judge
from attnctl.processors import AStar, Couple, Nag, Perturb, Regions, TokenMaps
from attnctl.processors.couple import encoded
from attnctl.processors.nag import extrapolated, limited, steered

FAMILIES = tuple(tiny.FAMILIES)
AWAY = "a red dog"
PLAIN = {"guidance_scale": 1.0}  # no classifier-free guidance; in FLUX it is distilled, and a setting of the model


# --- the maths --------------------------------------------------------------------------------------------------------


def by_hand(positive, negative, scale, tau, alpha):
    """The published formula, place by place and number by number."""
    out = torch.empty_like(positive)
    for image in range(positive.shape[0]):
        for cell in range(positive.shape[2]):
            plus, minus = positive[image, :, cell].flatten().tolist(), negative[image, :, cell].flatten().tolist()
            far = [scale * a - (scale - 1) * b for a, b in zip(plus, minus, strict=True)]
            r = sum(map(abs, far)) / sum(map(abs, plus))
            mixed = [alpha * z * min(r, tau) / r + (1 - alpha) * a for z, a in zip(far, plus, strict=True)]
            out[image, :, cell] = torch.tensor(mixed).reshape(positive.shape[1], -1)
    return out


@pytest.mark.parametrize("tau", [0.5, 2.5, math.inf])
def test_the_formula(tau):
    torch.manual_seed(0)
    positive, negative = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    negative[0, :, 0] = positive[0, :, 0]  # nothing to be led away from
    got = steered(positive, negative, 4.0, tau, 0.3)
    assert torch.allclose(got, by_hand(positive, negative, 4.0, tau, 0.3), rtol=1e-5, atol=1e-6)


def test_no_place_gets_larger_than_tau():
    torch.manual_seed(0)
    positive, negative = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)

    def size(z):
        return z.abs().sum((1, 3))

    far = extrapolated(positive, negative, 9.0)
    assert (size(far) > 2 * size(positive)).all()
    assert torch.allclose(size(limited(far, positive, 2.0)), 2 * size(positive), rtol=1e-5)
    assert torch.equal(limited(far, positive, 100.0), far)


def test_zeros_and_half_precision_stay_finite():
    zero = torch.zeros(1, 1, 2, 4)
    assert torch.equal(steered(zero, zero, 5.0, math.inf, 0.5), zero)
    assert steered(zero, zero + 1, 5.0, 2.5, 0.5).isfinite().all()
    many = torch.full((1, 24, 1, 128), 30.0, dtype=torch.float16)  # its L1 norm is no number of half precision
    got = steered(many, -many, 3.0, 2.5, 1.0)
    assert got.dtype == torch.float16 and torch.allclose(got.float(), 2.5 * many.float(), rtol=2e-3)


# --- on every family --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_acts_by_each_setting_and_leaves_nothing(family):
    pipe = tiny.FAMILIES[family]()
    plain = tiny.draw(pipe, **PLAIN)
    before = trace(pipe)
    drawn = [plain]
    changes = ({}, {"scale": 9.0}, {"tau": 0.5}, {"alpha": 0.6}, {"window": (0, 0.5)}, {"where": [0, 1]})
    for settings in changes:
        with attach(pipe, Nag(AWAY, **settings)) as run:
            drawn.append(tiny.draw(pipe, **PLAIN))
        ((_, away),) = run.report.traces
        assert away.effect > 0 and len(away.effects) == (1 if "window" in settings else 2)
    for number, one in enumerate(drawn):
        assert all(not torch.equal(one, other) for other in drawn[:number])
    assert trace(pipe) == before and torch.equal(tiny.draw(pipe, **PLAIN), plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"scale": 1.0}, {"alpha": 0.0}])
def test_no_strength_is_the_same_picture_to_the_bit(family, settings):
    pipe = tiny.FAMILIES[family]()
    plain = tiny.draw(pipe, **PLAIN)
    with attach(pipe, Nag(AWAY, **settings)):
        assert torch.equal(tiny.draw(pipe, **PLAIN), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_batch_are_drawn_as_alone(family):
    pipe = tiny.FAMILIES[family]()
    with attach(pipe, Nag(AWAY)):
        both = tiny.draw(pipe, [tiny.TEXT, "a blue cat"], **PLAIN)
        assert close(both[:1], tiny.draw(pipe, **PLAIN))
        assert close(both[1:], tiny.draw(pipe, "a blue cat", seed=1, **PLAIN))


# --- what it is, in full pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ByHand(Control):
    """NAG from maps that are really made, over the keys of each text, with the negative text as rows of its own."""

    like: Nag
    kept: dict = field(default_factory=dict)

    lane: ClassVar[Lane] = Lane.PROBS

    def sites(self, available):
        return tuple(site for site in available if site.kind in ("cross", "joint"))

    def begin(self, run):
        self.kept["rows"] = encoded(run, [self.like.negative])[0]

    def inputs(self, step):
        text, rows = step.arguments["encoder_hidden_states"], self.kept["rows"]
        found = {"encoder_hidden_states": torch.cat([text, rows.expand(len(text), -1, -1)], 1)}
        if "txt_ids" in step.arguments:
            ids = step.arguments["txt_ids"]
            found["txt_ids"] = torch.cat([ids, ids[:1].expand(len(rows), -1)])
        return found

    def attend(self, call, proceed):
        logits = call.q @ call.k.mT * call.q.shape[-1] ** -0.5
        keys = torch.arange(call.k.shape[2])
        negative = (keys >= call.text.stop - len(self.kept["rows"])) & (keys < call.text.stop)
        prompt = (keys >= call.text.start) & (keys < call.text.stop) & ~negative

        def without(closed):
            return logits.masked_fill(closed, -math.inf).softmax(-1) @ call.v

        out, away = without(negative), without(prompt)
        own, image = call.step.rows.cond, call.image
        if call.site.kind == "joint":
            out[:, :, negative] = away[:, :, negative]
        like = self.like
        out[own, :, image] = by_hand(out[own, :, image], away[own, :, image], like.scale, like.tau, like.alpha)
        return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_it_is_the_published_method(family, guidance):
    """With classifier-free guidance, too, whose unconditional half is left alone; FLUX has none of that here."""
    pipe, nag = tiny.FAMILIES[family](), Nag(AWAY)
    with attach(pipe, nag):
        got = tiny.draw(pipe, guidance_scale=guidance)
    with attach(pipe, ByHand(nag)):
        assert close(got, tiny.draw(pipe, guidance_scale=guidance))
    assert differs(got, tiny.draw(pipe, guidance_scale=guidance))


@pytest.mark.parametrize("family", ["sd3", "sd35", "flux"])
def test_who_sees_whom_at_joint_attention(family):
    """At alpha next to nothing the picture is the prompt's: the negative text is seen by nobody."""
    pipe = tiny.FAMILIES[family]()
    plain = tiny.draw(pipe, **PLAIN)
    with attach(pipe, Nag(AWAY, alpha=1e-7)):
        assert close(tiny.draw(pipe, **PLAIN), plain)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_an_unconditional_pass_is_left_alone(family):
    pipe = tiny.FAMILIES[family]()
    settings = {"true_cfg_scale": 2.0, "negative_prompt": "and"} if family == "flux" else {"guidance_scale": 4.0}
    plain = tiny.draw(pipe, **settings)
    with attach(pipe, Nag(AWAY, alpha=1e-7)):
        assert close(tiny.draw(pipe, **settings), plain)
    with attach(pipe, Nag(AWAY)):
        assert differs(tiny.draw(pipe, **settings), plain)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_maps_are_the_prompts_and_change_nothing(family):
    """In either order; all that the picture gives to words goes to words of the prompt, or to the rest of its text."""
    pipe = tiny.FAMILIES[family]()
    with attach(pipe, Nag(AWAY)):
        alone = tiny.draw(pipe, **PLAIN)
    for order in (1, -1):
        with attach(pipe, *(Nag(AWAY, alpha=1e-7), TokenMaps("cat"))[::order]) as run:
            tiny.draw(pipe, **PLAIN)
        maps = run.maps["cat"][0]
        with attach(pipe, TokenMaps("cat")) as run:
            tiny.draw(pipe, **PLAIN)
        if order == 1:
            assert close(maps, run.maps["cat"][0])
        with attach(pipe, *(Nag(AWAY), TokenMaps("cat"))[::order]):
            assert torch.equal(tiny.draw(pipe, **PLAIN), alone)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_beside_other_controls(family):
    """Regions before or after it, and a perturbation; each of the two adds something."""
    pipe = tiny.FAMILIES[family]()
    others = Regions({"dog": (0, 0, 0.5, 1)}, inside=4.0), Perturb("1", scale=3.0)
    with attach(pipe, *others):
        without = tiny.draw(pipe, **PLAIN)
    with attach(pipe, Nag(AWAY)):
        alone = tiny.draw(pipe, **PLAIN)
    with attach(pipe, *others, Nag(AWAY)):
        after = tiny.draw(pipe, **PLAIN)
    with attach(pipe, Nag(AWAY), *others):
        before = tiny.draw(pipe, **PLAIN)
    assert differs(after, without) and differs(after, alone) and differs(before, without) and differs(before, alone)


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_gradients_go_through_it(family):
    pipe, guide = tiny.FAMILIES[family](), AStar("cat", "dog", updates=1, relative=0.1)
    with attach(pipe, guide):
        without = tiny.draw(pipe, **PLAIN)
    with attach(pipe, Nag(AWAY), guide):
        got = tiny.draw(pipe, **PLAIN)
    assert got.isfinite().all() and differs(got, without)


def test_what_the_negative_text_names_is_drawn_less_without_guidance():
    """The trained model, in pictures: the same noises with and without it."""
    pipe, eye = tiny.glyph(), judge.load()
    settings = {"num_inference_steps": 10, "guidance_scale": 1.0, "num_images_per_prompt": 8}

    def cats(*controls):
        with attach(pipe, *controls):
            noise = [torch.Generator().manual_seed(seed) for seed in range(8)]
            pictures = pipe("a car and a cat", generator=noise, **settings).images
        return sum(reading.has("cat") for reading in eye.read(pictures))

    found = cats(), cats(Nag("a cat", scale=9, tau=5, alpha=0.5))
    assert found[1] + 3 <= found[0], found


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.5}, "scale is a number from 1"),
        ({"scale": math.nan}, "scale"),
        ({"alpha": 1.5}, "alpha is a number from 0 to 1"),
        ({"tau": 0}, "tau is a number above 0"),
        ({"window": (0.5, 0.2)}, "window"),
        ({"negative": ["a", "b"]}, "negative is one prompt"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ControlError, match=message):
        Nag(**{"negative": AWAY} | settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_itself_is_refused(family):
    pipe = tiny.FAMILIES[family]()
    with attach(pipe, Nag("a blue cat")):
        with pytest.raises(ControlError, match="is the prompt of image 1"):
            tiny.draw(pipe, [tiny.TEXT, "a blue cat"], **PLAIN)


def test_what_cannot_work_is_refused_by_name():
    pipe = tiny.sd1()
    for controls, error, message in (
        ((Nag(AWAY), Couple({"a blue cat": (0, 0, 0.5, 1)})), ControlError, "no Nag"),
        ((Couple({"a blue cat": (0, 0, 0.5, 1)}), Nag(AWAY)), ControlError, "beside a second one or Couple"),
        ((Nag(AWAY), Nag("blue")), ControlError, "another control adds text"),
        ((Nag(AWAY), Owner()), ControlError, "another control took"),
        ((Nag("cat " * 80),), PhraseError, "too long"),
        ((Nag(AWAY, window=(0.1, 0.2)),), ControlError, "window"),
        ((Nag(AWAY, where="nowhere"),), NoSiteError, "nowhere"),
    ):
        with pytest.raises(error, match=message), attach(pipe, *controls):
            tiny.draw(pipe, **PLAIN)


@pytest.mark.parametrize("make", [tiny.pixart, tiny.chroma])
def test_text_with_a_mask_is_refused(make):
    pipe = make()
    with pytest.raises(ControlError, match="attention_mask"), attach(pipe, Nag(AWAY)):
        tiny.draw(pipe)


def test_a_text_that_moves_nothing_is_an_error():
    """Here no text can: the values of all text are zero."""
    pipe = tiny.sd1()
    for name, weight in pipe.unet.named_parameters():
        if "attn2.to_v" in name:
            weight.data.zero_()
    with pytest.raises(ControlError, match="changes nothing"), attach(pipe, Nag(AWAY)):
        tiny.draw(pipe, **PLAIN)


class Owner(Control):
    """Works attention out by itself."""

    lane = Lane.PROBS

    def sites(self, available):
        return tuple(site for site in available if site.kind == "cross")[:1]

    def attend(self, call, proceed):
        return torch.zeros_like(call.q)
