"""Regions on the embedded model: two things, each with a box of its own; how often each is in its box, judged.

    python benchmarks/effect.py regions
    python benchmarks/effect.py regions --prompts 24

A thing is in place if it is there and the middle of its box, as the judge sees it, lies in its region. Prompts are from
the report half of the benchmark, spread evenly; the halves (left and right, or top and bottom) change with the prompt.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import effect
import torch
import typer
from measures import paired, rate
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import attnctl
from attnctl.app import command
from attnctl.glyph import judge
from attnctl.glyph.words import Prompt, benchmark, phrase
from attnctl.loading import USUAL
from attnctl.processors import Isolation, Regions, Retention

Box = tuple[float, float, float, float]
HALVES: tuple[tuple[Box, Box], ...] = (
    ((0, 0, 0.5, 1), (0.5, 0, 1, 1)), ((0.5, 0, 1, 1), (0, 0, 0.5, 1)),
    ((0, 0, 1, 0.5), (0, 0.5, 1, 1)), ((0, 0.5, 1, 1), (0, 0, 1, 0.5)),
)  # fmt: skip


def masks_of(prompt: Prompt, number: int) -> dict[str, Box]:
    """The region of each thing, by its phrase without the article."""
    names = [phrase(*thing).removeprefix("a ") for thing in prompt.things]
    return dict(zip(names, HALVES[number % len(HALVES)], strict=True))


CONDITIONS: dict[str, Any] = {
    "plain": lambda masks: [],
    "regions": lambda masks: [Regions(masks)],
    "regions, inside 0": lambda masks: [Regions(masks, inside=0.0)],
    "regions + isolation": lambda masks: [Regions(masks), Isolation(masks)],
    "regions + retention": lambda masks: [Regions(masks), Retention(masks=masks, window=(0, 0.25))],
}


def judged(prompt: Prompt, masks: dict[str, Box], reading: judge.Reading) -> dict[str, bool]:
    """Whether each thing is there, in place, and in its colour."""
    boxes = {thing.concept: thing.box for thing in reading.things}
    present, colours = reading.satisfies(prompt)
    placed = []
    for (concept, _), (left, top, right, bottom) in zip(prompt.things, masks.values(), strict=True):
        box = boxes.get(concept)
        middle = None if box is None else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        placed.append(middle is not None and left <= middle[0] <= right and top <= middle[1] <= bottom)
    right_colours = all(colour is not False for colour in colours)
    return {"present": all(present), "in place": all(placed), "right": all(placed) and right_colours}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    prompts: Annotated[int, typer.Option(min=4, help="How many prompts.")] = 48,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("out/regions"),
) -> None:
    command.check_writable(out)
    torch.set_num_threads(threads)
    texts, pipe, eye, console = benchmark(), attnctl.load("glyph-sd"), judge.load(), Console()
    pipe.set_progress_bar_config(disable=True)
    half = effect.half(texts, effect.Half.report)
    chosen: Sequence[int] = [half[(2 * i + 1) * len(half) // (2 * prompts)] for i in range(min(prompts, len(half)))]
    guidance = float(USUAL["glyph-sd"]["guidance"])
    found: dict[str, dict[str, list[bool]]] = {
        name: {"present": [], "in place": [], "right": []} for name in CONDITIONS
    }
    with Progress(console=console) as bar:
        line = bar.add_task("drawing", total=len(chosen) * len(CONDITIONS))
        for number, k in enumerate(chosen):
            masks = masks_of(texts[k], number)
            generators = [1000 * seed + k for seed in range(seeds)]
            for name, make in CONDITIONS.items():
                with attnctl.attach(pipe, *make(masks)):
                    images = pipe(
                        [texts[k].text] * seeds,
                        num_inference_steps=steps,
                        guidance_scale=guidance,
                        generator=[torch.Generator().manual_seed(seed) for seed in generators],
                    ).images
                for reading in eye.read(images):
                    for kind, hit in judged(texts[k], masks, reading).items():
                        found[name][kind].append(hit)
                bar.advance(line)
    groups = [k for k in chosen for _ in range(seeds)]
    table = Table("condition", "both there", "both in place", "... in their colours", "in place, against plain")
    rows: dict[str, Any] = {}
    for name, own in found.items():
        change = paired(found["plain"]["in place"], own["in place"], groups)
        points = [100 * value for value in (change.difference, change.low, change.high)]
        rates = {kind: rate(hits) for kind, hits in own.items()}
        rows[name] = {kind: one.to_json() for kind, one in rates.items()} | {"against plain": change.to_json()}
        table.add_row(name, *map(str, rates.values()), "{:+.0f} ({:+.0f} to {:+.0f})".format(*points))
    out.mkdir(parents=True, exist_ok=True)
    effect.write(out / "regions.json", json.dumps({"prompts": len(chosen), "seeds": seeds, "rates": rows}, indent=1))
    Console(width=max(140, console.width)).print(table)
    console.print(f"{out / 'regions.json'}")
