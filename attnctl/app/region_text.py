"""Regions as the command line takes them: "cat: 0,0,0.5,1" or "cat: mask.png"; and their outlines on a picture."""

from __future__ import annotations

import re
from ast import literal_eval
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from attnctl.app.layout_text import quoted
from attnctl.errors import AttnctlError
from attnctl.files import no_files

if TYPE_CHECKING:
    from attnctl.regions import Region

COLOURS = ("#e41a1c", "#377eb8", "#4daf4a", "#984ea3", "#ff7f00", "#a65628", "#f781bf", "#17becf")
_BOX = re.compile(r"\s*[\[(]?\s*((?:\d*\.?\d+)(?:\s*[,x ]\s*\d*\.?\d+){3})\s*[\])]?\s*")
_PAIR = re.compile(r"""\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"), \[([\d., ]+)\]\]""")


class RegionTextError(AttnctlError):
    """A region that is not written as the command line takes it."""


def region_controls(texts: Sequence[str]) -> list[str]:
    """The texts of the controls for these regions: `regions` for phrases, `couple` for prompts of their own.

    Args:
        texts: each "PHRASE: WHERE", "PHRASE: WHERE | PROMPT" or ": WHERE | PROMPT", and behind that perhaps
            "| NEGATIVE PROMPT"; WHERE is a box or a file, see `region_control`.

    Raises:
        RegionTextError: one is none of these.
    """
    phrases, own, against = [], [], []
    for text in texts:
        head, *prompts = (part.strip() for part in text.split("|"))
        if len(prompts) > 2 or (prompts and not prompts[0]):
            raise RegionTextError(
                f"--region {text!r}: write it as 'cat: 0,0,0.5,1 | its own prompt | its negative one'"
            )
        phrase, where = _read(head, free=bool(prompts))
        if phrase:
            phrases.append(head)
        if prompts:
            own.append(f"[{quoted(prompts[0])}, {where}]")
        if len(prompts) == 2 and prompts[1]:
            against.append(f"[{quoted(prompts[0])}, {quoted(prompts[1])}]")
    found = [region_control(phrases)] if phrases else []
    if own:
        negatives = f", negatives=[{', '.join(against)}]" if against else ""
        found.append(f"couple(masks=[{', '.join(own)}]{negatives})")
    return found


def region_control(texts: Sequence[str]) -> str:
    """The text of the control `regions` for these regions.

    Args:
        texts: each "PHRASE: left,top,right,bottom", in shares of the picture or in pixels, or "PHRASE: FILE", a mask.

    Raises:
        RegionTextError: one is neither.
    """
    return f"regions(masks=[{', '.join(f'[{phrase!r}, {where}]' for phrase, where in map(_read, texts))}])"


def _read(text: str, free: bool = False) -> tuple[str, str]:
    """(phrase, where) of a region; `free` ones need no phrase."""
    phrase, colon, where = (part.strip() for part in text.partition(":"))
    if not ((phrase or free) and colon and where):
        raise RegionTextError(
            f"--region {text!r}: write it as 'cat: 0,0,0.5,1' (left, top, right, bottom) or 'cat: mask.png'"
        )
    if box := _BOX.fullmatch(where):
        return phrase, f"[{', '.join(re.split(r'[,x ]+', box[1]))}]"
    if re.fullmatch(r"[\d\s.,x-]+", where):
        raise RegionTextError(f"--region {text!r}: a box is left,top,right,bottom, such as 0,0,0.5,1 for the left half")
    return phrase, repr(where)


def region_lines(control: str) -> list[str] | None:
    """The lines that `region_control` makes this control of; None if there are none, as where a region is a mask."""
    from attnctl.app.control_text import parts_of

    name, _, settings = parts_of(control)
    if name != "regions" or list(settings) != ["masks"]:
        return None
    pairs = [(_text(pair[1]), pair[2]) for pair in _PAIR.finditer(settings["masks"])]
    lines = [f"{phrase}: {box.replace(' ', '')}" for phrase, box in pairs]
    return lines if lines and region_control(lines) == control else None


def _text(quoted: str) -> str:
    return str(literal_eval(quoted))


def columns(lines: Sequence[str]) -> list[str]:
    """Regions, one a line; those that are a phrase alone stand side by side, in columns of equal width."""
    alone = [line for line in lines if ":" not in line]
    edges = [f"{number / max(1, len(alone)):.4g}" for number in range(len(alone) + 1)]
    boxes = {line: f"{line}: {edges[n]},0,{edges[n + 1]},1" for n, line in enumerate(alone)}
    return [boxes.get(line, line) for line in lines]


Box = list[Any]  # phrase, left, top, right, bottom, in shares of the picture


def box_of(line: str, size: tuple[int, int]) -> Box | None:
    """The box of a line; None where it is none, as while it is being written. It reads no file.

    Args:
        line: as for `region_control`.
        size: width and height of the picture, for a box in pixels.
    """
    from attnctl.app.control_text import parse_control
    from attnctl.processors import Regions

    try:
        with no_files():
            ((phrase, region),) = parse_control(region_control([line]), {"Regions": Regions}).masks
    except AttnctlError:
        return None
    if region.box is None:
        return None
    scale = (1, 1) if max(region.box) <= 1 else size
    return [phrase, *(round(side / scale[number % 2], 4) for number, side in enumerate(region.box))]


def redrawn(boxes: Sequence[Box], lines: Sequence[str], size: tuple[int, int]) -> list[str]:
    """The lines of these boxes, behind those lines that are none yet."""
    kept = [line for line in columns(lines) if box_of(line, size) is None]
    return [*kept, *(f"{phrase}: {','.join(f'{side:g}' for side in sides)}" for phrase, *sides in boxes)]


def outlined(picture: Image.Image, regions: Sequence[tuple[str, Region]]) -> Image.Image:
    """The picture with the outline and the name of each region over it."""
    page = picture.convert("RGB")
    wide = max(2, page.width // 128) | 1
    font: Any = ImageFont.load_default(max(10, page.width // 24))
    for number, (phrase, region) in enumerate(regions):
        colour = COLOURS[number % len(COLOURS)]
        inside = region.on((page.height, page.width), (page.height, page.width)) >= 0.5
        mask = Image.fromarray(inside.byte().mul(255).numpy())
        framed = Image.new("L", (page.width + 2 * wide, page.height + 2 * wide))
        framed.paste(mask, (wide, wide))
        edge = ImageChops.subtract(framed, framed.filter(ImageFilter.MinFilter(2 * wide + 1)))
        page.paste(colour, (0, 0), edge.crop((wide, wide, wide + page.width, wide + page.height)))
        box = mask.getbbox()
        if box is not None:
            ImageDraw.Draw(page).text((box[0] + 2 * wide, box[1] + 2 * wide), phrase, colour, font)
    return page
