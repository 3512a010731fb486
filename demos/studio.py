"""The studio: one page on which a control is tried, with the plain picture of the same seed beside it.

`attnctl ui` opens it. The page holds no control logic: what a visitor asks for is text, as on the command line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from attnctl.app.site_table import HEADINGS, site_rows
from attnctl.errors import AttnctlError

from .cards import EXAMPLES, cards
from .runs import STEPS, Asked, Result, Studio, lines, region_preview, restored, things

CSS = """
footer {display: none !important}
.gradio-container {max-width: 1360px !important}
#pictures img, #sheet img {image-rendering: auto}
#status p {font-size: 0.95rem}
"""
_QUEUE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}  # one run at a time
_SHOWN = 24  # pictures of a session's gallery


def _told(function: Any) -> Any:
    """The function, whose errors that the visitor can mend are one line on the page."""

    @wraps(function)
    def shown(*values: Any) -> Any:
        try:
            return function(*values)
        except AttnctlError as error:
            raise gr.Error(str(error), duration=8, print_exception=False) from None

    return shown


def page(studio: Studio) -> gr.Blocks:
    """The page on this studio's model."""
    known = cards()

    def generate(
        prompt: str, controls: str, regions: str, seed: float, steps: float, guidance: float, maps: bool,
        negative: str, size: str, history: list[tuple[str, str]],
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Draw the prompt plain and with the controls, from the same seed.

        Args:
            prompt: what to draw.
            controls: one a line, as name(phrase, phrase, setting=value).
            regions: one a line, as phrase: left,top,right,bottom in shares of the picture.
            seed: of both pictures.
            steps: of denoising.
            guidance: classifier-free guidance.
            maps: also show where each word is looked at.
            negative: what not to draw.
            size: WIDTHxHEIGHT in pixels; empty for the model's own.
        """
        rest = [gr.skip()] * 5
        try:
            asked = Asked(
                prompt or "", controls or "", regions or "", int(seed), int(steps), float(guidance), maps,
                negative or "", size or "",
            )  # fmt: skip
            for one in studio.run(asked):
                if not isinstance(one, Result):
                    which = "the plain picture" if one.kind == "plain" else "the controlled picture"
                    yield (f"Drawing {which}: step {one.done} of {one.total}, {one.seconds:.0f} s left.", *rest)
                    continue
                plain = str(one.files["plain"])
                controlled = str(one.files.get("controlled", plain))
                sheet = next((str(one.files[name]) for name in ("comparison", "maps") if name in one.files), None)
                if "controlled" not in one.files:
                    said = ["No control was given: this is the plain picture alone.", *one.told]
                else:
                    said = list(one.told)
                label = f"{prompt[:40]}, seed {one.recipe.seed}"
                history = [(controlled, label), *(old for old in history if old[0] != controlled)][:_SHOWN]
                report = "\n".join(f"- {line}" for line in said)
                yield report, (plain, controlled), sheet, one.command, history, history
        except AttnctlError as error:
            raise gr.Error(str(error), duration=8, print_exception=False) from None
        except (TypeError, ValueError, OverflowError):  # an empty number field
            raise gr.Error("seed, steps and guidance must be numbers", print_exception=False) from None

    def about(name: str) -> tuple[str, str]:
        card = known[name]
        return f"**{card.says}**", f"```text\n{card.written}\n```\n{card.whole}"

    @_told
    def add(name: str, controls: str, prompt: str) -> str:
        if not prompt.strip():
            raise gr.Error("write a prompt first: a control speaks of its words", print_exception=False)
        return "\n".join([*lines(controls), known[name].text(things(prompt))])

    @_told
    def restore(file: str) -> tuple[Any, ...]:
        recipe = restored(Path(file))
        if recipe.model != studio.model:
            gr.Warning(f"it was drawn with the model {recipe.model}; this studio draws with {studio.model}")
        size = f"{recipe.width}x{recipe.height}" if recipe.width and recipe.height else ""
        controls = "\n".join(recipe.controls)
        numbers = recipe.seed, recipe.steps, recipe.guidance
        return (recipe.prompt, controls, "", *numbers, bool(recipe.maps), recipe.negative or "", size)

    def sites() -> list[dict[str, str]]:
        """Every place where the model attends."""
        return [dict(zip(HEADINGS, row, strict=True)) for row in site_rows(studio.pipe, lambda site: True, None)]

    with gr.Blocks(title="attnctl studio", analytics_enabled=False) as demo:
        history = gr.State([])
        gr.Markdown(
            f"# attnctl studio\nSay what the attention of **{studio.model}** should do. "
            "Each run draws your prompt twice from the same seed: plain, and with your controls."
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                prompt = gr.Textbox(label="Prompt", value=EXAMPLES[0].prompt, lines=1, max_length=1000)
                gr.Markdown("Or start from a complaint, with a control that mends it:")
                with gr.Row(elem_id="complaints"):
                    complaints = [gr.Button(it.complaint, size="sm", min_width=200) for it in EXAMPLES]
                pick = gr.Dropdown(
                    [(f"{name}: {card.says.partition(':')[0]}", name) for name, card in known.items()],
                    value="segregation" if "segregation" in known else next(iter(known)),
                    label="What should change?",
                )
                says = gr.Markdown(about(pick.value)[0])
                put = gr.Button("Add this control", size="sm")
                with gr.Accordion("All settings of this control", open=False):
                    whole = gr.Markdown(about(pick.value)[1])
                controls = gr.Textbox(
                    label="Controls", info="One a line: words of the prompt first, then settings.",
                    value=EXAMPLES[0].controls, lines=1, max_lines=6,
                )  # fmt: skip
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", scale=3)
                    stop = gr.Button("Cancel", scale=1, min_width=90)
                with gr.Accordion("Regions: where a thing goes", open=True):
                    regions = gr.Textbox(
                        label="Regions", placeholder="cat: 0,0,0.5,1", lines=2, max_lines=6,
                        info="One a line: words of the prompt, then left,top,right,bottom. 0,0,0.5,1 is the left half.",
                    )  # fmt: skip
                    preview = gr.Image(
                        region_preview(""), label="Your boxes", height=180, interactive=False, buttons=[]
                    )
                with gr.Row():
                    seed = gr.Number(EXAMPLES[0].seed, label="Seed", precision=0, minimum=0, min_width=80)
                    steps = gr.Number(
                        studio.usual["steps"], label="Steps", precision=0, minimum=1, maximum=STEPS, min_width=80
                    )
                    guidance = gr.Number(studio.usual["guidance"], label="Guidance", minimum=0, min_width=80)
                maps = gr.Checkbox(True, label="Show where each word is looked at (heat maps)")
                with gr.Accordion("More: negative prompt, size, restore a picture", open=False):
                    negative = gr.Textbox(label="Negative prompt", info="What not to draw.")
                    size = gr.Textbox(label="Size", placeholder="WIDTHxHEIGHT; empty: the model's own")
                    file = gr.File(
                        label="Drop a PNG of attnctl here to restore how it was drawn",
                        file_types=[".png"], type="filepath", height=110,
                    )  # fmt: skip
            with gr.Column(scale=7, min_width=340):
                pictures = gr.ImageSlider(
                    label="Left of the line: plain. Right of it: with your controls.",
                    type="filepath", interactive=False, elem_id="pictures", height=420,
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                status = gr.Markdown("Press Generate. The first picture takes a few seconds.", elem_id="status")
                gr.Markdown("**Both pictures, and where each word is looked at**")
                sheet = gr.Image(
                    label="Sheet", show_label=False, type="filepath", interactive=False, elem_id="sheet",
                    buttons=["download", "fullscreen"],
                )  # fmt: skip
                command = gr.Code(
                    label="The same on the command line", language="shell", interactive=False, lines=1,
                    wrap_lines=True, show_line_numbers=False,
                )  # fmt: skip
                gr.Markdown("**Your pictures of this visit**")
                gallery = gr.Gallery(
                    label="Your pictures of this visit", show_label=False, columns=6, height=170, interactive=False,
                    fit_columns=False, object_fit="contain", buttons=["download", "fullscreen"],
                )  # fmt: skip
        filled = [prompt, controls, regions, seed, guidance]
        for button, it in zip(complaints, EXAMPLES, strict=True):  # in the browser, so that it is there at once
            values = json.dumps([it.prompt, it.controls, it.regions, it.seed, it.guidance])
            button.click(None, None, filled, js=f"() => {values}", api_visibility="private")
        fields = [prompt, controls, regions, seed, steps, guidance, maps, negative, size]

        run = go.click(
            generate, [*fields, history], [status, pictures, sheet, command, gallery, history],
            api_name="generate", show_progress="hidden", **_QUEUE,
        )  # fmt: skip
        stopped = stop.click(None, cancels=[run], api_visibility="private")
        stopped.then(lambda: "Cancelled.", None, status, queue=False, api_visibility="private", show_progress="hidden")
        pick.change(about, pick, [says, whole], queue=False, api_visibility="private")
        put.click(add, [pick, controls, prompt], controls, api_visibility="private")
        regions.change(_told(region_preview), regions, preview, api_visibility="private", show_progress="hidden")
        file.upload(restore, file, fields, api_visibility="private")
        gr.api(_controls, api_name="controls")
        gr.api(sites, api_name="sites", **_QUEUE)
    return demo


def _controls() -> list[dict[str, Any]]:
    """Every control: how it is called, what it does, and how it is written with its settings."""
    return [asdict(card) for card in cards().values()]


def serve(
    model: str, host: str, port: int, auth: tuple[str, str] | None, device: str | None, dtype: str, browser: bool
) -> None:
    """Load the model and answer visitors until Ctrl-C."""
    demo = page(Studio(model, device, dtype))
    print(f"the studio is at http://{host}:{port} (Ctrl-C ends it)", flush=True)
    demo.launch(server_name=host, server_port=port, auth=auth, inbrowser=browser, quiet=True, **LAUNCH)


LAUNCH: dict[str, Any] = {
    "share": False,
    "ssr_mode": False,
    "run_history": False,
    "max_file_size": "20mb",
    "css": CSS,
    "theme": gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]),
}
"""How the page is served, whoever serves it."""
