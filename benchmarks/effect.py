"""What controls do to pictures: the 276 prompts of the Attend-and-Excite benchmark on the embedded model, judged.

    python benchmarks/effect.py --controls none segregation --seeds 2
    python benchmarks/effect.py --subset

All conditions draw from the same noise. Results are kept as they come: a killed run goes on where it was.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measures import Rate, paired, rate
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import attnctl
from attnctl.control import Control
from attnctl.glyph import judge
from attnctl.glyph.words import Prompt, benchmark, is_held_out
from attnctl.loading import USUAL
from attnctl.recipe import weights_hash

CATEGORIES = ("animals", "animal-object", "objects")


def segregation(prompts: Sequence[Prompt]) -> list[Control]:
    """Keeps the nouns of each prompt apart; an image ignores the pairs that its prompt does not have."""
    pairs = {pair for prompt in prompts for pair in combinations([concept for concept, _ in prompt.things], 2)}
    return [attnctl.processors.Segregation(*sorted(pairs))]


def nouns(prompts: Sequence[Prompt]) -> list[str]:
    """The things of all prompts; an image ignores those that its prompt does not have."""
    return sorted({concept for prompt in prompts for concept, _ in prompt.things})


def bonds(prompts: Sequence[Prompt]) -> list[str]:
    """Colours and things as the prompts have them in a row: "red car"."""
    return sorted({f"{colour} {concept}" for prompt in prompts for concept, colour in prompt.things if colour})


CONDITIONS: dict[str, Callable[[Sequence[Prompt]], list[Control]]] = {
    "none": lambda prompts: [],
    "excitation": lambda prompts: [attnctl.processors.Excitation(*nouns(prompts))],
    "segregation": segregation,
    "retention": lambda prompts: [attnctl.processors.Retention(*nouns(prompts))],
    "astar": lambda prompts: [attnctl.processors.AStar(*nouns(prompts))],
    "astar-binding": lambda prompts: [attnctl.processors.AStar(*nouns(prompts), bonds=bonds(prompts))],
}


class Half(StrEnum):
    """Which prompts to draw."""

    all = "all"
    development = "development"
    report = "report"


@dataclass(frozen=True)
class Case:
    """One picture: prompt number, seed and condition."""

    prompt: int
    seed: int
    condition: str

    @property
    def name(self) -> str:
        return f"{self.condition}-{self.seed}-{self.prompt:03d}"


def half(prompts: Sequence[Prompt], name: Half) -> list[int]:
    """The prompts of a half: settings are chosen on "development" alone, figures are told of "report".

    A prompt's half hangs on its text alone, so it stays the same when prompts are added.
    """
    even = [sha256(prompt.text.encode()).digest()[0] % 2 == 0 for prompt in prompts]
    return [k for k, first in enumerate(even) if name is Half.all or first == (name is Half.development)]


def subset(prompts: Sequence[Prompt], each: int = 8) -> list[int]:
    """`each` prompts of every category, evenly spread, so 24."""
    picked = []
    for category in CATEGORIES:
        own = [k for k, prompt in enumerate(prompts) if prompt.category == category]
        picked += [own[(2 * k + 1) * len(own) // (2 * each)] for k in range(each)]
    return picked


def batches(cases: Sequence[Case], size: int) -> Iterator[list[Case]]:
    """Cases of one condition and seed at a time."""
    groups: dict[tuple[str, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.condition, case.seed), []).append(case)
    for group in groups.values():
        for first in range(0, len(group), size):
            yield group[first : first + size]


def read_done(file: Path) -> dict[str, dict[str, Any]]:
    """Results by case; a line cut short by a kill is dropped."""
    done = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[result["case"]] = result
    return done


def draw(pipe: Any, controls: list[Control], texts: list[str], seeds: list[int], steps: int, guidance: float) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
    with attnctl.attach(pipe, *controls):
        return pipe(texts, **arguments).images


def judged(prompt: Prompt, reading: judge.Reading) -> dict[str, Any]:
    """present: each thing is there. colours: of each thing that is to have a colour, whether it is there and has it."""
    present, colours = reading.satisfies(prompt)
    named = [bool(right) for right, (_, colour) in zip(colours, prompt.things, strict=True) if colour]
    return {"present": list(present), "colours": named, "seen": reading.to_json()}


def summary(prompts: Sequence[Prompt], cases: Sequence[Case], done: dict[str, Any]) -> dict[str, Any]:
    """Rates for each condition and group of prompts, and each condition against the first."""
    conditions = list(dict.fromkeys(case.condition for case in cases))

    def held_out(k: int) -> bool:
        one, other = (concept for concept, _ in prompts[k].things)
        return is_held_out(one, other)

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
    return table


def show(table: dict[str, Any], console: Console) -> None:
    conditions = list(table["all"]["both present"])
    page = Table(title="rates with 95 % intervals; against the first condition: paired difference, repaired, broken")
    for column in ("prompts", "measure", *conditions, *(f"{name} against {conditions[0]}" for name in conditions[1:])):
        page.add_column(column)
    for group, measures in table.items():
        for measure, row in measures.items():
            cells = [str(Rate(*(row[name][key] for key in ("value", "low", "high", "n")))) for name in conditions]
            for name in conditions[1:]:
                change = row[name]["against " + conditions[0]]
                interval = f"{change['difference']:+.1%} [{change['low']:+.1%}, {change['high']:+.1%}]"
                parts = (
                    f"{kind} {change[kind]['value']:.0%} of {change[kind]['n']}" for kind in ("repaired", "broken")
                )
                cells.append(", ".join((interval, *parts)))
            page.add_row(group, measure, *cells)
    console.print(page)


def contact_sheet(prompts: Sequence[Prompt], cases: Sequence[Case], done: dict[str, Any], folder: Path) -> Image.Image:
    """A row per condition for each of 24 prompts, the first seed; a frame tells right (green) from wrong (red)."""
    conditions = list(dict.fromkeys(case.condition for case in cases))
    first = min(case.seed for case in cases)
    shown = [k for k in subset(prompts) if any(case.prompt == k for case in cases)]
    side, text, columns = 128, 30, 8
    rows = -(-len(shown) // columns)
    page = Image.new("RGB", (columns * (side + 8), rows * (len(conditions) * (side + 8) + text)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for place, k in enumerate(shown):
        x, y = place % columns * (side + 8), place // columns * (len(conditions) * (side + 8) + text)
        words = prompts[k].text.split(" and ") if " and " in prompts[k].text else prompts[k].text.split(" with ")
        pen.text((x + 4, y + 2), "\n".join(words), fill="black", font=font)
        for row, condition in enumerate(conditions):
            case = Case(k, first, condition)
            result = done[case.name]
            right = all(result["present"]) and all(result["colours"])
            top = y + text + row * (side + 8)
            pen.rectangle(
                (x + 1, top, x + side + 6, top + side + 5), outline="#2a9d3a" if right else "#d62828", width=3
            )
            page.paste(Image.open(folder / f"{case.name}.png").convert("RGB").resize((side, side)), (x + 4, top + 3))
    return page


def write(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".partial")
    beside.write_text(text)
    os.replace(beside, path)


app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    more: Annotated[list[str] | None, typer.Argument(metavar="", hidden=True)] = None,
    controls: Annotated[
        list[str],
        typer.Option(metavar="NAME...", help=f"Conditions, the first the baseline: {', '.join(CONDITIONS)}."),
    ] = ["none", "segregation"],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each prompt and condition.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for pictures, results and the sheet.")] = Path("out/effect"),
    model: Annotated[str, typer.Option(help="Embedded name or pipeline folder.")] = "glyph-sd",
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 12,
    prompts_of: Annotated[
        Half, typer.Option("--half", help="A fixed half of the prompts: tune on the one only.")
    ] = Half.all,
    subset_only: Annotated[
        bool, typer.Option("--subset", help="24 fixed prompts, one seed: about two minutes.")
    ] = False,
) -> None:
    console, controls = Console(), [*controls, *(more or [])]  # click gives an option one value, the rest come apart
    if unknown := [name for name in controls if name not in CONDITIONS]:
        raise typer.BadParameter(f"no condition {unknown[0]!r}; there are {', '.join(CONDITIONS)}")
    prompts, pipe, eye = benchmark(), attnctl.load(model), judge.load()
    pipe.set_progress_bar_config(disable=True)
    if guidance is None:
        guidance = float(USUAL.get(model, {}).get("guidance", 7.5))
    picked, seeds = (subset(prompts), 1) if subset_only else (list(range(len(prompts))), seeds)
    picked = [k for k in picked if k in set(half(prompts, prompts_of))]
    cases = [Case(k, seed, name) for name in dict.fromkeys(controls) for seed in range(seeds) for k in picked]

    setting = {"model": model, "weights": weights_hash(pipe), "steps": steps, "guidance": guidance}
    setting["judge"] = sha256((judge.SHIPPED / "judge.safetensors").read_bytes()).hexdigest()
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    note, log = out / "setting.json", out / "results.jsonl"
    if note.exists() and json.loads(note.read_text()) != setting:
        raise typer.BadParameter(f"{out} holds results of another setting: {note.read_text()}; choose another --out")
    write(note, json.dumps(setting))
    done = read_done(log)
    todo = [case for case in cases if case.name not in done]
    if len(todo) < len(cases):
        console.print(f"going on: {len(cases) - len(todo)} of {len(cases)} pictures are there")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar, log.open("a") as results:
        line = bar.add_task("drawing", total=len(cases), completed=len(cases) - len(todo))
        for group in batches(todo, batch):
            bar.update(line, description=group[0].condition)
            asked = [prompts[case.prompt] for case in group]
            seeds_of = [1000 * case.seed + case.prompt for case in group]
            controls_of = CONDITIONS[group[0].condition](asked)
            images = draw(pipe, controls_of, [prompt.text for prompt in asked], seeds_of, steps, guidance)
            for case, prompt, image, reading in zip(group, asked, images, eye.read(images), strict=True):
                image.save(folder / f"{case.name}.png")
                done[case.name] = {"case": case.name} | judged(prompt, reading)
                results.write(json.dumps(done[case.name]) + "\n")
            results.flush()
            bar.advance(line, len(group))

    table = summary(prompts, cases, done)
    write(
        out / "effect.json",
        json.dumps({"setting": setting, "seeds": seeds, "half": prompts_of, "rates": table}, indent=1),
    )
    contact_sheet(prompts, cases, done, folder).save(out / "sheet.png")
    show(table, console)
    console.print(f"{out / 'effect.json'}\n{out / 'sheet.png'}")


if __name__ == "__main__":
    app()
