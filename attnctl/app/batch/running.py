"""Carrying out a plan: what is missing is drawn, written by threads beside it, and told as it comes.

A picture is named by what was asked for, appears whole or not at all, and holds its own recipe. So a batch that was
stopped, in whatever way, goes on where it was, and a row that changes draws its own picture again and no other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.app.batch.folder import MANIFEST, held, note_failure, tidy
from attnctl.app.batch.job_files import read_jobs
from attnctl.app.batch.jobs import Job, check_jobs
from attnctl.app.batch.planning import Group, Plan, plan
from attnctl.app.batch.report import write_report
from attnctl.app.batch.results import How, Result, drawn, failed, there
from attnctl.app.batch.scores import check_scores, note_scores, score_of
from attnctl.app.batch.shares import Share
from attnctl.app.batch.worker import Drawn, Worker
from attnctl.app.command import UsageError, check_writable

if TYPE_CHECKING:
    from rich.progress import Progress

LABEL = "pictures"
"""Of the bar of the whole batch."""

WRITERS = 2
_WAITING = 4  # pictures that may wait for each writer: memory has an end


def run(
    jobs: str | Path | Iterable[Job | Mapping[str, Any]],
    out: str | Path,
    *,
    device: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    group: int | None = None,
    scores: Iterable[str] = (),
    ray: str | None = None,
    retry_failed: bool = False,
    bar: "Progress | None" = None,
) -> Iterator[Result]:
    """Draw what is missing of a batch; yields each result as it comes, first those that are there already.

    Args:
        jobs: a job file, or jobs as `Job` or as rows. All of them are checked before this returns.
        out: the folder of the pictures; made if need be.
        device: as for `attnctl.load`; default: cuda if there is one, else cpu. Several with commas between them, as in
            "cuda:0,cuda:1", draw side by side, each in a process of its own.
        dtype: "float32", "float16" or "bfloat16".
        threads: of the processor, for each device; default: 1 for an embedded model, else torch's own number.
        group: how many pictures are drawn together at most; default: what suits the model.
        scores: of each picture, "judge" or "clip:FOLDER", see `attnctl.app.batch.scores`.
        ray: draw on the Ray cluster at this address ("auto": the one of this machine) instead of here.
        retry_failed: draw only those that failed before.
        bar: shows how far the batch is.

    Raises:
        JobError: a job is wrong.
        UsageError: `out` cannot be written, or there is no such score.
    """
    out, scores = Path(out), tuple(scores)
    check_scores(scores)
    if isinstance(jobs, str | Path):
        placed = read_jobs(Path(jobs))
    else:
        rows = (job.model_dump(exclude_defaults=True) if isinstance(job, Job) else job for job in jobs)
        placed = check_jobs((f"job {number}", row) for number, row in enumerate(rows, 1))
    check_writable(out)
    what = Share.of().part_of(plan(placed, out, dtype, retry_failed, group))
    return draw(what, How(device, dtype, threads, scores, ray), bar)


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
    told, news = 0, False
    what.out.mkdir(parents=True, exist_ok=True)
    share = Share.of()
    with held(what.out, shared=share.world > 1) as hold:
        for task in what.there:
            yield there(task)
        total = bar.add_task(LABEL, total=len(what.missing))
        for name in how.scores:
            score_of(name)  # whatever it is missing, is missing before the first picture
        if how.ray is None and how.device is None:
            how = replace(how, device=share.device())
        for result in _drawn(what, how, bar, stopped):
            told, news = told + 1, news or result.drawn
            bar.advance(total)
            yield result
        if hold.last():
            tidy(what.out)
            whole = told == len(what.missing)  # a report of less would only be made again
            if whole and (news or share.world > 1 or not (what.out / MANIFEST).exists()):
                write_report(what.out, how.scores)


def _drawn(what: Plan, how: How, bar: "Progress", stopped: Callable[[], bool]) -> Iterator[Result]:
    if how.ray is not None:
        from attnctl.app.batch import cluster

        yield from cluster.results(what.to_draw, how, how.ray, stopped)
        return
    devices = [name.strip() for name in (how.device or "").split(",")]
    if len(devices) > 1:
        from attnctl.app.batch import processes

        yield from processes.results(what.to_draw, how, devices, stopped)
        return
    worker = Worker(how.device, how.dtype, how.threads, bar)
    try:
        yield from results(_until(stopped, what.to_draw), worker, how.scores)
    finally:
        worker.close()


def _until(stopped: Callable[[], bool], groups: Iterable[Group]) -> Iterator[Group]:
    for group in groups:
        if stopped():
            return
        yield group


def results(groups: Iterable[Group], worker: Worker, scores: tuple[str, ...] = ()) -> Iterator[Result]:
    """The results of groups; pictures are written and scored while the next ones are drawn."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(WRITERS, "attnctl-writer") as pool:
        try:
            for group in groups:
                for one in worker.draw(group):
                    waiting.append(pool.submit(_written, one, scores))
                while waiting and (waiting[0].done() or len(waiting) > WRITERS * _WAITING):
                    yield waiting.popleft().result()
        except KeyboardInterrupt:
            yield from (one.result() for one in waiting)
            raise
        yield from (one.result() for one in waiting)


def _written(one: Drawn, scores: tuple[str, ...]) -> Result:
    """Write the files of a task and note its scores, or its failure."""
    task, path = one.task, one.task.path
    try:
        if one.error is not None:
            note_failure(path.parent, task.key, one.error, task.place, task.job.model_dump(mode="json"))
            return failed(task, one.error)
        for path, write in one.files.items():
            write(path)
        if one.picture is not None:
            note_scores(path.parent, task.key, one.picture, task.job.prompt, scores)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}; the same command goes on") from error
    return drawn(task)
