"""Regions, drawn: the lines of boxes as rectangles on a canvas, and back. A view of the regions' text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnctl.app.asked import known_controls
from attnctl.app.control_settings import things
from attnctl.app.control_text import parse_control
from attnctl.app.drawing import content_words
from attnctl.app.region_text import COLOURS, columns, region_control
from attnctl.app.service import lines
from attnctl.errors import AttnctlError
from attnctl.files import no_files
from attnctl.regions import Region

Box = list[Any]  # phrase, left, top, right, bottom, in shares of the picture


def canvas(text: str, prompt: str, size: tuple[int, int]) -> dict[str, Any]:
    """What the canvas shows: boxes, the phrases to draw for, colours, and its shape."""
    phrases = list(dict.fromkeys([*things(prompt), *content_words(prompt)])) if prompt.strip() else []
    boxes = [box for line in columns(lines(text)) if (box := _box(line, size))]
    return {"boxes": boxes, "phrases": phrases, "colours": COLOURS, "ratio": size[0] / size[1]}


def _box(line: str, size: tuple[int, int]) -> Box | None:
    """The rectangle of a line; None where it is none yet, as while it is being written."""
    try:
        with no_files():
            control = parse_control(region_control([line]), known_controls())
    except AttnctlError:
        return None
    phrase, region = control.masks[0]
    box = Region(region).box
    if box is None:
        return None
    scale = (1, 1) if max(box) <= 1 else size  # in pixels
    return [phrase, *(round(side / scale[number % 2], 4) for number, side in enumerate(box))]


def redrawn(boxes: Sequence[Box], text: str, size: tuple[int, int]) -> str:
    """The lines of these boxes, behind those lines of the text that the canvas does not show."""
    kept = [line for line in columns(lines(text)) if _box(line, size) is None]
    return "\n".join([*kept, *(f"{phrase}: {','.join(f'{side:g}' for side in sides)}" for phrase, *sides in boxes)])


SHOWS: dict[str, Any] = {
    "html_template": """<div class="bar"><label>Draw a box for <select></select></label>
        <button class="add">Add a box</button><button class="clear">Clear</button></div>
        <div class="area" role="group" aria-label="Canvas: drag to draw a box"></div>""",
    "js_on_load": (Path(__file__).parent / "canvas.js").read_text(encoding="utf-8"),
}
"""How the canvas is shown: a change of its boxes is an `input` event with all of them."""
