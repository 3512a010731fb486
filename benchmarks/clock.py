"""Time and memory of one run, on a CPU or an accelerator."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Sample:
    """What one run took: seconds, and the highest memory beyond what was there before."""

    seconds: float
    mebibytes: float


def placed(pipe: Any, device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The pipeline on a device; in this precision where that is no CPU."""
    return pipe if device == "cpu" else pipe.to(device, dtype)


def synchronise(device: str) -> None:
    """Wait until the device has done what it was told; a CPU has when a call returns."""
    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def timed(run: Callable[[], Any], around: AbstractContextManager[Any], device: str = "cpu") -> float:
    """Seconds of one run, what is around it included."""
    synchronise(device)
    start = time.perf_counter()
    with around:
        run()
    synchronise(device)
    return time.perf_counter() - start


def watched(run: Callable[[], Any], around: AbstractContextManager[Any], device: str = "cpu") -> Sample:
    """Time of one run, and its memory: of the resident set on a CPU, else of the device's allocator."""
    gc.collect()
    if device != "cpu":
        before = torch.accelerator.memory_allocated(torch.device(device))
        torch.accelerator.reset_peak_memory_stats(torch.device(device))
        seconds = timed(run, around, device)
        return Sample(seconds, (torch.accelerator.max_memory_allocated(torch.device(device)) - before) / 2**20)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    page, first, done = os.sysconf("SC_PAGE_SIZE"), _pages(), threading.Event()
    highest = first

    def look() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, _pages())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        seconds = timed(run, around)
        highest = max(highest, _pages())
    finally:
        done.set()
        watcher.join()
    return Sample(seconds, (highest - first) * page / 2**20)


def _pages() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])
