"""The benchmark of regions: its boxes, its prompts, its judgement, and the peer that mixes latents."""

from __future__ import annotations

import json

import mixing
import numpy as np
import placing
import pytest
import regions_speed
import tiny
import torch

from attnctl.areas import shares
from attnctl.glyph.judge import Reading, Seen
from attnctl.regions import Region


@pytest.mark.parametrize("count", [2, 4])
def test_boxes_are_disjoint_large_and_differ(count):
    seen = set()
    for number in range(40):
        boxes = placing.random_boxes(count, number)
        seen.add(tuple(boxes))
        assert placing.random_boxes(count, number) == boxes
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1 and right - left > 0.3 and bottom - top > 0.3
        cells = torch.stack([Region(box).on((100, 100), (100, 100)) for box in boxes])
        assert float((cells.sum(0) - 1).clamp_min(0).max()) < 1e-5
    assert len(seen) == 40


def test_four_things_in_colours_that_differ():
    for prompt in placing.fours():
        colours = [colour for _, colour in prompt.things if colour]
        assert len({concept for concept, _ in prompt.things}) == 4 and len(set(colours)) == len(colours) == 2


def test_judged():
    mask = torch.zeros(32, 32)
    mask[8:16, 12:20] = 1  # half of it left of the middle
    car = Seen("car", "red", (0.375, 0.25, 0.625, 0.5), 0.9, mask.numpy())
    cat = Seen("cat", None, (0.1, 0.1, 0.4, 0.4), 0.9, mask.numpy())
    found = placing.judged(placing.CASE, placing.CASE_BOXES, Reading((car, cat)))
    assert found["present"] and found["in place"] and found["right"] and found["shares"] == [0.5, 0.5]
    found = placing.judged(placing.CASE, placing.CASE_BOXES, Reading((car,)))
    assert not found["present"] and not found["in place"] and found["shares"] == [0.5]


def test_mixing_with_one_region_of_all_is_plain_drawing():
    pipe = tiny.sd1()
    with torch.no_grad():
        want = pipe("a red dog", num_inference_steps=3, guidance_scale=2.0, generator=torch.Generator().manual_seed(1))
        got = mixing.draw_mixed(pipe, tiny.TEXT, [("a red dog", (0, 0, 1, 1))], [1], 3, 2.0)
    one, other = (np.asarray(image, np.float32) for image in (want.images[0], got[0]))
    assert np.abs(one - other).mean() < 1.5


@pytest.mark.parametrize("count", regions_speed.COUNTS)
def test_regions_of_the_speed_benchmark_leave_a_border(count):
    regions = [region for _, region in regions_speed.couple(count).masks]
    part = shares(regions, (32, 32), (512, 512))
    assert len(regions) == count and part[0].sum() > 0


def test_the_command_draws_judges_and_writes(tmp_path, monkeypatch, capsys):
    """One prompt in two steps, with two conditions."""
    monkeypatch.setattr(placing, "CONDITIONS", {name: placing.CONDITIONS[name] for name in ("plain", "Regions")})
    placing.main(prompts=1, seeds=1, steps=1, threads=1, things=2, out=tmp_path)
    rates = json.loads((tmp_path / "regions.json").read_text())["rates"]
    assert set(rates) == {"plain", "Regions", placing.MIXING} and "the cat and the car" in capsys.readouterr().out
