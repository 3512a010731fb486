"""The sprites of the glyph world as one tensor, so that scenes can be put together on a GPU, without a font.

python -m attnctl.glyph.train atlas --out atlas.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnctl.errors import AttnctlError
from attnctl.glyph.scenes import sprite_tones
from attnctl.glyph.words import COLOURS, CONCEPTS, OBJECTS, Named

ANGLES = tuple(range(-12, 13))
"""Degrees by which a thing may be turned."""

PAGE = 160
"""Pixels of the square that a sprite lies in."""

THINGS: tuple[Named, ...] = tuple(
    (concept, colour) for concept in CONCEPTS for colour in (None, *(COLOURS if concept in OBJECTS else ()))
)
"""What there is a sprite of, in the order of the atlas: 12 animals, and 12 objects plain and in 11 colours."""


class AtlasError(AttnctlError):
    """A file that holds no atlas."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """Sprites, and how large each is when turned.

    pictures: (156, 4, 160, 160) uint8, premultiplied, centred, with room to be turned.
    tones: (156, 2, 3) RGB in [0, 1], of the outline and of the whole.
    boxes: (156, 25, 4) left, top, right and bottom of what is seen, in [-1, 1], after a turn by each of `ANGLES`.
    """

    pictures: Tensor
    tones: Tensor
    boxes: Tensor

    def to(self, device: str | torch.device) -> Atlas:
        return Atlas(self.pictures.to(device), self.tones.to(device), self.boxes.to(device))

    def save(self, file: Path) -> None:
        save_file({"pictures": self.pictures, "tones": self.tones, "boxes": self.boxes}, file)


def _square(image: Image.Image, side: int = 112) -> Image.Image:
    """The picture in the middle of a square in which it can be turned; its longer side is `side` pixels."""
    scale = side / max(image.size)
    size = round(image.width * scale), round(image.height * scale)
    page = Image.new(image.mode, (PAGE, PAGE))
    page.paste(image.resize(size, Image.Resampling.LANCZOS), ((PAGE - size[0]) // 2, (PAGE - size[1]) // 2))
    return page


def build() -> Atlas:
    """Draws all sprites with the font.

    Raises:
        FileNotFoundError: the font is not installed.
    """
    pictures = np.zeros((len(THINGS), PAGE, PAGE, 4), np.uint8)
    tones = np.zeros((len(THINGS), 2, 3), np.float32)
    boxes = np.zeros((len(THINGS), len(ANGLES), 4), np.float32)
    for k, thing in enumerate(THINGS):
        image, tones[k] = sprite_tones(*thing)
        page = _square(image)
        pictures[k] = np.asarray(page)
        for j, angle in enumerate(ANGLES):
            box = (
                page.rotate(angle, Image.Resampling.BILINEAR).getchannel("a").point(lambda a: 255 * (a > 20)).getbbox()
            )
            boxes[k, j] = np.array(box, np.float32) / (PAGE / 2) - 1
    images = torch.from_numpy(pictures).movedim(-1, 1).contiguous()
    return Atlas(images, torch.from_numpy(tones / 255), torch.from_numpy(boxes))


def read(file: Path) -> Atlas:
    """An atlas that `save` wrote.

    Raises:
        AtlasError: it is none.
    """
    try:
        found = load_file(file)
        atlas = Atlas(found["pictures"], found["tones"], found["boxes"])
    except Exception as error:  # what a reader of tensors raises is not a closed set
        raise AtlasError(f"{file} is no atlas of sprites") from error
    if atlas.boxes.shape != (len(THINGS), len(ANGLES), 4):
        raise AtlasError(f"{file} is an atlas of another world: it has {len(atlas.boxes)} sprites, not {len(THINGS)}")
    return atlas
