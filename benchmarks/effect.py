"""What controls do to pictures: the 276 prompts of the Attend-and-Excite benchmark on the embedded model, judged.

    python benchmarks/effect.py --controls none segregation --seeds 2
    python benchmarks/effect.py --subset
    python benchmarks/effect.py perturb
    python benchmarks/effect.py regions

The last two are perturbation guidance, see perturb_effect.py, and regions, see placing.py (`perturb --help`).
All conditions draw from the same noise. Results are kept as they come: a killed run goes on where it was.
"""

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NoReturn, TextIO

import torch
import typer
from conditions import CONDITIONS
from measures import paired, rate
from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import attnctl
from attnctl.app import command
from attnctl.app.loading import USUAL
from attnctl.app.recipe import installed_versions, weights_hash
from attnctl.engine.control import Control
from attnctl.errors import AttnctlError
from attnctl.glyph import judge
from attnctl.glyph.words import Prompt, benchmark, is_held_out, triples

WIDTH = 112  # characters of the table of results
CATEGORIES = ("animals", "animal-object", "objects")


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


def subset(prompts: Sequence[Prompt], among: Sequence[int] | None = None, each: int = 8) -> list[int]:
    """`each` prompts of every category, evenly spread, or all where there are fewer: of these prompts, or of all."""
    picked = []
    for category in CATEGORIES:
        own = [k for k in (range(len(prompts)) if among is None else among) if prompts[k].category == category]
        many = min(each, len(own))
        picked += [own[(2 * k + 1) * len(own) // (2 * many)] for k in range(many)]
    return picked


def batches(cases: Sequence[Case], size: int) -> Iterator[list[Case]]:
    """Cases of one condition and seed at a time; conditions take turns, so that a slow minute hits all of them."""
    groups: dict[int, dict[str, list[Case]]] = {}
    for case in cases:
        groups.setdefault(case.seed, {}).setdefault(case.condition, []).append(case)
    for conditions in groups.values():
        for first in range(0, max(map(len, conditions.values())), size):
            yield from (part for own in conditions.values() if (part := own[first : first + size]))


def unfinished(cases: Sequence[Case], done: dict[str, Any], size: int) -> list[list[Case]]:
    """The batches that lack a result. They stay whole: the size of its batch decides the last bits of a picture."""
    return [group for group in batches(cases, size) if any(case.name not in done for case in group)]


def read_done(file: Path, pictures: Path) -> dict[str, dict[str, Any]]:
    """Results by case; what a kill cut short, or whose picture is gone, is not done."""
    there, done = {path.stem for path in pictures.glob("*.png")}, {}
    for line in file.read_text().splitlines():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if result["case"] in there:
            done[result["case"]] = result
    return done


class FolderError(AttnctlError):
    """A folder whose results are not for this run to go on with."""


@contextmanager
def opened(log: Path) -> Iterator[TextIO]:
    """The results, to append to on a fresh line, for this process alone; the lock ends with the process.

    Raises:
        FolderError: another process has them.
    """
    with log.open("a") as results:
        try:
            fcntl.flock(results, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"another process is drawing into {log.parent}; wait, or choose another --out") from None
        if not (log.read_bytes() or b"\n").endswith(b"\n"):
            results.write("\n")
        yield results


def setting_of(
    pipe: Any, model: str, prompts: Sequence[Prompt], controls: Sequence[str], **numbers: float
) -> dict[str, Any]:
    """All that decides results. Batch and threads are in it because the last bits of pictures depend on them."""
    return {
        "model": model,
        "weights": weights_hash(pipe),
        "judge": sha256((judge.SHIPPED / "judge.safetensors").read_bytes()).hexdigest(),
        "prompts": sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest(),
        **numbers,
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
        "conditions": {name: [repr(control) for control in CONDITIONS[name](prompts[:1])] for name in controls},
    }


def flat(setting: dict[str, Any]) -> dict[str, Any]:
    """{"versions": {"torch": ...}} as {"versions.torch": ...}."""
    parts = ((name, value if isinstance(value, dict) else {"": value}) for name, value in setting.items())
    return {f"{name}.{key}".rstrip("."): value for name, inside in parts for key, value in inside.items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Which settings differ, as "steps 20, now 30"; a condition that is new does not."""
    was, now = flat(old), flat(new)
    compared = [name for name in now if name in was or not name.startswith("conditions.")]
    return [
        f"{name} {was.get(name, 'not recorded')}, now {now[name]}" for name in compared if was.get(name) != now[name]
    ]


def agree(note: Path, log: Path, setting: dict[str, Any]) -> None:
    """Write the setting down, beside the conditions that were drawn before.

    Raises:
        FolderError: the results that are there were drawn under other settings.
    """
    try:
        old = json.loads(note.read_text()) if log.stat().st_size else setting
    except (FileNotFoundError, ValueError):
        old = {}
    if changed := differences(old, setting):
        raise FolderError(f"{note.parent} holds results of other settings ({'; '.join(changed)}); choose another --out")
    write(note, json.dumps(setting | {"conditions": old.get("conditions", {}) | setting["conditions"]}, indent=1))


def draw(pipe: Any, controls: list[Control], texts: list[str], seeds: list[int], steps: int, guidance: float) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    arguments = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generators}
    with attnctl.attach(pipe, *controls):
        return pipe(texts, **arguments).images


def draw_batch(pipe: Any, prompts: Sequence[Prompt], group: Sequence[Case], steps: int, guidance: float) -> Any:
    asked = [prompts[case.prompt] for case in group]
    seeds = [1000 * case.seed + case.prompt for case in group]
    return draw(pipe, CONDITIONS[group[0].condition](asked), [prompt.text for prompt in asked], seeds, steps, guidance)


def judged(prompt: Prompt, reading: judge.Reading) -> dict[str, Any]:
    """What the judge says of one picture.

    present: each thing is there. colours: of each thing that is to have a colour, whether it is there and has it.
    areas: of each thing, the part of the picture that it covers, 0 if it is not there.
    """
    present, colours = reading.satisfies(prompt)
    named = [bool(right) for right, (_, colour) in zip(colours, prompt.things, strict=True) if colour]
    areas = [round(reading.area_of(concept), 4) for concept, _ in prompt.things]
    return {"present": list(present), "colours": named, "areas": areas, "seen": reading.to_dict()}


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


def write(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".partial")
    beside.write_text(text)
    os.replace(beside, path)


def save(image: Image.Image, path: Path) -> None:
    beside = path.with_suffix(".partial")
    image.save(beside, format="PNG")
    os.replace(beside, path)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    controls: Annotated[
        list[str],
        typer.Option(metavar="NAME...", help=f"Conditions, the first the baseline: {', '.join(CONDITIONS)}."),
    ] = ["none", "segregation"],  # noqa: B006
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each prompt and condition.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder for pictures, results and the sheet.")] = Path("out/effect"),
    things: Annotated[
        int, typer.Option(min=2, max=3, help="2: the benchmark. 3: 48 prompts of ours, of three things.")
    ] = 2,
    model: Annotated[str, typer.Option(help="Embedded name or pipeline folder.")] = "glyph-sd",
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: Annotated[float | None, typer.Option(help="Default: the model's.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 12,
    prompts_of: Annotated[
        Half, typer.Option("--half", help="A fixed half of the prompts: tune on the one only.")
    ] = Half.all,
    every: Annotated[int, typer.Option(min=1, help="Of these prompts, only every Nth.")] = 1,
    subset_only: Annotated[
        bool, typer.Option("--subset", help="24 fixed prompts, one seed: about two minutes.")
    ] = False,
) -> None:
    if unknown := [name for name in controls if name not in CONDITIONS]:
        raise typer.BadParameter(f"no condition {unknown[0]!r}; there are {', '.join(CONDITIONS)}")
    command.check_writable(out)
    prompts = benchmark() if things == 2 else triples()
    console, pipe, eye = Console(), attnctl.load(model), judge.load()
    pipe.set_progress_bar_config(disable=True)
    if guidance is None:
        guidance = float(USUAL.get(model, {}).get("guidance", 7.5))
    picked, seeds = (subset(prompts), 1) if subset_only else (list(range(len(prompts))), seeds)
    chosen = set(half(prompts, prompts_of))
    picked = [k for k in picked if k in chosen][::every]
    controls = list(dict.fromkeys(controls))
    cases = [Case(k, seed, name) for name in controls for seed in range(seeds) for k in picked]

    setting = setting_of(pipe, model, prompts, controls, steps=steps, guidance=guidance, batch=batch)
    folder, log = out / "pictures", out / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with opened(log) as results:
        agree(out / "setting.json", log, setting)
        done = read_done(log, folder)
        missing = sum(case.name not in done for case in cases)
        if missing < len(cases):
            console.print(f"going on: {len(cases) - missing} of {len(cases)} pictures are there")

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            line = bar.add_task("drawing", total=len(cases), completed=len(cases) - missing)
            for group in unfinished(cases, done, batch):
                bar.update(line, description=group[0].condition)
                start = time.perf_counter()
                images = draw_batch(pipe, prompts, group, steps, guidance)
                each = {"seconds": (time.perf_counter() - start) / len(group)}
                for case, image, reading in zip(group, images, eye.read(images), strict=True):
                    if case.name not in done:
                        save(image, folder / f"{case.name}.png")
                        done[case.name] = {"case": case.name} | each | judged(prompts[case.prompt], reading)
                        results.write(json.dumps(done[case.name]) + "\n")
                        bar.advance(line)
                results.flush()

        table = summary(prompts, cases, done)
        found = {"setting": setting, "seeds": seeds, "half": prompts_of, "every": every, "rates": table}
        write(out / "effect.json", json.dumps(found, indent=1))
        write(out / "table.md", markdown(table))
        contact_sheet(prompts, cases, done, folder).quantize(256).save(out / "sheet.png")
    show(table, console)
    console.print(f"{out / 'effect.json'}\n{out / 'table.md'}\n{out / 'sheet.png'}")


def repeated(words: Sequence[str]) -> list[str]:
    """`--controls one two` as click takes it: `--controls one --controls two`."""
    spread, within = list[str](), False
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-"):
            within = word.split("=")[0] == "--controls"
        elif within and before != "--controls":
            spread.append("--controls")
        spread.append(word)
    return spread


def run() -> NoReturn:
    if sys.argv[1:2] == ["perturb"]:
        import perturb_effect

        command.run(perturb_effect.app, "effect perturb", sys.argv[2:])
    if sys.argv[1:2] == ["regions"]:
        import placing

        command.run(placing.app, "effect regions", sys.argv[2:])
    command.run(app, "effect", repeated(sys.argv[1:]))


if __name__ == "__main__":
    run()
