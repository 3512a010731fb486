"""Areas: which region each cell of a grid belongs to, with overlaps resolved and soft edges; none of them vanishes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnctl.regions import WHOLE, Region

Box = tuple[float, float, float, float]

LEAST = 0.02
"""A share of a cell below this counts as none: it would cost a row of attention and show nothing."""


def on_grid(region: Region, grid: tuple[int, int], picture: tuple[int, int], view: Box = WHOLE) -> Tensor:
    """The cells of a grid that belong to a region, (height, width) bool: half of the cell or more lies inside.

    A region that would vanish keeps the cells it covers most. So none is empty but one that lies outside of the view.
    """
    covered = region.on(grid, picture, view)
    inside = covered >= 0.5
    return inside if inside.any() else (covered >= covered.max()) & (covered > 0)


def shares(
    regions: Sequence[Region],
    grid: tuple[int, int],
    picture: tuple[int, int],
    feather: float = 0.0,
    view: Box = WHOLE,
) -> Tensor:
    """How each cell of a grid is shared out, (1 + regions, cells) float32; the first row is what no region covers.

    Overlaps are resolved on the grid: the smaller region lies on top. A region that would vanish under others, or
    between cells, takes the cell it covers most, or shares it where the other would vanish then.

    Args:
        regions: the regions.
        grid: (height, width) in cells.
        picture: (height, width) in pixels, for boxes in pixels.
        feather: width of soft edges, as a share of the grid's shorter side; 0 is none.
        view: (left, top, right, bottom) of what the grid shows, in shares of the picture.

    Returns:
        Non-negative, every column sums to 1, every region has a cell if some of it is in view.
    """
    inside = torch.stack([on_grid(region, grid, picture, view).flatten() for region in regions])
    covered = torch.stack([region.on(grid, picture, view).flatten() for region in regions])
    owner = torch.full((inside.shape[1],), -1)
    for number in sorted(range(len(regions)), key=lambda number: (-float(covered[number].sum()), number)):
        owner[inside[number]] = number
    part = torch.zeros(len(regions) + 1, inside.shape[1])
    part.scatter_(0, owner[None] + 1, 1.0)
    if feather:
        part = _softened(part.unflatten(1, grid), feather * min(grid) / 2).flatten(1)
        part = part * (part >= LEAST)
        part = part / part.sum(0)
    for number in range(1, len(part)):
        if not part[number].any() and covered[number - 1].any():
            _take_cell(part, number, covered[number - 1])
    return part


def _take_cell(part: Tensor, number: int, covered: Tensor) -> None:
    """Give a region that has none the best cell whose owners have others; failing that, a share of the best cell."""
    best = (covered >= covered.max()).nonzero().flatten()
    room = [
        cell for cell in best if all((part[other] > 0).sum() > 1 for other in part[1:, cell].nonzero().flatten() + 1)
    ]
    cell = (room or list(best))[0]
    taken = 1.0 if room else 1.0 / (1 + int((part[:, cell] > 0).sum()))
    part[:, cell] *= 1 - taken
    part[number, cell] = taken


def _softened(part: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of (regions, height, width) along both sides, the border repeated: columns go on to sum to 1."""
    for side in (1, 2):
        places = torch.arange(part.shape[side], dtype=torch.float32)
        reach = int(3 * sigma) + 1
        steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (steps / max(sigma, 1e-6)) ** 2)
        at = (places[:, None] + steps).clamp(0, part.shape[side] - 1).long()  # (places, steps)
        mixing = torch.zeros(len(places), len(places)).scatter_add_(1, at, (kernel / kernel.sum()).expand(at.shape))
        part = part @ mixing.mT if side == 2 else mixing @ part
    return part
