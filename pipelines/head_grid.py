"""The picture of a search: a grid of blocks by heads; the colour is the gain, its strength how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from attnctl.pipelines.head_race import Rank

Colour = tuple[int, ...]

HELPS, NOTHING, HARMS, UNSURE, INK = (20, 100, 190), (165, 165, 165), (205, 85, 15), (246, 246, 244), (32, 32, 36)
SURE = 3.0  # standard errors from which on a gain has its full colour
WIDE = 16  # heads a block, up to which gains are written into the cells


def colour_of(one: Rank, largest: float) -> Colour:
    """Grey is no gain, blue `largest` or more, orange as much of a loss; washed out as far as it may be chance."""
    part = max(-1.0, min(1.0, one.gain / largest)) if largest else 0.0
    solid = _between(NOTHING, HELPS if part > 0 else HARMS, abs(part))
    return _between(UNSURE, solid, _certainty(one, largest))


def _certainty(one: Rank, largest: float) -> float:
    """Of a gain, or, where it is small, of that there is none: 1 where the error is small beside the largest gain."""
    if math.isnan(one.error):
        return 0.0
    against_zero = abs(one.gain) / (SURE * one.error) if one.error else 1.0
    against_largest = (largest - abs(one.gain)) / (SURE * one.error) if one.error else 1.0
    return max(0.0, min(1.0, max(against_zero, against_largest)))


def _between(first: Colour, second: Colour, part: float) -> Colour:
    return tuple(round(a + (b - a) * part) for a, b in zip(first, second, strict=True))


def head_grid(ranks: Sequence[Rank], chosen: str, objective: str = "score") -> Image.Image:
    """Every head that was searched, by block; the whole blocks stand in the first column.

    Args:
        ranks: what a search measured. Sets of several heads are not drawn; heads left out by the size of their effect
            are a dot.
        chosen: heads with a frame.
        objective: name of the score, for the legend.
    """
    single = {one.heads: one for one in ranks if " " not in one.heads}
    blocks: dict[str, set[int]] = {}
    for text in [*single, *chosen.split()]:
        place, _, head = text.partition(":")
        blocks.setdefault(place, set()).update([int(head)] if head else [])
    rows = sorted(blocks, key=lambda place: (not place.isdigit(), int(place) if place.isdigit() else 0, place))
    count = max((max(own, default=0) + 1 for own in blocks.values()), default=1)
    side = 46 if count <= WIDE else 24
    small, font = ImageFont.load_default(11), ImageFont.load_default(13)
    left = 16 + max(round(font.getlength(name)) for name in [*rows, "block"])
    top, first = 42, left + side + 14  # the grid of heads begins behind the whole blocks
    width = max(first + count * side + 16, 470)
    page = Image.new("RGB", (width, top + len(rows) * side + 118), "white")
    pen = ImageDraw.Draw(page)
    drawn = [one for one in single.values() if one.stage != "prune"]
    largest = max((abs(one.gain) - one.error for one in drawn if not math.isnan(one.error)), default=0.0)
    if largest <= 0:  # nothing is above its error
        largest = max((abs(one.gain) for one in drawn), default=0.0)
    pen.text((8, top - 10), "block", INK, font, anchor="ls")
    pen.text((left + side / 2, top - 10), "all", INK, font, anchor="ms")
    for k in range(count):
        pen.text((first + (k + 0.5) * side, top - 10), str(k), INK, font, anchor="ms")
    pen.text((first, top - 26), "head", INK, font, anchor="ls")
    framed = chosen.split()
    for y, place in enumerate(rows):
        middle = top + (y + 0.5) * side
        pen.text((left - 8, middle), place, INK, font, anchor="rm")
        cells: list[tuple[str, int]] = [
            (place, left),
            *((f"{place}:{head}", first + head * side) for head in sorted(blocks[place])),
        ]
        for name, edge in cells:
            one = single.get(name)
            box = (edge + 1, top + y * side + 1, edge + side - 2, top + (y + 1) * side - 2)
            if one is not None and one.stage != "prune":
                fill = colour_of(one, largest)
                pen.rectangle(box, fill=fill)
                if side > 24:
                    ink = "white" if sum(fill) < 380 else INK
                    pen.text((edge + side / 2, middle - 6), f"{one.gain:+.2f}", ink, small, anchor="mm")
                    pen.text((edge + side / 2, middle + 8), f"±{one.error:.2f}", ink, small, anchor="mm")
            elif one is not None:
                pen.ellipse((edge + side / 2 - 2, middle - 2, edge + side / 2 + 2, middle + 2), fill=NOTHING)
            if name in framed:
                pen.rectangle(box, outline=INK, width=3)
    _legend(pen, top + len(rows) * side + 12, largest, objective, small)
    return page


def _legend(pen: ImageDraw.ImageDraw, top: int, largest: float, objective: str, font: Any) -> None:
    steps, wide = 41, 5
    for row, (errors, says) in enumerate(((0.0, "sure"), (largest / 1.5, "hardly"))):
        for k in range(steps):
            gain = largest * (2 * k / (steps - 1) - 1)
            fill = colour_of(Rank("", "race", gain, errors, 2), largest)
            pen.rectangle((8 + k * wide, top + 18 * row, 8 + (k + 1) * wide, top + 18 * row + 14), fill=fill)
        pen.text((16 + steps * wide, top + 18 * row + 7), says, INK, font, anchor="lm")
    ends = 8 + steps * wide
    marks = ((8, f"{-largest:+.2f}", "lt"), (8 + steps * wide // 2, "0", "mt"), (ends, f"{largest:+.2f}", "rt"))
    for x, text, anchor in marks:
        pen.text((x, top + 40), text, INK, font, anchor=anchor)
    pen.text((8, top + 60), f"gain in {objective[:60]}, over no perturbation, ± its standard error", INK, font)
    frames = "frame: chosen   dot: left out, by the small size of its effect   empty: not measured"
    pen.text((8, top + 78), frames, INK, font)
