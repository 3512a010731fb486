"""Both pipelines in one timed run, on scenes composed on the device; and what a machine without a font needs for it."""

from __future__ import annotations

import io
import os
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import attnctl
from attnctl.app.command import UsageError
from attnctl.glyph.scenes import font_path
from attnctl.glyph.train import atlas
from attnctl.glyph.train.composed import Composer
from attnctl.glyph.train.denoiser import Denoiser
from attnctl.glyph.train.loop import Settings, read_checkpoint, train

WEAK = {"elephant": 2.0, "suitcase": 2.0, "horse": 2.0, "chair": 1.5, "glasses": 1.5, "bench": 1.5}
"""Concepts that come out worst, and how many times as often they are drawn."""

SHARES = {"sd": 0.45, "sd3": 0.55}
"""Parts of the minutes."""

NEEDED = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow", "rich", "typer",
)  # fmt: skip
LONGEST = 1_000_000  # steps; the clock ends a timed run


def composer(file: Path | None, device: str) -> Composer:
    """Scenes from an atlas: one that is given, else drawn here.

    Raises:
        AtlasError: the file holds none.
        FileNotFoundError: no file is given and the font is not installed.
    """
    if file is None:
        font_path()
    return Composer((atlas.build() if file is None else atlas.read(file)).to(device), weights=WEAK)


def settings_of(name: str, out: Path, minutes: float, seed: int, resume: bool, task: dict[str, Any]) -> Settings:
    """The timed run of one of the two pipelines; one that was not begun starts, however `resume` is set."""
    begun = (out / name / "checkpoint.pt").exists()
    return Settings(
        out / name, LONGEST, 6e-3, seed=seed, minutes=SHARES[name] * minutes, timed=True, resume=resume and begun,
        task={"model": name} | task,
    )  # fmt: skip


def train_all(
    out: Path,
    device: str,
    minutes: float,
    seed: int,
    resume: bool,
    vae: Path,
    weights: str,
    file: Path | None,
    batch: int | None,
) -> None:
    """Trains glyph-sd, then glyph-sd3; writes OUT/sd/glyph-sd and OUT/sd3/glyph-sd3.

    weights: those of the autoencoder in `vae`, so that a run goes on with no other.
    """
    from attnctl.glyph.train import sd, sd3

    if minutes <= 0:
        raise UsageError("--minutes is the length of the run here: above 0")
    tasks: dict[str, type[Denoiser]] = {"sd": sd.Denoising, "sd3": sd3.Flow}
    runs = {
        name: settings_of(name, out, minutes, seed, resume, {"batch": batch or task.rows, "vae": weights})
        for name, task in tasks.items()
    }
    for settings in runs.values():
        read_checkpoint(settings)
    scenes = composer(file, device)
    for name, task in tasks.items():
        train(task(vae, 0, seed, device, out / name, batch=batch, composer=scenes), runs[name])


def pack(out: Path) -> float:
    """Writes what `all` needs on another machine: package, atlas, versions of what it stands on. Returns its MB."""
    root = Path(attnctl.__file__).parent
    lines = "".join(f"{name}=={version(name).split('+')[0]}\n" for name in NEEDED)
    how = "pip install -r requirements.txt\npython -m attnctl.glyph.train all --atlas atlas.safetensors --device cuda\n"
    beside = out.with_suffix(".partial")
    drawn = out.with_suffix(".safetensors")
    atlas.build().save(drawn)
    try:
        with tarfile.open(beside, "w:gz") as tar:
            for folder, _, names in os.walk(root, followlinks=True):
                for path in (Path(folder, name) for name in sorted(names) if "__pycache__" not in folder):
                    tar.add(path.resolve(), Path("attnctl") / path.relative_to(root))
            tar.add(drawn, "atlas.safetensors")
            for name, text in (("requirements.txt", lines), ("README.txt", how)):
                entry = tarfile.TarInfo(name)
                entry.size = len(text.encode())
                tar.addfile(entry, io.BytesIO(text.encode()))
        beside.replace(out)
    finally:
        drawn.unlink()
        beside.unlink(missing_ok=True)
    return out.stat().st_size / 1e6
