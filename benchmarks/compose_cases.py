"""Compositions of the glyph world: a background with one thing at the left, an object to be put at the right.

An object is a concept of the world, or an emoji that the model has never seen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from attnctl.glyph import scenes
from attnctl.pipelines.compositions import Composition

Named = tuple[str, str | None]
SIDE, LONGER, MIDDLE = 128, 46, (96, 64)  # of the picture; the object's longer side and its middle (x, y)


@dataclass(frozen=True)
class Pair:
    """A thing of the background and an object.

    Attributes:
        thing: (concept, colour).
        object: the same; of a new object, (emoji, word).
        covers: the object lies over a part of the thing.
        style: "" as it is; "gray", "sketch" or "flat": the object is drawn in another manner than the world.
    """

    thing: Named
    object: Named
    covers: bool = False
    style: str = ""

    @property
    def kind(self) -> str:
        """Under which heading the object is counted."""
        return "style" if self.style else "known" if self.object[0] in scenes.CONCEPTS else "new"


PAIRS: tuple[Pair, ...] = (
    Pair(("cat", None), ("car", "red")), Pair(("dog", None), ("🚀", "rocket")),
    Pair(("bear", None), ("clock", "yellow"), covers=True), Pair(("rabbit", None), ("chair", None), style="sketch"),
    Pair(("lion", None), ("crown", "purple")), Pair(("bird", None), ("🍄", "mushroom")),
    Pair(("dog", None), ("balloon", "blue")), Pair(("cat", None), ("🍩", "donut"), covers=True),
    Pair(("bench", "gray"), ("cat", None)), Pair(("frog", None), ("apple", None), style="gray"),
    Pair(("cat", None), ("🍕", "pizza")), Pair(("elephant", None), ("backpack", "green")),
    Pair(("rabbit", None), ("apple", "red")), Pair(("frog", None), ("chair", "brown")),
    Pair(("car", "green"), ("🌵", "cactus")), Pair(("turtle", None), ("suitcase", "pink")),
    Pair(("elephant", None), ("balloon", "yellow"), covers=True), Pair(("monkey", None), ("bowl", "orange")),
    Pair(("bird", None), ("suitcase", None), style="flat"), Pair(("horse", None), ("🎸", "guitar")),
    Pair(("lion", None), ("car", "blue"), covers=True), Pair(("mouse", None), ("⛵", "boat")),
    Pair(("bench", "red"), ("clock", None), style="gray"), Pair(("horse", None), ("bow", "red")),
)  # fmt: skip


def composition(pair: Pair, number: int, seed: int = 0) -> Composition:
    """A pair as a composition; the background is a function of the number and the seed."""
    concept, colour = pair.object
    known, renderer = concept in scenes.CONCEPTS, scenes.Renderer()
    first = 5000 + 997 * number + 100_000 * seed
    drawn = (renderer.render([pair.thing], first + i) for i in range(5000))
    scene = next(one for one in drawn if one.things[0].box[2] < 0.53)
    picture = _styled(scenes.sprite(concept, colour) if known else emoji(concept), pair.style)
    scale = LONGER / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    middle = MIDDLE
    if pair.covers:  # a third of it lies over the thing, at its right edge
        _, top, right, bottom = (SIDE * side for side in scene.things[0].box)
        middle = round(right + width / 6), round((top + bottom) / 2)
    left, top = middle[0] - width // 2, max(2, min(middle[1] - height // 2, SIDE - height - 2))
    if known:
        prompt = scenes.caption([pair.thing, (concept, colour)], "and")
        words = " ".join(filter(None, [colour, concept]))
    else:
        prompt, words = f"{scenes.caption([pair.thing])} and a {colour}", str(colour)
    return Composition(
        background=Image.fromarray(scene.image),
        thing=picture,
        box=(left, top, left + width, top + height),
        prompt=prompt,
        words=words,
        others=(scenes.caption([pair.thing]).removeprefix("an ").removeprefix("a "),),
        seed=seed,
    )


def _styled(picture: Image.Image, style: str) -> Image.Image:
    """A cut-out in another manner: without colours, as lines on white, or in a few flat colours."""
    alpha = picture.getchannel("A")
    plain = Image.new("RGB", picture.size, "white")
    plain.paste(picture, mask=alpha)
    if style == "gray":
        plain = plain.convert("L").convert("RGB")
    elif style == "sketch":
        lines = plain.convert("L").filter(ImageFilter.FIND_EDGES)
        plain = ImageOps.invert(lines.point(lambda value: min(255, 3 * value))).convert("RGB")
    elif style == "flat":
        plain = ImageOps.posterize(plain, 1)
    plain.putalpha(alpha)
    return plain if style else picture


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
