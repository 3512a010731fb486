"""Regions and isolation: what is closed, that nothing is ever empty, and what they do beside other controls."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import tiny
import torch
from contract_table import close, differs
from PIL import Image
from toys import Spy

from attnctl import attach
from attnctl.areas import on_grid
from attnctl.engine.control import Control
from attnctl.errors import ControlError, NoSiteError, PhraseError
from attnctl.processors import Isolation, Perturb, Regions, Segregation, TokenMaps
from attnctl.processors.regions import constrained, isolated
from attnctl.regions import Region

LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
FAMILIES = tuple(tiny.FAMILIES)


def share_outside(maps, left):
    """The share of each image's map that lies in the other half."""
    middle = maps.shape[-1] // 2
    outside = maps[..., middle + 1 :] if left else maps[..., : middle - 1]
    return outside.sum((-2, -1)) / maps.sum((-2, -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_phrases_are_attended_to_in_their_regions_only(family):
    pipe = tiny.FAMILIES[family]()
    with attach(pipe, Regions({"cat": LEFT, "dog": RIGHT}), TokenMaps("cat", "dog", "and")) as run:
        tiny.draw(pipe, ["a cat and a dog", "a red dog and a blue cat"])
    assert (share_outside(run.maps["cat"], left=True) < 0.02).all()
    assert (share_outside(run.maps["dog"], left=False) < 0.02).all()
    assert (share_outside(run.maps["and"], left=True) > 0.2).all()  # other words stay open everywhere


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_prompts_of_a_batch_use_the_phrases_they_have(family):
    pipe = tiny.FAMILIES[family]()
    control = Regions({"cat": LEFT, "dog": RIGHT})
    with attach(pipe, control):
        batch = tiny.draw(pipe, ["a cat", "a dog and a cat"])
    for image, (prompt, masks) in enumerate(
        (("a cat", {"cat": LEFT}), ("a dog and a cat", {"cat": LEFT, "dog": RIGHT}))
    ):
        with attach(pipe, Regions(masks)):
            assert close(batch[image : image + 1], tiny.draw(pipe, prompt, seed=image), 2e-3)


def test_no_region_vanishes_and_no_row_is_empty():
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        height, width = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(2))
        boxes = []
        for _ in range(3):
            x, y = (torch.rand(2, generator=generator).sort().values for _ in range(2))
            boxes.append((float(x[0]) * 0.99, float(y[0]) * 0.99, float(x[1]) * 0.99 + 0.01, float(y[1]) * 0.99 + 0.01))
        masks = torch.stack([on_grid(Region(box), (height, width), (8 * height, 8 * width)).flatten() for box in boxes])
        assert masks.any(1).all()
        bias = constrained(masks, [[1], [2, 3], [3]], 6, 1.0)
        assert bias.isfinite().any(1).all() and not bias.isnan().any()
        assert isolated(masks).any(1).all() and isolated(masks).diagonal().all()


def test_bias_is_what_the_docstring_says():
    masks = torch.tensor([[True, True, False, False], [False, True, True, False]])
    bias = constrained(masks, [[1], [2, 3]], 5, inside=2.0)
    inf = -math.inf
    want = [[0, 2, inf, inf, 0], [0, 2, 2, 2, 0], [0, inf, 2, 2, 0], [0, inf, inf, inf, 0]]
    assert torch.equal(bias, torch.tensor(want, dtype=torch.float32))
    shared = constrained(masks, [[1], [1]], 2, inside=0.0)  # a token of two phrases is open in both regions
    assert shared[:, 1].tolist() == [0, 0, 0, inf]


def test_isolated_cells_see_their_own_region_and_what_is_free():
    masks = torch.tensor([[True, False, False, True], [False, True, False, True]])
    may = isolated(masks).int().tolist()
    assert may == [[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_isolated_regions_do_not_see_each_other(family):
    """What is drawn on the right does not depend on the values on the left, at the site itself."""
    pipe = tiny.FAMILIES[family]()
    seen = {}

    class Look(Control):
        def sites(self, available):
            return tuple(site for site in available if site.kind in ("self", "joint"))[:1]

        def attend(self, call, proceed):
            image = call.image
            probabilities = (call.q @ call.k.mT * call.q.shape[-1] ** -0.5 + call.bias).softmax(-1)
            height, width = call.grid
            seen["map"] = probabilities[:, :, image, image].unflatten(2, (height, width)).unflatten(4, (height, width))
            return proceed(call)

    with attach(pipe, Isolation({"one": LEFT, "other": RIGHT}, window=(0, 1)), Look()):
        tiny.draw(pipe, steps=1)
    middle = seen["map"].shape[3] // 2
    assert float(seen["map"][:, :, :, :middle, :, middle:].max()) == 0.0
    assert float(seen["map"][:, :, :, :middle, :, :middle].min()) > 0.0


@dataclass(frozen=True, eq=False)
class Read(Control):
    """What the weak pass of a perturbation gets as bias."""

    biases: list = field(default_factory=list)

    def sites(self, available):
        return tuple(site for site in available if site.kind == "joint")

    def attend(self, call, proceed):
        self.biases.append((call.step.pass_name, call.bias))
        return proceed(call)


def test_beside_perturbation_and_a_gradient():
    pipe = tiny.sd3()
    regions, read = Regions({"cat": LEFT}), Read()
    drawn = []
    for controls in (
        [regions],
        [regions, Perturb("1")],
        [regions, Perturb("1"), Segregation("cat", "dog", relative=0.1)],
    ):
        with attach(pipe, *controls, read):
            drawn.append(tiny.draw(pipe))
    assert differs(drawn[0], drawn[1]) and differs(drawn[1], drawn[2])
    assert {name for name, _ in read.biases} == {"main", "perturb", "probe", "look-ahead"}
    assert all(bias is not None for _, bias in read.biases)


def test_window_and_strength():
    pipe = tiny.sd1()
    plain = tiny.draw(pipe, steps=4)
    drawn = []
    for settings in ({}, {"window": (0, 0.3)}, {"strength": 0.5}):
        with attach(pipe, Regions({"cat": LEFT}, inside=5.0, **settings)):
            drawn.append(tiny.draw(pipe, steps=4))
    assert differs(drawn[0], drawn[1]) and differs(drawn[0], drawn[2]) and all(differs(one, plain) for one in drawn)


@pytest.mark.parametrize("size", [(32, 64), (72, 40)])
def test_sizes_and_painted_masks(size):
    """A mask as a picture, at sizes whose grids halve unevenly."""
    pipe = tiny.sd1()
    mask = Image.new("L", (30, 20))
    mask.paste(255, (0, 0, 15, 20))
    with attach(pipe, Regions({"cat": mask}), TokenMaps("cat")) as run:
        tiny.draw(pipe, size=size)
    with attach(pipe, Regions({"cat": LEFT}), TokenMaps("cat")) as other:
        tiny.draw(pipe, size=size)
    assert torch.equal(run.maps["cat"], other.maps["cat"])
    assert float(share_outside(run.maps["cat"], left=True)) < 0.05


def test_biases_are_made_once_for_a_shape():
    pipe = tiny.sd1()
    control = Regions({"cat": LEFT})
    with attach(pipe, control, Spy()) as run:
        tiny.draw(pipe, steps=4)
        assert len(run.run.state(control).made) == 2  # two grids


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Regions({}), "at least one region"),
        (lambda: Regions({"cat": 5}), "a region is a box"),
        (lambda: Regions([("cat", LEFT), ("cat", RIGHT)]), "each phrase once"),
        (lambda: Regions({"cat": LEFT}, strength=2), "strength is from 0 to 1"),
        (lambda: Regions({"cat": LEFT}, inside=-1), "inside from 0"),
        (lambda: Regions({"cat": LEFT}, window=(1, 0)), "window is"),
        (lambda: Isolation({"cat": LEFT}), "two or more"),
    ],
)
def test_refused(make, said):
    with pytest.raises(ControlError, match=said):
        make()


def test_refused_at_the_pipeline():
    pipe = tiny.sd1()
    with pytest.raises(NoSiteError, match="cross or joint"):
        attach(pipe, Regions({"cat": LEFT}, where="self"))
    for masks, said in (({"bird": LEFT}, "bird"), ({"cat": LEFT, "bird": RIGHT}, "bird")):
        with pytest.raises(PhraseError, match=said), attach(pipe, Regions(masks)):
            tiny.draw(pipe)
    with pytest.raises(ControlError, match="outside of the picture"), attach(pipe, Regions({"cat": (500, 0, 600, 50)})):
        tiny.draw(pipe)
