"""Draws 128 x 128 scenes of the glyph world from the Noto Color Emoji font, with exact ground truth.

The font (Debian package fonts-noto-color-emoji) is needed to draw scenes, that is to train, and not to use what was
trained.
"""

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from attnctl.glyph.words import ANIMALS, COLOURS, CONCEPTS, OBJECTS, WORN, Named, is_held_out, phrase

SIDE = 128
"""Width and height of a scene, in pixels."""

_GLYPHS = {
    "cat": "🐱", "dog": "🐶", "bird": "🐦", "bear": "🐻", "lion": "🦁", "horse": "🐴",
    "elephant": "🐘", "monkey": "🐵", "frog": "🐸", "turtle": "🐢", "rabbit": "🐰", "mouse": "🐭",
    "backpack": "🎒", "glasses": "👓", "crown": "👑", "suitcase": "🧳", "chair": "🪑", "balloon": "🎈",
    "bow": "🎀", "car": "🚗", "bowl": "🥣", "clock": "⏰", "apple": "🍎",
}  # fmt: skip
_FONT_PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
)
_BITMAP_SIZE = 109  # the only size the font has
_SIZES = {1: (0.45, 0.85), 2: (0.35, 0.55), 3: (0.28, 0.40)}  # longer side of a thing, as a part of the scene's
_MARGIN = 2
_LEAST_VISIBLE = 0.7
_ENOUGH_CONTRAST = 90.0  # distance in RGB between a thing's tones and the background

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Thing:
    """One thing as it is seen in a scene.

    `colour` is None for animals and for objects in their natural colours. `box` is (x0, y0, x1, y1) in [0, 1], tight
    around `mask`, which is (128, 128) bool: the pixels this thing covers by more than half, after what lies in front of
    it. `visible` is the part of its pixels that nothing hides, 0.7 to 1.
    """

    concept: str
    colour: str | None
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_]
    visible: float


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, (128, 128, 3) uint8, its caption, and its things in the order of the caption."""

    image: NDArray[np.uint8]
    caption: str
    things: tuple[Thing, ...]


def font_path() -> Path:
    """Where Noto Color Emoji is installed; FileNotFoundError, naming the package to install, if it is not."""
    places = list(_FONT_PLACES)
    if shutil.which("fc-match"):
        query = ["fc-match", "--format=%{file}", "Noto Color Emoji"]
        places.append(subprocess.run(query, check=False, capture_output=True, text=True).stdout)
    for place in map(Path, places):
        if place.name == "NotoColorEmoji.ttf" and place.is_file():
            return place
    raise FileNotFoundError("drawing scenes needs NotoColorEmoji.ttf: apt-get install fonts-noto-color-emoji")


def _bench() -> Image.Image:
    """A park bench, which has no emoji: drawn four times too large, then reduced."""
    image = Image.new("RGBA", (512, 512))
    draw = ImageDraw.Draw(image)
    wood, shade, light, iron = "#b5743c", "#8a5228", "#d39a5f", "#4a3a32"
    for x in (64, 416):
        draw.rounded_rectangle((x, 116, x + 32, 420), 10, fill=iron)  # back posts down to the ground
    for x in (34, 446):
        draw.rounded_rectangle((x, 290, x + 32, 440), 10, fill=iron)  # front legs
    for y in (106, 166, 226):
        draw.rounded_rectangle((20, y, 492, y + 44), 12, fill=wood)
        draw.rounded_rectangle((20, y, 492, y + 12), 6, fill=light)
    draw.polygon([(44, 286), (468, 286), (504, 338), (8, 338)], fill=light)
    draw.line([(28, 312), (484, 312)], fill=shade, width=6)
    draw.rounded_rectangle((6, 334, 506, 368), 10, fill=shade)
    return image.resize((128, 128), Image.Resampling.LANCZOS)


def _natural(concept: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    if concept == "bench":
        image = _bench()
    else:
        image = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(image).text((8, 8), _GLYPHS[concept], font=font, embedded_color=True)
        # Drawn on transparent black, the colours come out premultiplied.
        image = Image.frombytes("RGBa", image.size, image.tobytes()).convert("RGBA")
    return image.crop(image.getbbox())


def _tint(image: Image.Image, colour: str) -> Image.Image:
    """Re-colours by luminance: the median becomes the reference colour, darker parts shade it, lighter ones bleach it.

    A darker rim keeps flat light shapes, a white balloon say, readable.
    """
    pixels = np.asarray(image, np.float32)
    light = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    middle = float(np.clip(np.median(light[pixels[..., 3] > 127]), 0.25, 0.75))
    reference = np.array(COLOURS[colour], np.float32)
    shade = np.clip((middle - light) / middle, 0, 1)[..., None]
    gleam = np.clip((light - middle) / 0.75, 0, 1)[..., None]  # absolute: the white face of a clock takes the colour
    tinted = reference * (1 - (0.3 if colour == "white" else 0.5) * shade)  # white soon turns gray
    tinted += (255 - tinted) * 0.5 * gleam
    depth = np.pad(pixels[..., 3], 12)  # 0 outside, about half of 255 on the outline, 255 well inside
    depth = np.asarray(Image.fromarray(depth.astype(np.uint8)).filter(ImageFilter.GaussianBlur(4)), np.float32)
    tinted *= (0.75 + 0.25 * depth[12:-12, 12:-12] / 255)[..., None]
    return Image.fromarray(np.dstack([tinted, pixels[..., 3]]).astype(np.uint8))


@dataclass(frozen=True, eq=False)
class _Sprite:
    image: Image.Image  # premultiplied, so that resampling draws no fringe
    tones: Floats  # (2, 3), mean RGB along the outline and of the whole


def _sprite(image: Image.Image) -> _Sprite:
    padded = np.pad(np.asarray(image, np.float32), ((3, 3), (3, 3), (0, 0)))
    inside = padded[..., 3] > 127
    core = np.logical_and.reduce([np.roll(inside, shift, axis) for axis in (0, 1) for shift in (-3, 3)])
    tones = np.stack([padded[where][:, :3].mean(0) for where in (inside & ~core, inside)])
    return _Sprite(image.convert("RGBa"), tones)


@cache
def _sprites() -> dict[Named, _Sprite]:
    font = ImageFont.truetype(font_path(), _BITMAP_SIZE)
    sprites: dict[Named, _Sprite] = {}
    for concept in CONCEPTS:
        image = _natural(concept, font)
        sprites[concept, None] = _sprite(image)
        if concept in OBJECTS:
            sprites.update({(concept, colour): _sprite(_tint(image, colour)) for colour in COLOURS})
    return sprites


def sprite(concept: str, colour: str | None = None) -> Image.Image:
    """A thing of the world by itself, cut out by its alpha channel."""
    return _sprites()[concept, colour].image.convert("RGBA")


def sprite_tones(concept: str, colour: str | None = None) -> tuple[Image.Image, Floats]:
    """A thing with premultiplied alpha ("RGBa"), and its tones: (2, 3), RGB of its outline and of the whole."""
    found = _sprites()[concept, colour]
    return found.image, found.tones


_GRID: Floats = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j].astype(np.float32)  # (2, 128, 128), y and x


def _rgb(hsv: NDArray[np.floating]) -> NDArray[np.floating]:
    """(..., 3) hue, saturation and value in [0, 1] (hue wraps) to RGB in [0, 255]."""
    hue, saturation, value = np.moveaxis(hsv, -1, 0)[..., None]
    k = (np.array([5, 3, 1]) + 6 * hue) % 6
    return 255 * value * (1 - saturation * np.minimum(k, 4 - k).clip(0, 1))


def _background(tones: Floats, rng: np.random.Generator) -> Floats:
    """A soft gradient, (128, 128, 3) in [0, 1]: the first of 16 that stands off from all `tones`, else the best."""
    one = rng.uniform((0, 0.04, 0.55), (1, 0.28, 0.97), (16, 3))
    two = one + rng.uniform((-0.15, 0, -0.15), (0.15, 0, 0.15), (16, 3))
    ends = _rgb(np.stack([one, two], 1).clip((-1, 0, 0.5), (2, 1, 1)))  # (16, 2, 3)
    contrast = np.linalg.norm(ends[:, :, None] - tones, axis=-1).min((1, 2))  # (16,)
    best: Floats = ends[contrast.clip(max=_ENOUGH_CONTRAST).argmax()].astype(np.float32) / 255
    angle = rng.uniform(0, 2 * np.pi)
    along: Floats = np.float32(np.sin(angle)) * _GRID[0] + np.float32(np.cos(angle)) * _GRID[1]
    along = (along / along.max() + 1)[..., None] / 2
    return best[0] * (1 - along) + best[1] * along


def _posed(sprite: _Sprite, mirrors: bool, longer: int, rng: np.random.Generator) -> Floats:
    """The sprite turned, perhaps mirrored, and scaled: (h, w, 4) premultiplied in [0, 1] with max(h, w) = `longer`."""
    image = sprite.image.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True)
    mirrored = rng.random() < 0.5  # drawn in any case, so that what follows does not depend on the concept
    if mirrored and mirrors:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.crop(image.getbbox())
    scale = longer / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.float32) / np.float32(255)


def _in_line(shapes: Sequence[tuple[int, int]], axis: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Top left corners (y, x) of things in random order along `axis` (0: one above the other), without overlap."""
    slack = SIDE - 2 * _MARGIN - sum(shape[axis] for shape in shapes)
    gaps = slack * rng.dirichlet(np.ones(len(shapes) + 1))
    corners = [(0, 0)] * len(shapes)
    start = float(_MARGIN)
    for gap, k in zip(gaps, rng.permutation(len(shapes)), strict=False):
        start += gap
        free = SIDE - shapes[k][1 - axis]
        across = np.clip(free / 2 + rng.uniform(-0.2, 0.2) * SIDE, _MARGIN, free - _MARGIN)
        corner = int(start), int(across)
        corners[k] = corner if axis == 0 else corner[::-1]
        start += shapes[k][axis]
    return corners


def _anywhere(shapes: Sequence[tuple[int, int]], rng: np.random.Generator) -> list[tuple[int, int]]:
    return [
        (int(rng.integers(_MARGIN, SIDE - _MARGIN - h + 1)), int(rng.integers(_MARGIN, SIDE - _MARGIN - w + 1)))
        for h, w in shapes
    ]


def _window(patch: Floats, corner: tuple[int, int]) -> tuple[slice, slice]:
    return slice(corner[0], corner[0] + patch.shape[0]), slice(corner[1], corner[1] + patch.shape[1])


def _visible(
    patches: Sequence[Floats], corners: Sequence[tuple[int, int]], order: Iterable[int]
) -> tuple[list[NDArray[np.bool_]], list[float]]:
    """Masks, (128, 128), and visible parts of patches at their corners, `order` telling them front first.

    What they cover of a pixel adds up to at most 1, so that "more than half" makes the masks disjoint.
    """
    clear = np.ones((SIDE, SIDE), np.float32)
    masks, parts = [clear > 1] * len(patches), [0.0] * len(patches)
    for k in order:
        window, alpha = _window(patches[k], corners[k]), patches[k][..., 3]
        masks[k] = np.zeros((SIDE, SIDE), bool)
        masks[k][window] = alpha * clear[window] > 0.5
        parts[k] = float(masks[k].sum() / (alpha > 0.5).sum())
        clear[window] *= 1 - alpha
    return masks, parts


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x0, y0, x1, y1 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return float(x0 / SIDE), float(y0 / SIDE), float(x1 / SIDE), float(y1 / SIDE)


class Renderer:
    """Draws scenes. Each is a function of its seed and the arguments alone.

    counts: probabilities of 1, 2 and 3 things. natural: part of the objects left in their natural colours. named: part
    of the tinted objects whose colour the caption tells. stream: 0 or more; each gives other scenes for the same seeds.
    """

    def __init__(
        self,
        counts: tuple[float, float, float] = (0.3, 0.55, 0.15),
        natural: float = 0.2,
        named: float = 0.85,
        stream: int = 0,
    ) -> None:
        self.counts, self.natural, self.named, self.stream = counts, natural, named, stream

    def scene(self, seed: int, split: str = "train", count: int | None = None) -> Scene:
        """The scene of `seed` (0 or more), with `count` things (1, 2 or 3) if given.

        split: "train" never has a held-out pair among its things, "held_out" has at least one (so two or three things),
        "all" does not look. Raises ValueError for anything else.
        """
        possible = {"train": (1, 2, 3), "held_out": (2, 3), "all": (1, 2, 3)}.get(split, ())
        if not possible or count not in (None, *possible):
            raise ValueError(f"no scenes with split={split!r} and count={count!r}")
        rng = np.random.Generator(np.random.PCG64([seed, self.stream, 0]))
        if count is None:
            weights = np.array([self.counts[n - 1] for n in possible])
            count = int(rng.choice(possible, p=weights / weights.sum()))
        while True:
            concepts = [CONCEPTS[k] for k in rng.choice(len(CONCEPTS), count, replace=False)]
            if split == "all" or any(is_held_out(a, b) for a, b in combinations(concepts, 2)) == (split == "held_out"):
                break
        things = [(concept, self._colour(concept, rng)) for concept in concepts]
        told = [(concept, colour if rng.random() < self.named else None) for concept, colour in things]
        return self._draw(things, caption(told, "with" if rng.random() < 0.7 else "and"), rng)

    def render(self, things: Iterable[Named], seed: int) -> Scene:
        """A scene of one to three things, as in [("cat", None), ("car", "red")]; its caption tells every colour.

        Raises ValueError for unknown or repeated concepts, unknown colours, and coloured animals.
        """
        things = list(things)
        if not 1 <= len(things) <= 3 or len({concept for concept, _ in things}) < len(things):
            raise ValueError(f"a scene has one to three different concepts, not {things}")
        for concept, colour in things:
            if concept not in CONCEPTS or (colour is not None and (colour not in COLOURS or concept in ANIMALS)):
                raise ValueError(f"no such thing: {concept!r} in {colour!r}")
        rng = np.random.Generator(np.random.PCG64([seed, self.stream, 1]))
        return self._draw(things, caption(things), rng)

    def _colour(self, concept: str, rng: np.random.Generator) -> str | None:
        if concept in ANIMALS or rng.random() < self.natural:
            return None
        return list(COLOURS)[rng.integers(len(COLOURS))]

    def _draw(self, things: Sequence[Named], text: str, rng: np.random.Generator) -> Scene:
        sprites = [_sprites()[thing] for thing in things]
        low, high = _SIZES[len(things)]
        sizes = rng.uniform(low, high, len(things))
        room = 1 - 2 * _MARGIN / SIDE
        if sizes.sum() > room:  # shrink what exceeds the least size, so that a row or column holds them all
            sizes = low + (sizes - low) * (room - low * len(sizes)) / (sizes.sum() - low * len(sizes))
        patches = [
            _posed(sprite, concept != "clock", int(size * SIDE), rng)  # clocks keep their hands
            for sprite, size, (concept, _) in zip(sprites, sizes, things, strict=True)
        ]
        shapes = [(patch.shape[0], patch.shape[1]) for patch in patches]
        order = rng.permutation(len(things))  # front first
        layout = int(rng.integers(3))
        for attempt in range(20):
            free = layout == 2 and attempt < 19
            corners = _anywhere(shapes, rng) if free else _in_line(shapes, 1 - layout % 2, rng)
            masks, parts = _visible(patches, corners, order)
            if min(parts) >= _LEAST_VISIBLE:
                break
        canvas = _background(np.concatenate([sprite.tones for sprite in sprites]), rng)
        for k in order[::-1]:
            window = _window(patches[k], corners[k])
            canvas[window] = patches[k][..., :3] + canvas[window] * (1 - patches[k][..., 3:])
        image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
        seen = zip(things, masks, parts, strict=True)
        return Scene(image, text, tuple(Thing(*thing, _box(mask), mask, part) for thing, mask, part in seen))


def caption(things: Sequence[Named], joint: str = "with") -> str:
    """One of "a X", "a X and a Y" and "a X, a Y and a Z", with colours where given.

    joint: "with" or "and", what ties an animal to the glasses, crown or bow that follows it.
    """
    *firsts, last = (phrase(*thing) for thing in things)
    if not firsts:
        return last
    worn = len(things) == 2 and things[0][0] in ANIMALS and things[1][0] in WORN
    return f"{', '.join(firsts)} {joint if worn else 'and'} {last}"
