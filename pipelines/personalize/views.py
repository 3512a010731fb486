"""Views: the one picture, larger or smaller and elsewhere, with what each must say and which part of it is real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from attnctl.pipelines.personalize.settings import Views

LARGE = (0.42, 0.8)  # of a view's side: the longer side of a thing alone


@dataclass(frozen=True)
class View:
    """Where a view takes its picture from, and where it puts it.

    Attributes:
        box: (left, top, right, bottom) of the source, in shares of the picture's side; outside of 0 to 1 its rim is
            repeated.
        place: (left, top, right, bottom) of the target that shows it, in shares; the rest is grey and does not count.
        mirrored: left and right are swapped.
        prefix: what the caption says first, such as "very small ".
    """

    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    place: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    mirrored: bool = False
    prefix: str = ""

    @property
    def numbers(self) -> tuple[float, ...]:
        """Where it takes its picture from and puts it, and 1 if it is mirrored: nine."""
        return (*self.box, *self.place, float(self.mirrored))

    @classmethod
    def of(cls, numbers: Sequence[float]) -> View:
        """From `numbers`."""
        a, b, c, d, left, top, right, bottom, mirrored = numbers
        return cls((a, b, c, d), (left, top, right, bottom), bool(mirrored))

    def picture(self, source: Image.Image, side: int) -> Image.Image:
        """The view of a square picture, (side, side)."""
        return self._shown(source, side, Image.Resampling.BICUBIC, 127)

    def mask(self, source: Image.Image, side: int) -> Image.Image:
        """The view of a mask of the picture."""
        return self._shown(source, side, Image.Resampling.BILINEAR, 0)

    def _shown(self, source: Image.Image, side: int, how: Image.Resampling, ground: int) -> Image.Image:
        width = source.width
        around = max(0.0, -min(self.box), max(self.box) - 1)
        rim = int(np.ceil(around * width))
        wide = source
        if rim:
            array = np.asarray(source)
            wide = Image.fromarray(np.pad(array, [(rim, rim)] * 2 + [(0, 0)] * (array.ndim - 2), mode="edge"))
        left, top, right, bottom = (round(share * side) for share in self.place)
        box = tuple(share * width + rim for share in self.box)
        shown = wide.resize((right - left, bottom - top), how, box=box)  # type: ignore[arg-type]
        if shown.size != (side, side):
            canvas = Image.new(source.mode, (side, side), ground if source.mode == "L" else (ground,) * 3)
            canvas.paste(shown, (left, top))
            shown = canvas
        return ImageOps.mirror(shown) if self.mirrored else shown

    def valid(self, cells: int) -> Tensor:
        """(cells, cells), 1 where the view shows the picture; where grey is around it, less one cell on each side."""
        left, top, right, bottom = (round(share * cells) for share in self.place)
        real = torch.zeros(cells, cells)
        rim = 0 if (left, top, right, bottom) == (0, 0, cells, cells) else 1
        real[top + rim : bottom - rim, left + rim : right - rim] = 1.0
        return real.flip(-1) if self.mirrored else real


def squared(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its longer side `side`, in the middle of a square whose rim repeats its own."""
    rgb = picture.convert("RGB")
    scale = side / max(rgb.size)
    width, height = (max(1, round(length * scale)) for length in rgb.size)
    small = np.asarray(rgb.resize((width, height), Image.Resampling.LANCZOS))
    top, left = (side - height) // 2, (side - width) // 2
    room = ((top, side - height - top), (left, side - width - left), (0, 0))
    return Image.fromarray(np.pad(small, room, mode="edge"))


def make_views(kind: Views, count: int, side: int, rng: np.random.Generator) -> list[View]:
    """So many views, the first of them the picture as it is.

    Args:
        kind: see `Settings.views`.
        count: how many.
        side: of the picture in pixels.
        rng: where the chances come from.
    """
    make = {"ours": _ours, "paper": _paper, "none": lambda side, rng: View()}[kind]
    return [View(), *(make(side, rng) for _ in range(count - 1))]


def views_around(box: tuple[float, float, float, float], count: int, rng: np.random.Generator) -> list[View]:
    """Views in which a thing is as large as models like to draw one alone, wholly inside; half are mirrored.

    Args:
        box: (left, top, right, bottom) of the thing, in shares of the picture's side.
        count: how many.
        rng: where the chances come from.
    """
    left, top, right, bottom = box
    longer, found = max(right - left, bottom - top), []
    for _ in range(count):
        length = longer / rng.uniform(*LARGE)
        x, y = rng.uniform(right - length, left), rng.uniform(bottom - length, top)
        found.append(View((x, y, x + length, y + length), mirrored=bool(rng.random() < 0.5)))
    return found


def box_of(mask: Tensor) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a mask (height, width), in shares of its sides."""
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    height, width = mask.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def painted_out(picture: Image.Image, mask: Tensor) -> Image.Image:
    """The picture with what a mask covers replaced by what is around it, from far to near ever less blurred.

    Args:
        picture: RGB.
        mask: (height, width) bool.
    """
    image = torch.from_numpy(np.array(picture, np.float32)).permute(2, 0, 1)[None]
    known = (~mask)[None, None].float()
    filled = image * known + (1 - known) * (image * known).sum((2, 3), keepdim=True) / known.sum().clamp_min(1)
    width = 2 * (min(mask.shape) // 4) + 1
    while width >= 5:
        pad = (width // 2,) * 4
        weight = F.avg_pool2d(F.pad(known, pad, mode="replicate"), width, 1)
        near = F.avg_pool2d(F.pad(image * known, pad, mode="replicate"), width, 1) / weight.clamp_min(1e-6)
        filled = torch.where((known == 0) & (weight > 0.02), near, filled)
        width = 2 * (width // 4) + 1
    return Image.fromarray(filled[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy())


def _ours(side: int, rng: np.random.Generator) -> View:
    """Seven of ten show all of the picture or more, three a part of 65 to 100 percent; half are mirrored."""
    length = rng.uniform(1.0, 1.5) if rng.random() < 0.7 else rng.uniform(0.65, 1.0)
    left, top = rng.uniform(0, 1, 2) * (1 - length)
    return View((left, top, left + length, top + length), mirrored=bool(rng.random() < 0.5))


def _paper(side: int, rng: np.random.Generator) -> View:
    """Custom Diffusion's: two of three smaller (from a third), one larger (up to 1.4 times)."""
    mirrored = bool(rng.random() < 0.5)
    unit = side / 512
    size = rng.integers(170, 513) * unit if rng.random() < 2 / 3 else rng.integers(614, 716) * unit
    share = size / side
    if share < 0.6:
        left, top = rng.uniform(0, 1, 2) * (1 - share)
        prefix = ("a far away ", "very small ")[rng.integers(2)]
        return View(place=(left, top, left + share, top + share), mirrored=mirrored, prefix=prefix)
    if share <= 1:
        return View(mirrored=mirrored)
    length = 1 / share
    left, top = rng.uniform(0, 1, 2) * (1 - length)
    prefix = ("zoomed in ", "close up ")[rng.integers(2)]
    return View((left, top, left + length, top + length), mirrored=mirrored, prefix=prefix)


def pixels(pictures: list[Image.Image]) -> Tensor:
    """(pictures, 3, height, width), -1 to 1."""
    arrays = np.stack([np.asarray(one.convert("RGB"), np.float32) for one in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1
