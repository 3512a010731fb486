"""Couple: each region reads its own prompt, on every family, and the picture is what the prompts alone would give."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import tiny
import torch
from contract_table import close, differs

from attnctl import attach
from attnctl.engine.control import Control
from attnctl.errors import ControlError, NoSiteError, PhraseError
from attnctl.processors import AStar, Couple, Isolation, Perturb, Regions, TokenMaps
from attnctl.processors.couple import encoded

LEFT, RIGHT, ALL = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1)
FAMILIES = tuple(tiny.FAMILIES)
OTHER = "a blue cat"


@pytest.mark.parametrize("negative", [None, "red"])
def test_a_region_of_the_whole_picture_is_its_prompt(negative):
    """Stable Diffusion 1 has nothing but the text rows, so the picture is that of the region's own prompt."""
    pipe = tiny.sd1()
    want = tiny.draw(pipe, OTHER, negative_prompt=negative)
    with attach(pipe, Couple({OTHER: ALL}, negatives={OTHER: negative} if negative else {})):
        assert close(tiny.draw(pipe), want, 1e-4)
    assert differs(tiny.draw(pipe), want)


@pytest.mark.parametrize("family", ["sd3", "sd35", "flux"])
def test_and_so_it_is_at_joint_attention(family):
    """Pooled embeddings stay the base prompt's; the region's rows are those of its prompt without T5's padding."""
    pipe = tiny.FAMILIES[family]()
    kept = {}

    class Peek(Control):
        def begin(self, run):
            kept["rows"] = encoded(run, [OTHER])[0]

    pooled = pipe.encode_prompt(prompt=tiny.TEXT, prompt_2=None, **({} if family == "flux" else {"prompt_3": None}))
    pooled = pooled[1] if family == "flux" else pooled[2]
    settings = {"guidance_scale": 1.0}
    with attach(pipe, Couple({OTHER: ALL}), Peek()):
        got = tiny.draw(pipe, **settings)
    given = {"prompt_embeds": kept["rows"][None], "pooled_prompt_embeds": pooled}
    assert len(kept["rows"]) < (16 if family == "flux" else 77 + 16)
    assert close(got, tiny.draw(pipe, None, **given, **settings), 1e-4)


@dataclass(frozen=True, eq=False)
class Read(Control):
    """The bias at the first joint or cross site, as a control that reads attention is shown it."""

    seen: list = field(default_factory=list)

    def sites(self, available):
        return tuple(site for site in available if site.kind in ("joint", "cross"))[:1]

    def attend(self, call, proceed):
        self.seen.append((call, call.bias))
        return proceed(call)


@pytest.mark.parametrize("family", FAMILIES)
def test_who_sees_whom(family):
    pipe, read = tiny.FAMILIES[family](), Read()
    with attach(pipe, Couple({"a red dog": LEFT, OTHER: RIGHT}), read):
        tiny.draw(pipe, steps=1)
    call, bias = read.seen[-1]
    height, width = call.grid
    rows = call.step.rows
    open_keys = (bias > -1e9).expand(rows.total, -1, -1, -1)[:, 0]
    places = open_keys[:, call.image, call.text].unflatten(1, (height, width))[rows.cond][0]
    left, right = places[:, : width // 2].flatten(0, 1), places[:, width - width // 2 :].flatten(0, 1)
    assert (left == left[0]).all() and (right == right[0]).all() and left.any() and right.any()
    assert not (left[0] & right[0]).any()
    if call.site.kind == "joint":
        assert open_keys[:, call.image, call.image].all()  # the picture sees all of itself
    if rows.uncond is not None:  # without negative prompts the unconditional half reads the picture's own
        other = open_keys[rows.uncond][0][call.image, call.text]
        assert (other == other[0]).all() and not (other[0] & (left[0] | right[0])).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_window_base_feather_and_where(family):
    pipe = tiny.FAMILIES[family]()
    masks = {"a red dog": LEFT, OTHER: RIGHT}
    plain = tiny.draw(pipe, steps=4)
    drawn = [plain]
    for settings in (
        {},
        {"base": 0.4},
        {"base": (0.0, 1.0)},
        {"feather": 0.4},
        {"window": (0, 0.5)},
        {"where": [0, 1]},
    ):
        with attach(pipe, Couple(masks, **settings)):
            drawn.append(tiny.draw(pipe, steps=4))
    for number, one in enumerate(drawn):
        assert all(not torch.equal(one, other) for other in drawn[:number])
    with attach(pipe, Couple(masks, base=1.0)):
        assert torch.equal(tiny.draw(pipe, steps=4), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_prompts(family):
    pipe = tiny.FAMILIES[family]()
    settings = {"true_cfg_scale": 2.0, "negative_prompt": "and"} if family == "flux" else {}
    drawn = []
    for negatives in ({}, {OTHER: "red"}, {OTHER: "red", "a red dog": "blue"}):
        with attach(pipe, Couple({"a red dog": LEFT, OTHER: RIGHT}, negatives=negatives)):
            drawn.append(tiny.draw(pipe, **settings))
    assert differs(drawn[0], drawn[1]) and differs(drawn[1], drawn[2])


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_beside_other_controls(family):
    """Regions, isolation, a gradient, a perturbation and maps, all at once; maps of the base prompt stay out."""
    pipe = tiny.FAMILIES[family]()
    couple = Couple({OTHER: RIGHT})
    others = (
        Regions({"dog": LEFT}), Isolation({"one": LEFT, "other": RIGHT}), AStar("cat", "dog", updates=1, relative=0.1)
    )  # fmt: skip
    with attach(pipe, couple, *others, Perturb("1", scale=3.0), TokenMaps("cat")) as run:
        drawn = tiny.draw(pipe)
    with attach(pipe, *others, Perturb("1", scale=3.0)):
        assert differs(tiny.draw(pipe), drawn)
    maps = run.maps["cat"][0]
    middle = maps.shape[-1] // 2
    assert drawn.isfinite().all()
    assert maps[:, middle + 1 :].sum() < 0.02 * maps.sum()


def test_maps_do_not_change_the_picture():
    pipe = tiny.flux()
    with attach(pipe, Couple({OTHER: RIGHT})):
        alone = tiny.draw(pipe)
    with attach(pipe, Couple({OTHER: RIGHT}), TokenMaps("cat")):
        assert torch.equal(tiny.draw(pipe), alone)


@pytest.mark.parametrize("control", [Couple({OTHER: RIGHT}), Regions({"cat": LEFT})])
def test_masks_of_image_prompts_that_flux_would_ignore_are_refused(control):
    pipe = tiny.flux()
    with pytest.raises(ControlError, match="FLUX ignores ip_adapter_masks"), attach(pipe, control):
        tiny.draw(pipe, joint_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 32, 48)]})


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Couple({}), "at least one region"),
        (lambda: Couple({"cat": 5}), "a region is a box"),
        (lambda: Couple({" ": LEFT}), "a prompt of its own"),
        (lambda: Couple({"cat": LEFT}, base=2), "base and feather"),
        (lambda: Couple({"cat": LEFT}, base=(0.1, 0.2)), "2 numbers for 1 regions"),
        (lambda: Couple({"cat": LEFT}, negatives={"dog": "red"}), "no region's prompt"),
        (lambda: Couple({"cat": LEFT}, window=(1, 0)), "window is"),
    ],
)
def test_refused(make, said):
    with pytest.raises(ControlError, match=said):
        make()


def test_refused_at_the_pipeline():
    pipe = tiny.sd1()
    with pytest.raises(NoSiteError, match="no attention site matches 'self'"):
        attach(pipe, Couple({OTHER: LEFT}, where="self"))
    with (
        pytest.raises(ControlError, match="one Couple at a time"),
        attach(pipe, Couple({OTHER: LEFT}), Couple({OTHER: RIGHT})),
    ):
        tiny.draw(pipe)
    with pytest.raises(PhraseError, match="too long"), attach(pipe, Couple({"cat " * 80: LEFT})):
        tiny.draw(pipe)
