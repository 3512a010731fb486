"""What a composition costs: passes of the denoiser, time and memory, against a plain run of as many steps.

Plain: the pipeline draws one picture with classifier-free guidance, two forwards a step. A composition inverts two
pictures, once, and then draws. Time is of the processor; memory is the highest resident set beyond what was there
before. Infusion keeps queries and keys of each self-attention and makes no table of logits; "one site" is the largest
self-attention of SD 1.5 alone, against the same by its definition, with the tables of heads x cells x cells numbers.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clock import watched
from models import MODELS, build
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from attnctl.pipelines import Composition, PrimeComposer
from attnctl.pipelines.inversion_cache import InversionCache
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


def measure(name: str, bar: Progress, folder: Path) -> dict[str, Any]:
    """The plain run and each setting, once. What was measured is noted in the folder: one that is stopped goes on."""
    steps = MODELS[name][2] if name == "glyph-sd" else FEW
    run, side = build(name, steps), MODELS[name][1]
    pipe = run.pipe  # type: ignore[attr-defined]
    notes = folder / f"compose-{name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    known = {}
    for text in notes.read_text().splitlines() if notes.exists() else ():
        one = json.loads(text)
        known[one.pop("part")] = one
    cache = InversionCache(folder / f"compose-{name}-inversions", name)

    def inversions() -> dict[str, Any]:
        base = PrimeComposer(pipe, steps=steps, cache=cache)
        plan, begun = base.plan([asked(side)], (side, side)), time.process_time()
        *_, calls = base.inverted(plan)
        return {"passes": calls, "seconds": time.process_time() - begun}

    def composing(preset: str, changes: dict[str, Any]) -> dict[str, Any]:
        composer, made = PrimeComposer(pipe, preset, cache=cache, **{"steps": steps} | changes), list[Any]()
        sample = used(lambda: made.extend(composer.batch([asked(side)], size=(side, side))))
        return sample | {"passes": sum(made[0].passes.values()), "kept": made[0].kept}

    parts: dict[str, Callable[[], Any]] = {"plain": lambda: used(torch.no_grad()(run)), "two inversions": inversions}
    parts |= {setting: partial(composing, *how) for setting, how in SETTINGS.items()}
    parts["one site"] = lambda: one_site(*SITE)
    line = bar.add_task(f"compose: {name}", total=len(parts))
    for part, work in parts.items():
        if part not in known:
            known[part] = work()
            with notes.open("a") as file:
                file.write(json.dumps({"part": part} | known[part]) + "\n")
        bar.advance(line)
    notes.unlink()
    shutil.rmtree(cache.folder, ignore_errors=True)
    return {"model": name, "steps": steps, "parts": known}


def used(run: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of the processor, which do not tell what else the machine does, and the peak of memory."""
    begun = time.process_time()
    memory = watched(run, nullcontext()).mebibytes
    return {"seconds": time.process_time() - begun, "mebibytes": memory}


SITE = (8, 64 * 64, 40)
"""Heads, cells and width of a head of the largest self-attention of SD 1.5 at 512 x 512."""


def one_site(heads: int, cells: int, width: int) -> dict[str, dict[str, float]]:
    """Time and memory of one self-attention of one picture: as it is, infused, and infused by its definition."""
    q, k, v, q2, k2 = (torch.randn(1, heads, cells, width) for _ in range(5))
    inside = torch.zeros(cells, dtype=torch.bool)
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
        found[name] = used(call)
    gap = (runs["infused"]() - definition()).abs().max()
    return found | {"gap": {"largest": float(gap)}}


def show(found: dict[str, Any], console: Console) -> None:
    steps, parts = found["steps"], found["parts"]
    plain, site = parts["plain"], parts["one site"]
    title = f"{found['model']}, {steps} steps; plain {2 * steps} passes, {plain['seconds']:.1f} s of the processor"
    title += f", {plain['mebibytes']:.0f} MiB"
    table = Table("setting", "passes", "time / plain", "memory", "kept by infusion", title=title, box=SIMPLE_HEAD)
    for name, row in parts.items():
        if "passes" in row:
            memory = (f"{row['mebibytes']:.0f} MiB", f"{row['kept'] / 2**20:.1f} MiB") if "kept" in row else ("", "")
            table.add_row(name, f"{row['passes']:g}", f"{row['seconds'] / plain['seconds']:.2f}", *memory)
    console.print(table)
    alone = Table("one site", "s", "memory", title="a self-attention of SD 1.5 at 64 x 64", box=SIMPLE_HEAD)
    for name, row in site.items():
        if "seconds" in row:
            alone.add_row(name, f"{row['seconds']:.2f}", f"{row['mebibytes']:.0f} MiB")
    console.print(alone)
    console.print(f"infused and by its definition differ by at most {site['gap']['largest']:.1e}")
