"""Placement: BoxDiff's loss by hand, its gradient, and that maps move into their regions."""

from __future__ import annotations

import pytest
import tiny
import torch

from attnctl import attach
from attnctl.errors import ControlError
from attnctl.processors import Placement, Regions, TokenMaps
from attnctl.processors.placement import edge_gap, highest_mean, placement_parts

LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
MASK = torch.zeros(1, 4, 6, dtype=torch.bool)
MASK[0, 1:3, 2:5] = True


def test_the_parts_by_hand():
    maps = torch.zeros(1, 1, 4, 6)
    maps[0, 0, 1, 2], maps[0, 0, 0, 0], maps[0, 0, 3, 5] = 0.8, 0.6, 0.4
    assert highest_mean(maps, MASK, 1 / 3).item() == pytest.approx(0.4)  # the two highest of six inside: 0.8 and 0
    assert highest_mean(maps, ~MASK, 2 / 18).item() == pytest.approx(0.5)
    assert highest_mean(maps, torch.zeros_like(MASK), 0.5).item() == 0
    # x: outline 0.6 0 0.8 0 0 0.4, wanted 0 0 1 1 1 0, near the edges 1 2 4 5; y: 0.6 0.8 0 0.4, wanted 0 1 1 0, all
    want = (0 + 0.2 + 1 + 0.4) / 4 + (0.6 + 0.2 + 1 + 0.4) / 4
    assert edge_gap(maps, MASK, 1).item() == pytest.approx(want)
    total = placement_parts(maps, MASK, 1 / 3).item()
    assert total == pytest.approx(1 - 0.4 + float(highest_mean(maps, ~MASK, 1 / 3)) + want)


def test_a_map_that_is_the_mask_loses_nothing_and_others_are_drawn_there():
    assert placement_parts(MASK[None].float(), MASK).item() == 0
    maps = torch.full((1, 1, 4, 6), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(placement_parts(maps, MASK, 1.0).sum(), maps)
    assert (gradient[0, 0][MASK[0]] < 0).any() and gradient[0, 0][MASK[0]].sum() < 0
    assert gradient[0, 0][~MASK[0]].sum() > 0


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_maps_move_into_their_regions(family):
    pipe, found = tiny.FAMILIES[family](), []
    masks = {"cat": LEFT, "dog": RIGHT}
    for controls in ([], [Placement(masks=masks, relative=0.3, window=(0, 1))]):
        with attach(pipe, *controls, TokenMaps("cat")) as run:
            tiny.draw(pipe, steps=4)
        maps = run.maps["cat"]
        found.append(float(maps[..., : maps.shape[-1] // 2].sum() / maps.sum()))
    assert found[1] > found[0]


def test_phrases_without_masks_stand_side_by_side():
    assert Placement("cat", "dog") == Placement(masks={"cat": LEFT, "dog": RIGHT})


def test_beside_regions():
    pipe = tiny.sd1()
    with attach(pipe, Regions({"cat": LEFT}), Placement(masks={"cat": LEFT}, relative=0.1)):
        assert tiny.draw(pipe).isfinite().all()


def test_refused():
    for make, said in (
        (lambda: Placement(), "at least one region"),
        (lambda: Placement("bird", masks={"cat": LEFT}), "no region for 'bird'"),
        (lambda: Placement(masks={"cat": LEFT}, share=0), "above 0"),
    ):
        with pytest.raises(ControlError, match=said):
            make()


def test_regions_may_come_first_as_for_the_other_controls():
    boxes = {"cat": (0, 0, 0.5, 1)}
    assert Placement(boxes, share=0.3) == Placement(masks=boxes, share=0.3)
