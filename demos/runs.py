"""Runs on the page: their steps as they come, their result, the history of a visit, and batches."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from attnctl.app import service_batch
from attnctl.app.elsewhere import split_regions
from attnctl.app.recipe import Recipe
from attnctl.app.service import Asked, Result, Service, restored

from .api import TURN, refused, told
from .cards import QUIET

EMPTY = "Press **Generate**. The first picture takes a few seconds."
_SHOWN = 24  # pictures of a visit


def wire(ui: SimpleNamespace, studio: Service) -> None:
    """Generate, Cancel, restore."""
    texts = [ui.prompt, ui.controls, ui.regions, ui.negative, ui.size, ui.model]
    fields = [*texts, ui.seed, ui.steps, ui.guidance, ui.maps]

    @told
    def drawn(history: list[Result], *values: Any) -> Iterator[dict[Any, Any]]:
        prompt, controls, regions, negative, size, model = (text or "" for text in values[: len(texts)])
        seed, steps, guidance, maps = values[len(texts) :]
        yield {ui.status: "Its turn comes as soon as the model is free."}
        numbers = int(seed or 0), int(steps) if steps else None, guidance
        for one in studio.run(Asked(prompt, controls, regions, *numbers, maps, negative, size, model)):
            if isinstance(one, Result):
                history = [one, *(old for old in history if old.final != one.final)][:_SHOWN]
                labelled = [(str(old.final), f"{old.recipe.prompt[:40]}, seed {old.recipe.seed}") for old in history]
                yield shown(one) | {ui.history: history, ui.gallery: labelled}
                continue
            which = "plain picture" if one.kind == "plain" else "picture with your controls"
            said = f"Drawing the {which}: step {one.done} of {one.total}, {one.seconds:.0f} s left."
            now = {ui.preview: gr.Image(one.preview, visible=True), ui.pictures: gr.ImageSlider(visible=False)}
            yield {ui.status: said} | (now if one.preview is not None else {})

    def shown(result: Result) -> dict[Any, Any]:
        """What the page shows of a result."""
        plain, files = result.files["plain"], result.files
        alone = [] if "controlled" in files else ["No control was given: this is the plain picture alone."]
        return {
            ui.status: "\n".join(f"- {line}" for line in (*alone, *result.told)),
            ui.preview: gr.Image(None, visible=False),
            ui.pictures: gr.ImageSlider((str(plain), str(result.final)), visible=True),
            ui.heat: gr.Gallery(result.heat, selected_index=None),
            ui.sheet: next((str(files[name]) for name in ("comparison", "maps") if name in files), None),
            ui.curves: result.curves,
            ui.command: result.command,
            ui.python: result.python,
            ui.recipe: gr.DownloadButton(value=_recipe_file(result), interactive=True),
        }

    def filled(recipe: Recipe) -> dict[Any, Any]:
        """The fields as they were for a recipe."""
        if recipe.model not in studio.models and not studio.any_model:
            gr.Warning(f"it was drawn with the model {recipe.model}, which is not here")
        size = f"{recipe.width}x{recipe.height}" if recipe.width and recipe.height else ""
        boxes, controls = split_regions(recipe.controls)
        model = recipe.model if recipe.model in studio.models or studio.any_model else gr.skip()
        words = recipe.prompt, "\n".join(controls), "\n".join(boxes), recipe.negative or "", size, model
        values = *words, recipe.seed, recipe.steps, recipe.guidance, bool(recipe.maps)
        return dict(zip(fields, values, strict=True))

    @told
    def again(history: list[Result], stamp: int, event: gr.SelectData) -> dict[Any, Any]:
        chosen = history[event.index]
        return filled(chosen.recipe) | shown(chosen) | {ui.stamp: stamp + 1}

    @told
    def dropped(file: str, stamp: int) -> dict[Any, Any]:
        return filled(restored(Path(file))) | {ui.stamp: stamp + 1}

    result = [ui.status, ui.preview, ui.pictures, ui.heat, ui.sheet, ui.curves, ui.command, ui.python, ui.recipe]
    run = gr.on(
        [ui.go.click, ui.prompt.submit], drawn, [ui.history, *fields], [*result, ui.gallery, ui.history],
        show_progress="full", show_progress_on=ui.status, api_visibility="private", **TURN,
    )  # fmt: skip
    back = {ui.status: "Stopped: nothing was drawn.", ui.preview: gr.update(value=None, visible=False)}
    back[ui.pictures] = gr.update(visible=True)
    seen = "() => document.getElementById('status').scrollIntoView({block: 'nearest', behavior: 'smooth'})"
    ui.go.click(None, js=seen, api_visibility="private")  # on a phone it is further down
    ui.stop.click(lambda: back, None, list(back), cancels=[run], **QUIET)
    run.failure(lambda: back, None, list(back), **QUIET)
    ui.gallery.select(again, [ui.history, ui.stamp], [*fields, *result, ui.stamp], **QUIET)
    ui.file.upload(dropped, [ui.file, ui.stamp], [*fields, ui.stamp], **QUIET)


def _recipe_file(result: Result) -> str:
    path = result.final.with_suffix(".json")
    path.write_text(result.recipe.to_json(), encoding="utf-8")
    return str(path)


def batch(studio: Service) -> None:
    """The tab of batches."""
    gr.Markdown(
        "Many pictures from a file: rows with `prompt`, `seed`, `controls` and so on, as `attnctl batch` takes them; "
        f"at most {studio.limits.jobs} pictures here."
    )
    kinds = [".yaml", ".yml", ".jsonl", ".csv"]
    file = gr.File(label="Job file: .yaml, .jsonl or .csv", file_types=kinds, type="filepath", elem_id="jobs")
    with gr.Row():
        go, stop = gr.Button("Draw them", variant="primary", scale=3), gr.Button("Cancel", scale=1)
    said = gr.Markdown("Drop a job file, then press **Draw them**.", elem_id="batch-status")
    pictures = gr.Gallery(label="Pictures", columns=6, fit_columns=False, object_fit="contain", interactive=False)
    archive = gr.DownloadButton("Take them all (zip)", interactive=False, elem_id="zip")

    @told
    def draw(path: str | None) -> Iterator[tuple[Any, ...]]:
        if path is None:
            raise refused("drop a job file first")
        for one in service_batch.run(studio, Path(path)):
            report = [f"{one.done} of {one.total} pictures.", *(f"- failed: {fault}" for fault in one.faults)]
            ready = gr.DownloadButton(value=one.archive and str(one.archive), interactive=one.archive is not None)
            yield "\n".join(report), one.pictures, ready

    run = go.click(draw, file, [said, pictures, archive], api_visibility="private", show_progress="minimal",
                   show_progress_on=said, **TURN)  # fmt: skip
    stop.click(lambda: "Cancelled.", None, said, cancels=[run], **QUIET)
