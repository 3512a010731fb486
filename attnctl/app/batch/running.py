"""Carrying out a plan: what is missing is drawn, written by threads beside it, and told as it comes.

A picture is named by what was asked for, appears whole or not at all, and holds its own recipe. So a batch that was
stopped, in whatever way, goes on where it was, and a row that changes draws its own picture again and no other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.app.batch.folder import MANIFEST, held, note_failure, tidy
from attnctl.app.batch.job_files import read_jobs
from attnctl.app.batch.jobs import Job, check_jobs
from attnctl.app.batch.planning import Group, Plan, plan
from attnctl.app.batch.report import write_report
from attnctl.app.batch.worker import Drawn, Worker
from attnctl.app.command import UsageError, check_writable

if TYPE_CHECKING:
    from rich.progress import Progress

LABEL = "pictures"
"""Of the bar of the whole batch."""

WRITERS = 2
_WAITING = 4  # pictures that may wait for each writer: memory has an end


@dataclass(frozen=True)
class How:
    """Where a batch is drawn; see `run`."""

    device: str | None = None
    dtype: str = "float32"
    threads: int | None = None


@dataclass(frozen=True)
class Result:
    """What became of a job: `drawn` now, there already, or an `error` in one line."""

    job: Job
    place: str
    path: Path
    drawn: bool = False
    error: str | None = None


def run(
    jobs: str | Path | Iterable[Job | Mapping[str, Any]],
    out: str | Path,
    *,
    device: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    group: int | None = None,
    retry_failed: bool = False,
    bar: "Progress | None" = None,
) -> Iterator[Result]:
    """Draw what is missing of a batch; yields each result as it comes, first those that are there already.

    Args:
        jobs: a job file, or jobs as `Job` or as rows. All of them are checked before this returns.
        out: the folder of the pictures; made if need be.
        device: as for `attnctl.load`; default: cuda if there is one, else cpu.
        dtype: "float32", "float16" or "bfloat16".
        threads: of the processor; default: 1 for an embedded model, else torch's own number.
        group: how many pictures are drawn together at most; default: what suits the model.
        retry_failed: draw only those that failed before.
        bar: shows how far the batch is.

    Raises:
        JobError: a job is wrong.
        UsageError: `out` cannot be written.
    """
    out = Path(out)
    if isinstance(jobs, str | Path):
        placed = read_jobs(Path(jobs))
    else:
        rows = (job.model_dump(exclude_defaults=True) if isinstance(job, Job) else job for job in jobs)
        placed = check_jobs((f"job {number}", row) for number, row in enumerate(rows, 1))
    check_writable(out)
    return draw(plan(placed, out, dtype, retry_failed, group), How(device, dtype, threads), bar)


def draw(
    what: Plan,
    how: How,
    bar: "Progress | None" = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Result]:
    """Carry out a plan; its results as they come.

    Args:
        what: the plan.
        how: where it is drawn.
        bar: as for `run`.
        stopped: asked before each group; once it says so, what is drawn is written, and that is all.
    """
    from rich.progress import Progress

    bar = bar or Progress(disable=True)
    drawn = False
    what.out.mkdir(parents=True, exist_ok=True)
    with held(what.out):
        for task in what.there:
            yield Result(task.job, task.place, task.path)
        total = bar.add_task(LABEL, total=len(what.missing))
        worker = Worker(how.device, how.dtype, how.threads, bar)
        try:
            for result in _results(_until(stopped, what.to_draw), worker):
                drawn |= result.drawn
                bar.advance(total)
                yield result
        finally:
            worker.close()
        tidy(what.out)
        if drawn or not (what.out / MANIFEST).exists():
            write_report(what.out)


def _until(stopped: Callable[[], bool], groups: Iterable[Group]) -> Iterator[Group]:
    for group in groups:
        if stopped():
            return
        yield group


def _results(groups: Iterable[Group], worker: Worker) -> Iterator[Result]:
    """The results of groups; pictures are written while the next ones are drawn."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(WRITERS, "attnctl-writer") as pool:
        try:
            for group in groups:
                for drawn in worker.draw(group):
                    waiting.append(pool.submit(_written, drawn))
                while waiting and (waiting[0].done() or len(waiting) > WRITERS * _WAITING):
                    yield waiting.popleft().result()
        except KeyboardInterrupt:
            yield from (one.result() for one in waiting)
            raise
        yield from (one.result() for one in waiting)


def _written(drawn: Drawn) -> Result:
    """Write the files of a task, or note its failure."""
    task = drawn.task
    if drawn.error is not None:
        note_failure(task.path.parent, task.key, drawn.error, task.place, task.job.model_dump(mode="json"))
        return Result(task.job, task.place, task.path, error=drawn.error)
    for path, write in drawn.files.items():
        try:
            write(path)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}; the same command goes on") from error
    return Result(task.job, task.place, task.path, drawn=True)
