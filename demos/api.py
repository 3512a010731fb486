"""What programs ask of the studio, and how it is served. Names and arguments of the endpoints stay."""

from collections.abc import Iterator
from functools import wraps
from inspect import isgeneratorfunction
from pathlib import Path
from typing import Any

import gradio as gr

from attnctl.app.control_settings import cards
from attnctl.app.service import Asked, Result, Service
from attnctl.app.site_table import HEADINGS, site_rows
from attnctl.errors import AttnctlError
from attnctl.files import no_files

TURN: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
"""Of events that use the model: they wait in one queue."""


def refused(error: AttnctlError | str) -> gr.Error:
    """One line on the page, or for a program."""
    return gr.Error(str(error), duration=8, print_exception=False)


def told(function: Any) -> Any:
    """The function, which reads no file whose name stands in a text; errors that a visitor can mend are one line."""

    @wraps(function)
    def answer(*values: Any) -> Any:
        try:
            with no_files():
                return function(*values)
        except AttnctlError as error:
            raise refused(error) from None

    @wraps(function)
    def answers(*values: Any) -> Iterator[Any]:
        try:
            yield from function(*values)
        except AttnctlError as error:
            raise refused(error) from None

    return answers if isgeneratorfunction(function) else answer


def endpoints(studio: Service) -> None:
    """Put the endpoints on the page that is open."""

    def generate(
        prompt: str, controls: str = "", regions: str = "", seed: int = 0, steps: int = 0, guidance: float = -1.0,
        maps: bool = False, negative: str = "", size: str = "", model: str = "",
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Draw a prompt plain and, from the same seed, with controls. The last answer holds pictures and report.

        Args:
            prompt: what to draw.
            controls: one a line, as name(phrase, phrase, setting=value); `controls` lists them.
            regions: one a line, as phrase: left,top,right,bottom in shares of the picture; a phrase alone is a column.
            seed: of both pictures.
            steps: of denoising; 0: the model's own.
            guidance: classifier-free guidance; below 0: the model's own.
            maps: also show where each word is looked at.
            negative: what not to draw.
            size: WIDTHxHEIGHT in pixels; empty: the model's own.
            model: one of the studio's; empty: its first.
        """
        numbers = seed, steps or None, None if guidance < 0 else guidance
        for one in studio.run(Asked(prompt, controls, regions, *numbers, maps, negative, size, model)):
            if isinstance(one, Result):
                pictures = {shows: _file(path) for shows, path in one.files.items()}
                yield pictures | {"report": list(one.told), "command": one.command, "python": one.python}
            else:
                yield {"drawing": one.kind, "step": one.done, "of": one.total}

    def maps(prompt: str, seed: int = 0, steps: int = 0, controls: str = "", model: str = "") -> list[dict[str, Any]]:
        """Draw a prompt and show where each of its words is looked at.

        Args:
            prompt: what to draw.
            seed: of the picture.
            steps: of denoising; 0: the model's own.
            controls: one a line, as for `generate`.
            model: one of the studio's; empty: its first.
        """
        *_, result = studio.run(Asked(prompt, controls, seed=seed, steps=steps or None, model=model))
        heat = result.heat if isinstance(result, Result) else []
        split = ((path, *said.rsplit(", ", 1)) for path, said in heat)
        return [{"word": word, "drawing": kind, "picture": _file(Path(path))} for path, word, kind in split]

    def controls() -> list[dict[str, Any]]:
        """Every control: how it is called, what it does, and its settings."""
        return [card.to_dict() for card in cards().values()]

    def sites(model: str = "") -> list[dict[str, Any]]:
        """Every place where a model attends.

        Args:
            model: one of the studio's; empty: its first.
        """
        studio.sites(model, load=True)
        return [dict(zip(HEADINGS, row, strict=True)) for row in site_rows(studio.pipe, lambda site: True, None)]

    for function in (generate, maps, sites):
        gr.api(told(function), api_name=function.__name__, **TURN)
    gr.api(controls, queue=False)


def _file(path: Path) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


LAUNCH: dict[str, Any] = {
    "share": False,
    "ssr_mode": False,
    "run_history": False,
    "css_paths": Path(__file__).parent / "studio.css",
    "theme": gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]),
}
"""How the page is served, whoever serves it."""


def opened(demo: gr.Blocks, studio: Service, **how: Any) -> Any:
    """Serve a page of `studio`; `how` goes to gradio's `launch`."""
    demo.queue(max_size=studio.limits.waiting, default_concurrency_limit=8)
    return demo.launch(quiet=True, max_file_size=f"{studio.limits.upload}mb", **LAUNCH, **how)
