"""What controls cost in time: ratios to the plain run of the same pipeline, as medians over alternating runs.

    python benchmarks/speed.py attach maps

attach: an attachment without controls, and one that sits at every site and does nothing.
compose: compositions, see compose_speed.py; passes and time against the plain run.
guided: guidance by gradients, see guided.py; ours against diffusers' Attend-and-Excite, in time and memory.
perturb: perturbation guidance, see perturb_speed.py; ours against diffusers' PAG pipeline of SD 3, in time and memory.
personalize: training steps with calibrated attention, see personalize_speed.py; of glyph-sd and sd15 alone.
regions: regions with prompts of their own, see regions_speed.py; it is measured on flux and sd15.
batch: plans and groups of `attnctl batch`, see batch_speed.py.
maps: the maps of all words, against the plain run; beside it, recording as DAAM does it, by materialised probabilities.
"""

import json
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, ClassVar

import batch_speed
import compose_speed
import guided
import personalize_speed
import perturb_speed
import regions_speed
import torch
import typer
from clock import placed, timed
from models import MODELS, build
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import attnctl
from attnctl.engine.control import AttentionCall, Control, Lane, Proceed
from attnctl.engine.run import Run
from attnctl.engine.sites import Site, select


@dataclass(frozen=True)
class Idle(Control):
    """Sits at every site and does nothing."""

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return select(available, None)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        return proceed(call)


@dataclass(frozen=True)
class Eager(Control):
    """Records as DAAM does: probabilities as a tensor at every site with text, summed over heads and steps."""

    lane: ClassVar[Lane] = Lane.PROBS

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return select(available, ["cross", "joint"])

    def begin(self, run: Run) -> dict[str, Tensor]:
        return {}

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        probabilities = torch.softmax(call.q @ call.k.mT * scale, -1)
        sums, rows = call.step.run.state(self), call.step.rows.cond
        maps = probabilities[rows][:, :, call.image, call.text].sum(1)
        sums[call.site.name] = maps if call.site.name not in sums else sums[call.site.name] + maps
        return probabilities @ call.v


Setting = Callable[[Any], AbstractContextManager[Any]]

TOPICS: dict[str, dict[str, Setting]] = {
    "attach": {
        "no controls": lambda pipe: attnctl.attach(pipe),
        "idle at all sites": lambda pipe: attnctl.attach(pipe, Idle()),
    },
    "maps": {
        "maps of all words": lambda pipe: attnctl.attach(pipe, attnctl.processors.TokenMaps()),
        "as DAAM, eager": lambda pipe: attnctl.attach(pipe, Eager()),
    },
}


def measure(name: str, topic: str, repeats: int, bar: Progress, device: str = "cpu") -> dict[str, Any]:
    """Plain and each setting in turn, `repeats` times, each time in another order; ratios are within a round."""
    run = build(name)
    pipe = placed(run.pipe, device)  # type: ignore[attr-defined]
    settings = TOPICS[topic]
    line = bar.add_task(f"{topic}: {name}", total=repeats + 1)
    times: dict[str, list[float]] = {setting: [] for setting in ("plain", *settings)}
    for repeat in range(repeats + 1):
        shift = repeat % len(times)  # who comes after whom must not matter
        for setting in [*times][shift:] + [*times][:shift]:
            around = nullcontext() if setting == "plain" else settings[setting](pipe)
            seconds = timed(run, around, device)
            if repeat:  # the first round warms up
                times[setting].append(seconds)
        bar.advance(line)
    ratios = {s: median(b / a for a, b in zip(times["plain"], times[s], strict=True)) for s in settings}
    return {
        "model": name,
        "topic": topic,
        "device": device,
        "plain": median(times["plain"]),
        "ratios": ratios,
        "seconds": times,
    }


def machine() -> dict[str, Any]:
    return {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__} | {
        "processor": platform.machine()
    }


app = typer.Typer(add_completion=False)
APART = ("compose", "guided", "perturb", "regions", "batch", "personalize")  # topics with a table of their own


@app.command(help=__doc__)
def main(
    topics: Annotated[list[str], typer.Argument(help=f"Any of {', '.join([*TOPICS, *APART])}.")],
    model: Annotated[list[str], typer.Option(help=f"Any of {', '.join(MODELS)}.")] = list(MODELS),  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Measured rounds, after one to warm up.")] = 5,
    out: Annotated[Path, typer.Option(help="File for all times.")] = Path("out/speed.json"),
    device: Annotated[str, typer.Option(help="cpu, or another such as cuda, in bfloat16.")] = "cpu",
) -> None:
    for given, known in ((topics, [*TOPICS, *APART]), (model, MODELS)):
        if unknown := [name for name in given if name not in known]:
            raise typer.BadParameter(f"no {unknown[0]!r}; there are {', '.join(known)}")
    if device != "cpu" and (fixed := [name for name in topics if name in ("batch", "compose", "personalize")]):
        raise typer.BadParameter(f"{fixed[0]} is measured by the processor's time, on the CPU alone")
    with Progress() as bar:
        found = [measure(name, topic, repeats, bar, device) for name in model for topic in topics if topic in TOPICS]
        guidance = [guided.measure(name, repeats, bar, device) for name in model if "guided" in topics]
        trained = [
            personalize_speed.measure(name, repeats, bar)
            for name in model
            if "personalize" in topics and name in personalize_speed.ROWS
        ]
        compositions = [compose_speed.measure(name, bar, out.parent) for name in model if "compose" in topics]
        perturbation = perturb_speed.measure(repeats, bar, device=device) if "perturb" in topics else None
        areas = [m for m in regions_speed.MODELS if m in model] if "regions" in topics else []
        placed = [regions_speed.measure(name, repeats, bar, device) for name in areas]
        batches = batch_speed.measure(repeats, bar) if "batch" in topics else None
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {"measured": found, "guided": guidance, "perturb": perturbation, "regions": placed, "batch": batches}
    results["personalize"] = trained
    results["compose"] = compositions
    out.write_text(json.dumps({"machine": machine()} | results, indent=1))
    console = Console()
    table = Table("model", "setting", "time / plain", title=f"medians of {repeats} alternating rounds")
    for row in found:
        table.add_row(row["model"], "plain", f"{row['plain']:.2f} s")
        for setting, ratio in row["ratios"].items():
            table.add_row("", setting, f"{ratio:.3f}")
    if found:
        console.print(table)
    if guidance:
        guided.show(guidance, console)
    if trained:
        personalize_speed.show(trained, console)
    for each in compositions:
        compose_speed.show(each, console)
    if perturbation:
        perturb_speed.show(perturbation, console)
    if placed:
        regions_speed.show(placed, console)
    if batches:
        batch_speed.show(batches, console)
    console.print(f"{machine()}", str(out), sep="\n")


if __name__ == "__main__":
    app()
