"""Whether the racing search for heads finds what brute force finds, at a tenth of its forward passes.

    python benchmarks/effect.py heads --truth --minutes 10    brute force, in pieces; say it again until it is done
    python benchmarks/effect.py heads                         the rest of it, the search, and the comparison

Brute force draws with each site of self-attention, then with each head of the two best sites: 48 pictures at a time,
one of each prompt, until the ranking of the sites, then of the heads, has a reliability of .8 by split halves
(Spearman-Brown), or at most `--pictures`. The search draws from seeds of its own; what it finds is then drawn from the
seeds of brute force, which chose nothing in it. A gain is a score minus that of the picture from the same prompt and
seed without guidance. Results are kept as they come.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from cases import write
from clock import placed
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

import attnctl
from attnctl.app import command
from attnctl.glyph.objective import Shown, usual_prompts
from attnctl.pipelines.head_bench import LoggedBench, Progress, opened
from attnctl.pipelines.head_hunter import Found, HeadHunter
from attnctl.pipelines.head_race import Floats, cases, rank

SEED = 5_000_000  # of brute force; the search draws from others
GOOD = 2
ENOUGH = 0.8  # reliability of a ranking


class Paused(Exception):
    """The minutes are over."""


def spearman(a: Floats, b: Floats) -> float:
    ranks = [values.argsort().argsort().astype(float) for values in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


def reliability(gains: Floats, draws: int = 400) -> float:
    """Of the ranking of sets by their mean, (sets, pictures): halves of the pictures, stepped up to all of them."""
    random, n = np.random.default_rng(0), gains.shape[1]
    found = []
    for _ in range(draws):
        order = random.permutation(n)
        found.append(spearman(gains[:, order[: n // 2]].mean(1), gains[:, order[n // 2 :]].mean(1)))
    half = float(np.mean(found))
    return 2 * half / (1 + half)


def interval(gains: Floats, draws: int = 4000) -> tuple[float, float, float]:
    """Mean of (pictures,), and 95 % by bootstrap."""
    picked = np.random.default_rng(0).integers(len(gains), size=(draws, len(gains)))
    low, high = np.quantile(gains[picked].mean(1), (0.025, 0.975))
    return float(gains.mean()), float(low), float(high)


class Truth:
    """Brute force: the gains of sets on the same pictures, as far as they are known."""

    def __init__(self, hunter: HeadHunter, bench: LoggedBench, pictures: int) -> None:
        self.hunter, self.bench, self.pictures = hunter, bench, pictures
        self.gains: dict[str, Floats] = {}
        self.groups: dict[str, list[str]] = {}

    def measure(self, sets: list[str], stage: str, pictures: int | None = None) -> None:
        """A picture of each prompt with each set, again and again, until their ranking can be relied on."""
        prompts = len(self.hunter.prompts)
        for count in range(prompts, (pictures or self.pictures) + 1, prompts):
            values = self.bench.gains(sets, cases(prompts, count, seed=SEED), self.hunter.steps, stage)
            if len(sets) > 1 and count > prompts and reliability(values) >= ENOUGH:
                break
        self.gains |= dict(zip(sets, values, strict=True))

    def brute_force(self, also: Sequence[str]) -> None:
        """The sites, further sets, and the heads of the best sites."""
        self.groups["sites"] = sites = list(self.hunter.sites)
        self.measure(sites, "sites")
        self.groups["also"] = list(also)
        for one in also:
            self.measure([one], one, len(self.gains[sites[0]]))
        best = sorted(sites, key=lambda one: -self.gains[one].mean())[:GOOD]
        self.groups["heads"] = [head for site in best for head in self.hunter.sites[site]]
        self.measure(self.groups["heads"], "heads")

    @property
    def drawn(self) -> set[str]:
        """The sets of brute force."""
        return {*self.groups.get("sites", []), *self.groups.get("heads", [])}

    def most(self, sets: int) -> int:
        """Forward passes of so many sets, with the pictures without guidance, if all pictures are needed."""
        one, plain = self.bench.price("all", self.hunter.steps), self.bench.price("", self.hunter.steps)
        return self.pictures * (sets * one + plain)


def compare(truth: Truth, found: str) -> dict[str, Any]:
    """A set against the best one of brute force, every site whole (PAG on one layer), and no guidance."""
    known, own = truth.gains, truth.gains[found]
    best = max((one for one in known if one in truth.drawn), key=lambda one: known[one].mean())
    against = {}
    for one in dict.fromkeys([best, *truth.groups["sites"]]):
        count = min(len(own), len(known[one]))  # the same pictures
        against[one] = interval(own[:count] - known[one][:count])
    return {"found": found, "best": best, "against none": interval(own), "against": against}


def best_of(truth: Truth) -> Found:
    """The best set of brute force, as a preset."""
    hunter = truth.hunter
    ranks = [rank(one, "brute force", gains) for one, gains in truth.gains.items() if one in truth.drawn]
    ranks.sort(key=lambda one: -one.gain)
    settings = {**hunter.settings, "method": "brute force", "seed": SEED}
    return Found(ranks[0].heads, tuple(ranks), truth.bench.spent, hunter.shape, settings)


def say(told: dict[str, Any], console: Console) -> None:
    console.print(
        f"heads {told['found']} on the pictures of brute force, with 95 % intervals: against no guidance "
        "{:+.3f} ({:+.3f} to {:+.3f})".format(*told["against none"])
    )
    for name, values in told["against"].items():
        label = "the best set," if name == told["best"] else "PAG on block"
        console.print("  against {} {} {:+.3f} ({:+.3f} to {:+.3f})".format(label, name, *values))


def show(truth: Truth, console: Console) -> None:
    """The rankings that are complete."""
    for name in ("sites", "heads"):
        sets = truth.groups.get(name, [])
        if not sets or sets[0] not in truth.gains:
            continue
        gains = np.stack([truth.gains[one] for one in sets])
        title = f"{name}: {gains.shape[1]} pictures each, reliability {reliability(gains):.2f}"
        page = Table(title=title, box=SIMPLE_HEAD)
        for column in ("set", "gain", "standard error"):
            page.add_column(column)
        for one in sorted(sets, key=lambda one: -truth.gains[one].mean()):
            own = rank(one, name, truth.gains[one])
            page.add_row(one, f"{own.gain:+.3f}", f"{own.error:.3f}")
        console.print(page)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    truth_only: Annotated[bool, typer.Option("--truth", help="Brute force only.")] = False,
    pictures: Annotated[int, typer.Option(min=48, help="Of each set by brute force, at most.")] = 288,
    minutes: Annotated[float, typer.Option(min=0.1, help="Stop after so many; go on next time.")] = 600.0,
    budget: Annotated[int | None, typer.Option(help="Of the search; default: a tenth of brute force.")] = None,
    found_only: Annotated[bool, typer.Option("--search", help="The search only; needs --budget.")] = False,
    also: Annotated[list[str], typer.Option(help="A further set to draw; several times.")] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Of a picture.")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    model: Annotated[str, typer.Option(help="Embedded name or pipeline folder.")] = "glyph-sd",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...: where pictures are drawn.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/heads"),
) -> None:
    if found_only and (truth_only or budget is None):
        raise command.UsageError("--search stands without --truth, and with --budget")
    command.check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    console, pipe = Console(), placed(attnctl.load(model), device, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    hunter = HeadHunter(pipe, Shown(), usual_prompts(), steps=steps, model=model)
    pictures -= pictures % len(hunter.prompts)
    end = time.monotonic() + 60 * minutes
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    decides = ("model", "weights", "scope", "kind", "u", "scale", "steps", "batch", "prompts", "objective")
    setting = {name: hunter.settings[name] for name in decides} | {"seed": SEED, "threads": threads}
    setting |= {} if device == "cpu" else {"device": device}
    with opened(out / "truth.jsonl", setting) as log, Bars(*columns, console=console) as bar:
        sets = len(hunter.sites) + sum(sorted(map(len, hunter.sites.values()))[-GOOD:])
        line = bar.add_task("brute force")

        def told(now: Progress) -> None:
            bar.update(line, completed=now.spent, total=max(now.budget, now.spent), description=now.stage)
            if time.monotonic() > end:
                raise Paused

        bench = LoggedBench(hunter.drawer, hunter.prompts, log, 0, hunter.batch, told)
        truth = Truth(hunter, bench, pictures)
        bench.budget = truth.most(sets)
        try:
            if not found_only:
                truth.brute_force(also)
                spent = bench.spent
            if not truth_only:
                line = bar.add_task("search")
                found = hunter.hunt(budget or spent // 10, log=out / "search.jsonl", progress=told)
                found.save(out / "found.json")
                if (saved := hunter.saved(found.heads)) is not None:
                    console.print(saved)
                if found_only:
                    console.print(*found.ranks[:8], sep="\n")
                    return
                truth.measure([found.heads], "what was found")
        except Paused:
            show(truth, console)
            for one in filter(truth.gains.__contains__, also):
                say(compare(truth, one), console)
            if truth.gains:
                best_of(truth).save(out / "best.json")
            console.print(f"{bench.spent} of at most {bench.budget} forward passes are done; say it again to go on")
            return
    show(truth, console)
    for one in also:
        say(compare(truth, one), console)
    console.print(f"brute force: {spent} forward passes")
    best_of(truth).save(out / "best.json")
    if truth_only:
        return
    told_of = compare(truth, found.heads)
    for known in found.ranks[:8]:
        console.print(f"  {known}")
    console.print(f"search: {found.spent} forward passes ({found.spent / spent:.1%})")
    say(told_of, console)
    table = {one: [float(values.mean()), len(values)] for one, values in truth.gains.items()}
    write(
        out / "heads.json", json.dumps({"gains": table, "forwards": spent, "search": found.spent, **told_of}, indent=1)
    )
