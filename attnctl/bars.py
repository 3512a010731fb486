"""Step bars of the command line, and room to print beside them."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def bars() -> Iterator[Progress]:
    """Step bars with the time left, on stderr; they vanish when done."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


@contextmanager
def paused(bar: Progress) -> Iterator[None]:
    """Room to print on stdout: while a bar is live, rich sends stdout to the bar's own stream."""
    bar.stop()
    try:
        yield
    finally:
        for task in bar.task_ids:
            bar.remove_task(task)
        bar.start()
