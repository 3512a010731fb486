"""What the judge learns from: scenes, and pictures made of scenes that test its honesty.

Of a thing that is only partly there, at least 78 % count as the thing and at most 52 % do not; in between, where people
would argue too, nothing is drawn.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from attnctl.glyph.scenes import SIDE, Renderer, Scene, Thing, font_path
from attnctl.glyph.words import ANIMALS, COLOURS

THERE, GONE = 0.78, 0.52
Floats = NDArray[np.float32]

KINDS = {
    "scene": 0.40, "hidden": 0.12, "leaked": 0.10, "twice": 0.07, "ghost": 0.04, "pale": 0.03,
    "cut": 0.10, "blend": 0.05, "faded": 0.06, "smeared": 0.02, "noise": 0.02, "blank": 0.02, "stranger": 0.06,
}  # fmt: skip
"""How a picture is made, and the share of such pictures in training."""

NONE = ("blank", "noise", "faded", "smeared", "blend")
"""Kinds that show none of the 24 concepts, whatever they were made of."""


@dataclass(frozen=True, eq=False)
class Example:
    """A picture, (128, 128, 3) in [0, 255], the things that count in it, and the concepts that are there in part."""

    image: Floats
    things: tuple[Thing, ...] = ()
    in_part: frozenset[str] = frozenset()
    kind: str = "scene"


def _soft(mask: NDArray[np.bool_], wider: int = 0) -> Floats:
    """A mask with an edge as soft as a drawing's, (128, 128, 1) in [0, 1]; `wider` by so many pixels."""
    image = Image.fromarray((mask * 255).astype(np.uint8))
    if wider:
        image = image.filter(ImageFilter.MaxFilter(2 * wider + 1))
    edged: Floats = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), np.float32)[..., None] / np.float32(255)
    return edged


_PLANE = np.stack([np.ones((SIDE, SIDE)), *np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]], -1)


def _ground(scene: Scene) -> Floats:
    """The background behind everything: a plane in each channel, fitted where nothing hides it."""
    covered = np.logical_or.reduce([thing.mask for thing in scene.things])
    seen = _soft(covered, 3)[..., 0] == 0
    fit = np.linalg.lstsq(_PLANE[seen][::7], scene.image[seen][::7].astype(float), rcond=None)[0]
    return (_PLANE @ fit).clip(0, 255).astype(np.float32)


def _span(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels, the last two exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _lifted(scene: Scene, longer: int, centre: tuple[int, int]) -> tuple[Floats, NDArray[np.bool_]]:
    """The first thing of `scene`, its longer side scaled and its centre (x, y) moved, but kept inside; and its mask."""
    mask = scene.things[0].mask
    span = _span(mask)
    width, height = span[2] - span[0], span[3] - span[1]
    scale = longer / max(width, height)
    size = max(2, round(width * scale)), max(2, round(height * scale))
    x, y = (min(max(c - s // 2, 1), SIDE - s - 1) for c, s in zip(centre, size, strict=True))
    cut = np.dstack([scene.image, mask * np.uint8(255)])
    patch = Image.fromarray(cut).crop(span).resize(size, Image.Resampling.BICUBIC)
    image, moved = np.zeros((SIDE, SIDE, 3), np.float32), np.zeros((SIDE, SIDE), bool)
    image[y : y + size[1], x : x + size[0]] = np.asarray(patch)[..., :3]
    moved[y : y + size[1], x : x + size[0]] = np.asarray(patch)[..., 3] > 127
    return image, moved


def _over(below: Floats, above: Floats, opacity: Floats | float) -> Floats:
    return below * (1 - opacity) + above * opacity


def jpeg(image: Floats, quality: int) -> Floats:
    """The picture after a round trip through JPEG."""
    file = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file), np.float32)


# Emoji that a fair viewer would call by one of the 24 names.
_ALIKE = set(
    "🐱🐈😸😹😺😻😼😽😾😿🙀🐶🐕🐩🦮🐦🐤🐥🐣🐓🐔🦅🦆🦉🕊🦜🦢🦩🐧🐻🧸🐼🐨🦁🐯🐅🐆🐴🐎🦄🏇🎠🐘🐵🐒🙈🙉🙊🦍🦧🐸🐢🐰🐇🐭🐁🐀🐹🐿"
    "🎒👜👝👛💼🧳🛍🛄🛅👓🕶🥽🤓😎👑🤴👸💺🎈🎀🎁💝🚗🚘🚙🚕🚖🚓🚔🏎🚐🚑🥣🍲🍜🥗🍚🍛🍧🍨🍵🥘🕰🍎🍏🍅🍒🍑🍊"
) | {chr(code) for code in range(0x1F550, 0x1F568)}
_CODES = [*range(0x1F300, 0x1F5FF), *range(0x1F600, 0x1F64F), *range(0x1F680, 0x1F6FC), *range(0x1F90C, 0x1F9FF)]


@cache
def strangers() -> list[Image.Image]:
    """All emoji of the font's pictorial blocks, cropped, but those a fair viewer would call by one of the 24 names."""
    font = ImageFont.truetype(font_path(), 109)
    drawn = []
    for code in _CODES:
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((8, 8), chr(code), font=font, embedded_color=True)
        if chr(code) not in _ALIKE and glyph.getbbox():
            drawn.append(glyph.crop(glyph.getbbox()))
    return drawn


class Easel:
    """Draws examples of each kind. Each is a function of `stream`, kind and seed alone."""

    def __init__(self, stream: int) -> None:
        self.render = Renderer(counts=(0.3, 0.45, 0.25), stream=stream)
        self.stream = stream

    def draw(self, kind: str, seed: int) -> Example:
        """One of `KINDS`; ValueError for any other."""
        if kind not in KINDS:
            raise ValueError(f"no examples of kind {kind!r}, only {', '.join(KINDS)}")
        rng = np.random.default_rng([seed, self.stream, list(KINDS).index(kind)])
        make: Callable[[np.random.Generator], Example | None] = getattr(self, "_" + kind)
        while (example := make(rng)) is None:
            pass
        return replace(example, kind=kind)

    def _some(self, rng: np.random.Generator, count: int | None = None) -> Scene:
        return self.render.scene(int(rng.integers(2**31)), "all", count)

    def _scene(self, rng: np.random.Generator) -> Example:
        scene = self._some(rng)
        return Example(scene.image.astype(np.float32), scene.things)

    def _leaked(self, rng: np.random.Generator) -> Example:
        """Animals that took on a colour, as happens beside coloured objects."""
        example = self._scene(rng)
        image = example.image
        for thing in example.things:
            if thing.concept in ANIMALS:
                luma = image @ np.array([0.299, 0.587, 0.114], np.float32) / 150
                colour = np.array(list(COLOURS.values())[rng.integers(len(COLOURS))], np.float32)
                tinted = (luma[..., None] * colour).clip(0, 255)
                image = _over(image, tinted, _soft(thing.mask) * np.float32(rng.uniform(0.25, 0.65)))
        return replace(example, image=image)

    def _hidden(self, rng: np.random.Generator) -> Example | None:
        """One thing more, in front of the others; of one of them at most 92 % are left, of each at least 70 %."""
        scene, other = self._some(rng, int(rng.integers(1, 3))), self._some(rng, 1)
        front = other.things[0]
        if front.concept in [thing.concept for thing in scene.things]:
            return None
        longer = int(rng.uniform(0.28, 0.55) * SIDE)
        for _ in range(12):
            image, mask = _lifted(other, longer, tuple(rng.integers(0, SIDE, 2)))
            left = [thing.visible * (thing.mask & ~mask).sum() / thing.mask.sum() for thing in scene.things]
            if 0.7 <= min(left) <= 0.92:
                behind = [replace(thing, mask=thing.mask & ~mask) for thing in scene.things]
                things = *behind, replace(front, mask=mask)
                return Example(_over(scene.image.astype(np.float32), image, _soft(mask)), things)
        return None

    def _twice(self, rng: np.random.Generator) -> Example | None:
        """One thing more: mostly of a concept that is there already."""
        scene = self._some(rng, int(rng.integers(1, 3)))
        first = scene.things[0]
        other = self._some(rng, 1)
        if rng.random() < 0.6:
            colour = first.colour if rng.random() < 0.5 else other.things[0].colour
            named = (first.concept, None if first.concept in ANIMALS else colour)
            other = self.render.render([named], int(rng.integers(2**31)))
        extra = other.things[0]
        image, mask = _lifted(other, int(rng.uniform(0.28, 0.5) * SIDE), tuple(rng.integers(0, SIDE, 2)))
        if any((mask & thing.mask).sum() > 0.1 * min(thing.mask.sum(), mask.sum()) for thing in scene.things):
            return None
        things = {thing.concept: replace(thing, mask=thing.mask & ~mask) for thing in scene.things}
        same = things.get(extra.concept)
        if same:
            colour = same.colour if same.colour == extra.colour else None
            things[extra.concept] = replace(same, mask=same.mask | mask, colour=colour)
        else:
            things[extra.concept] = replace(extra, mask=mask)
        return Example(_over(scene.image.astype(np.float32), image, _soft(mask)), tuple(things.values()))

    def _two(self, rng: np.random.Generator) -> tuple[Scene, Thing, Floats, str, Floats, NDArray[np.bool_]] | None:
        """A scene, its first thing, its ground; another concept, its picture and mask at the same place and size."""
        scene, other = self._some(rng, 1 if rng.random() < 0.7 else 2), self._some(rng, 1)
        thing, concept = scene.things[0], other.things[0].concept
        if concept in [one.concept for one in scene.things]:
            return None
        left, top, right, bottom = _span(thing.mask)
        centre = (left + right) // 2, (top + bottom) // 2
        image, mask = _lifted(other, max(right - left, bottom - top), centre)
        return scene, thing, _ground(scene), concept, image, mask

    def _cut(self, rng: np.random.Generator) -> Example | None:
        """A part of one thing, and beyond a straight cut the rest of another one, or nothing."""
        if (two := self._two(rng)) is None:
            return None
        scene, thing, ground, concept, image, mask = two
        left, top, right, bottom = _span(thing.mask)
        along, low, high = (1, left, right) if rng.random() < 0.6 else (0, top, bottom)
        side = np.indices((SIDE, SIDE))[along] < low + (high - low) * rng.uniform(0.3, 0.7)
        if rng.random() < 0.5:
            side = ~side
        alone = rng.random() < 0.2
        kept, added = thing.mask & side, mask & ~side & (not alone)
        parts = {thing.concept: (kept, thing.mask, thing), concept: (added, mask, None)}
        things, in_part = list(scene.things[1:]), set()
        for name, (shown, full, one) in parts.items():
            part = shown.sum() / full.sum()
            if GONE < part < THERE or (part >= THERE and one is None):
                return None
            if part >= THERE and one is not None:
                things.append(replace(one, mask=shown))
            elif part > 0:
                in_part.add(name)
        if any((added & other.mask).sum() > 0.1 * other.mask.sum() for other in scene.things[1:]):
            return None
        others = np.logical_or.reduce([kept, *(other.mask for other in scene.things[1:])])
        hidden = _soft(thing.mask & ~side, 2) * (1 - _soft(others)) * ~side[..., None]
        drawn = _over(_over(scene.image.astype(np.float32), ground, hidden), image, _soft(added))
        return Example(drawn, tuple(things), frozenset(in_part))

    def _mixed(self, rng: np.random.Generator, low: float, high: float) -> tuple[Scene, Floats, str] | None:
        two = self._two(rng)
        if two is None or len(two[0].things) > 1:
            return None
        scene, _, ground, concept, image, mask = two
        other = _over(ground, image, _soft(mask))
        return scene, _over(other, scene.image.astype(np.float32), rng.uniform(low, high)), concept

    def _blend(self, rng: np.random.Generator) -> Example | None:
        """Two things shining through each other: neither counts."""
        if (mixed := self._mixed(rng, 0.36, 0.64)) is None:
            return None
        scene, image, concept = mixed
        return Example(image, in_part=frozenset({scene.things[0].concept, concept}))

    def _ghost(self, rng: np.random.Generator) -> Example | None:
        """A thing with a faint other one in it: the first counts."""
        if (mixed := self._mixed(rng, 0.8, 0.94)) is None:
            return None
        scene, image, concept = mixed
        return Example(image, scene.things, frozenset({concept}))

    def _veil(self, scene: Scene, rng: np.random.Generator) -> Floats:
        return _ground(scene) if rng.random() < 0.6 else self._noise(rng).image

    def _pale(self, rng: np.random.Generator) -> Example:
        """A scene seen through a little fog or noise; its colours are no longer sure."""
        scene = self._some(rng)
        image = _over(self._veil(scene, rng), scene.image.astype(np.float32), rng.uniform(0.75, 0.95))
        return Example(image, tuple(replace(thing, colour=None) for thing in scene.things))

    def _faded(self, rng: np.random.Generator) -> Example:
        """Half-drawn: a scene that is mostly background or noise still."""
        scene = self._some(rng)
        image = _over(self._veil(scene, rng), scene.image.astype(np.float32), rng.uniform(0.03, 0.37))
        return Example(image, in_part=frozenset(thing.concept for thing in scene.things))

    def _smeared(self, rng: np.random.Generator) -> Example:
        """Half-drawn: a scene blurred beyond recognition."""
        scene = self._some(rng)
        longest = max(max(x1 - x0, y1 - y0) for x0, y0, x1, y1 in (thing.box for thing in scene.things)) * SIDE
        blurred = Image.fromarray(scene.image).filter(ImageFilter.GaussianBlur(longest * rng.uniform(0.15, 0.3)))
        return Example(np.asarray(blurred, np.float32), in_part=frozenset(thing.concept for thing in scene.things))

    def _noise(self, rng: np.random.Generator) -> Example:
        cells = int(rng.choice([4, 8, 16, 32, 64, 128]))
        noise = rng.normal(rng.uniform(60, 200, 3), rng.uniform(15, 90), (cells, cells, 3)).clip(0, 255)
        smooth = Image.Resampling.BICUBIC if rng.random() < 0.5 else Image.Resampling.NEAREST
        image = Image.fromarray(noise.astype(np.uint8)).resize((SIDE, SIDE), smooth)
        return Example(np.asarray(image, np.float32))

    def _blank(self, rng: np.random.Generator) -> Example:
        if rng.random() < 0.5:
            return Example(_ground(self._some(rng)))
        ends = rng.uniform(0, 256, (2, 3)) if rng.random() < 0.5 else np.tile(rng.uniform(0, 256, 3), (2, 1))
        fit = np.stack([ends.mean(0), *(ends[1] - ends[0]) * rng.uniform(-0.5, 0.5, (2, 1))])
        return Example((_PLANE @ fit).clip(0, 255).astype(np.float32))

    def _stranger(self, rng: np.random.Generator) -> Example:
        """Emoji of other things, alone or beside one that counts."""
        scene = self._some(rng, 1)
        beside = rng.random() < 0.35
        page = Image.fromarray((scene.image if beside else _ground(scene)).astype(np.uint8))
        free = ~scene.things[0].mask | (not beside)
        for _ in range(int(rng.integers(1, 4))):
            glyph = strangers()[rng.integers(len(strangers()))].rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
            scale = rng.uniform(0.28, 0.5 if beside else 0.85) * SIDE / max(glyph.size)
            glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.BICUBIC)
            x, y = (int(rng.integers(0, SIDE - side)) for side in glyph.size)
            if free[y : y + glyph.height, x : x + glyph.width].all():
                page.paste(glyph, (x, y), glyph)
        return Example(np.asarray(page, np.float32), scene.things if beside else ())
