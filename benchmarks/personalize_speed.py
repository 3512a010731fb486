"""What calibrated attention adds to a training step: medians of ratios to the plain step, in alternating rounds.

Measured is the processor's own time, so that other programs beside it matter little.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from models import MODELS
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from attnctl.pipelines.personalize.concepts import Encoders, caption, read_concepts
from attnctl.pipelines.personalize.kinds import denoising_of
from attnctl.pipelines.personalize.settings import settings_of
from attnctl.pipelines.personalize.trainer import Examples, Trainer

ROWS = {"glyph-sd": (4, 5), "sd15": (1, 1)}  # rows of a step, and steps of a round


def measure(name: str, repeats: int, bar: Progress) -> dict[str, Any]:
    """Seconds of a step, plain and calibrated, on random latents."""
    rows, steps = ROWS[name]
    make, side, _ = MODELS[name]
    pipe, concepts = make(), read_concepts("cat, car")
    with_maps = settings_of("ours", rows=rows, regular_rows=0, masks="none", keep=0.0)
    arms = {"plain": replace(with_maps, bind=0.0, separate=0.0), "calibrated": with_maps}
    dice = torch.Generator().manual_seed(0)
    denoising = denoising_of(pipe)
    trainer = Trainer(denoising, concepts, Encoders(denoising.encoders, concepts, with_maps, dice), with_maps, dice)
    cells = side // pipe.vae_scale_factor
    shape = rows, pipe.unet.config.in_channels, cells, cells
    text = caption([one.phrase for one in concepts], with_maps)
    views = Examples(
        torch.randn(shape, generator=dice), torch.ones(rows, cells, cells), [text] * rows, torch.zeros(rows)
    )
    line = bar.add_task(f"personalize: {name}", total=repeats + 1)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for repeat in range(repeats + 1):
        for arm in [*arms][:: 1 if repeat % 2 else -1]:
            trainer.settings, start = arms[arm], time.process_time()
            trainer.train(views, None, trainer.step + steps)
            if repeat:  # the first round warms up
                times[arm].append((time.process_time() - start) / steps)
        bar.advance(line)
    ratio = median(b / a for a, b in zip(times["plain"], times["calibrated"], strict=True))
    return {"model": name, "rows": rows, "plain": median(times["plain"]), "ratio": ratio, "seconds": times}


def show(found: list[dict[str, Any]], console: Console) -> None:
    """A table of both."""
    table = Table("model", "rows", "plain step", "calibrated / plain", title="training steps")
    for one in found:
        table.add_row(one["model"], str(one["rows"]), f"{one['plain']:.2f} s", f"{one['ratio']:.3f}")
    console.print(table)
