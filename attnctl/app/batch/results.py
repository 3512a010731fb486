"""What a batch is told, and what it tells."""

from dataclasses import dataclass
from pathlib import Path

from attnctl.app.batch.jobs import Job
from attnctl.app.batch.planning import Task


@dataclass(frozen=True)
class How:
    """Where a batch is drawn, and what beside; see `attnctl.batch.run`."""

    device: str | None = None
    dtype: str = "float32"
    threads: int | None = None
    scores: tuple[str, ...] = ()
    ray: str | None = None


@dataclass(frozen=True)
class Result:
    """What became of a job: `drawn` now, there already, or an `error` in one line."""

    job: Job
    place: str
    key: str
    path: Path
    drawn: bool = False
    error: str | None = None


def there(task: Task) -> Result:
    return Result(task.job, task.place, task.key, task.path)


def failed(task: Task, error: str) -> Result:
    return Result(task.job, task.place, task.key, task.path, error=error)


def drawn(task: Task) -> Result:
    return Result(task.job, task.place, task.key, task.path, drawn=True)
