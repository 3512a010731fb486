"""Pasting: an object cut out of its picture, fitted into a box of another, and the two on one grid of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from attnctl.errors import ControlError
from attnctl.files import check_file
from attnctl.regions import Region

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Fit = Literal["inside", "stretch"]
Floats = NDArray[np.float32]


def opened(what: Any, role: str) -> Image.Image:
    """A picture as it is meant to be seen: from a file (its EXIF rotation applied), PIL, or an array.

    Args:
        what: a path, a PIL picture, or a (height, width, 3 or 4) array of uint8.
        role: what it is for, for messages.

    Raises:
        ControlError: it is no picture.
    """
    picture: Image.Image
    if isinstance(what, (str, Path)):
        check_file(what)
        try:
            with Image.open(Path(what).expanduser()) as file:
                file.load()
                picture = file
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is not a whole picture"
            raise ControlError(f"cannot read the {role} {what}: {reason}") from None
    elif isinstance(what, np.ndarray):
        if what.dtype != np.uint8 or what.ndim != 3 or what.shape[2] not in (3, 4):
            raise ControlError(f"the {role} is a (height, width, 3 or 4) array of uint8, not {what.dtype} {what.shape}")
        picture = Image.fromarray(what)
    elif isinstance(what, Image.Image):
        picture = what
    else:
        raise ControlError(f"the {role} is a picture or the path of one, not {type(what).__name__}")
    picture = ImageOps.exif_transpose(picture)
    has_alpha = "A" in picture.getbands() or "transparency" in picture.info
    return picture.convert("RGBA" if has_alpha else "RGB")


def object_mask(picture: Image.Image, mask: Any) -> Floats:
    """How much of each pixel of a picture belongs to the object, (height, width) in [0, 1].

    Args:
        picture: the object's.
        mask: anything a `Region` is made of; None: the picture's alpha channel.

    Raises:
        ControlError: there is no mask and no alpha, or nothing is in it.
    """
    size = picture.height, picture.width
    if mask is not None:
        if isinstance(mask, (str, Path)):  # a photograph's mask is turned as the photograph is
            mask = opened(mask, "mask")
        region = Region(mask)
        if region.mask is not None and abs(region.mask.shape[1] / region.mask.shape[0] * size[0] / size[1] - 1) > 0.05:
            shape = f"{region.mask.shape[1]} x {region.mask.shape[0]}"
            raise ControlError(f"the mask is {shape}, and the object's picture {size[1]} x {size[0]}: another shape")
        same = region.mask is not None and tuple(region.mask.shape) == size
        found = (region.mask if same and region.mask is not None else region.on(size, size)).numpy()
    elif picture.mode == "RGBA":
        found = np.asarray(picture.getchannel("A"), np.float32) / 255
        if found.min() == 1:
            raise ControlError("the object's alpha channel is opaque everywhere, so it cuts nothing out; give a mask")
    else:
        raise ControlError("the object needs a mask, or a picture with an alpha channel")
    if found.max() < 0.5:
        raise ControlError("the object's mask has nothing in it")
    return np.asarray(found, np.float32)


def box_in(box: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box as shares of a picture.

    Args:
        box: (left, top, right, bottom), shares of the picture or pixels of it.
        size: (width, height) of the picture.

    Raises:
        ControlError: it is no box, or does not lie in the picture.
    """
    region = Region(box)
    if region.box is None:
        raise ControlError("the place of the object is a box (left, top, right, bottom), not a mask")
    left, top, right, bottom = region.box
    region.on((1, 1), (size[1], size[0]))  # raises where a box in pixels is beyond the picture
    if max(region.box) <= 1:
        return left, top, right, bottom
    return left / size[0], top / size[1], right / size[0], bottom / size[1]


@dataclass(frozen=True, eq=False)
class Pasted:
    """A background and an object on one grid of pixels.

    Attributes:
        background, picture, alone: (height, width, 3) uint8: the background, it with the object pasted in, and the
            object on black.
        mask: (height, width) float32 in [0, 1], the object's.
        box: the place it was fitted into, in pixels.
    """

    background: NDArray[np.uint8]
    picture: NDArray[np.uint8]
    alone: NDArray[np.uint8]
    mask: Floats
    box: Box


def paste(
    background: Image.Image,
    thing: Image.Image,
    mask: Floats,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    fit: Fit = "inside",
) -> Pasted:
    """Cut an object out and put it into a box of a background.

    Args:
        background: a picture.
        thing: the object's picture.
        mask: (height, width) of `thing`, see `object_mask`.
        box: shares of the background.
        size: (width, height) of the result; the background is resized to it.
        fit: "inside": the object keeps its shape and lies in the middle of the box; "stretch": it fills the box.

    Raises:
        ControlError: the box has less than two pixels a side.
    """
    ground = np.asarray(background.convert("RGB").resize(size, Image.Resampling.LANCZOS), np.float32)
    left, right = round(box[0] * size[0]), round(box[2] * size[0])
    top, bottom = round(box[1] * size[1]), round(box[3] * size[1])
    if right - left < 2 or bottom - top < 2:
        raise ControlError(
            f"the box {box} is {right - left} x {bottom - top} pixels of {size[0]} x {size[1]}: too small"
        )
    cut, alpha = _cut(thing, mask)
    width, height = right - left, bottom - top
    if fit == "inside":
        scale = min(width / alpha.shape[1], height / alpha.shape[0])
        width, height = max(1, round(alpha.shape[1] * scale)), max(1, round(alpha.shape[0] * scale))
    x, y = left + (right - left - width) // 2, top + (bottom - top - height) // 2
    shown = _resized(alpha, (width, height)).clip(0, 1)
    colours = np.stack([_resized(cut[..., c] * alpha, (width, height)) for c in range(3)], -1)  # premultiplied
    window = slice(y, y + height), slice(x, x + width)
    whole, alone, place = ground.copy(), np.zeros_like(ground), np.zeros(ground.shape[:2], np.float32)
    whole[window] = colours + whole[window] * (1 - shown[..., None])
    alone[window], place[window] = colours, shown
    return Pasted(_bytes(ground), _bytes(whole), _bytes(alone), place, (left, top, right, bottom))


def _cut(thing: Image.Image, mask: Floats) -> tuple[Floats, Floats]:
    """The part of a picture around its object, (height, width, 3), and of its mask."""
    rows, columns = np.flatnonzero((mask > 0.02).any(1)), np.flatnonzero((mask > 0.02).any(0))
    window = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return np.asarray(thing.convert("RGB"), np.float32)[window], mask[window]


def _resized(channel: Floats, size: tuple[int, int]) -> Floats:
    return np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.LANCZOS), np.float32)


def _bytes(pixels: Floats) -> NDArray[np.uint8]:
    return pixels.clip(0, 255).round().astype(np.uint8)
