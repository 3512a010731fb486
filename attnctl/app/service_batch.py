"""A batch for strangers: a visitor's job file, drawn as `attnctl batch` draws it, and the folder as one archive."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.progress import Progress, TaskID

from attnctl.app.batch import running as batch
from attnctl.app.batch.job_files import read_jobs
from attnctl.app.batch.jobs import Job
from attnctl.app.service import Asked, Service, ServiceError, Shown, check_files
from attnctl.app.watched import Bar
from attnctl.files import no_files
from attnctl.loading import embedded

TURN = 8  # pictures in a row; then other visitors have their turn


@dataclass(frozen=True)
class Batch:
    """How far a batch is; the archive comes at its end."""

    done: int
    total: int
    pictures: Shown
    faults: list[str]
    archive: Path | None = None


def checked(service: Service, file: Path) -> list[Job]:
    """The jobs of a file, once this service may draw them all."""
    try:
        check_files(file.read_text(encoding="utf-8", errors="replace").splitlines())
        with no_files():
            jobs = [job for job, _ in read_jobs(file)]
    except ValueError as error:  # without the folder that uploads lie in
        raise ServiceError(str(error).replace(str(file), file.name)) from None
    if len(jobs) > service.limits.jobs:
        raise ServiceError(f"{len(jobs)} pictures: at most {service.limits.jobs} in a batch here")
    for job in jobs:
        service.permitted(job.model)
        controls = "\n".join(job.controls)
        Asked(job.prompt, controls, seed=job.seed, steps=job.steps, size=job.size or "").check(service.limits)
    return jobs


def run(service: Service, file: Path) -> Iterator[Batch]:
    """Draw a job file, and tell how far it is after each picture. Closing it stops the drawing."""
    jobs = checked(service, file)
    out = Path(tempfile.mkdtemp(prefix="batch-", dir=service.folder))
    service.keep([out, out.with_suffix(".zip")])
    pictures, faults = Shown(), list[str]()
    yield Batch(0, len(jobs), [], [])
    for start in range(0, len(jobs), TURN):
        some = jobs[start : start + TURN]
        seconds = len(some) * service.limits.seconds
        for one in service.turns.watch(partial(_drawn, service, some, out), seconds):
            if one is not None:
                said = f"{one.job.prompt[:40]}, seed {one.job.seed}"
                pictures += [(str(one.path), said)] * (one.error is None)
                faults += [f"{said}: {one.error}"] * (one.error is not None)
                yield Batch(len(pictures) + len(faults), len(jobs), list(pictures), list(faults))
    archive = Path(shutil.make_archive(str(out), "zip", out))
    yield Batch(len(jobs), len(jobs), pictures, faults, archive)


def _drawn(service: Service, jobs: Sequence[Job], out: Path, bar: Bar) -> None:
    if any(job.model not in embedded() for job in jobs):
        service.close()  # room for the batch's own
    for result in batch.run(jobs, out, device=service.device, dtype=service.dtype, group=1, bar=_Bars(bar)):
        bar.told.put(result)


class _Bars(Progress):
    """Bars that nobody sees, at each step of which the batch may be stopped."""

    def __init__(self, bar: Bar) -> None:
        super().__init__(disable=True)
        self._bar = bar

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        self._bar.check()
        super().advance(task_id, advance)
