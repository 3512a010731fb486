"""Regions, drawn: the lines of boxes as rectangles on a canvas, and back. A view of the regions' text."""

from pathlib import Path
from typing import Any

from attnctl.app.control_settings import things
from attnctl.app.drawing import content_words
from attnctl.app.region_text import COLOURS, box_of, columns
from attnctl.app.service import lines


def canvas(text: str, prompt: str, size: tuple[int, int]) -> dict[str, Any]:
    """What the canvas shows: boxes, the phrases to draw for, colours, and its shape."""
    phrases = list(dict.fromkeys([*things(prompt), *content_words(prompt)])) if prompt.strip() else []
    boxes = [box for line in columns(lines(text)) if (box := box_of(line, size))]
    return {"boxes": boxes, "phrases": phrases, "colours": COLOURS, "ratio": size[0] / size[1]}


SHOWS: dict[str, Any] = {
    "html_template": """<div class="bar"><label>Draw a box for <select></select></label>
        <button class="add">Add a box</button><button class="clear">Clear</button></div>
        <div class="area" role="group" aria-label="Canvas: drag to draw a box"></div>""",
    "js_on_load": (Path(__file__).parent / "canvas.js").read_text(encoding="utf-8"),
}
"""How the canvas is shown: a change of its boxes is an `input` event with all of them."""
