"""The studio's page: a control is tried, with the plain picture of the same seed beside it. `attnctl ui` opens it.

What a visitor asks for is text, as on the command line: controls and regions, one a line. Chips, cards, canvas and head
grid show that text and change it. The page holds no control logic.
"""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace
from typing import Any

import gradio as gr

from attnctl.app.clicks import clicked, toggled
from attnctl.app.control_settings import Card, Setting, cards, changed, switched
from attnctl.app.region_text import redrawn
from attnctl.app.service import Service, lines
from attnctl.errors import AttnctlError

from . import compose, heads, regions, runs
from .api import endpoints, opened, refused, told
from .cards import EXAMPLES, QUIET, form, listed
from .chips import SHOWS, chips

CLICKS = ("keeps it in the picture", "shows its heat map")
_GALLERY: dict[str, Any] = {
    "interactive": False,
    "fit_columns": False,
    "object_fit": "contain",
    "buttons": ["download", "fullscreen"],
}
_CODE: dict[str, Any] = {"interactive": False, "lines": 1, "wrap_lines": True, "show_line_numbers": False}
_IMAGE: dict[str, Any] = {"interactive": False, "buttons": ["download", "fullscreen"]}


def page(studio: Service) -> gr.Blocks:
    """The page on this service's models."""
    known = cards()
    with gr.Blocks(title="attnctl studio", analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        gr.Markdown(
            "# attnctl studio\nSay what a picture model should pay attention to. Each run draws your prompt twice from "
            "the same seed: plain, and with your controls.",
            elem_id="title",
        )
        with gr.Tab("Studio"):
            ui = SimpleNamespace(
                history=gr.State([]),
                card=gr.Textbox("", visible="hidden", label="Open card"),
                stamp=gr.Number(0, visible="hidden", label="Stamp"),
            )
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    _asked(ui, studio, known)
                with gr.Column(scale=7, min_width=320):
                    _shown(ui)
            _views(ui, studio, known)
            _words(ui)
            _cards(ui, studio, known)
            runs.wire(ui, studio)
        with gr.Tab("Compose"):
            compose.tab(studio)
        with gr.Tab("Batch"):
            runs.batch(studio)
        endpoints(studio)
    return demo


def _asked(ui: SimpleNamespace, studio: Service, known: dict[str, Card]) -> None:
    """The left side: what is asked for."""
    first, most, size = EXAMPLES[0], studio.limits, studio.size()
    gr.Markdown("Start from a complaint:")
    with gr.Row(elem_id="complaints"):
        ui.complaints = [gr.Button(it.complaint, size="sm", min_width=200) for it in EXAMPLES]
    ui.prompt = gr.Textbox(first.prompt, label="Prompt", lines=1, max_length=most.letters)
    ui.chips = gr.HTML(chips(first.prompt, first.controls), elem_id="chips", **SHOWS)
    ui.clicks = gr.Radio(
        CLICKS, value=CLICKS[0], label="A click on a word", elem_id="clicks",
        info="Two words are kept apart. The dash between two words binds them.",
    )  # fmt: skip
    with gr.Row():
        ui.go = gr.Button("Generate", variant="primary", scale=3)
        ui.stop = gr.Button("Cancel", scale=1, min_width=90)
    with gr.Row():
        ui.seed = gr.Number(first.seed, label="Seed", precision=0, minimum=0, min_width=80)
        ui.steps = gr.Number(studio.usual["steps"], label="Steps", precision=0, minimum=1, min_width=80)
        ui.guidance = gr.Number(studio.usual["guidance"], label="Guidance", minimum=0, min_width=80)
    ui.controls = gr.Textbox(
        first.controls, label="Controls", lines=1, max_lines=6, elem_id="controls",
        info="One a line: words of the prompt first, then settings. What you click is written here.",
    )  # fmt: skip
    with gr.Tab("Where things go"):
        ui.canvas = gr.HTML(regions.canvas("", first.prompt, size), elem_id="canvas", **regions.SHOWS)
        ui.regions = gr.Textbox(
            "", label="Regions", placeholder="cat\ndog", lines=2, max_lines=6, elem_id="regions",
            info="One a line. Words alone stand side by side, as columns. 'cat: 0,0,0.5,1' is a box: left, top, right, "
            "bottom, in shares of the picture.",
        )  # fmt: skip
    with gr.Tab("What should change"):
        ui.cards = gr.HTML(listed(known, first.controls, ""), elem_id="cards", **SHOWS)
        ui.form = gr.Column()
    with gr.Tab("More"):
        ui.maps = gr.Checkbox(True, label="Show where each word is looked at (heat maps)")
        ui.negative = gr.Textbox("", label="Negative prompt", info="What not to draw.")
        ui.size = gr.Textbox("", label="Size", placeholder="WIDTHxHEIGHT; empty: the model's own")
        ui.model = gr.Dropdown(
            list(studio.models), value=studio.models[0], label="Model", allow_custom_value=studio.any_model
        )
        ui.file = gr.File(
            label="Drop a PNG of attnctl, or a saved recipe, to restore how it was drawn",
            file_types=[".png", ".json"], type="filepath", height=110, elem_id="restore",
        )  # fmt: skip


def _shown(ui: SimpleNamespace) -> None:
    """The right side: what was drawn."""
    ui.preview = gr.Image(label="Being drawn", visible=False, height=420, elem_id="preview", **_IMAGE)
    ui.pictures = gr.ImageSlider(
        label="Left of the line: plain. Right of it: with your controls.", type="filepath", elem_id="pictures",
        height=420, **_IMAGE,
    )  # fmt: skip
    ui.status = gr.Markdown(runs.EMPTY, elem_id="status")
    with gr.Tabs() as ui.tabs:
        with gr.Tab("Heat maps", id="maps"):
            ui.heat = gr.Gallery(
                label="Where each word is looked at", elem_id="heat", columns=4, height="auto", **_GALLERY
            )
        with gr.Tab("Sheet", id="sheet"):
            ui.sheet = gr.Image(label="Everything on one sheet", type="filepath", elem_id="sheet", **_IMAGE)
        with gr.Tab("What the control did", id="trace"):
            ui.curves = gr.Gallery(label="Step by step", columns=2, height="auto", **_GALLERY)
        with gr.Tab("Use it elsewhere", id="use"):
            ui.command = gr.Code(label="Copy as command", language="shell", elem_id="command", **_CODE)
            ui.python = gr.Code(label="Copy as Python", language="python", elem_id="python", **_CODE)
            ui.recipe = gr.DownloadButton("Save recipe", size="sm", interactive=False)
    ui.gallery = gr.Gallery(
        label="Your pictures of this visit: click one to restore it", elem_id="history", columns=6, height=170,
        allow_preview=False, **_GALLERY,
    )  # fmt: skip


def _views(ui: SimpleNamespace, studio: Service, known: dict[str, Card]) -> None:
    """What shows the text, and is drawn anew as it changes."""

    def views(*texts: str | None) -> tuple[Any, ...]:
        prompt, controls, boxes, size, card = (text or "" for text in texts)
        return chips(prompt, controls), listed(known, controls, card), regions.canvas(boxes, prompt, sized(size))

    def sized(text: str | None) -> tuple[int, int]:
        try:
            return studio.size(text or "")
        except AttnctlError:  # it is being written
            return studio.size()

    texts = [ui.prompt, ui.controls, ui.regions, ui.size, ui.card]
    gr.on([one.change for one in texts], views, texts, [ui.chips, ui.cards, ui.canvas],
          trigger_mode="always_last", **QUIET)  # fmt: skip

    def drawn(boxes: str | None, size: str | None, event: gr.EventData) -> str:
        return "\n".join(redrawn(event._data["value"], lines(boxes or ""), sized(size)))

    ui.canvas.input(drawn, [ui.regions, ui.size], ui.regions, **QUIET)
    filled = [ui.prompt, ui.controls, ui.regions, ui.seed, ui.guidance]
    for button, it in zip(ui.complaints, EXAMPLES, strict=True):  # in the browser, so that it is there at once
        values = json.dumps([it.prompt, it.controls, it.regions, it.seed, it.guidance])
        button.click(None, None, filled, js=f"() => {values}", api_visibility="private")


def _words(ui: SimpleNamespace) -> None:
    """Clicks on chips."""

    @told
    def word(controls: str, click: str, found: list[Any] | None, event: gr.EventData) -> tuple[Any, ...]:
        key = event._data["value"]
        if click == CLICKS[0] or key.startswith("link"):
            return clicked(key, controls or ""), gr.skip(), gr.skip()
        name = key.partition(" ")[2]
        of_word = [n for n, (_, caption) in enumerate(found or []) if caption.rpartition(", ")[0] == name]
        if not of_word:
            raise refused(f"no heat map of {name!r} yet: press Generate first")
        return gr.skip(), gr.Gallery(selected_index=of_word[-1]), gr.Tabs(selected="maps")

    ui.chips.select(word, [ui.controls, ui.clicks, ui.heat], [ui.controls, ui.heat, ui.tabs], **QUIET)


def _cards(ui: SimpleNamespace, studio: Service, known: dict[str, Card]) -> None:
    """The open card: its form, whose fields write into the controls."""

    def picked(event: gr.EventData) -> str:
        return str(event._data["value"])

    ui.cards.select(picked, None, ui.card, **QUIET)

    with ui.form:

        @gr.render([ui.card, ui.controls, ui.prompt, ui.model], triggers=[ui.card.change, ui.stamp.change])
        def opened(name: str, controls: str, prompt: str, model: str) -> None:
            if not (card := known.get(name)):
                return
            used = any(line.startswith(name) for line in lines(controls))
            switch = gr.Button(f"{'Remove' if used else 'Use'} {name}", size="sm")

            @told
            def switched_(controls: str, prompt: str, stamp: int) -> tuple[str, int]:
                return "\n".join(switched(card.cls, lines(controls), prompt)), stamp + 1

            switch.click(switched_, [ui.controls, ui.prompt, ui.stamp], [ui.controls, ui.stamp], **QUIET)

            def wire(event: Any, setting: Setting, fields: list[Any]) -> None:
                @told
                def write(*values: Any) -> str:
                    *given, controls, prompt = values
                    value = given[0] if len(given) == 1 else tuple(given)
                    return "\n".join(changed(card.cls, setting, value, lines(controls), prompt))

                event(write, [*fields, ui.controls, ui.prompt], ui.controls, **QUIET)

            def choose(setting: Setting, text: str) -> None:
                field = gr.Textbox(text, label="Heads", info="block:head, or click below", interactive=True)
                places = studio.sites(model)
                board = gr.HTML(heads.grid(places, text), elem_classes="heads", **SHOWS)
                wire(field.submit, setting, [field])

                @told
                def click(text: str, event: gr.EventData) -> tuple[str, str]:
                    new = toggled(places, text, event._data["value"])
                    return new, heads.grid(places, new)

                wire(board.select(click, field, [field, board], **QUIET).then, setting, [field])

            form(card, controls, wire, choose)
            with gr.Accordion("All about it", open=False):
                gr.Code(f"{card.written}\n\n{inspect.cleandoc(card.whole)}", show_label=False, language=None, **_CODE)


def serve(
    studio: Service, host: str, port: int, auth: tuple[str, str] | None, browser: bool = False, mcp: bool = False
) -> None:
    """Answer visitors until Ctrl-C."""
    demo = page(studio)
    print(f"the studio is at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    opened(demo, studio, server_name=host, server_port=port, auth=auth, inbrowser=browser, mcp_server=mcp)
