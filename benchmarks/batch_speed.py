"""Batches: how long a plan takes, what drawing in groups saves, and how much of the time the model works.

Planning is measured as the command that a person types, start-up of Python included, on a file of 10,000 jobs in which
250 prompts stand with 5 controls. Groups draw the same pictures in every size, in turn, with writing and the judge.
What they gain is told in processor time of the drawing thread: where other work goes on, the clock says less.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from attnctl.app import drawing
from attnctl.app.batch import running
from attnctl.app.batch.jobs import check_jobs
from attnctl.app.batch.planning import plan
from attnctl.app.batch.worker import Worker
from attnctl.glyph.words import benchmark

SIZES = (1, 2, 4, 8)
CONTROLS = ("none", "segregation")
PROMPTS, SEEDS, STEPS = 1, 16, 10


def planning(repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds and MiB of `attnctl batch FILE --dry-run`, as medians."""
    file = folder / "many.yaml"
    axes = {
        "prompt": [prompt.text for prompt in benchmark()[:250]],
        "controls": ["none", "segregation", "astar", "excitation", "perturb(heads=7)"],
        "seed": list(range(8)),
    }
    file.write_text(yaml.safe_dump({"model": "glyph-sd", "steps": 2, "product": axes}))
    words = [sys.executable, "-m", "attnctl", "batch", str(file), "--out", str(folder / "none"), "--dry-run"]
    seconds, work, memory = list[float](), list[float](), list[float]()
    for _ in range(repeats):
        start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            most = 0.0
            while process.poll() is None:
                most = max(most, _resident(process.pid))
                time.sleep(0.02)
            assert process.stdout is not None and process.stdout.read().startswith("10000 pictures")
        seconds.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        work.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        memory.append(most)
    return {"jobs": 10_000, "seconds": median(seconds), "work": median(work), "MiB": median(memory)}


def _resident(pid: int) -> float:
    """The most memory that a process has had, in MiB; what `wait4` says would hold that of the parent it came from."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return 0.0


@contextmanager
def clocked() -> Iterator[list[float]]:
    """Seconds of each call of the pipeline, while it is open."""
    own, spent = drawing.draw_together, list[float]()

    def draw_together(*args: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        try:
            return own(*args, **settings)
        finally:
            spent.append(time.perf_counter() - start)

    with patch.object(drawing, "draw_together", draw_together):
        yield spent


def grouping(repeats: int, folder: Path, bar: Progress) -> list[dict[str, Any]]:
    """Seconds a picture by control and size of group, and the share of them that the model works."""
    worker, found = Worker("cpu", "float32", None, Progress(disable=True)), []
    line = bar.add_task("groups", total=len(CONTROLS) * len(SIZES) * (repeats + 1))
    for control in CONTROLS:
        rows = {"model": "glyph-sd", "steps": STEPS, "controls": control}
        rows |= {"product": {"prompt": [one.text for one in benchmark()[:PROMPTS]], "seed": list(range(SEEDS))}}
        jobs = check_jobs([("row 1", rows)])
        busy: dict[int, list[float]] = {size: [] for size in SIZES}
        times: dict[int, list[float]] = {size: [] for size in SIZES}
        shares: dict[int, list[float]] = {size: [] for size in SIZES}
        for repeat in range(repeats + 1):
            shift = repeat % len(SIZES)  # who comes after whom must not matter
            for size in SIZES[shift:] + SIZES[:shift]:
                out = folder / f"{control[:4]}-{repeat}-{size}"
                out.mkdir()
                with clocked() as spent:
                    start, work = time.perf_counter(), time.thread_time()
                    results = list(running.results(plan(jobs, out, group=size).to_draw, worker, ("judge",)))
                    seconds, work = time.perf_counter() - start, time.thread_time() - work
                assert all(result.drawn for result in results) and len(results) == len(jobs)
                if repeat:  # the first round warms up
                    times[size].append(seconds / len(jobs))
                    busy[size].append(work)
                    shares[size].append(sum(spent) / seconds)
                bar.advance(line)
        for size in SIZES:
            gain = median(one / many for one, many in zip(busy[1], busy[size], strict=True))
            found.append(
                {"control": control, "group": size, "seconds": median(times[size]), "gain": gain}
                | {"model": median(shares[size])}
            )
    worker.close()
    return found


def measure(repeats: int, bar: Progress) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        return {"planning": planning(repeats, Path(folder)), "groups": grouping(repeats, Path(folder), bar)}


def show(found: dict[str, Any], console: Console) -> None:
    planned = found["planning"]
    console.print(
        f"{planned['jobs']} jobs planned in {planned['seconds']:.1f} s, of which the processor worked "
        f"{planned['work']:.1f} s, with {planned['MiB']:.0f} MiB at most"
    )
    title = f"glyph-sd, {STEPS} steps, {PROMPTS} prompt with {SEEDS} seeds, written and judged"
    table = Table("control", "together", "s / picture", "less work", "of the time in the model", title=title)
    for row in found["groups"]:
        cells = (f"{row['seconds']:.3f}", f"{row['gain']:.2f}", f"{row['model']:.1%}")
        table.add_row(row["control"], str(row["group"]), *cells)
    console.print(table)
