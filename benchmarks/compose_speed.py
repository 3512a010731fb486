"""What a composition costs: passes of the denoiser and time, against a plain run of as many steps; and its memory.

Plain: the pipeline draws one picture with classifier-free guidance, two forwards a step. A composition inverts two
pictures, once, and then draws; "again" has the inversions. Infusion keeps queries and keys of each self-attention; a
table of all logits of one site would take heads x cells x cells numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from models import MODELS, build
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import attnctl
from attnctl.pipelines import Composition, PrimeComposer

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("ours", {}),
    "ours, without infusion": ("ours", {"infuse": 0.0}),
    "ours, from step 0": ("ours", {"start": 0.0}),
    "paper": ("paper", {}),
}


def asked(side: int) -> Composition:
    """Something to compose; what, is nothing to the clock."""
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : -side // 4, side // 4 : -side // 4] = True
    return Composition(
        background=pixels, thing=pixels, mask=mask, box=(0.5, 0.3, 0.9, 0.7), prompt="a cat and a dog", words="dog",
        others=("cat",),
    )  # fmt: skip


def measure(name: str, bar: Progress, steps: int = 4) -> dict[str, Any]:
    """Each setting once, after the plain run; a composer of its own each."""
    run, side = build(name, steps), MODELS[name][1]
    pipe = run.pipe  # type: ignore[attr-defined]
    line = bar.add_task(f"compose: {name}", total=1 + len(SETTINGS))
    plain = _seconds(run)
    bar.advance(line)
    rows: dict[str, Any] = {}
    for setting, (preset, changes) in SETTINGS.items():
        composer = PrimeComposer(pipe, preset, **{"steps": steps} | changes)
        plan = composer.plan([asked(side)], (side, side))
        begun = time.perf_counter()
        composer.inverted(plan)
        inversion = time.perf_counter() - begun
        begun = time.perf_counter()
        (made,) = composer.batch([asked(side)], size=(side, side))
        rows[setting] = {"inversion": inversion, "again": time.perf_counter() - begun, "kept": made.kept}
        rows[setting]["passes"] = sum(made.passes.values())
        bar.advance(line)
    sites = [site for site in attnctl.sites(pipe) if site.kind in ("self", "joint")]
    grid = max((site.grid(side // 8, side // 8) for site in sites), key=lambda grid: grid[0] * grid[1])
    table = max(site.heads for site in sites) * (grid[0] * grid[1]) ** 2 * 4
    return {"model": name, "steps": steps, "plain": plain, "rows": rows, "grid": grid, "table": table}


def _seconds(run: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    with torch.no_grad():
        run()
    return time.perf_counter() - begun


def show(found: dict[str, Any], console: Console) -> None:
    steps, plain = found["steps"], found["plain"]
    title = f"{found['model']}, {steps} steps; plain {plain:.1f} s, {2 * steps} passes"
    table = Table("setting", "passes again", "inversion / plain", "again / plain", "kept", title=title, box=SIMPLE_HEAD)
    for name, row in found["rows"].items():
        times = [f"{row[one] / plain:.2f}" for one in ("inversion", "again")]
        table.add_row(name, f"{row['passes']:g}", *times, f"{row['kept'] / 2**20:.1f} MiB")
    console.print(table)
    height, width = found["grid"]
    console.print(f"all logits of one site at {height} x {width}: {found['table'] / 2**20:.1f} MiB")
