"""`attnctl compose`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctl.app.asked import open_model, slug
from attnctl.app.command import DEVICE_HELP, MODEL_HELP, UsageError, check_writable, plain, tell
from attnctl.app.limits import LARGEST, THREADS

if TYPE_CHECKING:
    from attnctl.pipelines.compose import Composed


def compose(
    background: Annotated[Path, typer.Option("--background", "-b", help="A picture.", show_default=False)],
    thing: Annotated[
        Path,
        typer.Option(
            "--object", help="The object's picture; with an alpha channel it needs no --mask.", show_default=False
        ),
    ],
    box: Annotated[
        str,
        typer.Option(
            help="Where the object goes: left,top,right,bottom in shares of the background or in its pixels.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Names the background's things and the object.", show_default=False)
    ],
    mask: Annotated[Path | None, typer.Option(help="The object in its picture: white, or what was painted.")] = None,
    words: Annotated[
        str | None,
        typer.Option(help="Phrases of the prompt that mean the object, with commas; default: the last thing it names."),
    ] = None,
    others: Annotated[
        str | None,
        typer.Option(help="Phrases that mean things of the background; default: all other things it names."),
    ] = None,
    preset: Annotated[str, typer.Option(help="ours; paper, or paper-painting, paper-sketch, paper-cartoon.")] = "ours",
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
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures; made if need be.")] = Path("out"),
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, max=THREADS, help="Threads of the processor; default: as for generate.")
    ] = None,
) -> None:
    """Put an object into a picture, without training (PrimeComposer).

    - attnctl compose --background park.jpg --object car.png --box 0.55,0.4,0.95,0.8 --prompt "a cat and a red car"
    - attnctl compose -b park.jpg --object shop.jpg --mask car-mask.png --box 300,200,460,330 -p "a cat and a red car"
    - attnctl compose ... --set start=0 --set guidance=2.5 --preset paper-cartoon

    Writes the picture, a sheet beside the background and the pasted pixels, and what was done as JSON.
    """
    from attnctl.pipelines.compose_settings import settings_of

    changes = settings(set_ or [])
    settings_of(preset, **changes)
    where, shape = numbers(box, 4, "--box", "left,top,right,bottom"), size_of(size)
    check_writable(out)
    from attnctl import loading
    from attnctl.app.bars import bars, paused
    from attnctl.app.drawing import steps_shown
    from attnctl.pipelines.compose import Composition, PrimeComposer

    asked = Composition(background, thing, where, prompt, mask, phrases(words), phrases(others), seed)
    if threads is None and model in loading.embedded():
        threads = 1  # as for generate
    more: dict[str, Any] = {} if negative is None else {"negative_prompt": negative}
    with bars() as bar:
        pipe = open_model(model, device, dtype, bar, threads)
        with steps_shown(pipe, bar, "composing"):
            composer = PrimeComposer(pipe, preset, **changes)
            (made,) = composer.batch([asked], measure=check, size=shape, **more)
        with paused(bar):
            if words is None:
                tell(f"the object is {', '.join(map(repr, made.words))}: the last thing that the prompt names")
            print(*told(made), *map(plain, save(made, prompt, seed, out, preset, changes)), sep="\n", flush=True)


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


def save(made: "Composed", prompt: str, seed: int, out: Path, preset: str, changes: dict[str, Any]) -> list[Path]:
    """Write the picture, the sheet and the report; returns their paths."""
    from attnctl.sheets import grid

    stem = f"{slug(prompt)}-{seed}"
    cells = (("background", made.background), ("pasted", made.pasted), ("composed", made.picture))
    report = {"prompt": prompt, "preset": preset, "settings": changes, "seed": seed} | made.to_dict()
    paths = [out / f"{stem}-{name}" for name in ("report.json", "sheet.png", "composed.png")]
    try:
        out.mkdir(parents=True, exist_ok=True)
        paths[0].write_text(json.dumps(report, indent=1), encoding="utf-8")
        grid([cells]).save(paths[1])
        made.picture.save(paths[2])
    except OSError as error:
        raise UsageError(f"cannot write into {out}: {error.strerror or error}") from error
    return paths
