"""Step bars of the command line, and room to print beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def bars(memory: float = 30) -> Iterator[Progress]:
    """Bars with the time left, on stderr; they vanish when done. The last `memory` seconds tell the speed."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    off = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=off, speed_estimate_period=memory) as bar:
        yield bar


@contextmanager
def paused(bar: Progress, keep: str | None = None) -> Iterator[None]:
    """Room to print on stdout: while a bar is live, rich sends stdout to the bar's own stream.

    Afterwards the bars are gone, but for the one of the label `keep`.
    """
    bar.stop()
    try:
        yield
    finally:
        for task in bar.tasks:
            if task.description != keep:
                bar.remove_task(task.id)
        bar.start()
