"""What a composition costs: passes of the denoiser, time and memory, against a plain run of as many steps.

Plain: the pipeline draws one picture with classifier-free guidance, two forwards a step. A composition inverts two
pictures, once, and then draws. Memory is the highest resident set beyond what was there before. Infusion keeps queries
and keys of each self-attention and makes no table of logits; "one site" is its largest self-attention alone, against
the same by its definition, with the tables of heads x cells x cells numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from clock import placed, synchronise, watched
from models import MODELS, build
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import attnctl
from attnctl.pipelines import Composition, PrimeComposer
from attnctl.processors.composition import infused

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("ours", {}),
    "ours, without infusion": ("ours", {"infuse": 0.0}),
    "ours, from step 0": ("ours", {"start": 0.0}),
    "paper": ("paper", {}),
}
FEW = 2
"""Steps of the models of true size."""


def asked(side: int) -> Composition:
    """Something to compose; what, is nothing to the clock."""
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8)
    mask = np.zeros((side, side), bool)
    mask[side // 4 : -side // 4, side // 4 : -side // 4] = True
    return Composition(
        background=pixels, thing=pixels, mask=mask, box=(0.5, 0.3, 0.9, 0.7), prompt="a cat and a dog", words="dog",
        others=("cat",),
    )  # fmt: skip


def measure(name: str, bar: Progress, device: str = "cpu") -> dict[str, Any]:
    """The plain run and each setting, once."""
    steps = MODELS[name][2] if name == "glyph-sd" else FEW
    run, side = build(name, steps), MODELS[name][1]
    pipe = placed(run.pipe, device)  # type: ignore[attr-defined]
    line = bar.add_task(f"compose: {name}", total=3 + len(SETTINGS))
    plain = watched(torch.no_grad()(run), nullcontext(), device)
    bar.advance(line)
    rows: dict[str, Any] = {}
    base = PrimeComposer(pipe, steps=steps)
    begun = time.perf_counter()
    *_, calls = base.inverted(base.plan([asked(side)], (side, side)))
    synchronise(device)
    rows["two inversions"] = {"passes": calls, "time": time.perf_counter() - begun}
    bar.advance(line)
    for setting, (preset, changes) in SETTINGS.items():
        composer = PrimeComposer(pipe, preset, **{"steps": steps} | changes)
        composer.paths = base.paths
        made: list[Any] = []
        sample = watched(lambda: made.extend(composer.batch([asked(side)], size=(side, side))), nullcontext(), device)  # noqa: B023
        rows[setting] = {"passes": sum(made[0].passes.values()), "time": sample.seconds, "kept": made[0].kept}
        rows[setting]["memory"] = sample.mebibytes
        bar.advance(line)
    sites = [site for site in attnctl.sites(pipe) if site.kind in ("self", "joint")]
    largest = max(sites, key=lambda site: _cells(site, side))
    one = one_site(largest.heads, _cells(largest, side), SITE[name], device) if name in SITE else None
    bar.advance(line)
    grid = largest.grid(side // 8, side // 8)
    return {
        "model": name,
        "device": device,
        "steps": steps,
        "plain": vars(plain),
        "rows": rows,
        "grid": grid,
        "site": one,
    }


SITE = {"sd15": 40}
"""Models of which one site is measured, and the width of a head there."""


def _cells(site: Any, side: int) -> int:
    height, width = site.grid(side // 8, side // 8)
    return int(height * width)


def one_site(heads: int, cells: int, width: int, device: str = "cpu") -> dict[str, dict[str, float]]:
    """Time and memory of one self-attention of one picture: as it is, infused, and infused by its definition."""
    q, k, v, q2, k2 = (torch.randn(1, heads, cells, width, device=device) for _ in range(5))
    inside = torch.zeros(cells, dtype=torch.bool, device=device)
    inside[: cells // 9] = True
    scale = width**-0.5

    def definition() -> Tensor:
        logits, other = (one @ two.mT * scale for one, two in ((q, k), (q2, k2)))
        return torch.where(inside[:, None] | inside, other, logits).softmax(-1) @ v

    runs: dict[str, Callable[[], Any]] = {
        "as it is": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale),
        "infused": lambda: infused(q, k, v, q2, k2, inside, slice(0, cells), scale),
        "infused, by its definition": definition,
    }
    found = {}
    for name, call in runs.items():
        call()
        found[name] = vars(watched(call, nullcontext(), device))
    gap = (runs["infused"]() - definition()).abs().max()
    return found | {"gap": {"largest": float(gap)}}


def show(found: dict[str, Any], console: Console) -> None:
    steps, plain = found["steps"], found["plain"]
    title = f"{found['model']}, {steps} steps; plain {2 * steps} passes, {plain['seconds']:.1f} s"
    title += f", {plain['mebibytes']:.0f} MiB"
    table = Table("setting", "passes", "time / plain", "memory", "kept by infusion", title=title, box=SIMPLE_HEAD)
    for name, row in found["rows"].items():
        memory, kept = (f"{row['memory']:.0f} MiB", f"{row['kept'] / 2**20:.1f} MiB") if "kept" in row else ("", "")
        table.add_row(name, f"{row['passes']:g}", f"{row['time'] / plain['seconds']:.2f}", memory, kept)
    console.print(table)
    if found["site"] is None:
        return
    height, width = found["grid"]
    site = Table("one site", "s", "memory", title=f"self-attention at {height} x {width}", box=SIMPLE_HEAD)
    for name, row in found["site"].items():
        if "seconds" in row:
            site.add_row(name, f"{row['seconds']:.2f}", f"{row['mebibytes']:.0f} MiB")
    console.print(site)
    console.print(f"infused and by its definition differ by at most {found['site']['gap']['largest']:.1e}")
