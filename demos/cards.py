"""Cards: what the studio says of each control, and its form; all of it from the control's signature and docstring."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from attnctl.app.control_settings import Card, Setting, find
from attnctl.app.control_text import parts_of
from attnctl.app.service import lines
from attnctl.errors import short


def listed(known: dict[str, Card], controls: str, chosen: str) -> str:
    """The cards as buttons: which is open, and which are in use."""
    shown = []
    for card in known.values():
        on, says = find(lines(controls), card.name) is not None, escape(card.says.partition(": ")[0])
        shown.append(
            f'<button class="card{" on" * on}" data-k="{card.name}" aria-pressed="{str(card.name == chosen).lower()}">'
            f"<b>{card.name.replace('_', ' ')}</b>{'<i>in use</i>' * on} {says}</button>"
        )
    return "".join(shown)


Wire = Callable[[Any, Setting, list[Any]], Any]  # an event, what it changes, and the fields that hold the value


def form(card: Card, controls: str, wire: Wire, heads: Callable[[Setting, str], Any]) -> None:
    """The settings of a card as fields; `heads` makes the field of a setting that chooses heads."""
    there = find(lines(controls), card.name)
    given = parts_of(there)[2] if there else {}
    for first in (True, False):
        some = [one for one in card.settings if one.first is first]
        with gr.Group() if first else gr.Accordion("More settings", open=False, visible=bool(some)):
            for one in some:
                text = given.get(one.name, str(one.default)).strip("'\"")
                heads(one, text) if one.kind == "heads" else _field(one, text, wire)


def _field(one: Setting, text: str, wire: Wire) -> None:
    label = one.name.replace("_", " ").capitalize()
    words = {"label": label, "info": short(one.says, 160), "interactive": True}
    if one.kind == "window":
        ends = zip(("from", "until"), text.strip("()[]").split(","), strict=True)
        with gr.Row():
            pair = [
                gr.Slider(0, 1, float(end), step=0.01, label=f"{label}: {name}", min_width=120, interactive=True)
                for name, end in ends
            ]
        for slider in pair:
            wire(slider.release, one, pair)
        return
    field: Any
    if one.kind == "switch":
        field = gr.Checkbox(text.lower() == "true", **words)
    elif one.kind == "choice":
        field = gr.Dropdown(list(one.choices), value=text, **words)
    elif one.most is not None:
        field = gr.Slider(0, one.most, float(text), step=one.most / 80, **words)
    elif one.kind == "text":
        field = gr.Textbox(text, **words)
    else:
        field = gr.Number(float(text), precision=0 if one.kind == "whole" else None, **words)
    events = {"text": "submit", "number": "release" if one.most is not None else "submit"}
    wire(getattr(field, events.get(one.kind, "input")), one, [field])


QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
"""Of events that are no run."""


@dataclass(frozen=True)
class Example:
    """A complaint, and a case on glyph-sd that shows it and mends it."""

    complaint: str
    prompt: str
    controls: str = ""
    regions: str = ""
    seed: int = 0
    guidance: float = 3.0


EXAMPLES = (
    Example("One of my two things is missing", "a cat and a dog", "astar(cat, dog)", seed=7),
    Example("Colours leak", "a blue car and a red crown", "binding(blue car, red crown)", seed=13),
    Example("It must be on the left", "a red car and a cat", "", "cat: 0,0,0.5,1\nred car: 0.5,0,1,1", seed=4),
    Example("It looks flat without CFG", "a red car and a cat", "perturb(heads=6 7, u=0.5)", seed=6, guidance=1.0),
)
