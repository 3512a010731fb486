"""Compositions on the embedded model: an object is put into a picture; what becomes of both, in dB, and the judge.

    python benchmarks/effect.py compose
    python benchmarks/effect.py compose --compositions 24 --seeds 2
    python benchmarks/effect.py compose --conditions ours --conditions paper

outside: of the drawn box, against the background. known, new, style: of the object's pixels, against its own; concepts
of the world, emoji it has never seen, objects in another manner. rim: the box without the object, against the
background. object, thing: how often the judge sees the (known) object and the background's thing. extra: things more.
"ceiling" is the pasted picture through the autoencoder alone: no method can do better. Needs the world's font.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from compose_cases import PAIRS, Pair, composition, psnr
from PIL import Image, ImageFilter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import attnctl
from attnctl.app import command
from attnctl.glyph import judge
from attnctl.pipelines.compose import PrimeComposer
from attnctl.pipelines.compositions import Composition, Plan
from attnctl.pipelines.inversion import Solver, decode, encode, redrawn, sampling
from attnctl.sheets import grid

SCRATCH = ("pasted pixels", "ceiling", "inverted and back", "SDEdit 0.5", "SDEdit 0.5 in the box")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("paper", {}),
    "paper, own rows": ("paper", {"rows": "own"}),
    "paper, without infusion": ("paper", {"infuse": 0.0}),
    "ours": ("ours", {}),
    "ours, from step 0": ("ours", {"start": 0.0}),
    "ours, paper's columns": ("ours", {"rows": "columns"}),
    "ours, all rows as TF-ICON": ("ours", {"rows": "all"}),
    "ours, without infusion": ("ours", {"infuse": 0.0}),
    "from step 0, object's words only": ("ours", {"start": 0.0, "words": "object"}),
    "ours, no words": ("ours", {"words": "none"}),
    "ours, noise in the rim": ("ours", {"start": 0.0, "rim": "noise"}),
    "ours, blending to 0.8": ("ours", {"blend": 0.8}),
    "ours, guidance 2.5": ("ours", {"guidance": 2.5}),
    "ours, object inverted alone": ("ours", {"invert": "alone"}),
}
KINDS = ("known", "new", "style")


def scratch(name: str, composer: PrimeComposer, plan: Plan) -> list[Image.Image]:
    """What it is compared with."""
    pipe, size = composer.pipe, plan.size
    wholes = [Image.fromarray(one.picture) for one in plan.pasted]
    if name == "pasted pixels":
        return wholes
    clean = encode(pipe, wholes)
    if name == "ceiling":
        return decode(pipe, clean, size)
    if name == "inverted and back":
        _, path, _ = composer.inverted(plan)
        return decode(pipe, redrawn(pipe, path, size), size)
    ground = encode(pipe, [Image.fromarray(one.background) for one in plan.pasted])
    return decode(pipe, sdedit(pipe, plan, clean, ground if "box" in name else None), size)


def sdedit(pipe: Any, plan: Plan, clean: Tensor, ground: Tensor | None, guidance: float = 2.5) -> Tensor:
    """Noise on the pasted picture at half of the schedule, then by the prompt; outside of the box `ground`."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    boxes = plan.boxes[:, None].to(clean)

    def after(latents: Tensor, node: int) -> Tensor:
        if ground is None:
            return latents
        around = ground if node == 20 else solver.schedule.noised(ground, noise, node)
        return torch.lerp(around, latents, boxes)

    solver = Solver(pipe.scheduler, 20, start=10, after=after)
    solver.set_timesteps()
    start = solver.schedule.noised(clean, noise, 10)
    height, width = plan.size
    arguments = {"height": height, "width": width, "num_inference_steps": 20, "guidance_scale": guidance}
    with sampling(pipe, solver):
        pipe(prompt=[one.prompt for one in plan.asked], latents=start, output_type="latent", **arguments)
    return solver.path[20]


def measured(pair: Pair, plan: Plan, number: int, picture: Image.Image, reading: judge.Reading) -> dict[str, Any]:
    """One picture against its background and its pasted pixels."""
    known, drawn = plan.pasted[number], np.asarray(picture)
    left, top, right, bottom = plan.drawn(number)
    box = np.zeros(drawn.shape[:2], bool)
    box[top:bottom, left:right] = True
    thing = known.mask > 0.5
    near = np.asarray(Image.fromarray(thing.astype(np.uint8)).filter(ImageFilter.MaxFilter(7))) > 0
    wanted = {pair.thing[0], pair.object[0]}
    return {
        "outside": psnr(drawn, known.background, ~box),
        pair.kind: psnr(drawn, known.picture, thing),
        "rim": psnr(drawn, known.background, box & ~near),
        "thing": reading.has(pair.thing[0]),
        "extra": sum(seen.concept not in wanted for seen in reading.things),
    } | ({"object": reading.has(pair.object[0])} if pair.kind == "known" else {})


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of what is measured in dB; counts of the rest, with how many there could be."""
    found: dict[str, Any] = {}
    for name in ("outside", *KINDS, "rim"):
        if values := [row[name] for row in rows if name in row]:
            found[name] = float(np.mean(values))
    for name in ("object", "thing"):
        found[name] = [sum(row[name] for row in rows if name in row), sum(name in row for row in rows)]
    return found | {"extra": sum(row["extra"] for row in rows)}


def show(table: dict[str, dict[str, Any]], console: Console) -> None:
    shown = Table(box=SIMPLE_HEAD)
    for heading in ("condition", "outside", *KINDS, "rim", "object", "thing", "extra", "s"):
        shown.add_column(heading, no_wrap=True)
    for name, row in table.items():
        cells = [f"{row[one]:.1f}" if one in row else "" for one in ("outside", *KINDS, "rim")]
        counts = ["{}/{}".format(*row[one]) for one in ("object", "thing")]
        shown.add_row(name, *cells, *counts, str(row["extra"]), f"{row['seconds']:.1f}")
    console.print(shown)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    conditions: Annotated[
        list[str] | None, typer.Option(help=f"Any of {', '.join([*SCRATCH, *METHODS])}; default: all.")
    ] = None,
    compositions: Annotated[int, typer.Option(min=1, max=len(PAIRS), help="Of the fixed list, from its start.")] = 8,
    seeds: Annotated[int, typer.Option(min=1, help="Backgrounds of each composition.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the table and the sheet.")] = Path("out/compose"),
) -> None:
    names = list(conditions or [*SCRATCH, *METHODS])
    if unknown := [name for name in names if name not in SCRATCH and name not in METHODS]:
        raise typer.BadParameter(f"no condition {unknown[0]!r}; there are {', '.join([*SCRATCH, *METHODS])}")
    command.check_writable(out)
    torch.set_num_threads(1)
    pipe, eye, console = attnctl.load("glyph-sd"), judge.load(), Console(width=None if sys.stdout.isatty() else 120)
    pipe.set_progress_bar_config(disable=True)
    pairs = [pair for _ in range(seeds) for pair in PAIRS[:compositions]]
    asked = [composition(PAIRS[n], n, seed) for seed in range(seeds) for n in range(compositions)]
    table: dict[str, dict[str, Any]] = {}
    sheet: list[list[tuple[str, Image.Image]]] = []
    with Progress(console=console) as bar:
        line = bar.add_task("composing", total=len(names) * len(asked))
        base = PrimeComposer(pipe)
        for name in names:
            bar.update(line, description=name)
            plans, pictures, seconds = _all(name, base, asked, lambda count: bar.advance(line, count))
            readings = eye.read(pictures)
            rows = [measured(*each) for each in zip(pairs, *zip(*plans, strict=True), pictures, readings, strict=True)]
            table[name] = summary(rows) | {"seconds": seconds / len(asked), "each": rows}
            if not sheet:
                grounds = [Image.fromarray(plan.pasted[n].background) for plan, n in plans[:compositions]]
                sheet.append([("background" * (n == 0), ground) for n, ground in enumerate(grounds)])
            sheet.append([(name * (n == 0), picture) for n, picture in enumerate(pictures[:compositions])])
    out.mkdir(parents=True, exist_ok=True)
    setting = {"compositions": compositions, "seeds": seeds, "model": "glyph-sd"}
    (out / "compose.json").write_text(json.dumps({"setting": setting, "conditions": table}, indent=1))
    grid(sheet).save(out / "sheet.png")
    show(table, console)
    console.print(f"{out / 'compose.json'}\n{out / 'sheet.png'}")


def _all(
    name: str, base: PrimeComposer, asked: Sequence[Composition], told: Callable[[int], object], group: int = 12
) -> tuple[list[tuple[Plan, int]], list[Image.Image], float]:
    """Each composition as a plan and its number there, their pictures, and the seconds these took."""
    preset, settings = METHODS.get(name, ("ours", {}))
    composer = PrimeComposer(base.pipe, preset, **settings)
    composer.paths = base.paths  # most inversions are the same
    plans: list[tuple[Plan, int]] = []
    pictures: list[Image.Image] = []
    seconds = 0.0
    for first in range(0, len(asked), group):
        some = asked[first : first + group]
        plan, start = composer.plan(some), time.perf_counter()
        of_method = [] if name in SCRATCH else [one.picture for one in composer.batch(some)]
        pictures += of_method or scratch(name, composer, plan)
        seconds += time.perf_counter() - start
        plans += [(plan, n) for n in range(len(some))]
        told(len(some))
    return plans, pictures, seconds


if __name__ == "__main__":
    command.run(app, "effect compose")
