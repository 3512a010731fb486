"""Compositions of the glyph world: a background with one thing at the left, an object to be put at the right.

An object is a concept of the world, or an emoji that the model has never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from attnctl.glyph import scenes
from attnctl.pipelines.compose import Composition

Named = tuple[str, str | None]
SIDE, LONGER, MIDDLE = 128, 46, (96, 64)  # of the picture; the object's longer side and its middle (x, y)

PAIRS: tuple[tuple[Named, Named], ...] = (  # thing of the background, object; a new object is (emoji, word)
    (("cat", None), ("car", "red")), (("dog", None), ("balloon", "blue")), (("bear", None), ("clock", "yellow")),
    (("elephant", None), ("backpack", "green")), (("lion", None), ("crown", "purple")),
    (("rabbit", None), ("apple", "red")), (("frog", None), ("chair", "brown")), (("bench", "gray"), ("cat", None)),
    (("cat", None), ("🍕", "pizza")), (("dog", None), ("🚀", "rocket")), (("bird", None), ("🍄", "mushroom")),
    (("car", "green"), ("🌵", "cactus")),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Case:
    """A composition and what is known of it.

    Attributes:
        thing, object: of the background, and what is put in.
        known: the object is a concept of the world, which the judge can see.
        asked: the composition.
    """

    thing: Named
    object: Named
    known: bool
    asked: Composition


def case(number: int, seed: int = 0) -> Case:
    """One of `PAIRS`, drawn with a seed."""
    thing, (concept, colour) = PAIRS[number]
    known, renderer = concept in scenes.CONCEPTS, scenes.Renderer()
    first = 5000 + 997 * number + 100_000 * seed
    drawn = (renderer.render([thing], first + i) for i in range(5000))
    scene = next(one for one in drawn if one.things[0].box[2] < 0.53)
    picture = scenes.sprite(concept, colour) if known else emoji(concept)
    scale = LONGER / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    left, top = MIDDLE[0] - width // 2, MIDDLE[1] - height // 2
    if known:
        prompt, words = scenes.caption([thing, (concept, colour)], "and"), " ".join(filter(None, [colour, concept]))
    else:
        prompt, words = f"{scenes.caption([thing])} and a {colour}", str(colour)
    asked = Composition(
        background=Image.fromarray(scene.image),
        thing=picture,
        box=(left, top, left + width, top + height),
        prompt=prompt,
        words=words,
        others=(scenes.caption([thing]).removeprefix("a "),),
        seed=seed,
    )
    return Case(thing, (concept, colour), known, asked)


def emoji(sign: str) -> Image.Image:
    """A sign of the world's font, cut out."""
    image = Image.new("RGBA", (160, 160))
    font = ImageFont.truetype(scenes.font_path(), 109)
    ImageDraw.Draw(image).text((8, 8), sign, font=font, embedded_color=True)
    return Image.frombytes("RGBa", image.size, image.tobytes()).convert("RGBA").crop(image.getbbox())


def psnr(one: NDArray[np.uint8], other: NDArray[np.uint8], where: NDArray[np.bool_]) -> float:
    """In dB, over the pixels of a mask."""
    gap = np.square(one.astype(np.float64) - other)[where].mean()
    return float(10 * np.log10(255**2 / max(gap, 1e-9)))
