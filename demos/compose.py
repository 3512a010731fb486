"""The tab Compose: an object goes into a picture. Pictures are dropped, the box is dragged or written."""

from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import gradio as gr
from PIL import Image

from attnctl.app.region_text import COLOURS
from attnctl.app.service import Service
from attnctl.app.service_compose import ComposeAsked, Composing, Made, shares
from attnctl.errors import AttnctlError
from attnctl.glyph import examples
from attnctl.pipelines.compose_settings import PRESETS, Settings

from .api import TURN, told
from .cards import QUIET
from .regions import SHOWS

MASKS = ("its transparent part is not the object", "the mask below", "where the model sees it (rough)")
_THING, _SEEN = "object", 480  # name of the box; longer side of the background on the canvas
_IMAGE: dict[str, Any] = {
    "type": "pil",
    "image_mode": None,
    "format": "png",
    "sources": ["upload", "clipboard"],
    "height": 220,
}
_SHOWN: dict[str, Any] = {"interactive": False, "buttons": ["download", "fullscreen"], "type": "filepath"}


def canvas(background: Image.Image | None, box: str) -> dict[str, Any]:
    """What the canvas shows: the background and the box in it."""
    value: dict[str, Any] = {"boxes": [], "phrases": [_THING], "colours": COLOURS, "ratio": 1.0}
    if background is None:
        return value
    seen, page = background.convert("RGB"), BytesIO()
    seen.thumbnail((_SEEN, _SEEN))
    seen.save(page, "JPEG", quality=85)
    value["picture"] = f"data:image/jpeg;base64,{b64encode(page.getvalue()).decode()}"
    value["ratio"] = background.width / background.height
    try:
        value["boxes"] = [[_THING, *(round(side, 3) for side in shares(box, background))]]
    except AttnctlError:  # it is being written
        pass
    return value


def tab(studio: Service) -> None:
    """The tab, and what its buttons do."""
    composing, usual = Composing(studio), Settings()
    gr.Markdown("Put an object into a picture, without training. Start from an example, or drop pictures of yours:")
    with gr.Row():
        buttons = {name: gr.Button(name.capitalize(), size="sm", min_width=90) for name in examples.EXAMPLES}
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            with gr.Row():
                ground = gr.Image(label="Background", elem_id="ground", **_IMAGE)
                thing = gr.Image(label="Object", elem_id="thing", **_IMAGE)
            place = gr.HTML(canvas(None, ""), elem_id="place", **SHOWS)
            box = gr.Textbox(
                "0.55,0.3,0.95,0.7", label="Box", elem_id="box", max_length=80,
                info="left,top,right,bottom: shares of the background, or its pixels. Drag it above, or write it here.",
            )  # fmt: skip
            prompt = gr.Textbox(
                "", label="What the result shows", elem_id="compose-prompt", max_length=studio.limits.letters,
                info="Names the background's things and the object: 'a cat and a red car'.",
            )  # fmt: skip
            with gr.Row():
                words = gr.Textbox("", label="Words of the object", info="Empty: the last thing named.", min_width=140)
                others = gr.Textbox("", label="Words of the background", info="Empty: all others.", min_width=140)
            with gr.Row():
                go = gr.Button("Compose", variant="primary", scale=3, elem_id="compose")
                stop = gr.Button("Cancel", scale=1, min_width=90, elem_id="compose-stop")
            with gr.Accordion("More", open=False):
                how = gr.Radio(MASKS, value=MASKS[0], label="The object in its picture")
                mask = gr.Image(label="Mask: white is the object", **_IMAGE | {"height": 140})
                start = gr.Slider(
                    0, 0.9, usual.start, step=0.05, label="Start",
                    info="Share of the steps left out: lower harmonises more, higher is truer to the object.",
                )  # fmt: skip
                with gr.Row():
                    steps = gr.Number(usual.steps, label="Steps", precision=0, minimum=2, min_width=80)
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80)
                    preset = gr.Dropdown(list(PRESETS), value="ours", label="Preset", min_width=120)
                size = gr.Textbox("", label="Size", placeholder="WIDTHxHEIGHT; empty: as fits background and model")
                model = gr.Dropdown(
                    list(studio.models), value=studio.models[0], label="Model", allow_custom_value=studio.any_model
                )
        with gr.Column(scale=7, min_width=320):
            pictures = gr.ImageSlider(
                label="Left of the line: pasted pixels. Right of it: composed.",
                elem_id="composed",
                height=420,
                **_SHOWN,
            )
            said = gr.Markdown("Drop two pictures, draw a box, press **Compose**.", elem_id="compose-status")
            sheet = gr.Image(label="Everything on one sheet", elem_id="compose-sheet", **_SHOWN)
            command = gr.Code(
                label="Copy as command", language="shell", interactive=False, lines=1, wrap_lines=True,
                show_line_numbers=False, elem_id="compose-command",
            )  # fmt: skip

    @told
    def work(*values: Any) -> Iterator[tuple[Any, ...]]:
        ground, thing, mask, how, box, prompt, words, others, start, steps, seed, preset, size, model = values
        yield "Its turn comes as soon as the model is free.", gr.skip(), gr.skip(), gr.skip()
        chosen = (None, mask, "words")[MASKS.index(how)]
        if how == MASKS[1] and mask is None:
            raise gr.Error("drop a mask first", duration=8, print_exception=False)
        settings: dict[str, Any] = {"steps": int(steps or usual.steps)}
        if start != usual.start or preset == "ours":
            settings["start"] = float(start)
        asked = ComposeAsked(
            ground, thing, box or "", prompt or "", chosen, words or "", others or "", int(seed or 0), preset, settings,
            size or "", model or "",
        )  # fmt: skip
        part, before = 1, 0
        for one in composing.run(asked):
            if isinstance(one, Made):
                report = "\n".join(f"- {line}" for line in one.told)
                yield report, (str(one.pasted), str(one.picture)), str(one.sheet), one.command
                continue
            part, before = part + (one.done <= before), one.done
            doing = f"Part {part} (both pictures are inverted, then it is drawn): step {one.done} of {one.total}."
            yield doing, gr.skip(), gr.skip(), gr.skip()

    fields = [ground, thing, mask, how, box, prompt, words, others, start, steps, seed, preset, size, model]
    run = go.click(
        work, fields, [said, pictures, sheet, command], api_visibility="private", show_progress="full",
        show_progress_on=said, **TURN,
    )  # fmt: skip
    back = "Stopped: nothing was made."
    stop.click(lambda: back, None, said, cancels=[run], **QUIET)
    run.failure(lambda: back, None, said, **QUIET)

    gr.on([ground.change, box.change], canvas, [ground, box], place, trigger_mode="always_last", **QUIET)

    def dragged(event: gr.EventData) -> str:
        boxes = event._data["value"]
        return ",".join(f"{side:g}" for side in boxes[-1][1:]) if boxes else ""

    place.input(dragged, None, box, **QUIET)

    def filled(name: str) -> dict[Any, Any]:
        one = examples.EXAMPLES[name]
        opened = [Image.open(examples.path(file)) if file else None for file in (one.background, one.thing, one.mask)]
        values = dict(zip((ground, thing, mask), opened, strict=True))
        values |= {how: MASKS[int(one.mask is not None)], box: ",".join(f"{side:g}" for side in one.box)}
        return values | {prompt: one.prompt, words: one.words, others: one.others}

    for name, button in buttons.items():
        button.click(
            lambda name=name: filled(name), None, [ground, thing, mask, how, box, prompt, words, others], **QUIET
        )
