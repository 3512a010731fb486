"""What the command line and a job file ask for, made into controls, a pipeline and a recipe: one way for both."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.app.command import UsageError, plain, tell

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

    from attnctl.app.recipe import Recipe
    from attnctl.engine.control import Control

READ = {"segregation": 2, "astar": 2, "excitation": 1, "retention": 1}
"""The controls that read their phrases from the prompt where none is named, and how many they need."""


def with_phrases(text: str, prompt: str, model: str, say: Callable[[str], object] = tell) -> str:
    """A control's text; if it names no phrase, with the things that the prompt names, which `say` is told."""
    from attnctl.app.control_text import named, phraseless
    from attnctl.loading import USUAL, embedded

    bare = phraseless(text)
    kind = named(bare[0], known_controls()).__name__.lower() if bare else ""
    if bare is None or kind not in READ:
        return text
    things = glyph_things(prompt) if model in USUAL or model in embedded() else []
    if len(things) < READ[kind]:
        things = read_things(prompt)
    return filled(*bare, things, f"--control {bare[0]}", READ[kind], say)


def read_things(prompt: str) -> list[str]:
    """The things that any prompt names, with their adjectives."""
    from attnctl.words.subjects import read_subjects

    return [subject.whole for subject in read_subjects(prompt)]


def filled(
    name: str, settings: str, things: list[str], asked: str, least: int = 2, say: Callable[[str], object] = tell
) -> str:
    """The control's text with these things for its phrases; `asked` is what wanted it, for the error."""
    from attnctl.app.control_text import write_control

    if len(things) < least:
        raise UsageError(f"{asked}: the prompt names one thing, {things[0]!r}; two are kept apart")
    chosen = write_control(name, *things, settings=settings)
    say(f"the prompt names {', '.join(things)}: {chosen}")
    return chosen


def glyph_things(prompt: str) -> list[str]:
    """The phrases of the prompt that name a thing of the glyph world."""
    from attnctl.app.drawing import content_words
    from attnctl.glyph.words import CONCEPTS

    return [phrase for phrase in content_words(prompt) if phrase.partition("#")[0] in CONCEPTS]


@cache
def known_controls() -> "dict[str, type[Control]]":
    """The controls of `attnctl.processors` that change a picture, by class name; --maps is for what only looks."""
    from attnctl import processors
    from attnctl.engine.control import Control, Lane

    found = {name: getattr(processors, name) for name in dir(processors) if not name.startswith("_")}
    controls = {name: it for name, it in found.items() if isinstance(it, type) and issubclass(it, Control)}
    return {name: it for name, it in controls.items() if it is not Control and it.lane is not Lane.MAPS}


def control_of(text: str) -> "Control":
    from attnctl.app.control_text import parse_control

    return parse_control(text, known_controls())


def without_files(text: str) -> str:
    """The control's text for the recipe: heads, presets and masks in files are written out, since files change.

    Whatever is wrong with the control, is told.
    """
    from attnctl.engine.heads import files_of, read_heads

    control = control_of(text)
    for file in files_of(getattr(control, "heads", ())):
        heads = read_heads(Path(file).expanduser())
        text = text.replace(file, " ".join(map(str, heads)) if isinstance(heads, tuple) else str(heads))
    if str(getattr(control, "preset", None)).endswith(".json"):
        text = _without_preset(text, control)
    for _, region in getattr(control, "masks", ()):
        if region.file is not None:
            from attnctl.regions import written

            place = rf"""([:,]\s*)(["']?){re.escape(region.file)}\2(?=\s*[])}},])"""
            text = re.sub(place, rf"\1'{written(region.file)}'", text)
    return text


def _without_preset(text: str, control: "Control") -> str:
    from attnctl.app.control_text import parts_of

    name, phrases, settings = parts_of(text)
    del settings["preset"]
    for one in ("heads", "u", "scale", "kind", "scope"):
        value = getattr(control, one)
        settings.setdefault(one, f"[{', '.join(map(repr, value))}]" if isinstance(value, tuple) else repr(value))
    return f"{name}({', '.join([*phrases, *(f'{one}={value}' for one, value in settings.items())])})"


def open_model(
    model: str, device: str | None, dtype: str, bar: "Progress", threads: int | None = None
) -> "DiffusionPipeline":
    """The pipeline; from then on torch works with so many threads, or, if None, with its own number."""
    task = bar.add_task(f"loading {plain(model)}", total=None)
    import torch

    from attnctl.loading import load

    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True  # a seed means one picture
    pipe = load(model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype=dtype)
    bar.remove_task(task)
    return pipe


def surroundings(pipe: "DiffusionPipeline") -> dict[str, Any]:
    import torch

    from attnctl.app.recipe import installed_versions

    return {
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }


def recipe_of(
    pipe: "DiffusionPipeline",
    *,
    model: str,
    prompt: str,
    negative: str | None,
    seed: int,
    steps: int | None,
    size: tuple[int, int] | None,
    guidance: float | None,
    controls: tuple[str, ...],
    maps: tuple[str, ...],
    weights: str | None = None,
) -> "Recipe":
    """The recipe of a drawing by this pipeline; what is None is the model's own.

    `weights` is the hash of the pipeline's weights, where it is known already.
    """
    from attnctl import loading
    from attnctl.app import drawing, recipe

    usual = loading.usual(model)
    return recipe.Recipe(
        model=model,
        weights=weights or recipe.weights_hash(pipe),
        prompt=prompt,
        negative=negative,
        sampler=recipe.sampler_of(pipe),
        seed=seed,
        steps=steps or usual.get("steps") or drawing.default_setting(pipe, "num_inference_steps"),
        width=size[0] if size else None,
        height=size[1] if size else None,
        guidance=next(
            (g for g in (guidance, usual.get("guidance")) if g is not None),
            drawing.default_setting(pipe, "guidance_scale"),
        ),
        controls=controls,
        maps=maps,
        **surroundings(pipe),
    )


def slug(prompt: str) -> str:
    """The beginning of a prompt as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].rstrip("-") or "picture"
