"""Regions: where in the picture, as a box, a mask, a picture or a layer of one; on whatever grid is asked for."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import ControlError
from .files import check_file

WHOLE = (0.0, 0.0, 1.0, 1.0)
"""The box of all the picture."""


class Region:
    """A part of the picture.

    Args:
        what: one of
            - a box (left, top, right, bottom): shares of the picture if none is above 1, pixels otherwise, which may
              not end beyond the picture;
            - a picture with an alpha channel: the alpha counts, so a painted layer is what was painted;
            - any other picture: its brightness counts, white is inside;
            - a picture in a file, by its path; or as text, see `written`;
            - a numpy array or tensor: (height, width), bool, 0-255 in uint8 or floats in [0, 1]; or
              (height, width, channels), read as a picture. Bytes that are all 0 or 1 are taken as bools.

    Attributes:
        file: the path, if it was read from a file.

    Raises:
        ControlError: it is none of these, or empty.
    """

    def __init__(self, what: Any) -> None:
        self.box: tuple[float, float, float, float] | None = None
        self.mask: Tensor | None = None
        self.file: str | None = None
        if isinstance(what, (str, Path)):
            check_file(what)
            if not str(what).startswith(_DATA):
                self.file = str(what)
            what = _opened(str(what))
        if isinstance(what, Region):
            self.box, self.mask, self.file = what.box, what.mask, what.file
        elif isinstance(what, (Image.Image, np.ndarray, Tensor)):
            self.mask = _mask(what)
            if not self.mask.any():
                raise ControlError(f"an empty region: a {type(what).__name__} without anything in it")
        else:
            self.box = _box(what)

    def on(
        self, grid: tuple[int, int], picture: tuple[int, int], view: tuple[float, float, float, float] = WHOLE
    ) -> Tensor:
        """How much of each cell lies inside, exact by area.

        Args:
            grid: (height, width) in cells.
            picture: (height, width) in pixels, for boxes in pixels.
            view: (left, top, right, bottom) of what the grid shows, in shares of the picture.

        Returns:
            (height, width) float32 in [0, 1].

        Raises:
            ControlError: a box in pixels does not lie in the picture.
        """
        if self.mask is not None:
            seen = ((view[1], view[3]), (view[0], view[2]))
            rows, columns = (_shares(*one) for one in zip(grid, self.mask.shape, seen, strict=True))
            return (rows @ self.mask @ columns.T).clamp(0, 1)
        assert self.box is not None
        left, top, right, bottom = self.box
        if max(self.box) > 1:
            height, width = picture
            if left >= width or top >= height:
                raise ControlError(f"box {self.box} lies outside of the picture, which is {width} x {height}")
            if right > width or bottom > height:
                raise ControlError(f"box {self.box} ends beyond the picture, which is {width} x {height} pixels")
            left, right, top, bottom = left / width, right / width, top / height, bottom / height
        left, right = ((side - view[0]) / (view[2] - view[0]) for side in (left, right))
        top, bottom = ((side - view[1]) / (view[3] - view[1]) for side in (top, bottom))
        down, across = _inside(grid[0], top, bottom), _inside(grid[1], left, right)
        return torch.outer(down, across)

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
    if max(right, bottom) > 1 and any(0 < side < 1 for side in (left, top, right, bottom)):
        raise ControlError(f"a box is in shares of the picture or in pixels, not in both as {what!r} is")
    return left, top, right, bottom


def named_regions(masks: Any) -> tuple[tuple[str, Region], ...]:
    """Regions by phrase, a dict or pairs of a phrase and anything a `Region` is made of, as pairs.

    Raises:
        ControlError: they are none, or a phrase is named twice.
    """
    pairs = masks.items() if isinstance(masks, Mapping) else masks
    try:
        found = tuple((phrase, Region(what)) for phrase, what in pairs)
    except (TypeError, ValueError) as error:
        if isinstance(error, ControlError):
            raise
        raise ControlError(f"masks are pairs (phrase, region) or a dict of them, not {masks!r}") from None
    if len({phrase for phrase, _ in found}) != len(found) or any(not isinstance(phrase, str) for phrase, _ in found):
        raise ControlError("masks name each phrase once")
    return found


_DATA = "data:image/png;base64,"
_LONGEST = 500_000  # characters of a mask as text: a PNG keeps no more than a million beside its picture


def written(what: str) -> str:
    """A mask file as text that says the same when the file is gone: a grey PNG as a data URI.

    Raises:
        ControlError: it is no picture, or too detailed to be kept as text.
    """
    mask = Region(what).mask
    assert mask is not None
    file = BytesIO()
    Image.fromarray((mask * 255).round().byte().numpy()).save(file, "PNG", optimize=True)
    text = _DATA + b64encode(file.getvalue()).decode()
    if len(text) > _LONGEST:
        raise ControlError(f"the mask {what} is too detailed for a recipe to hold: make it smaller, or black and white")
    return text


def _opened(text: str) -> Image.Image:
    """The picture in a file, or in a data URI."""
    name = "in a text" if text.startswith(_DATA) else text
    try:
        inside = b64decode(text.removeprefix(_DATA), validate=True) if text.startswith(_DATA) else None
        with Image.open(Path(text).expanduser() if inside is None else BytesIO(inside)) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is not a whole picture"
        raise ControlError(f"cannot read the picture {name} of a region: {reason}") from None


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
    mask = array.float() / 255 if array.dtype == torch.uint8 and array.max() > 1 else array.float()
    if not (mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1):
        raise ControlError("a mask holds bools, 0 to 255 in uint8, or numbers from 0 to 1")
    return mask


def _inside(cells: int, start: float, stop: float) -> Tensor:
    """How much of each of `cells` equal parts of [0, 1] lies in [start, stop], (cells,)."""
    edges = torch.linspace(0, 1, cells + 1, dtype=torch.float64)
    length = edges[1:].clamp(max=stop) - edges[:-1].clamp(min=start)
    return (length.clamp_min(0) * cells).clamp_max(1).float()


def _shares(cells: int, size: int, seen: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """(cells, size): how much of each cell each of `size` rows covers, where the cells span `seen` of all rows."""
    coarse = torch.linspace(*seen, cells + 1, dtype=torch.float64)
    fine = torch.linspace(0, 1, size + 1, dtype=torch.float64)
    common = torch.minimum(coarse[1:, None], fine[1:]) - torch.maximum(coarse[:-1, None], fine[:-1])
    return (common.clamp_min(0) * cells / (seen[1] - seen[0])).float()
