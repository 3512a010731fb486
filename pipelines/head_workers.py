"""Measuring batches on several devices: a process for each, which draws what it is handed and keeps its pipeline.

Which candidates share a batch does not depend on how many processes there are, so neither do the scores.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from attnctl.errors import ControlError
from attnctl.pipelines.head_bench import Cost, Drawer, Item, Spread

_drawer: Drawer | None = None  # of a worker


@contextmanager
def spread_over(drawer: Drawer, devices: Sequence[str]) -> Iterator[Spread]:
    """What measures batches, in their order, by a process on each device; a device may be named twice.

    Raises:
        ControlError: the pipeline or the objective cannot be sent to another process; a process died.
    """
    context: Any = torch.multiprocessing.get_context("spawn")
    places = context.Queue()
    for device in devices:
        places.put(device)
    try:
        sent = pickle.dumps(drawer)
    except Exception as error:  # whatever an object of the user's raises
        raise ControlError(f"the objective or the pipeline cannot be sent to other processes: {error}") from None
    pool = ProcessPoolExecutor(
        len(devices), context, initializer=_begin, initargs=(sent, places, torch.get_num_threads(), os.getpid())
    )

    def spread(batches: Iterable[list[Item]]) -> Iterator[list[float]]:
        try:
            for scores, cost in pool.map(_measure, batches):
                drawer.cost += cost
                yield scores
        except BrokenProcessPool:
            raise ControlError("a process of the search died; what was measured is kept, so start it again") from None

    try:
        yield spread
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(sent: bytes, places: Any, threads: int, parent: int) -> None:
    global _drawer
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    _drawer = pickle.loads(sent)
    device = places.get()
    _drawer.pipe.to(device)
    _drawer.pipe.set_progress_bar_config(disable=True)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed ends, too."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _measure(items: list[Item]) -> tuple[list[float], Cost]:
    assert _drawer is not None
    _drawer.cost = Cost()
    return _drawer(items), _drawer.cost
