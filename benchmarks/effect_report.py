"""What an effect benchmark found, as a table and as a contact sheet."""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from cases import CATEGORIES, Case, subset
from measures import paired, rate
from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from attnctl.glyph.words import Prompt, is_held_out

WIDTH = 112  # characters of the table of results


def area_ratios(before: dict[str, Any], after: dict[str, Any]) -> list[float]:
    """The area of each thing that is in both pictures, as a part of its area before."""
    pairs = zip(before["areas"], after["areas"], strict=True)
    return [new / old for old, new in pairs if old and new]


def summary(prompts: Sequence[Prompt], cases: Sequence[Case], done: dict[str, Any]) -> dict[str, Any]:
    """Rates for each condition and group of prompts, each condition against the first; times and areas as parts of its.

    The area is the median over the things that both pictures have.
    """
    conditions = list(dict.fromkeys(case.condition for case in cases))

    def held_out(k: int) -> bool:
        return any(is_held_out(one, other) for (one, _), (other, _) in combinations(prompts[k].things, 2))

    groups: dict[str, Callable[[int], bool]] = {"all": lambda k: True}
    groups |= {name: lambda k, name=name: prompts[k].category == name for name in CATEGORIES}  # type: ignore[misc]
    groups |= {"seen pairs": lambda k: not held_out(k), "held-out pairs": held_out}
    measures: dict[str, Callable[[dict[str, Any]], bool | None]] = {
        "both present": lambda result: all(result["present"]),
        "colours right": lambda result: all(result["colours"]) if result["colours"] else None,
        "all right": lambda result: all(result["present"]) and all(result["colours"]),
    }
    table: dict[str, Any] = {}
    for name, belongs in groups.items():
        for measure, ask in measures.items():
            values: dict[str, dict[tuple[int, int], bool]] = {condition: {} for condition in conditions}
            for case in cases:
                if belongs(case.prompt) and (value := ask(done[case.name])) is not None:
                    values[case.condition][case.prompt, case.seed] = value
            if not values[conditions[0]]:
                continue
            row = table.setdefault(name, {}).setdefault(measure, {})
            base = values[conditions[0]]
            for condition, own in values.items():
                row[condition] = rate(list(own.values())).to_json()
                if own is not base:
                    change = paired([*base.values()], [own[key] for key in base], [prompt for prompt, _ in base])
                    row[condition]["against " + conditions[0]] = change.to_json()
    if all("areas" in done[case.name] for case in cases):
        areas: dict[str, list[float]] = {condition: [] for condition in conditions}
        for case in cases:
            base = done[Case(case.prompt, case.seed, conditions[0]).name]
            areas[case.condition] += area_ratios(base, done[case.name])
        if all(areas.values()):
            told = {name: {"value": median(own), "n": len(own)} for name, own in areas.items()}
            table["all"]["thing area"] = told
    if all("seconds" in done[case.name] for case in cases):
        spent = dict.fromkeys(conditions, 0.0)
        for case in cases:
            spent[case.condition] += done[case.name]["seconds"]
        table["all"]["time"] = {name: {"value": own / spent[conditions[0]]} for name, own in spent.items()}
    return table


COLUMNS = ("", "condition", "right", "difference", "repaired", "broken")


def rows(measures: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of one group of prompts; each condition stands under the first, which it is compared with."""
    for measure, row in measures.items():
        for name, found in row.items():
            change = next((value for key, value in found.items() if key.startswith("against")), None)
            told = compared(change) if change else ("", "", "")
            yield measure if name == next(iter(row)) else "", name, counted(found), *told


def show(table: dict[str, Any], console: Console) -> None:
    """A block of rows for each group of prompts."""
    head = "counts, and paired differences in points to the first condition, with 95 % intervals"
    page = Table(title=head, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in COLUMNS:
        page.add_column(column, no_wrap=True)
    for group, measures in table.items():
        page.add_section()
        page.add_row(f"[bold]{group}[/bold]")
        for row in rows(measures):
            page.add_row(*row)
    Console(width=max(WIDTH, console.width)).print(page)  # rather wrapped by a narrow terminal than cut short


def markdown(table: dict[str, Any]) -> str:
    """The same table for a page of the documentation."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for group, measures in table.items():
        lines.append(f"| **{group}** |" + " |" * (len(COLUMNS) - 1))
        lines += [f"| {' | '.join(row)} |" for row in rows(measures)]
    return "\n".join(lines) + "\n"


def between(found: dict[str, float]) -> str:
    """75.4% (72-79); a value without an interval is a factor."""
    if "low" not in found:
        return f"{found['value']:.2f} x"
    return f"{found['value']:.1%} ({100 * found['low']:.0f}-{100 * found['high']:.0f})"


def counted(found: dict[str, float]) -> str:
    """104 of 138, 75.4% (72-79); a factor as it is."""
    return (f"{found['hits']} of {found['n']}, " if "hits" in found else "") + between(found)


def compared(change: dict[str, Any]) -> tuple[str, ...]:
    """+12.9 (+9 to +17), 39 of 136, 6 of 416"""
    points = [100 * change[key] for key in ("difference", "low", "high")]
    counts = (f"{change[kind]['hits']} of {change[kind]['n']}" for kind in ("repaired", "broken"))
    return "{:+.1f} ({:+.0f} to {:+.0f})".format(*points), *counts


def contact_sheet(prompts: Sequence[Prompt], cases: Sequence[Case], done: dict[str, Any], folder: Path) -> Image.Image:
    """A row per condition for each of 24 prompts, the first seed; a frame tells right (green) from wrong (red).

    The names of the conditions stand at the left.
    """
    conditions = list(dict.fromkeys(case.condition for case in cases))
    first = min(case.seed for case in cases)
    shown = subset(prompts, sorted({case.prompt for case in cases}))
    side, text, columns = 128, 30, 8
    font = ImageFont.load_default(11)
    margin = 12 + round(max(font.getlength(name) for name in conditions))
    rows = -(-len(shown) // columns)
    page = Image.new("RGB", (margin + columns * (side + 8), rows * (len(conditions) * (side + 8) + text)), "white")
    pen = ImageDraw.Draw(page)
    for place, k in enumerate(shown):
        x, y = margin + place % columns * (side + 8), place // columns * (len(conditions) * (side + 8) + text)
        words = re.split(" and | with |, ", prompts[k].text)
        lines = words if len(words) == 2 else [f"{words[0]}, {words[1]}", words[2]]
        pen.text((x + 4, y + 2), "\n".join(lines), fill="black", font=font)
        for row, condition in enumerate(conditions):
            case = Case(k, first, condition)
            result = done[case.name]
            right = all(result["present"]) and all(result["colours"])
            top = y + text + row * (side + 8)
            if place % columns == 0:
                pen.text((6, top + side // 2), condition, fill="black", font=font)
            pen.rectangle(
                (x + 1, top, x + side + 6, top + side + 5), outline="#2a9d3a" if right else "#d62828", width=3
            )
            page.paste(Image.open(folder / f"{case.name}.png").convert("RGB").resize((side, side)), (x + 4, top + 3))
    return page
