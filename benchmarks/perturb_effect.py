"""What perturbation guidance does to pictures of the embedded model: single things and pairs, judged.

    python benchmarks/effect.py perturb                  the report: no guidance, CFG, PAG and SoftPAG, at equal cost
    python benchmarks/effect.py perturb --scan           every block, then every head, alone, on the development half
    python benchmarks/effect.py perturb --blocks --model glyph-sd3
    python benchmarks/effect.py perturb --heads "8:2" -u 0.5

All conditions draw from the same noise, with the same number of forwards for a picture: 40 steps without any guidance,
20 with one kind, 13 with both (a weak pass counts as a whole one, though it starts at the first perturbed block).
Results are kept as they come: a killed run goes on where it was.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import cases as pictures
import effect
import torch
import typer
from clock import placed
from effect_report import between
from measures import paired, rate
from PIL import Image, ImageDraw, ImageFont
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import attnctl
from attnctl.app import command
from attnctl.app.recipe import installed_versions, weights_hash
from attnctl.glyph import judge
from attnctl.glyph.words import COLOURS, CONCEPTS, OBJECTS, Prompt, benchmark, phrase
from attnctl.loading import USUAL
from attnctl.processors import Perturb

FORWARDS = 40
STRENGTHS = [0.25, 0.5, 1.0]
CHOSEN = ["7", "0:3"]  # the best block and the best head of the scan on the development half


@dataclass(frozen=True)
class Condition:
    """Guidance of one kind, or of two, or none."""

    heads: str | None = None
    u: float = 1.0
    cfg: bool = False

    @property
    def name(self) -> str:
        own = "cfg" if self.cfg and self.heads is None else "none"
        return own if self.heads is None else f"{self.heads}@{self.u:g}{'+cfg' if self.cfg else ''}"

    @property
    def steps(self) -> int:
        return FORWARDS // (1 + self.cfg + (self.heads is not None))


def prompts() -> list[Prompt]:
    """48 single things (each concept, each object in two colours) and the 276 pairs of the benchmark."""
    colours = list(COLOURS)
    single: list[tuple[str, str | None]] = [(concept, None) for concept in CONCEPTS]
    single += [(thing, colours[(i + shift) % 11]) for i, thing in enumerate(OBJECTS) for shift in (0, 5)]
    return [Prompt(phrase(*thing), "single", (thing,)) for thing in single] + benchmark()


def picked(texts: Sequence[Prompt], half: pictures.Half, singles: int, pairs: int) -> list[int]:
    """So many single things and pairs of a half, evenly spread."""
    own = pictures.half(texts, half)
    found = []
    for wanted, of_kind in ((singles, True), (pairs, False)):
        there = [k for k in own if (texts[k].category == "single") == of_kind]
        many = min(wanted, len(there))
        found += [there[(2 * i + 1) * len(there) // (2 * many)] for i in range(many)]
    return found


def right(prompt: Prompt, reading: judge.Reading) -> bool:
    """Everything is there in its colour; of a single thing, nothing else is."""
    present, colours = reading.satisfies(prompt)
    alone = len(prompt.things) > 1 or len(reading.things) == 1
    return all(present) and alone and all(colour is not False for colour in colours)


def report_conditions(heads: Sequence[str], strengths: Sequence[float]) -> list[Condition]:
    """None, CFG, PAG on the middle block, and these heads at these strengths, each alone and with CFG."""
    perturbed = [("mid", 1.0), *((one, u) for one in heads for u in strengths)]
    return [Condition(), Condition(cfg=True), *(Condition(h, u, cfg) for h, u in perturbed for cfg in (False, True))]


def scan_conditions(pipe: Any, heads: bool = True) -> list[Condition]:
    """None, then every block in which the picture attends to itself, then each of its heads."""
    able = [site for site in attnctl.sites(pipe) if site.kind in ("self", "joint")]
    each = [f"{site.block}:{head}" for site in able for head in range(site.heads)] if heads else []
    return [Condition(), *(Condition(str(site.block)) for site in able), *map(Condition, each)]


def draw(pipe: Any, one: Condition, texts: list[str], seeds: list[int], guidance: float, scale: float) -> Any:
    controls = [Perturb(one.heads, u=one.u, scale=scale)] if one.heads is not None else []
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with attnctl.attach(pipe, *controls) as run:
        images = pipe(
            texts, num_inference_steps=one.steps, guidance_scale=guidance if one.cfg else 1.0, generator=generators
        ).images
    trace = next((trace for _, trace in run.report.traces), None)
    return images, None if trace is None else trace.effect


def summary(conditions: Sequence[Condition], cases: Sequence[pictures.Case], done: dict[str, Any], texts: Any) -> Any:
    """Rates of each condition on single things, pairs and all, against no guidance and against CFG."""
    table: dict[str, Any] = {}
    for one in conditions:
        own = [case for case in cases if case.condition == one.name]
        row = table[one.name] = {"steps": one.steps}
        for group, single in (("singles", True), ("pairs", False)):
            chosen = [case for case in own if (texts[case.prompt].category == "single") == single]
            row[group] = rate([done[case.name]["right"] for case in chosen]).to_json()
        hits = [done[case.name]["right"] for case in own]
        row["all"] = rate(hits).to_json()
        effects = [done[case.name]["effect"] for case in own if done[case.name]["effect"] is not None]
        row["effect"] = sum(effects) / len(effects) if effects else None
        row["seconds"] = sum(done[case.name]["seconds"] for case in own) / len(own)
        for base in ("none", "cfg"):
            before = [done[f"{base}-{case.seed}-{case.prompt:03d}"]["right"] for case in own if base in table]
            if before and base != one.name:
                row[f"against {base}"] = paired(before, hits, [case.prompt for case in own]).to_json()
    return table


def show(table: dict[str, Any], console: Console) -> None:
    page = Table(title="parts judged right, with 95 % intervals; differences in points", box=SIMPLE_HEAD)
    rates = ("single things", "pairs", "all")
    for column in ("guidance", "steps", *rates, "against none", "against CFG", "|c-p|/|c|", "time"):
        page.add_column(column, no_wrap=True)
    first = next(iter(table.values()))["seconds"]
    for name, row in table.items():
        change = [
            "{:+.0f} ({:+.0f} to {:+.0f})".format(*(100 * row[base][k] for k in ("difference", "low", "high")))
            if (base := f"against {one}") in row
            else ""
            for one in ("none", "cfg")
        ]
        moved = "" if row["effect"] is None else f"{row['effect']:.2%}"
        parts = (between(row[group]) for group in ("singles", "pairs", "all"))
        page.add_row(name, str(row["steps"]), *parts, *change, moved, f"{row['seconds'] / first:.2f}")
    Console(width=max(140, console.width)).print(page)


def sheet(texts: Sequence[Prompt], chosen: Sequence[int], names: Sequence[str], done: Any, folder: Path) -> Image.Image:
    """A row for each condition, a column for each of 12 prompts; a frame tells right (green) from wrong (red)."""
    shown = [chosen[i * len(chosen) // 12] for i in range(min(12, len(chosen)))]
    side, left, top, font = 112, 120, 34, ImageFont.load_default(11)
    page = Image.new("RGB", (left + len(shown) * (side + 8), top + len(names) * (side + 8)), "white")
    pen = ImageDraw.Draw(page)
    for x, k in enumerate(shown):
        words = texts[k].text.replace(" and ", "\nand ").replace(" with ", "\nwith ")
        pen.text((left + x * (side + 8), 2), words, fill="black", font=font)
        for y, name in enumerate(names):
            case = pictures.Case(k, 0, name).name
            at = left + x * (side + 8), top + y * (side + 8)
            colour = "#2a9d3a" if done[case]["right"] else "#d62828"
            pen.rectangle((at[0], at[1], at[0] + side + 5, at[1] + side + 5), outline=colour, width=3)
            page.paste(Image.open(folder / f"{case}.png").convert("RGB").resize((side, side)), (at[0] + 3, at[1] + 3))
    for y, name in enumerate(names):
        pen.text((4, top + y * (side + 8) + side // 2), name, fill="black", font=font)
    return page


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    scan: Annotated[bool, typer.Option("--scan", help="Every block and head alone, on the development half.")] = False,
    blocks: Annotated[bool, typer.Option("--blocks", help="As --scan, whole blocks only.")] = False,
    heads: Annotated[list[str], typer.Option(help="Which heads to report on, see attnctl.engine.heads.")] = CHOSEN,
    strength: Annotated[list[float], typer.Option("--strength", "-u", help="How far to break them.")] = STRENGTHS,
    scale: Annotated[float, typer.Option(min=0.0, help="w, of the difference.")] = 3.0,
    singles: Annotated[int, typer.Option(min=1, help="Single things of the half.")] = 24,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of the half.")] = 72,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each prompt and condition.")] = 1,
    model: Annotated[str, typer.Option(help="Embedded name or pipeline folder.")] = "glyph-sd",
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 12,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...: where pictures are drawn.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for pictures, results and the sheet.")] = Path("out/perturb"),
) -> None:
    command.check_writable(out)
    torch.set_num_threads(threads)
    texts, console, pipe, eye = prompts(), Console(), placed(attnctl.load(model), device, torch.float32), judge.load()
    pipe.set_progress_bar_config(disable=True)
    guidance = float(USUAL.get(model, {}).get("guidance", 7.5))
    scan = scan or blocks
    half = pictures.Half.development if scan else pictures.Half.report
    chosen = picked(texts, half, singles, pairs)
    conditions = scan_conditions(pipe, not blocks) if scan else report_conditions(heads, strength)
    by_name = {one.name: one for one in conditions}
    cases = [pictures.Case(k, seed, name) for name in by_name for seed in range(seeds) for k in chosen]
    setting = {
        "model": model,
        "weights": weights_hash(pipe),
        "prompts": sha256("\n".join(texts[k].text for k in chosen).encode()).hexdigest(),
        "guidance": guidance,
        "scale": scale,
        "batch": batch,
        "threads": threads,
        "versions": installed_versions(),
        "conditions": {name: [str(one)] for name, one in by_name.items()},
    }
    setting |= {} if device == "cpu" else {"device": device}
    folder, log = out / "pictures", out / "results.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with pictures.opened(log) as results:
        pictures.agree(out / "setting.json", log, setting)
        done = pictures.read_done(log, folder)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            line = bar.add_task("drawing", total=len(cases), completed=sum(case.name in done for case in cases))
            for group in pictures.unfinished(cases, done, batch):
                bar.update(line, description=group[0].condition)
                start = time.perf_counter()
                asked = [texts[case.prompt] for case in group]
                seed_of = [1000 * case.seed + case.prompt for case in group]
                one = by_name[group[0].condition]
                images, moved = draw(pipe, one, [prompt.text for prompt in asked], seed_of, guidance, scale)
                seconds = (time.perf_counter() - start) / len(group)
                for case, prompt, image, reading in zip(group, asked, images, eye.read(images), strict=True):
                    if case.name not in done:
                        effect.save(image, folder / f"{case.name}.png")
                        found = {"right": right(prompt, reading), "seen": reading.to_dict()}
                        done[case.name] = {"case": case.name, "seconds": seconds, "effect": moved} | found
                        results.write(json.dumps(done[case.name]) + "\n")
                        bar.advance(line)
                results.flush()
    table = summary(conditions, cases, done, texts)
    found = {"setting": setting, "seeds": seeds, "half": half, "rates": table}
    pictures.write(out / "perturb.json", json.dumps(found, indent=1))
    show(table, console)
    console.print(f"{out / 'perturb.json'}")
    if not scan:
        effect.save(sheet(texts, chosen, list(by_name), done, folder), out / "sheet.png")
        console.print(f"{out / 'sheet.png'}")
