"""The judge against a person's eye: 100 pictures that were read by eye before the judge read them.

    python benchmarks/by_eye.py

Both models drew them, under several controls and with none, many of them badly. The person named what is there
without a doubt, and what may be meant. missed: of the former, what the judge does not see. too much: what the judge
sees and the person could not make out. A strict judge takes few of the doubtful things.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

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
    """What the judge sees, against what the person saw."""
    found = Counts(Counter(), Counter(), Counter(), Counter(), Counter())
    told = json.loads((DATA / "by-eye.json").read_text())
    for reading, person in zip(eye.read(pictures()), told, strict=True):
        seen, sure, doubtful = {thing.concept for thing in reading.things}, set(person["sure"]), set(person["doubtful"])
        found.sure.update(sure)
        found.missed.update(sure - seen)
        found.too_much.update(seen - sure - doubtful)
        found.doubtful.update(doubtful)
        found.taken.update(doubtful & seen)
    return found


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main() -> None:
    found, table = compare(judge.load()), Table("things", "number", "most often")
    for name, of in (("sure", None), ("missed", "sure"), ("doubtful", None), ("taken", "doubtful"), ("too_much", None)):
        own: Counter[str] = getattr(found, name)
        number = f"{own.total()}" + (f" of {getattr(found, of).total()}" if of else "")
        often = ", ".join(f"{concept} {count}" for concept, count in own.most_common(3))
        table.add_row(name.replace("_", " "), number, often)
    Console(width=100).print(table)


if __name__ == "__main__":
    command.run(app, "by_eye")
