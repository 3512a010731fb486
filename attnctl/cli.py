"""The command line. Thin: it parses, calls and reports; torch and diffusers are imported once a command needs them."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .command import UsageError, check_writable, plain, run, tell
from .errors import short
from .limits import LARGEST, STEPS, THREADS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image
    from rich.progress import Progress

    from .control import Control
    from .drawing import Drawing
    from .recipe import Recipe

app = typer.Typer(
    name="attnctl",
    help="Say what a diffusion model's attention should do, in words.\n\n"
    "Start with:  attnctl generate 'a cat and a dog' --compare --maps\n\n"
    "It draws on glyph-sd, a small model that ships with the package; --model takes a folder or a hub id as well.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="markdown",
)

MODEL_HELP = "An embedded model, a folder written by save_pretrained, or a hub id."
DEVICE_HELP = "cpu, cuda, cuda:1, ...; default: cuda if there is one, else cpu."
DTYPE_HELP = "float32, float16 or bfloat16."


def main() -> None:
    """The console script."""
    run(app, "attnctl")


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"attnctl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# --- generate ---------------------------------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "glyph-sd",
    control: Annotated[
        list[str] | None,
        typer.Option(
            "--control", "-c", help="A control, as name(phrase, phrase, setting=value); may be given several times."
        ),
    ] = None,
    subjects: Annotated[
        str | None,
        typer.Option(help="Short for --control 'segregation(...)': phrases to keep apart, with commas; or auto."),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            "--region",
            "-r",
            help="Where a phrase goes: 'cat: 0,0,0.5,1' (left, top, right, bottom; shares of the picture or pixels) or "
            "'cat: mask.png'; may be given several times. More settings: attnctl controls regions.",
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option("--count", "-n", help="How many pictures.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; default: the model's.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; default: the model's.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also draw without controls; show both on one sheet.")
    ] = False,
    maps: Annotated[bool, typer.Option("--maps", help="Show where each word of the prompt is looked at.")] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", help="Also save what the controls did: losses by step, updates, and how maps changed."),
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures; made if need be.")] = Path("out"),
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of the processor; default: 1 for an embedded model, else torch's own number."),
    ] = None,
) -> None:
    """Draw pictures, with controls, word maps and a comparison if you like.

    - attnctl generate 'a cat and a dog' --compare --maps
    - attnctl generate 'a cat and a red car' --control 'segregation(cat, red car)' --seed 7 --count 4
    - attnctl generate 'a cat and a dog' --control 'astar(cat, dog)' --trace
    - attnctl generate 'a red car and a cat' --region 'cat: 0,0,0.5,1' --region 'red car: 0.5,0,1,1' --compare
    - attnctl generate 'a lion with a crown' --model ./my-model --size 768x512 --control 'segregation(lion, crown)'

    A control is written like a call whose strings need no quotes: phrases of the prompt first, then settings.
    Segregation, astar, excitation and retention without a phrase take the things that the prompt names. Every PNG holds
    its whole recipe: `attnctl reproduce` draws it again, bit for bit on the same machine.
    """
    shape = checked(prompt, seed, count, steps, guidance, size, threads)
    texts = control_texts(prompt, model, control or [], subjects, compare and not region)
    if region:
        from .region_text import region_control

        texts = [region_control(region), *texts]
    if trace and not texts:
        raise UsageError("--trace tells what a control does: give --control as well")
    check_writable(out)
    texts = [_without_files(text) for text in texts]
    controls = [_control(text) for text in texts]

    from . import drawing, loading
    from .bars import bars, paused

    if threads is None and model in loading.embedded():
        threads = 1  # so small a model gains little by more, and beside a busy process they wait for one another
    with bars() as bar:
        pipe = open_model(model, device, dtype, bar, threads)
        if shape is not None:
            drawing.check_size(pipe, *shape)
        first = new_recipe(
            pipe,
            model,
            prompt,
            texts,
            negative=negative,
            seed=seed,
            steps=steps,
            guidance=guidance,
            shape=shape,
            maps=maps,
        )
        if negative and first.guidance is not None and first.guidance <= 1:
            tell(f"--negative does nothing without guidance, which is {first.guidance:g}")
        for number in range(count):
            one = replace(first, seed=seed + number)
            kinds = ["plain"] * (compare or not controls) + ["controlled"] * bool(controls)
            drawings = {
                kind: drawing.draw(
                    pipe, one, controls if kind == "controlled" else [], kind, bar, trace and kind != "plain"
                )
                for kind in kinds
            }
            paths = _save(drawings, one, out)
            seen = [*left_alone(drawings), *judged(model, drawings)]
            with paused(bar):
                print(*seen, *map(plain, paths), sep="\n", flush=True)


def new_recipe(
    pipe: "DiffusionPipeline",
    model: str,
    prompt: str,
    controls: Sequence[str],
    *,
    negative: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    shape: tuple[int, int] | None = None,
    maps: bool = False,
    weights: str | None = None,
) -> "Recipe":
    """The recipe of the first picture: what is not given is usual for the model.

    Args:
        pipe: the model, loaded.
        weights: its `recipe.weights_hash`, if it is known.
    """
    from . import drawing, loading, recipe

    usual = loading.USUAL.get(model, {})
    return recipe.Recipe(
        model=model,
        weights=weights or recipe.weights_hash(pipe),
        prompt=prompt,
        negative=negative,
        sampler=recipe.sampler_of(pipe),
        seed=seed,
        steps=steps or usual.get("steps") or drawing.default_setting(pipe, "num_inference_steps"),
        width=shape[0] if shape else None,
        height=shape[1] if shape else None,
        guidance=next(
            (g for g in (guidance, usual.get("guidance")) if g is not None),
            drawing.default_setting(pipe, "guidance_scale"),
        ),
        controls=tuple(controls),
        maps=_mapped_words(pipe, prompt) if maps else (),
        **_surroundings(pipe),
    )


def checked(
    prompt: str,
    seed: int,
    count: int,
    steps: int | None,
    guidance: float | None,
    size: str | None,
    threads: int | None,
) -> tuple[int, int] | None:
    """The size as numbers, once every plain setting makes sense."""
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    if not 0 <= seed < 2**63 - count:
        raise UsageError(f"--seed {seed}: a seed is a whole number from 0 to 2^63 - 1, also of the last picture")
    if count < 1:
        raise UsageError(f"--count {count}: at least 1")
    for name, value, most in (("--steps", steps, STEPS), ("--threads", threads, THREADS)):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{name} {value}: from 1 to {most}")
    if guidance is not None and not 0 <= guidance < float("inf"):
        raise UsageError(f"--guidance {guidance}: a number from 0 up")
    return _size(size)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if match is None:
        raise UsageError(f"--size {short(text)}: write it as WIDTHxHEIGHT, such as 512x768")
    if any(len(side.lstrip("0")) > 5 or int(side) > LARGEST for side in match.groups()):
        raise UsageError(f"--size {short(text)}: a side has at most {LARGEST} pixels")
    return int(match[1]), int(match[2])


def control_texts(prompt: str, model: str, texts: list[str], subjects: str | None, compare: bool) -> list[str]:
    """The controls as text: those given, or segregation of the subjects, or of the glyph things in the prompt."""
    from .control_text import write_control
    from .loading import embedded

    if subjects is not None:
        if texts:
            raise UsageError("--subjects is short for one --control; give one of the two")
        if subjects.strip().lower() == "auto":
            return [_filled("segregation", "", _read_things(prompt), "--subjects auto")]
        phrases = [phrase.strip() for phrase in subjects.split(",")]
        if len(phrases) < 2 or not all(phrases):
            raise UsageError(f"--subjects {subjects!r}: at least two phrases of the prompt, with commas between them")
        return [write_control("segregation", *phrases)]
    if texts or not compare:
        return [_with_phrases(text, prompt, model) for text in texts]
    things = _glyph_things(prompt) if model in embedded() else []
    if len(things) < 2:
        raise UsageError("--compare has nothing to compare with: give --control, or --subjects 'PHRASE, PHRASE'")
    chosen = write_control("segregation", *things)
    tell(f"no control was given, so {chosen} is compared with none")
    return [chosen]


READ = {"segregation": 2, "astar": 2, "excitation": 1, "retention": 1}
"""The controls that read their phrases from the prompt where none is named, and how many they need."""


def _with_phrases(text: str, prompt: str, model: str) -> str:
    """A control's text; if it names no phrase, with the things that the prompt names, which are told on stderr."""
    from .control_text import named, phraseless
    from .loading import embedded

    bare = phraseless(text)
    kind = named(bare[0], known_controls()).__name__.lower() if bare else ""
    if bare is None or kind not in READ:
        return text
    things = _glyph_things(prompt) if model in embedded() else []
    if len(things) < READ[kind]:
        things = _read_things(prompt)
    return _filled(*bare, things, f"--control {bare[0]}", READ[kind])


def _read_things(prompt: str) -> list[str]:
    """The things that any prompt names, with their adjectives."""
    from .subjects import read_subjects

    return [subject.whole for subject in read_subjects(prompt)]


def _filled(name: str, settings: str, things: list[str], asked: str, least: int = 2) -> str:
    from .control_text import write_control

    if len(things) < least:
        raise UsageError(f"{asked}: the prompt names one thing, {things[0]!r}; two are kept apart")
    chosen = write_control(name, *things, settings=settings)
    tell(f"the prompt names {', '.join(things)}: {chosen}")
    return chosen


def _glyph_things(prompt: str) -> list[str]:
    """The phrases of the prompt that name a thing of the glyph world."""
    from .drawing import content_words
    from .glyph.words import CONCEPTS

    return [phrase for phrase in content_words(prompt) if phrase.partition("#")[0] in CONCEPTS]


def _mapped_words(pipe: "DiffusionPipeline", prompt: str) -> tuple[str, ...]:
    """The words that --maps shows; those it cannot show are told on stderr."""
    from .drawing import shown_words

    shown, left_out = shown_words(pipe, prompt)
    if left_out:
        tell(f"--maps leaves out what the tokenizer does not keep: {', '.join(left_out)}")
    if not shown:
        tell("--maps has no word of the prompt to show")
    return shown


def known_controls() -> "dict[str, type[Control]]":
    """The controls of `attnctl.processors` that change a picture, by class name; --maps is for what only looks."""
    from . import processors
    from .control import Control, Lane

    found = {name: getattr(processors, name) for name in dir(processors) if not name.startswith("_")}
    controls = {name: it for name, it in found.items() if isinstance(it, type) and issubclass(it, Control)}
    return {name: it for name, it in controls.items() if it is not Control and it.lane is not Lane.MAPS}


def _control(text: str) -> "Control":
    from .control_text import parse_control

    return parse_control(text, known_controls())


def _without_files(text: str) -> str:
    """The control's text for the recipe: heads and masks that stand in files are written out, since files change."""
    from .heads import files_of, read_heads

    control = _control(text)
    for file in files_of(getattr(control, "heads", ())):
        heads = read_heads(Path(file).expanduser())
        text = text.replace(file, " ".join(map(str, heads)) if isinstance(heads, tuple) else str(heads))
    for _, region in getattr(control, "masks", ()):
        if region.file is not None:
            from .regions import written

            place = rf"""([:,]\s*)(["']?){re.escape(region.file)}\2(?=\s*[])}},])"""
            text = re.sub(place, rf"\1'{written(region.file)}'", text)
    return text


def open_model(
    model: str, device: str | None, dtype: str, bar: "Progress", threads: int | None = None
) -> "DiffusionPipeline":
    """The pipeline; from then on torch works with so many threads, or, if None, with its own number."""
    task = bar.add_task(f"loading {plain(model)}", total=None)
    import torch

    from .loading import load

    if threads is not None:
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True  # a seed means one picture
    pipe = load(model, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype=dtype)
    bar.remove_task(task)
    return pipe


def _surroundings(pipe: "DiffusionPipeline") -> dict[str, Any]:
    import torch

    from .recipe import installed_versions

    return {
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }


def _save(drawings: "dict[str, Drawing]", recipe: "Recipe", out: Path) -> list[Path]:
    """Write the pictures of one drawing, all or none, the one to look at last; returns their paths.

    Raises:
        UsageError: one of them cannot be written.
    """
    from .drawing import pictures
    from .recipe import save

    slug = re.sub(r"[^a-z0-9]+", "-", recipe.prompt.lower()).strip("-")[:48].rstrip("-") or "picture"
    stem = f"{slug}-{recipe.seed}-{recipe.digest()}"
    traces: dict[Path, Callable[[Path], object]] = {}
    for drawn in drawings.values():
        if drawn.trace is not None:
            told = json.dumps({"prompt": recipe.prompt, "seed": recipe.seed} | drawn.trace.report, indent=1)
            traces[out / f"{stem}-trace.json"] = partial(Path.write_text, data=told)
            traces |= {out / f"{stem}-{name}.png": picture.save for name, picture in drawn.trace.pictures.items()}
    shown = {
        out / f"{stem}-{shows}.png": partial(save, picture, recipe=replace(recipe, shows=shows))
        for shows, picture in pictures(drawings, recipe).items()
    }
    files = shown | traces  # the first makes the folder
    new = [path for path in files if not path.exists()]
    for path, write in files.items():
        try:
            write(path)
        except OSError as error:
            for one in new:
                one.unlink(missing_ok=True)
            raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    return [*traces, *shown]


# --- reproduce, judge, controls, sites --------------------------------------------------------------------------------


@app.command(no_args_is_help=True)
def reproduce(
    image: Annotated[Path, typer.Argument(help="A PNG drawn by attnctl.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the redrawn picture into this folder.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model, where it has moved since.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: where it was drawn.")] = None,
) -> None:
    """Draw a picture again from the recipe inside it, and say whether it is bit-identical.

    Exit code 0: identical. 1: it differs; what is not as it was is told on stderr.
    """
    from . import drawing, recipe
    from .bars import bars

    picture, known = recipe.read(image)
    if out is not None:
        check_writable(out)
    controls = [_control(text) for text in known.controls]
    with bars() as bar:
        pipe = open_model(model or known.model, device or known.device, known.dtype, bar, known.threads)
        used = {"model": model or known.model, "weights": recipe.weights_hash(pipe), **_surroundings(pipe)}
        used["sampler"] = recipe.sampler_of(pipe)
        changes = known.differences(recipe.installed_versions(), used["weights"])
        drawings = {
            kind: drawing.draw(pipe, known, controls if kind == "controlled" else [], kind, bar)
            for kind in drawing.needed(known)
        }
    again = drawing.pictures(drawings, known)[known.shows]
    for line in changes:
        tell(line)
    if out is not None:
        path = _unused(out / image.name)
        recipe.save(again, path, replace(known, **used))
        print(plain(path))
    if recipe.pixel_hash(again) == known.pixels:
        print("bit-identical")
        return
    print(f"differs: {_difference(picture, again)}")
    raise typer.Exit(1)


def _unused(path: Path) -> Path:
    """This path, or NAME-again.png, NAME-again-2.png, ... beside what has it: nothing is overwritten."""
    number, free = 1, path
    while free.exists() or free.is_symlink():
        free = path.with_name(f"{path.stem}-again{f'-{number}' if number > 1 else ''}{path.suffix}")
        number += 1
    return free


def _difference(before: "Image.Image", after: "Image.Image") -> str:
    import numpy as np

    if before.size != after.size:
        return f"{before.width}x{before.height} before, {after.width}x{after.height} now"
    gap = np.abs(np.asarray(before.convert("RGB"), np.int16) - np.asarray(after.convert("RGB"), np.int16)).max(axis=2)
    return f"{(gap > 0).mean():.1%} of the pixels, by at most {gap.max()} of 255"


@app.command(no_args_is_help=True)
def judge(
    images: Annotated[list[Path], typer.Argument(help="Pictures.", show_default=False)],
) -> None:
    """Say what is in pictures of the glyph world, as JSON: which things, in which colours, where."""
    from .recipe import open_picture

    pictures = [open_picture(path).convert("RGB") for path in images]
    from .glyph import judge as judges

    readings = judges.load().read(pictures)
    answers = [{"image": str(path), **reading.to_dict()} for path, reading in zip(images, readings, strict=True)]
    print(json.dumps(answers, indent=2))


def left_alone(drawings: "dict[str, Drawing]") -> list[str]:
    """Which pictures a control left as they were, one line each."""
    return [
        f"{kind:<10}  left alone by {', '.join(drawn.alone)}, which looked ahead and saw every phrase"
        for kind, drawn in drawings.items()
        if drawn.alone
    ]


def judged(model: str, drawings: "dict[str, Drawing]") -> list[str]:
    """What the judge sees in each picture, one line each; it knows the glyph world alone."""
    from .loading import embedded

    if model not in embedded():
        return []
    from .glyph import judge as judges

    readings = judges.load().read([drawn.picture for drawn in drawings.values()])
    return [f"{kind:<10}  the judge sees {reading}" for kind, reading in zip(drawings, readings, strict=True)]


@app.command()
def controls(
    name: Annotated[str | None, typer.Argument(help="Tell everything about this one.", show_default=False)] = None,
) -> None:
    """List the controls that --control takes: how each is written, with its default settings, and what it does.

    - attnctl controls
    - attnctl controls segregation
    """
    from .control_text import describe, named, summary

    known = known_controls()
    for cls in known.values() if name is None else [named(name, known)]:
        print(describe(cls), summary(cls, whole=name is not None), sep="\n", end="\n\n")


@app.command(no_args_is_help=True)
def sites(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)],
    select: Annotated[
        list[str] | None,
        typer.Option("--select", "-s", help="A kind, factor:2, layers 7-10, a name or a glob; several: any of them."),
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT that the grids are for; default: the model's.")] = None,
) -> None:
    """List every place where a model attends: the names that controls and selections speak of."""
    shape = _size(size)
    from rich.console import Console
    from rich.table import Table

    from .bars import bars
    from .drawing import check_size
    from .site_table import HEADINGS, site_rows

    with bars() as bar:
        pipe = open_model(model, "cpu", "float32", bar)
    if shape is not None:
        check_size(pipe, *shape)
    table = Table(*HEADINGS)
    for row in site_rows(pipe, select or (lambda site: True), shape):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


# --- ui ---------------------------------------------------------------------------------------------------------------


@app.command()
def ui(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "glyph-sd",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    auth: Annotated[str | None, typer.Option(help="USER:PASSWORD that visitors must give.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
    open_: Annotated[bool, typer.Option("--open", help="Also open the page in a browser.")] = False,
) -> None:
    """Open the studio: a page in the browser to try controls, with both pictures side by side. Ctrl-C ends it.

    - attnctl ui
    - attnctl ui --model ./my-model --port 8000 --auth me:secret
    """
    user, colon, password = (auth or "").partition(":")
    if auth is not None and not (user and colon and password):
        raise UsageError("--auth: write it as USER:PASSWORD")
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UsageError(
            'the studio needs gradio: pip install "attnctl[ui]" (in a checkout: pip install ".[ui]")'
        ) from None
    from .demos.studio import serve

    serve(model, host, port, (user, password) if auth else None, device, dtype, open_)
