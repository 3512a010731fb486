"""The command line. Thin: it parses, calls and reports; torch and diffusers are imported once a command needs them."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnctl import __version__
from attnctl.app.asked import (
    control_of,
    known_controls,
    open_model,
    recipe_of,
    slug,
    surroundings,
    without_files,
)
from attnctl.app.batch.command import batch
from attnctl.app.command import DEVICE_HELP, MODEL_HELP, UsageError, check_writable, plain, run, tell
from attnctl.app.compose_command import compose
from attnctl.app.concepts_command import app as concepts_app
from attnctl.app.personalize_command import personalize
from attnctl.app.request import checked, control_texts, judged, left_alone, mapped_words, size_of
from attnctl.app.search_command import app as search_app

if TYPE_CHECKING:
    from PIL import Image

    from attnctl.app.drawing import Drawing
    from attnctl.app.recipe import Recipe

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

DTYPE_HELP = "float32, float16 or bfloat16."


app.command(no_args_is_help=True)(batch)
app.command(no_args_is_help=True)(compose)
app.command(no_args_is_help=True)(personalize)
app.add_typer(concepts_app, name="concepts")
app.add_typer(search_app, name="search")


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
            "'cat: mask.png', perhaps with '| a prompt of its own' behind it; several times. More settings: "
            "attnctl controls regions.",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="The prompt holds a region a line, or BREAK, ADDCOL, ADDROW, ADDBASE, ADDCOMM: columns, rows, shares "
            "such as 1,2,1 or 1,2,1;3,1, and base=0.2.",
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
    - attnctl generate 'a cat ADDCOL a red car ADDROW a lake' --layout '1,1,1;1,1'
    - attnctl generate 'a lion with a crown' --model ./my-model --size 768x512 --control 'segregation(lion, crown)'

    A control is written like a call whose strings need no quotes: phrases of the prompt first, then settings.
    Segregation, astar, excitation and retention without a phrase take the things that the prompt names. Every PNG holds
    its whole recipe: `attnctl reproduce` draws it again, bit for bit on the same machine.
    """
    shape = checked(prompt, seed, count, steps, guidance, size, threads)
    placed: list[str] = []
    if layout is not None:
        from attnctl.app.layout_text import read_layout

        said = read_layout(prompt, layout, negative)
        prompt, negative, placed = said.prompt, said.negative, [said.control]
    if region:
        from attnctl.app.region_text import region_controls

        placed += region_controls(region)
    texts = [*placed, *control_texts(prompt, model, control or [], subjects, compare and not placed)]
    if trace and not texts:
        raise UsageError("--trace tells what a control does: give --control as well")
    check_writable(out)
    texts = [without_files(text) for text in texts]
    controls = [control_of(text) for text in texts]

    from attnctl import loading
    from attnctl.app import drawing
    from attnctl.app.bars import bars, paused

    if threads is None and model in loading.embedded():
        threads = 1  # so small a model gains little by more, and beside a busy process they wait for one another
    with bars() as bar:
        pipe = open_model(model, device, dtype, bar, threads)
        if shape is not None:
            drawing.check_size(pipe, *shape)
        first = recipe_of(
            pipe,
            model=model,
            prompt=prompt,
            negative=negative,
            seed=seed,
            steps=steps,
            size=shape,
            guidance=guidance,
            controls=tuple(texts),
            maps=mapped_words(pipe, prompt) if maps else (),
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


def _save(drawings: "dict[str, Drawing]", recipe: "Recipe", out: Path) -> list[Path]:
    """Write the pictures of one drawing, all or none, the one to look at last; returns their paths.

    Raises:
        UsageError: one of them cannot be written.
    """
    from attnctl.app.drawing import pictures
    from attnctl.app.recipe import save

    stem = f"{slug(recipe.prompt)}-{recipe.seed}-{recipe.digest()}"
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
    from attnctl.app import composing, drawing, recipe
    from attnctl.app.bars import bars

    picture, known = recipe.read(image)
    if out is not None:
        check_writable(out)
    controls = [control_of(text) for text in known.controls]
    composition = None if known.compose is None else composing.of_recipe(known)
    with bars() as bar:
        pipe = open_model(model or known.model, device or known.device, known.dtype, bar, known.threads)
        used = {"model": model or known.model, "weights": recipe.weights_hash(pipe), **surroundings(pipe)}
        used["sampler"] = None if composition else recipe.sampler_of(pipe)
        changes = known.differences(recipe.installed_versions(), used["weights"])
        if composition is not None:
            changes += composition.changes
            size = (known.width, known.height) if known.width and known.height else None
            again = composing.composed(pipe, composition, size, known.negative, controls, bar)[-1].picture
        else:
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
    threshold: Annotated[
        float,
        typer.Option(help="Probability from which on a thing counts, 0 to 1; 0.98 is strict on half-drawn things."),
    ] = 0.5,
) -> None:
    """Say what is in pictures of the glyph world, as JSON: which things, in which colours, where."""
    from attnctl.app.recipe import open_picture

    if not 0 < threshold < 1:
        raise UsageError(f"--threshold {threshold:g}: a probability between 0 and 1")
    pictures = [open_picture(path).convert("RGB") for path in images]
    from attnctl.glyph import judge as judges

    readings = judges.load(threshold=threshold).read(pictures)
    answers = [{"image": str(path), **reading.to_dict()} for path, reading in zip(images, readings, strict=True)]
    print(json.dumps(answers, indent=2))


@app.command()
def controls(
    name: Annotated[str | None, typer.Argument(help="Tell everything about this one.", show_default=False)] = None,
) -> None:
    """List the controls that --control takes: how each is written, with its default settings, and what it does.

    - attnctl controls
    - attnctl controls segregation
    """
    from attnctl.app.control_text import describe, named, summary

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
    shape = size_of(size)
    from rich.console import Console
    from rich.table import Table

    from attnctl.app.bars import bars
    from attnctl.app.drawing import check_size
    from attnctl.app.site_table import HEADINGS, site_rows

    with bars() as bar:
        pipe = open_model(model, "cpu", "float32", bar)
    if shape is not None:
        check_size(pipe, *shape)
    table = Table(*HEADINGS)
    for row in site_rows(pipe, select or (lambda site: True), shape):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
