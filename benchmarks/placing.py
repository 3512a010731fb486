"""Regions on the embedded model: things with a box of their own; how often each is in its box, judged.

    python benchmarks/effect.py regions
    python benchmarks/effect.py regions --things 4 --prompts 12

A thing is in place if it is there and the middle of its box, as the judge sees it, lies in its region. Prompts are from
the report half of the benchmark, spread evenly; four things make prompts of our own. Boxes are random and disjoint, and
follow from the prompt's number. First comes a newcomer's case: "a red car and a cat", the cat left, seeds 0 to 7.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import cases
import torch
import typer
from clock import placed
from measures import paired, rate
from mixing import draw_mixed
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import attnctl
from attnctl.app import command
from attnctl.glyph import judge
from attnctl.glyph.words import ANIMALS, COLOURS, OBJECTS, Named, Prompt, benchmark, phrase
from attnctl.loading import USUAL
from attnctl.processors import Couple, DenseRegions, Isolation, Regions, Retention

Box = tuple[float, float, float, float]
CASE = Prompt("a red car and a cat", "animal-object", (("car", "red"), ("cat", None)))
CASE_BOXES: tuple[Box, ...] = ((0.5, 0, 1, 1), (0, 0, 0.5, 1))
MIXING = "latent mixing, a pass per region"


def fours() -> list[Prompt]:
    """24 prompts of four things, ours: two animals and two objects whose colours differ."""
    colours, found = list(COLOURS), []
    for i in range(24):
        one, two = OBJECTS[i % 12], OBJECTS[(i + 5) % 12]
        things: tuple[Named, ...] = (
            (ANIMALS[i % 12], None), (one, colours[i % 11]), (ANIMALS[(i + 3 + i // 12) % 12], None),
            (two, colours[(i + 4) % 11]),
        )  # fmt: skip
        *firsts, last = (phrase(*thing) for thing in things)
        found.append(Prompt(f"{', '.join(firsts)} and {last}", "four", things))
    return found


def random_boxes(count: int, number: int) -> list[Box]:
    """Disjoint boxes for 2 or 4 things: the picture cut near its middle, each part with a margin; in any order."""
    generator = torch.Generator().manual_seed(number)

    def near(middle: float, by: float) -> float:
        return middle + by * float(2 * torch.rand((), generator=generator) - 1)

    x, y = near(0.5, 0.06), near(0.5, 0.06)
    columns, rows = [(0.0, x), (x, 1.0)], [(0.0, y), (y, 1.0)]
    if count == 2:
        parts = [(*side, 0.0, 1.0) for side in columns] if number % 2 else [(0.0, 1.0, *side) for side in rows]
    else:
        parts = [(*across, *down) for down in rows for across in columns]
    order = torch.randperm(len(parts), generator=generator).tolist()
    margin = [near(0.02, 0.02) for _ in range(4 * count)]
    return [
        (left + margin[4 * k], top + margin[4 * k + 1], right - margin[4 * k + 2], bottom - margin[4 * k + 3])
        for k, (left, right, top, bottom) in enumerate(parts[number] for number in order)
    ]


def named(prompt: Prompt, boxes: Sequence[Box]) -> dict[str, Box]:
    """The region of each thing, by its phrase without the article."""
    return dict(zip((phrase(*thing).removeprefix("a ") for thing in prompt.things), boxes, strict=True))


def _couple(masks: dict[str, Box], base: float = 0.0) -> Couple:
    return Couple(tuple((f"a {phrase}", box) for phrase, box in masks.items()), base=base)


CONDITIONS: dict[str, Callable[[Any], list[Any]]] = {
    "plain": lambda masks: [],
    "Regions": lambda masks: [Regions(masks)],
    "Regions, inside 0": lambda masks: [Regions(masks, inside=0.0)],
    "Regions + Isolation": lambda masks: [Regions(masks), Isolation(masks)],
    "Regions + Retention": lambda masks: [Regions(masks), Retention(masks=masks, window=(0, 0.25))],
    "DenseRegions": lambda masks: [DenseRegions(masks)],
    "Couple": lambda masks: [_couple(masks)],
    "Regions + Couple, base 0.5": lambda masks: [_couple(masks, 0.5), Regions(masks)],
}


def judged(prompt: Prompt, boxes: Sequence[Box], reading: judge.Reading) -> dict[str, Any]:
    """Whether all are there, in place, and in their colours; the share of what is seen of each that is in its box."""
    seen = {thing.concept: thing for thing in reading.things}
    present, colours = reading.satisfies(prompt)
    placed, shares = [], []
    for (concept, _), (left, top, right, bottom) in zip(prompt.things, boxes, strict=True):
        thing = seen.get(concept)
        if thing is None:
            placed.append(False)
            continue
        x, y = (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2
        placed.append(left <= x <= right and top <= y <= bottom)
        cells = torch.as_tensor(thing.mask >= 0.5)
        centres = (torch.arange(judge.GRID) + 0.5) / judge.GRID
        inside = ((centres >= top) & (centres <= bottom))[:, None] & ((centres >= left) & (centres <= right))
        if cells.any():
            shares.append(float((cells & inside).sum() / cells.sum()))
    right_colours = all(colour is not False for colour in colours)
    return {
        "present": all(present), "in place": all(placed), "right": all(placed) and right_colours, "shares": shares
    }  # fmt: skip


class Drawn:
    """Draws a prompt with its boxes under one condition, and keeps what was judged and how long it took."""

    def __init__(self, pipe: Any, steps: int, guidance: float) -> None:
        self.pipe, self.steps, self.eye, self.guidance = pipe, steps, judge.load(), guidance
        mixes = hasattr(pipe, "unet")  # mixing latents is written for UNets
        names = (*CONDITIONS, MIXING) if mixes else tuple(CONDITIONS)
        self.found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        self.seconds = dict.fromkeys(self.found, 0.0)

    def draw(self, prompt: Prompt, boxes: Sequence[Box], seeds: Sequence[int], name: str) -> list[dict[str, Any]]:
        start, masks = time.perf_counter(), named(prompt, boxes)
        if name == MIXING:
            own = [(f"a {text}", box) for text, box in masks.items()]
            images = draw_mixed(self.pipe, prompt.text, own, seeds, self.steps, self.guidance)
        else:
            with attnctl.attach(self.pipe, *CONDITIONS[name](masks)):
                images = self.pipe(
                    [prompt.text] * len(seeds),
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                ).images
        self.seconds[name] += time.perf_counter() - start
        return [judged(prompt, boxes, reading) for reading in self.eye.read(images)]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 48,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...: where pictures are drawn.")] = "cpu",
    things: Annotated[int, typer.Option(help="Of a prompt: 2 or 4.")] = 2,
    model: Annotated[str, typer.Option(help="Embedded name or pipeline folder.")] = "glyph-sd",
    out: Annotated[Path, typer.Option(help="Folder for results.")] = Path("out/regions"),
) -> None:
    if things not in (2, 4):
        raise typer.BadParameter("--things is 2 or 4")
    command.check_writable(out)
    torch.set_num_threads(threads)
    pipe, console = placed(attnctl.load(model), device, torch.float32), Console()
    pipe.set_progress_bar_config(disable=True)
    texts = benchmark() if things == 2 else fours()
    half = cases.half(texts, cases.Half.report) if things == 2 else list(range(len(texts)))
    chosen: Sequence[int] = [half[(2 * i + 1) * len(half) // (2 * prompts)] for i in range(min(prompts, len(half)))]
    drawn = Drawn(pipe, steps, float(USUAL.get(model, {}).get("guidance", 7.5)))
    names = tuple(drawn.found)
    case: dict[str, int] = {}
    with Progress(console=console) as bar:
        line = bar.add_task("drawing", total=(len(chosen) + 1) * len(names))
        for name in names:
            case[name] = sum(one["in place"] for one in drawn.draw(CASE, CASE_BOXES, range(8), name))
            bar.advance(line)
        drawn.seconds = dict.fromkeys(names, 0.0)
        for number, k in enumerate(chosen):
            boxes = random_boxes(things, number)
            for name in names:
                drawn.found[name] += drawn.draw(texts[k], boxes, [1000 * seed + k for seed in range(seeds)], name)
                bar.advance(line)
    groups = [k for k in chosen for _ in range(seeds)]
    table = Table("condition", "all there", "all in place", "... in their colours", "of a thing inside its box",
                  "in place, against plain", "time / plain", "the cat and the car")  # fmt: skip
    rows: dict[str, Any] = {}
    for name, own in drawn.found.items():
        hits = {kind: [one[kind] for one in own] for kind in ("present", "in place", "right")}
        change = paired([one["in place"] for one in drawn.found["plain"]], hits["in place"], groups)
        points = [100 * value for value in (change.difference, change.low, change.high)]
        rates = {kind: rate(one) for kind, one in hits.items()}
        shares = [share for one in own for share in one["shares"]]
        inside, cost = sum(shares) / max(1, len(shares)), drawn.seconds[name] / drawn.seconds["plain"]
        rows[name] = {kind: one.to_json() for kind, one in rates.items()} | {
            "against plain": change.to_json(), "inside": inside, "time": cost, "case": case[name],
        }  # fmt: skip
        table.add_row(name, *map(str, rates.values()), f"{100 * inside:.0f} %",
                      "{:+.0f} ({:+.0f} to {:+.0f})".format(*points), f"{cost:.2f}", f"{case[name]} of 8")  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    file = out / ("regions.json" if things == 2 else "regions-4.json")
    cases.write(
        file,
        json.dumps({"model": model, "prompts": len(chosen), "seeds": seeds, "things": things, "rates": rows}, indent=1),
    )
    Console(width=max(180, console.width)).print(table)
    console.print(f"{file}")
