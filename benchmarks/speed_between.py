"""Whether controls have become dearer since a commit: its own speed.py and today's, in turn, on the same machine.

    python benchmarks/speed_between.py COMMIT attach maps guided --model glyph-sd

A figure is a control's time as a share of the plain run of the same round; shown are medians over all rounds, then and
now, and the second by the first.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parents[1]
Figure = tuple[str, str, str]  # model, topic, setting


def checked_out(commit: str, folder: str) -> Path:
    """The files of a commit, in a folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=HERE, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return Path(folder)


def ratios(found: dict[str, Any]) -> dict[Figure, list[float]]:
    """The time of each setting by that of the plain run, round by round, of what speed.py wrote."""
    told: dict[Figure, list[float]] = {}
    for one in found["measured"]:
        plain = one["seconds"]["plain"]
        for setting in one["ratios"]:
            told[one["model"], one["topic"], setting] = _shares(one["seconds"][setting], plain)
    for one in found["guided"]:
        seconds = {name: [sample["seconds"] for sample in samples] for name, samples in one["samples"].items()}
        for setting in seconds.keys() - {"plain"}:
            told[one["model"], "guided", setting] = _shares(seconds[setting], seconds["plain"])
    return told


def _shares(own: list[float], plain: list[float]) -> list[float]:
    return [a / b for a, b in zip(own, plain, strict=True)]


def measured(tree: Path, arguments: list[str]) -> dict[Figure, list[float]]:
    """One run of a tree's own speed.py."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speed.json"
        environment = os.environ | {"PYTHONPATH": str(tree)}
        command = [sys.executable, str(tree / "benchmarks/speed.py"), *arguments, "--out", str(out)]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tree}: {(done.stderr or done.stdout)[-2000:]}")
        return ratios(json.loads(out.read_text()))


def main(
    commit: Annotated[str, typer.Argument(help="What to compare today's files with.")],
    topics: Annotated[list[str], typer.Argument(help="Any of attach, maps, guided.")],
    model: Annotated[list[str], typer.Option(help="As for speed.py.")] = ["glyph-sd"],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="How often each is run.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds within a run.")] = 3,
) -> None:
    arguments = [*topics, "--repeats", str(repeats), *(part for name in model for part in ("--model", name))]
    found: list[dict[Figure, list[float]]] = [{}, {}]
    with tempfile.TemporaryDirectory() as folder:
        trees = checked_out(commit, folder), HERE
        for number in range(rounds):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                for figure, shares in measured(trees[which], arguments).items():
                    found[which].setdefault(figure, []).extend(shares)
            show(found, commit, f"{number + 1} of {rounds} runs each, of {repeats} rounds")


def show(found: list[dict[Figure, list[float]]], commit: str, said: str) -> None:
    """What is known so far."""
    table = Table("model", "topic", "setting", "then", "now", "now / then", title=f"time / plain, since {commit}")
    for figure in sorted(found[0].keys() & found[1].keys()):
        then, now = (median(one[figure]) for one in found)
        table.add_row(*figure, f"{then:.3f}", f"{now:.3f}", f"{now / then:.3f}")
    Console().print(table, f"{said}, in turn; {os.cpu_count()} cores", sep="\n")


if __name__ == "__main__":
    typer.run(main)
