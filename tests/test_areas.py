"""Areas: whatever the boxes and grids, every cell is shared out whole and no region vanishes."""

from __future__ import annotations

import pytest
import torch

from attnctl.areas import shares
from attnctl.processors.couple import coupled, mixed
from attnctl.processors.row_groups import Part, RowGroups
from attnctl.regions import Region

WHOLE = (64, 64)


def random_box(generator):
    x, y = (torch.rand(2, generator=generator).sort().values * 0.98 for _ in range(2))
    return float(x[0]), float(y[0]), float(x[1]) + 0.02, float(y[1]) + 0.02


def test_a_thousand_random_boxes_at_random_sizes():
    """No empty row, no vanished region, no NaN; also with soft edges, a share of the base prompt, and all at once."""
    generator = torch.Generator().manual_seed(0)
    drawn = 0
    while drawn < 1000:
        grid = tuple(int(torch.randint(1, 24, (), generator=generator)) for _ in range(2))
        count = int(torch.randint(1, 7, (), generator=generator))
        drawn += count
        regions = [Region(random_box(generator)) for _ in range(count)]
        feather = float(torch.rand((), generator=generator)) * (drawn % 2)
        part = shares(regions, grid, (8 * grid[0], 8 * grid[1]), feather)
        assert part.shape == (count + 1, grid[0] * grid[1]) and part.isfinite().all() and (part >= 0).all()
        assert torch.allclose(part.sum(0), torch.ones(part.shape[1]), atol=1e-5)
        assert (part[1:] > 0).any(1).all()
        cells, base = part.shape[1], 0.2 if drawn % 3 else 0.0
        for joint in (True, False):  # building proves that no row is without a key
            start = 5 * (count + 1) if joint else 0
            texts = [torch.arange(5 * number, 5 * number + 5) for number in range(count + 1)]
            size = start + cells if joint else None
            groups = coupled(mixed(part, [base] * count), texts, range(1, count + 1), slice(start, start + cells), size)
            RowGroups((Part(None, groups),), start + cells, start + cells if joint else 5 * (count + 1))


def test_the_smaller_region_lies_on_top():
    part = shares([Region((0.25, 0.25, 0.75, 0.75)), Region((0, 0, 1, 1))], (4, 4), WHOLE)
    inner = part[1].view(4, 4)
    assert inner[1:3, 1:3].eq(1).all() and inner.sum() == 4 and part[2].sum() == 12 and not part[0].any()


def test_what_no_region_covers_belongs_to_the_base():
    part = shares([Region((0, 0, 0.5, 1))], (2, 4), WHOLE)
    assert part[0].view(2, 4).tolist() == [[0, 0, 1, 1]] * 2


def test_a_hidden_region_takes_a_cell_and_shares_where_it_must():
    same = [Region((0, 0, 1, 1)), Region((0, 0, 1, 1))]
    part = shares(same, (2, 2), WHOLE)
    assert sorted(part[1:].sum(1).tolist()) == [1, 3]
    assert shares(same, (1, 1), WHOLE)[1:].flatten().tolist() == [0.5, 0.5]
    three = shares([*same, Region((0, 0, 1, 1))], (1, 1), WHOLE)
    assert torch.allclose(three[1:].flatten(), torch.full((3,), 1 / 3))


def test_feather_is_soft_symmetric_and_as_wide_as_asked():
    left = Region((0, 0, 0.5, 1))
    for width in (0.25, 0.5):
        edge = shares([left], (16, 16), WHOLE, width)[1].view(16, 16)
        assert torch.allclose(edge[0], edge[8]) and torch.allclose(edge[0] + edge[0].flip(0), torch.ones(16), atol=1e-5)
        assert (edge[0].diff() <= 1e-6).all()
        soft = int(((edge[0] > 0.1) & (edge[0] < 0.9)).sum())
        assert abs(soft - 1.28 * width * 16) <= 2, soft


@pytest.mark.parametrize("grid", [(5, 3), (1, 7), (33, 20)])
def test_pixels_fractions_and_masks_agree(grid):
    mask = torch.zeros(40, 80)
    mask[:, :20] = 1
    found = [shares([Region(what)], grid, (40, 80)) for what in ((0, 0, 0.25, 1), (0, 0, 20, 40), mask)]
    assert torch.allclose(found[0], found[1]) and torch.allclose(found[0], found[2])
