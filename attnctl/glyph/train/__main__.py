"""python -m attnctl.glyph.train: draws scenes, trains, and writes what attnctl ships."""

import json
from pathlib import Path
from typing import Annotated

import typer

from attnctl.glyph.train.loop import Settings, train

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def main() -> None:
    """Keeps the model's name an argument, however many there are."""


Out = Annotated[Path, typer.Option(help="Folder for checkpoints, reports and the result.")]
Steps = Annotated[int, typer.Option(help="Length of the whole run; a finished run can be resumed with more.")]
Minutes = Annotated[float, typer.Option(help="Stop, with a checkpoint, after so many minutes; 0: run to the end.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out, exactly.")]
Seed = Annotated[int, typer.Option(help="Seed of scenes, weights and noise.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate of matrices (Muon).")]
Scenes = Annotated[int, typer.Option(help="Scenes drawn for training.")]


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
    from attnctl.glyph.train.autoencoder import Autoencoding

    settings = Settings(out, steps, rate, small_rate=2e-3, seed=seed, minutes=minutes, resume=resume, every=250)
    train(Autoencoding(scenes, seed, device), settings)


@app.command()
def sd(
    vae: Annotated[Path, typer.Option(help="The trained autoencoder.")] = Path("runs/autoencoder/vae"),
    out: Out = Path("runs/sd"),
    steps: Steps = 15_000,
    minutes: Minutes = 0,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
    rate: Rate = 6e-3,
    scenes: Scenes = 20_000,
    grounding: Annotated[float, typer.Option(help="Weight of the grounding loss; 0 leaves it out.")] = 0.05,
) -> None:
    """The Stable Diffusion pipeline; writes OUT/glyph-sd."""
    from attnctl.glyph.train.sd import Denoising

    settings = Settings(out, steps, rate, seed=seed, minutes=minutes, resume=resume)
    train(Denoising(vae, scenes, seed, device, out, grounding), settings)


@app.command()
def judge(
    out: Out = Path("runs/judge"),
    steps: Steps = 6000,
    minutes: Minutes = 0,
    resume: Resume = False,
    seed: Seed = 0,
    device: Device = "cpu",
    rate: Rate = 6e-3,
    pictures: Annotated[int, typer.Option(help="Pictures drawn for training.")] = 24_000,
    vae: Annotated[Path | None, typer.Option(help="Pass half of the pictures through this autoencoder.")] = None,
) -> None:
    """The judge; writes OUT/judge and prints its scores on held-out pictures."""
    from attnctl.glyph.train.judge import Judging

    settings = Settings(out, steps, rate, seed=seed, minutes=minutes, resume=resume, average=0.995)
    train(Judging(pictures, seed, device, out, vae), settings)


@app.command()
def score(
    folder: Annotated[Path, typer.Argument(help="A glyph pipeline.")] = Path("runs/sd/glyph-sd"),
    scale: Annotated[list[float], typer.Option(help="Guidance scales to sweep.")] = [2.0, 3.0, 4.0, 5.0, 7.5],  # noqa: B006
    seed: Seed = 0,
) -> None:
    """Judges a trained pipeline and writes its model card: things, colours, pairs, and word maps on their things."""
    from attnctl.glyph.train.score import score as figures

    typer.echo(json.dumps(figures(folder, scale, seed), indent=1))


if __name__ == "__main__":
    app()
