"""`attnctl compose`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctl.app.asked import open_model, slug
from attnctl.app.command import DEVICE_HELP, MODEL_HELP, UsageError, check_writable, plain, tell
from attnctl.app.limits import LARGEST, THREADS
from attnctl.loading import check_name

if TYPE_CHECKING:
    from attnctl.app.composing import Compose
    from attnctl.app.recipe import Recipe
    from attnctl.pipelines.compositions import Composed, Composition


def compose(
    background: Annotated[Path | None, typer.Option("--background", "-b", help="A picture.")] = None,
    thing: Annotated[
        list[Path] | None,
        typer.Option(
            "--object",
            help="The object's picture; with an alpha channel it needs no --mask. Several go in one after the other, "
            "each with its --box.",
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(help="Where the object goes: left,top,right,bottom in shares of the background or in its pixels."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Names the background's things and the object.")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(
            help="The object in its picture: a file, white or painted; or 'words', where the model sees it; or 'alpha'."
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option(help="Phrases of the prompt that mean the object, with commas; default: the last thing it names."),
    ] = None,
    others: Annotated[
        str | None,
        typer.Option(help="Phrases that mean things of the background; default: all other things it names."),
    ] = None,
    example: Annotated[
        str | None, typer.Option(help="Compose pictures that ship with the package, for glyph-sd: car, balloon, apple.")
    ] = None,
    preset: Annotated[str, typer.Option(help="ours; paper, or paper-photo, -painting, -sketch, -cartoon.")] = "ours",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", help="A setting of the preset, as start=0; several times. --set help lists them."),
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "glyph-sd",
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise, for presets that draw some.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="WIDTHxHEIGHT of the result; default: the background's shape, the model's size.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Tell what the inversion loses; costs as much as an inversion.")
    ] = True,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Keep inversions in the user's cache folder, at most 1 GiB.")
    ] = True,
    full: Annotated[
        bool, typer.Option("--full", help="Also write the background in its own size, with the drawn box in it.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures; made if need be.")] = Path("out"),
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, max=THREADS, help="Threads of the processor; default: as for generate.")
    ] = None,
) -> None:
    """Put an object into a picture, without training (PrimeComposer).

    - attnctl compose --example car
    - attnctl compose --background park.jpg --object car.png --box 0.55,0.4,0.95,0.8 --prompt "a cat and a red car"
    - attnctl compose -b park.jpg --object shop.jpg --mask car-mask.png --box 300,200,460,330 -p "a cat and a red car"
    - attnctl compose ... --set start=0 --set guidance=2.5 --preset paper-cartoon

    Writes the picture, a sheet beside the background and the pasted pixels, and what was done as JSON.
    """
    changes = settings(set_ or [])
    steps, guidance = changes.pop("steps", None), changes.pop("guidance", None)
    shape = size_of(size)
    if example is not None:
        if background or thing or box or prompt:
            raise UsageError("--example brings background, object, box and prompt of its own; give one or the other")
        background, thing, box, prompt, mask, words, others = of_example(example)
    needed = {"--background": background, "--object": thing, "--box": box, "--prompt": prompt}
    if missing := [option for option, given in needed.items() if not given]:
        raise UsageError(f"{', '.join(missing)} missing; or --example car shows how it works")
    assert background is not None and thing and box and prompt
    asked = asked_for(background, thing, box, mask or [], words or [], phrases(others), preset, changes)
    check_name(model)
    check_writable(out)
    from attnctl.app.composing import checked, composed, recipe_for

    request = checked(asked, prompt, seed, steps, guidance)
    from attnctl import loading
    from attnctl.app.asked import recipe_of
    from attnctl.app.bars import bars, paused
    from attnctl.app.recipe import weights_hash
    from attnctl.pipelines.inversion_cache import InversionCache, usual_folder

    if threads is None and model in loading.embedded():
        threads = 1  # as for generate
    with bars() as bar:
        pipe = open_model(model, device, dtype, bar, threads)
        weights = weights_hash(pipe)
        drawing = recipe_of(
            pipe, model=model, prompt=prompt, negative=negative, seed=seed, steps=None, size=shape, guidance=None,
            controls=(), maps=(), weights=weights,
        )  # fmt: skip
        recipe = recipe_for(drawing, request)
        kept = InversionCache(usual_folder(), weights) if cache else None
        turns = composed(pipe, request, shape, negative, bar=bar, measure=check, cache=kept)
        with paused(bar):
            for made in turns:
                if not words:
                    tell(f"an object is {', '.join(map(repr, made.words))}, as the prompt names things last")
                print(*told(made), sep="\n", flush=True)
            print(*map(plain, save(turns, request.several, out, recipe, full)), sep="\n", flush=True)


def of_example(name: str) -> "tuple[Path, list[Path], list[str], str, list[str], list[str], str]":
    """Background, objects, boxes, prompt, masks, words and others of an example; what it is, is told."""
    import shlex

    from attnctl.glyph import examples

    one = examples.example(name)
    ground, thing = examples.path(one.background), examples.path(one.thing)
    box = ",".join(f"{side:g}" for side in one.box)
    masks = [str(examples.path(one.mask))] if one.mask else []
    words = ["--background", ground, "--object", thing, *(["--mask", masks[0]] if masks else []), "--box", box]
    words += ["--prompt", one.prompt, "--words", one.words, "--others", one.others]
    tell(f"the same as: attnctl compose {shlex.join(map(str, words))}")
    return ground, [thing], [box], one.prompt, masks, [one.words], one.others


def asked_for(
    background: Path,
    things: list[Path],
    boxes: list[str],
    masks: list[str],
    words: list[str],
    others: tuple[str, ...] | None,
    preset: str = "ours",
    changes: dict[str, Any] | None = None,
) -> "Compose":
    """What the options ask for."""
    from attnctl.app.composing import Compose, Object

    for option, given in (("--box", boxes), ("--mask", masks), ("--words", words)):
        if len(given) != len(things) and (given or option == "--box"):
            raise UsageError(f"{option} is given {len(given)} times for {len(things)} objects; each has its own")
    objects = []
    for n, thing in enumerate(things):
        left, top, right, bottom = numbers(boxes[n], 4, "--box", "left,top,right,bottom")
        mask = masks[n] if masks and masks[n] != "alpha" else None
        meant = phrases(words[n]) if words else None
        objects.append(Object(object=str(thing), box=(left, top, right, bottom), mask=mask, words=meant))
    return Compose(
        background=str(background), objects=tuple(objects), others=others, preset=preset, settings=changes or {}
    )


def settings(given: list[str]) -> dict[str, Any]:
    """Settings of a preset, from NAME=VALUE."""
    from dataclasses import fields

    from attnctl.errors import instead
    from attnctl.pipelines.compose_settings import Settings

    known = {one.name: one for one in fields(Settings)}
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = (part.strip() for part in text.partition("="))
        if name not in known:
            raise UsageError(f"--set {text}: there is no setting {name!r}; {instead(name, known)}")
        default: Any = known[name].default
        if not equals:
            raise UsageError(f"--set {text}: write it as {name}={default}")
        if isinstance(default, bool):
            if value.lower() not in ("true", "false"):
                raise UsageError(f"--set {text}: true or false")
            found[name] = value.lower() == "true"
            continue
        try:
            found[name] = type(default)(value)
        except ValueError:
            raise UsageError(f"--set {text}: {name} is a number, such as {default}") from None
    return found


def numbers(text: str, count: int, option: str, form: str) -> tuple[float, ...]:
    """So many numbers with commas."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != count:
        raise UsageError(f"{option} {text}: write it as {form}")
    return found


def size_of(text: str | None) -> tuple[int, int] | None:
    """WIDTHxHEIGHT as numbers."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and 0 < int(part) <= LARGEST for part in parts):
        raise UsageError(f"--size {text}: write it as WIDTHxHEIGHT, such as 512x768, at most {LARGEST} a side")
    return int(parts[0]), int(parts[1])


def phrases(text: str | None) -> tuple[str, ...] | None:
    """Phrases with commas; None where nothing was said, none where it is empty."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def told(made: "Composed") -> list[str]:
    """What was done, for people."""
    passes = ", ".join(f"{count:g} {name}" for name, count in made.passes.items() if count)
    lines = [f"forwards of the denoiser: {passes}; {made.seconds:.1f} s"]
    if made.lost is not None:
        lines.append(f"inverted and back, the pasted picture's latents are off by {made.lost:.1%}")
    if made.kept:
        lines.append(f"infusion keeps {made.kept / 2**20:.1f} MiB of queries and keys; no attention map is made")
    return lines


def save(turns: "list[Composed]", several: "list[Composition]", out: Path, recipe: "Recipe", full: bool) -> list[Path]:
    """Write the picture, the sheet and the report; returns their paths."""
    from attnctl.app.composing import sheet
    from attnctl.app.recipe import save

    made, first = turns[-1], several[0]
    stem = f"{slug(recipe.prompt)}-{recipe.seed}-{recipe.digest()}"
    report: dict[str, Any] = {"prompt": recipe.prompt, "seed": recipe.seed, "steps": recipe.steps}
    report |= {"guidance": recipe.guidance, "compose": recipe.compose, "objects": [one.to_dict() for one in turns]}
    names = ("report.json", "sheet.png", "composed.png", *(["full.png"] * full))
    paths = [out / f"{stem}-{name}" for name in names]
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(report, indent=1), encoding="utf-8")
        sheet(turns).save(paths[1])
        save(made.picture, paths[2], recipe)
        if full:
            whole: Any = first.background
            for one in turns:
                whole = one.onto(whole)
            whole.save(paths[3])
    except OSError as error:
        raise UsageError(f"cannot write into {out}: {error.strerror or error}") from error
    return paths
