"""Regions: where in the picture, as a box, a mask, a picture or a layer of one; on whatever grid is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import ControlError


class Region:
    """A part of the picture.

    Args:
        what: one of
            - a box (left, top, right, bottom): shares of the picture if none is above 1, pixels otherwise;
            - a picture with an alpha channel: the alpha counts, so a painted layer is what was painted;
            - any other picture: its brightness counts, white is inside;
            - a numpy array or tensor: (height, width), bool, 0-255 in uint8 or floats in [0, 1]; or
              (height, width, channels), read as a picture.

    Raises:
        ControlError: it is none of these, or empty.
    """

    def __init__(self, what: Any) -> None:
        self.box: tuple[float, float, float, float] | None = None
        self.mask: Tensor | None = None
        if isinstance(what, Region):
            self.box, self.mask = what.box, what.mask
        elif isinstance(what, (Image.Image, np.ndarray, Tensor)):
            self.mask = _mask(what)
            if not self.mask.any():
                raise ControlError(f"an empty region: a {type(what).__name__} without anything in it")
        else:
            self.box = _box(what)

    def on(self, grid: tuple[int, int], picture: tuple[int, int]) -> Tensor:
        """How much of each cell lies inside, exact by area.

        Args:
            grid: (height, width) in cells.
            picture: (height, width) in pixels, for boxes in pixels.

        Returns:
            (height, width) float32 in [0, 1].

        Raises:
            ControlError: a box in pixels lies outside of the picture.
        """
        if self.mask is not None:
            rows, columns = (_shares(cells, size) for cells, size in zip(grid, self.mask.shape, strict=True))
            return (rows @ self.mask @ columns.T).clamp(0, 1)
        assert self.box is not None
        left, top, right, bottom = self.box
        if max(self.box) > 1:
            height, width = picture
            left, right, top, bottom = left / width, right / width, top / height, bottom / height
        down, across = _inside(grid[0], top, bottom), _inside(grid[1], left, right)
        covered = torch.outer(down, across)
        if not covered.any():
            raise ControlError(f"box {self.box} lies outside of the picture, which is {picture[1]} x {picture[0]}")
        return covered

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Region) or self.box != other.box:
            return False
        one, two = self.mask, other.mask
        return one is two or (one is not None and two is not None and torch.equal(one, two))

    def __hash__(self) -> int:
        return hash((self.box, None if self.mask is None else self.mask.shape))

    def __repr__(self) -> str:
        if self.mask is None:
            return f"Region({self.box})"
        return f"Region(mask of {self.mask.shape[1]} x {self.mask.shape[0]})"


def _box(what: Any) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = (float(side) for side in what)
    except (TypeError, ValueError):
        raise ControlError(f"a region is a box (left, top, right, bottom), a mask or a picture; not {what!r}") from None
    if 1 < max(right, bottom) <= 2:
        raise ControlError(
            f"a box in shares of the picture ends at 1, and one in pixels is larger than two; not {what!r}"
        )
    if not (0 <= left < right and 0 <= top < bottom):
        raise ControlError(
            f"a box is (left, top, right, bottom) with 0 <= left < right and 0 <= top < bottom; not {what!r}"
        )
    return left, top, right, bottom


def _mask(what: Any) -> Tensor:
    """(height, width) float32 in [0, 1] on the CPU."""
    if isinstance(what, Image.Image):
        alpha = "A" in what.getbands() or "transparency" in what.info
        plain = what if what.mode == "F" else what.convert("L")  # floats are taken as they are
        what = np.array(what.convert("RGBA").getchannel("A") if alpha else plain)
    try:
        array = torch.as_tensor(what).detach().cpu()
    except (TypeError, ValueError):
        raise ControlError(f"a mask holds numbers, not {what.dtype}") from None
    if array.is_complex():
        raise ControlError("a mask holds numbers from 0 to 1, not complex ones")
    if array.ndim == 3 and array.shape[-1] in (1, 3, 4):
        array = array[..., 3] if array.shape[-1] == 4 else array.float().mean(-1).to(array.dtype)
    if array.ndim != 2 or not array.numel():
        raise ControlError(f"a mask is (height, width) or (height, width, channels), not {tuple(array.shape)}")
    mask = array.float() / 255 if array.dtype == torch.uint8 else array.float()
    if not (mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1):
        raise ControlError("a mask holds bools, 0 to 255 in uint8, or numbers from 0 to 1")
    return mask


def _inside(cells: int, start: float, stop: float) -> Tensor:
    """How much of each of `cells` equal parts of [0, 1] lies in [start, stop], (cells,)."""
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    length = edges[1:].clamp(max=stop) - edges[:-1].clamp(min=start)
    return (length.clamp_min(0) * cells).clamp_max(1).float()


def _shares(cells: int, size: int) -> Tensor:
    """(cells, size): how much of each cell each of `size` rows covers; every row of it sums to 1."""
    coarse, fine = (torch.linspace(0, 1, count + 1, dtype=torch.float64) for count in (cells, size))
    common = torch.minimum(coarse[1:, None], fine[1:]) - torch.maximum(coarse[:-1, None], fine[:-1])
    return (common.clamp_min(0) * cells).float()
