"""The judge against another eye: 100 pictures whose things were named without knowing prompts or the judge's readings.

    python benchmarks/by_eye.py

70 are of glyph-sd's first edition and 30 of an early glyph-sd3, with and without controls; many are bad. Some are of
one prompt and noise under different controls. The labels are of a vision-language model that looked at the pictures
twice as large: "sure" things are there, "doubtful" ones may be meant. missed: sure things that the judge does not see.
taken: doubtful things that it sees; a strict judge takes few. too much: what the judge alone sees.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from attnctl.app import command
from attnctl.glyph import judge

DATA = Path(__file__).parents[1] / "tests" / "glyph" / "data"
SIDE, ACROSS = 128, 10


@dataclass(frozen=True)
class Counts:
    """Of things, by concept."""

    sure: Counter[str]
    missed: Counter[str]
    too_much: Counter[str]
    doubtful: Counter[str]
    taken: Counter[str]


def pictures() -> list[Image.Image]:
    """The 100 pictures, 128 x 128."""
    page = Image.open(DATA / "by-eye.webp").convert("RGB")
    corners = [(k % ACROSS * SIDE, k // ACROSS * SIDE) for k in range(ACROSS**2)]
    return [page.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]


def compare(eye: judge.Judge) -> Counts:
    """What the judge sees, against the labels."""
    found = Counts(Counter(), Counter(), Counter(), Counter(), Counter())
    labels = json.loads((DATA / "by-eye.json").read_text())
    for reading, label in zip(eye.read(pictures()), labels, strict=True):
        seen, sure, doubtful = {thing.concept for thing in reading.things}, set(label["sure"]), set(label["doubtful"])
        found.sure.update(sure)
        found.missed.update(sure - seen)
        found.too_much.update(seen - sure - doubtful)
        found.doubtful.update(doubtful)
        found.taken.update(doubtful & seen)
    return found


_ROWS = (("sure", None), ("missed", "sure"), ("doubtful", None), ("taken", "doubtful"), ("too_much", None))
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    threshold: Annotated[
        list[float], typer.Option(min=1e-6, max=1 - 1e-6, help="Probability from which on the judge sees a thing.")
    ] = [0.5, 0.9, 0.98],  # noqa: B006
) -> None:
    for one in threshold:
        found, table = compare(judge.load(threshold=one)), Table("things", "number", "most often", title=f"{one:g}")
        for name, of in _ROWS:
            own: Counter[str] = getattr(found, name)
            number = f"{own.total()}" + (f" of {getattr(found, of).total()}" if of else "")
            often = ", ".join(f"{concept} {count}" for concept, count in own.most_common(3))
            table.add_row(name.replace("_", " "), number, often)
        Console(width=100).print(table)


if __name__ == "__main__":
    command.run(app, "by_eye")
