"""`attnctl batch`: its options, and what it prints around a batch."""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctl.app.command import UsageError, check_writable, plain, tell
from attnctl.app.limits import GROUP, THREADS
from attnctl.loading import DTYPES, usual

if TYPE_CHECKING:
    from attnctl.app.batch.jobs import Placed
    from attnctl.app.batch.planning import Plan
    from attnctl.app.batch.results import How

_MOST = 20  # faults of a file that are told


def batch(
    file: Annotated[
        Path | None, typer.Argument(help="Jobs, as .yaml, .jsonl or .csv; or a folder of pictures.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures; made if need be.")] = Path("out"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the file, say what is to draw, and stop.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Draw only what failed before.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="Make the manifest and contact sheets of this folder again, and stop.")
    ] = None,
    sheet: Annotated[
        str | None, typer.Option(help="For --report: fields of columns, rows and pages, as x=seed,y=controls,z=prompt.")
    ] = None,
    score: Annotated[
        list[str] | None, typer.Option(help="Score each picture: judge, or clip:FOLDER; may be given several times.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a row, and stop.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field for all rows, as seed=5; a list in brackets is an axis. Several times."),
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Pictures drawn together at most; default: 4 for glyph-sd, else 1.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", "--devices", help="cpu, cuda, cuda:1, ...; several, as in cuda:0,cuda:1, draw side by side."
        ),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(help="Draw on the Ray cluster at this address; auto: the one of this machine.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Threads of the processor; default: as for generate.")] = None,
) -> None:
    """Draw many pictures from a file of jobs; what is in the folder already is not drawn again.

    - attnctl batch jobs.yaml --out night --dry-run
    - attnctl batch jobs.yaml --out night
    - attnctl batch night --set "seed=[5, 6]" --set controls=astar --out again

    A row holds prompt, negative, seed, steps, guidance, size, controls, maps, trace, model and compose. Axes make many
    jobs of one row: product: {seed: [1, 2, 3], controls: [none, segregation, astar]} takes every combination, zip:
    takes lists in step.

    A batch that was stopped, in whatever way, goes on with the same command; the first Ctrl-C ends it after the
    pictures under way, a second one at once. Exit code 1: some job failed, and failures.jsonl says which and why.
    """
    from attnctl.app.batch import jobs, planning
    from attnctl.app.batch.results import How
    from attnctl.app.batch.scores import check_scores
    from attnctl.app.batch.shares import Share

    if schema:
        print(json.dumps(jobs.schema(), indent=2))
        return
    scores = tuple(dict.fromkeys(score or ()))
    check_scores(scores)
    if report is not None:
        _report(report, scores, sheet)
        return
    if sheet is not None:
        raise UsageError("--sheet is for --report DIR, once the pictures are there")
    if file is None:
        raise UsageError("there is no job file; attnctl batch --help shows one")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    for name, value, most in (("--threads", threads, THREADS), ("--group", group, GROUP)):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{name} {value}: from 1 to {most}")
    placed = _read(file, set_ or [])
    check_writable(out)
    what = Share.of().part_of(planning.plan(placed, out, dtype, retry_failed, group))
    if dry_run:
        print(_told(what))
        return
    _draw(what, How(device, dtype, threads, scores, ray))


def _read(file: Path, overrides: list[str]) -> "list[Placed]":
    from attnctl.app.batch import job_files
    from attnctl.app.batch.faults import JobError

    try:
        return job_files.read_jobs(file, job_files.read_overrides(overrides))
    except JobError as error:
        for line in error.lines[:_MOST]:
            tell(line)
        if len(error.lines) > _MOST:
            tell(f"and {len(error.lines) - _MOST} more")
        raise typer.Exit(2) from None


def _draw(what: "Plan", how: "How") -> None:
    from attnctl.app.bars import bars, paused
    from attnctl.app.batch import running
    from attnctl.app.batch.folder import FAILURES

    done = failed = 0
    whole = len(what.missing)
    with bars(memory=3600) as bar, _one_ctrl_c() as stopped:
        try:
            for result in running.draw(what, how, bar, stopped):
                done += result.drawn
                if result.error is not None:
                    failed += 1
                    with paused(bar, keep=running.LABEL):
                        tell(f"{result.place}, seed {result.job.seed}: {result.error}")
                elif result.drawn:
                    with paused(bar, keep=running.LABEL):
                        print(f"{done + failed}/{whole}  {plain(result.path)}", flush=True)
            if stopped() and done + failed < whole:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            bar.stop()
            tell(f"{done} of {whole} pictures drawn; the same command goes on from here")
            raise
    print(f"{_pictures(done)} drawn, {len(what.there)} there already, {failed} failed: {plain(what.out)}")
    if failed:
        tell(f"{what.out / FAILURES} says which failed; --retry-failed draws only those")
        raise typer.Exit(1)


@contextmanager
def _one_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed or the process told to end; a second time, it is a `KeyboardInterrupt`."""
    pressed: list[int] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        tell("stops after the pictures under way; once more: at once")

    try:
        before = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        before = {}
    try:
        yield lambda: bool(pressed)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(folder: Path, scores: tuple[str, ...], sheet: str | None) -> None:
    from attnctl.app.batch.contact_sheets import Axes
    from attnctl.app.batch.report import write_report

    if not folder.is_dir():
        raise UsageError(f"--report {folder}: there is no such folder")
    print(*map(plain, write_report(folder, scores, None if sheet is None else Axes.parse(sheet))), sep="\n")


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
            f"{len(what.to_draw)} groups",
            *([f"models: {models}"] if models else []),
        ]
    )


def _pictures(count: int) -> str:
    return f"{count} picture" + "s" * (count != 1)
