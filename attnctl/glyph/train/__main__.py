"""python -m attnctl.glyph.train: draws scenes, trains, and writes what attnctl ships."""

import json
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer
from torch.nn import Module

from attnctl.app.command import UsageError, check_writable, run
from attnctl.app.recipe import modules_hash
from attnctl.glyph.scenes import font_path
from attnctl.glyph.train.loop import Settings, read_checkpoint, train
from attnctl.glyph.words import CONCEPTS
from attnctl.loading import MODELS, ModelError, embedded, load, load_autoencoder, quiet, usable_device

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def main() -> None:
    """The whole program."""
    run(app, "python -m attnctl.glyph.train")


@app.callback()
def _options() -> None:
    """Keeps the model's name an argument, however many there are."""


def _finite(value: float) -> float:
    if not isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


def _all_finite(values: list[float]) -> list[float]:
    return [_finite(value) for value in values]


def _positive(value: float) -> float:
    if _finite(value) <= 0:
        raise typer.BadParameter(f"{value:g} is not above 0.")
    return value


Out = Annotated[Path, typer.Option(help="Folder for checkpoints, reports and the result.")]
Steps = Annotated[int, typer.Option(min=1, help="Length of the whole run; a finished run can be resumed with more.")]
Minutes = Annotated[
    float,
    typer.Option(min=0, callback=_finite, help="Stop, with a checkpoint, after so many minutes; 0: run to the end."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, exactly.")]
Seed = Annotated[int, typer.Option(min=0, max=2**40, help="Seed of scenes, weights and noise.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Rate = Annotated[float, typer.Option(callback=_positive, help="Peak learning rate of matrices (Muon).")]
Scenes = Annotated[int, typer.Option(min=1, help="Scenes drawn for training.")]
Vae = Annotated[Path, typer.Option(help="The trained autoencoder.")]
Grounding = Annotated[
    float, typer.Option(min=0, callback=_finite, help="Weight of the grounding loss; 0 leaves it out.")
]
Often = Annotated[
    list[str],
    typer.Option(
        "--often",
        metavar="CONCEPT=WEIGHT",
        help="Take scenes that name this concept so many times as often; repeatable.",
    ),
]
Start = Annotated[
    Path | None,
    typer.Option(help="Begin with the weights of this pipeline, a name as glyph-sd or a folder; default: new ones."),
]
Scales = Annotated[list[float], typer.Option(min=0, callback=_all_finite, help="Guidance scales to sweep.")]


def _check(settings: Settings, device: str) -> None:
    """Refuse what cannot be trained, before the first scene is drawn."""
    usable_device(device)
    check_writable(settings.out)
    read_checkpoint(settings)
    font_path()


LEAST, MOST = 0.01, 100  # weights of concepts


def _concept_weights(often: list[str]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for one in often:
        concept, _, text = one.partition("=")
        if concept not in CONCEPTS:
            raise UsageError(f"--often {one}: {concept!r} is no concept; there are {', '.join(CONCEPTS)}")
        if concept in weights:
            raise UsageError(f"--often {one}: {concept} has a weight already, {weights[concept]:g}")
        try:
            weights[concept] = float(text)
        except ValueError:
            weights[concept] = 0
        if not LEAST <= weights[concept] <= MOST:
            raise UsageError(f"--often {one}: CONCEPT=WEIGHT with a weight from {LEAST} to {MOST}, as --often mouse=2")
    return weights


def _weights(vae: Path) -> str:
    """The weights of an autoencoder, told from others wherever they lie."""
    try:
        return modules_hash({"vae": load_autoencoder(vae)})[:12]
    except ModelError as error:
        raise UsageError(f"--vae: {error}") from error


def _folder_of(start: Path | None) -> Path | None:
    """An embedded model is its folder."""
    return MODELS / start if start is not None and str(start) in embedded() and not start.exists() else start


def _start(folder: Path | None) -> str:
    """The weights of a pipeline to begin with, told from others wherever they lie; "new" without one."""
    if folder is None:
        return "new"
    with quiet():
        from attnctl.glyph.train.score import how_made

    try:
        how_made(folder)
        parts = load(folder.absolute()).components
    except (UsageError, ModelError) as error:
        raise UsageError(f"--start: {error}") from error
    return modules_hash({name: part for name, part in parts.items() if isinstance(part, Module)})[:12]


@app.command()
def autoencoder(
    out: Out = Path("runs/autoencoder"),
    steps: Steps = 6000,
    minutes: Minutes = 0,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
    rate: Rate = 6e-3,
    scenes: Scenes = 4000,
) -> None:
    """The autoencoder, on crops; writes OUT/vae."""
    from attnctl.glyph.train.autoencoder import BATCH, Autoencoding

    task = {"model": "autoencoder", "scenes": scenes, "batch": BATCH}
    settings = Settings(
        out, steps, rate, small_rate=2e-3, seed=seed, minutes=minutes, resume=resume, every=250, task=task
    )
    _check(settings, device)
    train(Autoencoding(scenes, seed, device), settings)


@app.command()
def sd(
    vae: Vae = Path("runs/autoencoder/vae"),
    out: Out = Path("runs/sd"),
    steps: Steps = 15_000,
    minutes: Minutes = 0,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
    rate: Rate = 6e-3,
    scenes: Scenes = 20_000,
    grounding: Grounding = 0.05,
    often: Often = [],  # noqa: B006
    start: Start = None,
) -> None:
    """The Stable Diffusion pipeline; writes OUT/glyph-sd."""
    with quiet():
        from attnctl.glyph.train.sd import BATCH, Denoising

    task = {"model": "sd", "scenes": scenes, "grounding": grounding, "batch": BATCH, "vae": _weights(vae)}
    weights, start = _concept_weights(often), _folder_of(start)
    task |= {"weights": weights, "start": _start(start)}
    settings = Settings(out, steps, rate, seed=seed, minutes=minutes, resume=resume, task=task)
    _check(settings, device)
    train(Denoising(vae, scenes, seed, device, out, grounding, weights=weights, start=start), settings)


@app.command()
def sd3(
    vae: Vae = Path("runs/autoencoder/vae"),
    out: Out = Path("runs/sd3"),
    steps: Steps = 15_000,
    minutes: Minutes = 0,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
    rate: Rate = 6e-3,
    scenes: Scenes = 24_000,
    grounding: Grounding = 0.05,
    often: Often = [],  # noqa: B006
    start: Start = None,
) -> None:
    """The Stable Diffusion 3 pipeline, which attends jointly; writes OUT/glyph-sd3."""
    with quiet():
        from attnctl.glyph.train.sd3 import BATCH, Flow

    task = {"model": "sd3", "scenes": scenes, "grounding": grounding, "batch": BATCH, "vae": _weights(vae)}
    weights, start = _concept_weights(often), _folder_of(start)
    task |= {"weights": weights, "start": _start(start)}
    settings = Settings(out, steps, rate, seed=seed, minutes=minutes, resume=resume, every=250, task=task)
    _check(settings, device)
    train(Flow(vae, scenes, seed, device, out, grounding, weights=weights, start=start), settings)


@app.command()
def judge(
    out: Out = Path("runs/judge"),
    steps: Steps = 6000,
    minutes: Minutes = 0,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
    rate: Rate = 6e-3,
    pictures: Annotated[int, typer.Option(min=2, help="Pictures drawn for training.")] = 24_000,
    vae: Annotated[Path | None, typer.Option(help="Pass half of the pictures through this autoencoder.")] = None,
) -> None:
    """The judge; writes OUT/judge and prints its scores on held-out pictures."""
    from attnctl.glyph.train.judge import BATCH, Judging

    task = {"model": "judge", "pictures": pictures, "batch": BATCH, "vae": _weights(vae) if vae else None}
    settings = Settings(out, steps, rate, seed=seed, minutes=minutes, resume=resume, average=0.995, task=task)
    _check(settings, device)
    train(Judging(pictures, seed, device, out, vae), settings)


@app.command(name="all")
def both(
    out: Out = Path("runs"),
    minutes: Annotated[float, typer.Option(min=0, callback=_finite, help="Length of the run, for both together.")] = 9,
    device: Device = "cpu",
    resume: Resume = False,
    seed: Seed = 0,
    vae: Annotated[Path, typer.Option(help="The trained autoencoder; default: the one that ships.")] = MODELS
    / "glyph-sd"
    / "vae",
    atlas: Annotated[Path | None, typer.Option(help="Sprites, from `atlas`; default: drawn with the font.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Scenes of a step; default: 32 and 48.")] = None,
) -> None:
    """Both pipelines, by the clock, on new scenes at every step; writes OUT/sd/glyph-sd and OUT/sd3/glyph-sd3."""
    usable_device(device)
    check_writable(out)
    weights = _weights(vae)
    with quiet():
        from attnctl.glyph.train.worlds import train_all

    train_all(out, device, minutes, seed, resume, vae, weights, atlas, batch)


@app.command()
def atlas(out: Annotated[Path, typer.Option(help="File to write.")] = Path("atlas.safetensors")) -> None:
    """Draws the sprites of the world into one file, for `all` on machines without the font."""
    from attnctl.glyph.train.atlas import build

    check_writable(out.parent)
    build().save(out)
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.0f} MB")


@app.command()
def pack(out: Annotated[Path, typer.Option(help="File to write.")] = Path("worlds.tar.gz")) -> None:
    """Packs package, atlas and versions, for `all` on another machine."""
    check_writable(out.parent)
    with quiet():
        from attnctl.glyph.train.worlds import pack as packed

    typer.echo(f"{out}: {packed(out):.0f} MB")


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="A glyph pipeline.")] = Path("runs/sd/glyph-sd"),
    scale: Scales = [2.0, 3.0, 4.0, 5.0, 7.5],  # noqa: B006
    seed: Seed = 0,
) -> None:
    """Judges a trained pipeline and writes its model card: things, colours, pairs, and word maps on their things."""
    from attnctl.glyph.train.score import score as figures

    typer.echo(json.dumps(figures(folder, scale, seed), indent=1))


if __name__ == "__main__":
    main()
