"""`attnctl batch`: what it prints around a batch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from attnctl.app.command import UsageError, check_writable, plain, tell
from attnctl.app.limits import THREADS
from attnctl.loading import DTYPES, usual

if TYPE_CHECKING:
    from attnctl.app.batch import Plan

_MOST = 20  # faults of a file that are told


def run(
    file: Path | None,
    out: Path,
    dry_run: bool,
    retry_failed: bool,
    report: Path | None,
    schema: bool,
    device: str | None,
    dtype: str,
    threads: int | None,
) -> None:
    """The command, see `attnctl.app.cli`."""
    from attnctl.app import batch, job_files, jobs

    if schema:
        print(json.dumps(jobs.schema(), indent=2))
        return
    if report is not None:
        _report(report)
        return
    if file is None:
        raise UsageError("there is no job file; attnctl batch --help shows one")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    if threads is not None and not 1 <= threads <= THREADS:
        raise UsageError(f"--threads {threads}: from 1 to {THREADS}")
    try:
        placed = job_files.read_jobs(file)
    except jobs.JobError as error:
        for line in error.lines[:_MOST]:
            tell(line)
        if len(error.lines) > _MOST:
            tell(f"and {len(error.lines) - _MOST} more")
        raise typer.Exit(2) from None
    check_writable(out)
    what = batch.plan(placed, out, dtype, retry_failed)
    if dry_run:
        print(_told(what))
        return
    _drawn(what, device, dtype, threads)


def _drawn(what: "Plan", device: str | None, dtype: str, threads: int | None) -> None:
    from attnctl.app import batch
    from attnctl.app.bars import bars, paused

    done = failed = 0
    whole = len(what.missing)
    with bars(memory=3600) as bar:
        try:
            for result in batch.draw(what, device, dtype, threads, bar):
                done += result.drawn
                if result.error is not None:
                    failed += 1
                    with paused(bar, keep=batch.LABEL):
                        tell(f"{result.place}, seed {result.job.seed}: {result.error}")
                elif result.drawn:
                    with paused(bar, keep=batch.LABEL):
                        print(f"{done + failed}/{whole}  {plain(result.path)}", flush=True)
        except KeyboardInterrupt:
            bar.stop()
            tell(f"{done} of {whole} pictures drawn; the same command goes on from here")
            raise
    print(f"{_pictures(done)} drawn, {len(what.there)} there already, {failed} failed: {plain(what.out)}")
    if failed:
        tell(f"{what.out / batch.FAILURES} says which failed; --retry-failed draws only those")
        raise typer.Exit(1)


def _report(folder: Path) -> None:
    from attnctl.app.batch_report import write_report

    if not folder.is_dir():
        raise UsageError(f"--report {folder}: there is no such folder")
    print(*map(plain, write_report(folder)), sep="\n")


def _told(what: "Plan") -> str:
    """What a plan comes to, in a few lines."""
    there, missing = len(what.there), what.missing
    steps = [task.job.steps or usual(task.job.model).get("steps") for task in missing]
    own = sum(count is None for count in steps)
    rest = f", and {_pictures(own)} in as many as the model itself takes" if own else ""
    models = ", ".join(map(plain, dict.fromkeys(task.job.model for task in missing)))
    return "\n".join(
        [
            f"{_pictures(there + len(missing))}, {there} there already, {len(missing)} to draw",
            f"{sum(filter(None, steps))} steps{rest}",
            *([f"models: {models}"] if models else []),
        ]
    )


def _pictures(count: int) -> str:
    return f"{count} picture" + "s" * (count != 1)
