"""What regions with prompts of their own cost: row groups against one dense mask at every site.

FLUX.1's blocks at true width, one of each kind, and the UNet of Stable Diffusion 1.5, random weights, 512 x 512. Cost
is in floating-point operations, time (of the processor, on a CPU) and memory, as ratios to the plain run: medians over
alternating rounds, time and memory within a round. A pass per region costs what it says, 1 + regions plain runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from clock import placed, watched
from models import build
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import attnctl
from attnctl.processors import Couple
from attnctl.processors.row_groups import RowGroups

MODELS, COUNTS, MASKED = ("flux", "sd15"), (1, 2, 4, 8), (4,)
WORDS = (
    "a fluffy cat",
    "a red car",
    "an old tree",
    "a brown dog",
    "a small boat",
    "a tall house",
    "a white horse",
    "a cloud",
)
SIDE = 512  # pixels
Around = Callable[[], AbstractContextManager[Any]]


def couple(count: int) -> Couple:
    """Regions in a grid of two rows, or side by side, with a border that no region covers."""
    rows, columns = (1, count) if count < 4 else (2, count // 2)
    boxes = [
        ((0.1 + column) / columns, (0.1 + row) / rows, (0.9 + column) / columns, (0.9 + row) / rows)
        for row in range(rows) for column in range(columns)
    ]  # fmt: skip
    return Couple(tuple(zip(WORDS, boxes, strict=False)))


@contextmanager
def masked(pipe: Any, control: Couple) -> Any:
    """Every site gets one dense mask of all its queries by all its keys."""
    with patch.object(RowGroups, "worth_it", lambda self: False), attnctl.attach(pipe, control):
        yield


def settings(pipe: Any) -> dict[str, Around]:
    found: dict[str, Around] = {"plain": nullcontext}
    for count in COUNTS:
        name = f"{count} region{'s' * (count > 1)}"
        found[name] = partial(attnctl.attach, pipe, couple(count))
        if count in MASKED:
            found[f"{name}, one mask"] = partial(masked, pipe, couple(count))
    return found


def _cpu_flash(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def counted(run: Callable[[], Any], around: AbstractContextManager[Any]) -> tuple[int, dict[str, int]]:
    """(floating-point operations of one run, those of each kernel of attention)."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with around, FlopCounterMode(display=False, custom_mapping={flash: _cpu_flash}) as counter:
        run()
    kernels = {str(op): count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op)}
    return counter.get_total_flops(), kernels


def observed(run: Callable[[], Any], around: AbstractContextManager[Any], device: str) -> tuple[float, float]:
    """(seconds, peak MiB) of one run."""
    start = time.process_time()
    sample = watched(run, around, device)
    if device == "cpu":  # time of the processor: what else runs on the machine must not count
        return time.process_time() - start, sample.mebibytes
    return sample.seconds, sample.mebibytes


def measure(name: str, repeats: int, bar: Progress, device: str = "cpu") -> dict[str, Any]:
    """Every setting in turn, `repeats` times, each time in another order; operations are counted in a round before."""
    pipe = build(name, 1).pipe  # type: ignore[attr-defined]
    guidance = {"guidance_scale": 1.0} if name == "sd15" else {}  # conditional rows alone

    def run() -> Any:
        noise = torch.Generator().manual_seed(0)
        size = {"height": SIDE, "width": SIDE, "num_inference_steps": 1, "output_type": "latent"}
        return pipe("a street in the evening", generator=noise, **size, **guidance).images

    with ExitStack() as stack:
        placed(pipe, device)
        found = settings(pipe)
        line = bar.add_task(f"regions: {name}", total=(repeats + 1) * len(found))
        flops, kernels = dict[str, int](), dict[str, dict[str, int]]()
        samples: dict[str, list[tuple[float, float]]] = {setting: [] for setting in found}
        for setting, around in found.items():
            flops[setting], kernels[setting] = counted(run, around())
            bar.advance(line)
        stack.callback(bar.remove_task, line)
        for repeat in range(repeats):
            shift = repeat % len(found)
            for setting in [*found][shift:] + [*found][:shift]:
                samples[setting].append(observed(run, found[setting](), device))
                bar.advance(line)
    plain = samples["plain"]
    return {
        "model": name,
        "device": device,
        "rows": [
            {
                "setting": setting,
                "operations": flops[setting] / flops["plain"],
                "seconds": median(one[0] for one in own),
                "time": median(a[0] / b[0] for a, b in zip(own, plain, strict=True)),
                "mebibytes": median(one[1] for one in own),
                "memory": median(a[1] / b[1] for a, b in zip(own, plain, strict=True)),
                "kernels": kernels[setting],
            }
            for setting, own in samples.items()
        ],
    }


def show(found: list[dict[str, Any]], console: Console) -> None:
    """A row per setting."""
    for one in found:
        page = Table(title=f"{one['model']} on {one['device']}, as ratios to the plain run", box=SIMPLE_HEAD)
        for column in ("setting", "operations", "time", "memory", "seconds"):
            page.add_column(column, no_wrap=True, justify="left" if column == "setting" else "right")
        for row in one["rows"]:
            ratios = (f"{row[name]:.2f}" for name in ("operations", "time", "memory"))
            page.add_row(row["setting"], *ratios, f"{row['seconds']:.1f}")
        console.print(page)
        if one["device"] != "cpu":
            kernels = {row["setting"]: ", ".join(row["kernels"]) for row in one["rows"]}
            console.print(f"kernels of attention: {kernels}")
