"""Compositions on the embedded model: an object is put into a picture; what becomes of both, in dB, and the judge.

    python benchmarks/effect.py compose
    python benchmarks/effect.py compose --compositions 24 --seeds 2
    python benchmarks/effect.py compose --conditions ours --conditions paper

Each picture and what was measured of it is kept in the folder of --out as it comes, and the same command goes on there.

outside: of the drawn box, against the background. known, new, style: of the object's pixels, against its own; concepts
of the world, emoji it has never seen, objects in another manner. rim: the box without the object, against the
background. object, thing: how often the judge sees the (known) object and the background's thing. extra: things more.
"ceiling" is the pasted picture through the autoencoder alone: no method can do better. Needs the world's font.
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from clock import placed
from compose_cases import PAIRS, Pair, composition, psnr
from PIL import Image, ImageFilter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import attnctl
from attnctl.app import command
from attnctl.app.asked import slug
from attnctl.glyph import judge
from attnctl.pipelines.compose import PrimeComposer
from attnctl.pipelines.compositions import Composition, Plan
from attnctl.pipelines.inversion import Solver, decode, encode, redrawn, sampling
from attnctl.sheets import Cell, grid

SCRATCH = ("pasted pixels", "ceiling", "inverted and back", "SDEdit 0.5", "SDEdit 0.5 in the box")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "paper": ("paper", {}),
    "paper, own rows": ("paper", {"rows": "own"}),
    "paper, without infusion": ("paper", {"infuse": 0.0}),
    "paper, without RCA": ("paper", {"words": "none"}),
    "paper, all rows as TF-ICON": ("paper", {"rows": "all"}),
    "ours": ("ours", {}),
    "ours, without infusion": ("ours", {"infuse": 0.0}),
    "ours, paper's columns": ("ours", {"rows": "columns"}),
    "ours, all rows as TF-ICON": ("ours", {"rows": "all"}),
    "ours, without RCA": ("ours", {"words": "none"}),
    "ours, without symmetric RCA": ("ours", {"words": "object"}),
    "from step 0": ("ours", {"start": 0.0}),
    "from step 0, without infusion": ("ours", {"start": 0.0, "infuse": 0.0}),
    "from step 0, without RCA": ("ours", {"start": 0.0, "words": "none"}),
    "from step 0, without symmetric RCA": ("ours", {"start": 0.0, "words": "object"}),
    "from step 0, noise in the rim": ("ours", {"start": 0.0, "rim": "noise"}),
    "ours, blending to 0.8": ("ours", {"blend": 0.8}),
    "ours, guidance 2.5": ("ours", {"guidance": 2.5}),
    "ours, object inverted alone": ("ours", {"invert": "alone"}),
}
KINDS = ("known", "new", "style")
GROUP = 8
"""Compositions that are made together."""


class Case(NamedTuple):
    """One of the list, and the seed of its background."""

    number: int
    seed: int

    @property
    def composition(self) -> Composition:
        return composition(PAIRS[self.number], self.number, self.seed)

    def file(self, condition: str) -> str:
        return f"{slug(condition)}-{self.number}-{self.seed}.png"


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
    found["seconds"] = float(np.mean([row["seconds"] for row in rows]))
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
    model: Annotated[str, typer.Option(help="Embedded name or pipeline folder.")] = "glyph-sd",
    device: Annotated[str, typer.Option(help="cpu, cuda, ...: where pictures are drawn.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder of results; default: out/compose, or one of the model.")
    ] = None,
) -> None:
    names = list(conditions or [*SCRATCH, *METHODS])
    if unknown := [name for name in names if name not in SCRATCH and name not in METHODS]:
        raise typer.BadParameter(f"no condition {unknown[0]!r}; there are {', '.join([*SCRATCH, *METHODS])}")
    out = out or Path("out/compose" if model == "glyph-sd" else f"out/compose-{slug(model)}")
    command.check_writable(out)
    torch.set_num_threads(1)
    pipe, eye, console = (
        placed(attnctl.load(model), device, torch.float32),
        judge.load(),
        Console(width=None if sys.stdout.isatty() else 120),
    )
    pipe.set_progress_bar_config(disable=True)
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    cases = [Case(number, seed) for seed in range(seeds) for number in range(compositions)]
    lines = out / "compose.jsonl"
    known = noted(lines)
    with Progress(console=console) as bar:
        line = bar.add_task("composing", total=len(names) * len(cases))
        base = PrimeComposer(pipe)
        for name in names:
            bar.update(line, description=name)
            missing = [case for case in cases if (name, case) not in known]
            bar.advance(line, len(cases) - len(missing))
            for first in range(0, len(missing), GROUP):
                some = missing[first : first + GROUP]
                made, rows = composed(name, base, some, eye)
                for case, picture, row in zip(some, made, rows, strict=True):
                    picture.save(pictures / case.file(name))
                    told = {"condition": name, "composition": case.number, "seed": case.seed, **row}
                    with lines.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(told) + "\n")
                    known[name, case] = told
                bar.advance(line, len(some))
    table = {name: summary([known[name, case] for case in cases]) for name in names}
    setting = {"compositions": compositions, "seeds": seeds, "model": model}
    (out / "compose.json").write_text(json.dumps({"setting": setting, "conditions": table}, indent=1))
    grid(sheet(base, names, cases[:compositions], pictures)).save(out / "sheet.png")
    show(table, console)
    console.print(f"{out / 'compose.json'}\n{out / 'sheet.png'}")


def noted(lines: Path) -> dict[tuple[str, Case], dict[str, Any]]:
    """What an earlier run has measured, by condition and case; a line that was cut off is passed over."""
    found: dict[tuple[str, Case], dict[str, Any]] = {}
    told = lines.read_text(encoding="utf-8") if lines.exists() else ""
    if told and not told.endswith("\n"):
        lines.write_text(told + "\n", encoding="utf-8")
    for line in told.splitlines():
        with suppress(ValueError):
            one = json.loads(line)
            found[one["condition"], Case(one["composition"], one["seed"])] = one
    return found


def sheet(base: PrimeComposer, names: Sequence[str], cases: Sequence[Case], folder: Path) -> list[list[Cell]]:
    """The backgrounds, and a row for each condition."""
    grounds = base.plan([case.composition for case in cases]).pasted
    rows: list[list[Cell]] = [
        [("background" * (n == 0), Image.fromarray(one.background)) for n, one in enumerate(grounds)]
    ]
    for name in names:
        rows.append([(name * (n == 0), Image.open(folder / case.file(name))) for n, case in enumerate(cases)])
    return rows


def composed(
    name: str, base: PrimeComposer, cases: Sequence[Case], eye: judge.Judge
) -> tuple[list[Image.Image], list[dict[str, Any]]]:
    """Pictures of one condition, and what is measured of each; seconds are a share of the group's."""
    preset, settings = METHODS.get(name, ("ours", {}))
    composer = PrimeComposer(base.pipe, preset, **settings)
    composer.paths = base.paths  # most inversions are the same
    some = [case.composition for case in cases]
    plan, start = composer.plan(some), time.perf_counter()
    made = scratch(name, base, plan) if name in SCRATCH else [one.picture for one in composer.batch(some)]
    seconds = (time.perf_counter() - start) / len(cases)
    readings = eye.read(made)
    rows = [
        measured(PAIRS[case.number], plan, n, made[n], readings[n]) | {"seconds": seconds}
        for n, case in enumerate(cases)
    ]
    return made, rows
