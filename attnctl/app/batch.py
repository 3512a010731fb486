"""Batches: jobs in, a folder of pictures out. The folder is the database: what is missing in it is drawn.

    for result in attnctl.batch.run("jobs.yaml", "out"):
        print(result.path, result.error)

A picture is named by what was asked for, appears whole or not at all, and holds its own recipe. So a batch that was
stopped, in whatever way, goes on where it was, and a row that changes draws its own picture again and no other.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.app.asked import control_of, open_model, recipe_of, slug
from attnctl.app.batch_report import MANIFEST, PICTURE, write_report, write_whole
from attnctl.app.command import UsageError, check_writable, plain, was_interrupted
from attnctl.app.job_files import read_jobs
from attnctl.app.jobs import Job, Placed, check_jobs
from attnctl.errors import AttnctlError, short

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

FAILURES, LOCK = "failures.jsonl", ".batch.lock"
LABEL = "pictures"
"""Of the bar of the whole batch."""

_PART = re.compile(r"\.[0-9a-f]{16}\.part")


@dataclass(frozen=True)
class Task:
    """A job, where it stands, the key of its content, and the file of its picture."""

    job: Job
    place: str
    key: str
    path: Path


@dataclass(frozen=True)
class Result:
    """What became of a job: `drawn` now, there already, or an `error` in one line."""

    job: Job
    place: str
    path: Path
    drawn: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Plan:
    """The pictures of a batch, each once, told apart by whether they are there already."""

    out: Path
    there: list[Task]
    missing: list[Task]


def key_of(job: Job, dtype: str = "float32") -> str:
    """Names a picture by what is asked for; not by time, device or versions, so that a batch may go on elsewhere."""
    asked = job.model_dump(mode="json", exclude_defaults=True) | ({"dtype": dtype} if dtype != "float32" else {})
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def plan(jobs: Iterable[Placed], out: Path, dtype: str = "float32", retry_failed: bool = False) -> Plan:
    """What is there and what is missing in a folder; `retry_failed` leaves of the missing those that failed before."""
    tasks: dict[str, Task] = {}
    for job, place in jobs:
        key = key_of(job, dtype)
        tasks.setdefault(key, Task(job, place, key, out / f"{slug(job.prompt)}-{job.seed}-{key}.png"))
    names = set(os.listdir(out)) if out.is_dir() else set()
    there = [task for task in tasks.values() if task.path.name in names]
    missing = [task for task in tasks.values() if task.path.name not in names]
    if retry_failed:
        failed = _failures(out)
        missing = [task for task in missing if task.key in failed]
    return Plan(out, there, missing)


def run(
    jobs: str | Path | Iterable[Job | Mapping[str, Any]],
    out: str | Path,
    *,
    device: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
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
    return draw(plan(placed, out, dtype, retry_failed), device, dtype, threads, bar)


def draw(
    what: Plan, device: str | None, dtype: str, threads: int | None, bar: "Progress | None" = None
) -> Iterator[Result]:
    """Carry out a plan; its results as they come."""
    import torch
    from rich.progress import Progress

    bar = bar or Progress(disable=True)
    own, drawn = torch.get_num_threads(), False
    what.out.mkdir(parents=True, exist_ok=True)
    with _alone(what.out):
        for name in os.listdir(what.out):
            if _PART.fullmatch(name):  # of a process that was killed
                (what.out / name).unlink(missing_ok=True)
        for task in what.there:
            yield Result(task.job, task.place, task.path)
        total = bar.add_task(LABEL, total=len(what.missing))
        by_model: dict[str, list[Task]] = {}
        for task in what.missing:
            by_model.setdefault(task.job.model, []).append(task)
        try:
            for model, tasks in by_model.items():
                for result in _of_model(model, tasks, device, dtype, threads or _threads(model, own), bar):
                    drawn |= result.drawn
                    bar.advance(total)
                    yield result
        finally:
            torch.set_num_threads(own)
        _keep_failures(what.out)
        if drawn or not (what.out / MANIFEST).exists():
            write_report(what.out)


def _threads(model: str, own: int) -> int:
    from attnctl.loading import embedded

    return 1 if model in embedded() else own  # as `attnctl generate` does


def _of_model(
    model: str, tasks: list[Task], device: str | None, dtype: str, threads: int, bar: "Progress"
) -> Iterator[Result]:
    """The results of the jobs of one model, which is loaded once."""
    from attnctl.app.recipe import weights_hash

    before = set(bar.task_ids)
    try:
        pipe = open_model(model, device, dtype, bar, threads)
        weights = weights_hash(pipe)
    except Exception as error:
        said = _said(error)
        for task in tasks:
            yield _failed(task, said)
        return
    for task in tasks:
        try:
            files = _pictures(pipe, task, weights, bar)
        except Exception as error:
            yield _failed(task, _said(error))
        else:
            _save(files)
            yield Result(task.job, task.place, task.path, drawn=True)
        for one in set(bar.task_ids) - before:
            bar.remove_task(one)


def _pictures(pipe: "DiffusionPipeline", task: Task, weights: str, bar: "Progress") -> dict[Path, tuple[Any, Any]]:
    """(picture, recipe) by file, the picture of the job last."""
    from attnctl.app import drawing

    job = task.job
    if job.shape is not None:
        drawing.check_size(pipe, *job.shape)
    recipe = recipe_of(
        pipe,
        model=job.model,
        weights=weights,
        prompt=job.prompt,
        negative=job.negative,
        seed=job.seed,
        steps=job.steps,
        size=job.shape,
        guidance=job.guidance,
        controls=job.controls,
        maps=drawing.shown_words(pipe, job.prompt)[0] if job.maps is True else job.maps or (),
    )
    controls = [control_of(text) for text in job.controls]
    kind = "controlled" if controls else "plain"
    drawn = drawing.draw(pipe, recipe, controls, plain(short(job.prompt, 40)), bar)
    files: dict[Path, tuple[Any, Any]] = {}
    if recipe.maps:
        sheet = drawing.pictures({kind: drawn}, recipe)["maps"]
        files[task.path.with_name(f"{task.path.stem}-maps.png")] = sheet, replace(recipe, shows="maps")
    files[task.path] = drawn.picture, replace(recipe, shows=kind)
    return files


def _save(files: dict[Path, tuple[Any, Any]]) -> None:
    from attnctl.app.recipe import save

    for path, (picture, recipe) in files.items():
        try:
            save(picture, path, recipe)
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror or error}; the same command goes on") from error


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuse a folder that another batch is drawing into; the system opens the lock of a process that is gone."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another batch is drawing into {out}") from None
        yield


# --- failures ---------------------------------------------------------------------------------------------------------


def _said(error: Exception) -> str:
    """An error in one line; Ctrl-C, whatever a library made of it, stays what it is."""
    if was_interrupted(error):
        raise KeyboardInterrupt from error
    text = " ".join(str(error).split())
    return text if isinstance(error, AttnctlError) else f"{type(error).__name__}: {short(text, 300)}"


def _failed(task: Task, error: str) -> Result:
    """Note a failure at once: the process may not live to the end of the batch."""
    note = {"key": task.key, "error": error, "place": task.place} | task.job.model_dump(mode="json")
    with (task.path.parent / FAILURES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(note, ensure_ascii=False) + "\n")
    return Result(task.job, task.place, task.path, error=error)


def _failures(out: Path) -> dict[str, str]:
    """The last line about each picture that failed and is not there, by key."""
    try:
        lines = (out / FAILURES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    there = {match[1] for name in os.listdir(out) if (match := PICTURE.fullmatch(name))}
    found: dict[str, str] = {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):  # a line that was cut off
            key = json.loads(line)["key"]
            if key not in there:
                found[key] = line
    return found


def _keep_failures(out: Path) -> None:
    """Leave in the file one line for each picture that is still missing."""
    if (out / FAILURES).exists():
        lines = _failures(out).values()
        if lines:
            write_whole(out / FAILURES, "".join(f"{line}\n" for line in lines).encode())
        else:
            (out / FAILURES).unlink()
