"""What is learnt from one picture of two things that the model never saw, with and without calibrated attention.

    python benchmarks/effect.py personalize --pictures 1 --arms plain --arms both --seeds 1

Each picture shows two emoji that are no part of the glyph world, one of the kind of each noun. Every arm trains with
the same steps and chances. Rates are means over pictures, training seeds and drawings; seconds are the processor's own:

own     how much of its own thing a word draws alone: R^2 of the best placed template, 0 to 1
both    the same for both things, where one prompt names both words
leak    how much of the other thing a word draws alone
kind    how much of the ordinary thing of its noun a word draws alone, where it should draw the learnt one
share   part of a word's map on its own thing, of what is on either thing
follow  the judge sees the bowl of "a <v1> cat and a red bowl", in red

Where the model's attention cannot tell the things apart, the arms with masks are given none, and the line says so.

Results are kept as they come: a killed run goes on where it was. Needs the emoji font.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageDraw, ImageFont, ImageOps
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from attnctl import attach, loading
from attnctl.app import command
from attnctl.glyph import judge, scenes
from attnctl.glyph.words import Prompt
from attnctl.maps.live import LiveMaps
from attnctl.pipelines import Personalizer
from attnctl.pipelines.personalize.examples import encoded
from attnctl.pipelines.personalize.masks import MaskError
from attnctl.pipelines.personalize.settings import PRESETS, Settings
from attnctl.pipelines.personalize.trainer import calibrated_sites
from attnctl.pipelines.personalize.views import View
from attnctl.sheets import grid

SIDE, DRAWN = 128, 6
GUIDANCE = {"glyph-sd": 3.0, "glyph-sd3": 4.0}
PAIRS = (  # (emoji, noun, the noun's own emoji) twice
    (("🦊", "cat", "🐱"), ("🚓", "car", "🚗")),
    (("🐺", "dog", "🐶"), ("🍊", "apple", "🍎")),
    (("🐼", "bear", "🐻"), ("🚕", "car", "🚗")),
    (("🐯", "lion", "🦁"), ("🎁", "suitcase", "🧳")),
    (("🐨", "mouse", "🐭"), ("🍅", "apple", "🍎")),
    (("🐔", "bird", "🐦"), ("🚙", "car", "🚗")),
)
BASE = PRESETS["ours"]
WHOLE = replace(BASE, masks="none", subsets="all", zoom=False, counted="view")  # every view has both things
PLAIN = replace(WHOLE, bind=0.0, separate=0.0)
ARMS: dict[str, Settings] = {
    "textual inversion": replace(PLAIN, kv_rate=0.0),
    "unkept": replace(PLAIN, keep=0.0),  # Custom Diffusion: keys and values, and words
    "plain": PLAIN,  # the same, and other words and the padding are held: so in all arms below
    "binding": replace(WHOLE, separate=0.0),
    "separate": replace(WHOLE, bind=0.0),
    "no suppression": replace(WHOLE, power=1),
    "disendiff": WHOLE,
    "masks": replace(BASE, bind=0.0, separate=0.0),
    "both": BASE,
}
BOWL = Prompt("a red bowl", "objects", (("bowl", "red"),))
MEASURES = ("own", "both", "leak", "kind", "share", "follow")


def emoji(glyph: str, longer: int, angle: float = 0, mirror: bool = False) -> np.ndarray[Any, Any]:
    """(height, width, 4), premultiplied, 0 to 1, its longer side so many pixels."""
    image = Image.new("RGBA", (160, 160))
    font = ImageFont.truetype(scenes.font_path(), 109)
    ImageDraw.Draw(image).text((8, 8), glyph, font=font, embedded_color=True)
    image = Image.frombytes("RGBa", image.size, image.tobytes())  # on nothing, colours come out premultiplied
    image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    image = (ImageOps.mirror(image) if mirror else image).crop(image.getbbox())
    size = [max(4, round(length * longer / max(image.size))) for length in image.size]
    return np.asarray(image.resize((size[0], size[1]), Image.Resampling.LANCZOS), np.float32) / 255


def reference(pair: Any) -> tuple[Image.Image, Tensor]:
    """The picture of a pair, and (2, side, side) where its things are, which only the measures see."""
    along = np.mgrid[0 : 1 : SIDE * 1j, 0 : 1 : SIDE * 1j].mean(0)[..., None]
    canvas = (np.array([150, 205, 190]) * (1 - along) + np.array([205, 190, 225]) * along) / 255
    masks = torch.zeros(2, SIDE, SIDE)
    for k, ((glyph, *_), (longer, x, y)) in enumerate(zip(pair, ((52, 6, 38), (56, 66, 44)), strict=True)):
        patch = emoji(glyph, longer)
        window = slice(y, y + patch.shape[0]), slice(x, x + patch.shape[1])
        canvas[window] = patch[..., :3] + canvas[window] * (1 - patch[..., 3:])
        masks[k][window] = torch.from_numpy(patch[..., 3] > 0.5).float()
    return Image.fromarray((canvas.clip(0, 1) * 255).round().astype(np.uint8)), masks


@torch.no_grad()
def likeness(images: Sequence[Image.Image], glyph: str) -> Tensor:
    """(images,): how much of an emoji each shows: 1 - squared error over spread of the best placed template."""
    arrays = np.stack([np.asarray(image, np.float32) for image in images]) / 255
    x = F.avg_pool2d(torch.from_numpy(arrays).permute(0, 3, 1, 2), 4)
    best = torch.zeros(len(images))
    for longer in (40, 48, 57, 68, 81, 96):
        for angle in (-9, 0, 9):
            for mirror in (False, True):
                patch = F.avg_pool2d(torch.from_numpy(emoji(glyph, longer, angle, mirror)).permute(2, 0, 1), 4)
                mask = (patch[3] > 0.6).float()
                look = patch[:3] / patch[3].clamp_min(1e-3) * mask
                spread = ((look - look.sum() / (3 * mask.sum())) * mask).square().sum()
                error = F.conv2d(x.square().sum(1, keepdim=True), mask[None, None]) - 2 * F.conv2d(x, look[None])
                found = 1 - (error + look.square().sum()) / spread
                best = torch.maximum(best, found.flatten(1).amax(1))
    return best


def shares(pipe: Any, personalizer: Personalizer, picture: Image.Image, masks: Tensor) -> list[float]:
    """For each word, the part of its map on its own thing, of what is on either, in the training picture."""
    words = [one.word for one in personalizer.concepts]
    text = " and ".join(f"a {one.phrase}" for one in personalizer.concepts)
    denoising = personalizer.denoising
    latents = encoded(pipe, [View().picture(picture, SIDE)], lambda at: None).repeat(3, 1, 1, 1)
    times = denoising.times(torch.tensor([0.3, 0.5, 0.7]))
    live = LiveMaps(*words, where=list(calibrated_sites(denoising, latents.shape[-1], None)))
    with torch.no_grad(), attach(pipe, live) as attached:
        with attached.batch([text] * 3, max_sequence_length=denoising.rows) as batch:
            states = denoising.text([text] * 3, (SIDE, SIDE))
            denoising.predict(latents, times, torch.Generator().manual_seed(0), states)
        maps = batch.state(live).maps().mean(0)  # (words, height, width)
    cells = F.adaptive_avg_pool2d(masks, maps.shape[-1])
    return [float((maps[k] * cells[k]).sum() / (maps[k] * cells.sum(0)).sum()) for k in range(2)]


def trial(model: str, pair: Any, settings: Settings, eye: Any) -> tuple[dict[str, float], list[list[Image.Image]]]:
    """Train one arm on one picture; its measures, and what it drew, by prompt."""
    pipe, (picture, masks) = loading.load(model), reference(pair)
    pipe.set_progress_bar_config(disable=True)
    nouns = [noun for _, noun, _ in pair]
    personalizer = Personalizer(pipe, nouns, **settings.to_dict())
    start, told = time.process_time(), True
    try:
        personalizer.learn(picture)
    except MaskError:
        told, personalizer = False, Personalizer(pipe, nouns, **settings.to_dict() | {"masks": "none"})
        personalizer.learn(picture)
    seconds = time.process_time() - start
    one, two = (concept.phrase for concept in personalizer.concepts)
    rows = []
    for prompt in (f"a {one}", f"a {two}", f"a {one} and a {two}", f"a {one} and a red bowl"):
        dice = [torch.Generator().manual_seed(500 + k) for k in range(DRAWN)]
        rows.append(
            pipe([prompt] * DRAWN, num_inference_steps=20, guidance_scale=GUIDANCE[model], generator=dice).images
        )
    (first, _, first_kind), (second, _, second_kind) = pair
    bowl = [reading.satisfies(BOWL) for reading in eye.read(rows[3])]
    found = {
        "own": float(torch.cat([likeness(rows[0], first), likeness(rows[1], second)]).mean()),
        "both": float(torch.cat([likeness(rows[2], first), likeness(rows[2], second)]).mean()),
        "leak": float(torch.cat([likeness(rows[0], second), likeness(rows[1], first)]).mean()),
        "kind": float(torch.cat([likeness(rows[0], first_kind), likeness(rows[1], second_kind)]).mean()),
        "share": mean(shares(pipe, personalizer, picture, masks)),
        "follow": mean(float(all(present) and all(colours)) for present, colours in bowl),
        "seconds": seconds,
        "masks": told,
    }
    return found, rows


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    arms: Annotated[list[str], typer.Option(help=f"Any of {', '.join(ARMS)}.")] = list(ARMS),  # noqa: B006
    pictures: Annotated[int, typer.Option(min=1, max=len(PAIRS), help="So many of the six pictures.")] = len(PAIRS),
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds.")] = 3,
    steps: Annotated[int, typer.Option(min=1)] = BASE.steps,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(GUIDANCE)}.")] = "glyph-sd",
    out: Annotated[Path, typer.Option(help="Folder for results and sheets.")] = Path("out/personalize"),
) -> None:
    if unknown := [name for name in arms if name not in ARMS]:
        raise typer.BadParameter(f"no arm {unknown[0]!r}; there are {', '.join(ARMS)}")
    if model not in GUIDANCE:
        raise typer.BadParameter(f"no model {model!r}; there are {', '.join(GUIDANCE)}")
    command.check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    log, console, eye = out / "results.jsonl", Console(), judge.load()
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(one.get("model", "glyph-sd"), one["arm"], one["picture"], one["seed"], one["steps"]): one for one in lines}
    wanted = [
        (model, arm, picture, seed, steps) for picture in range(pictures) for seed in range(seeds) for arm in arms
    ]
    for key in wanted:
        if key in done:
            continue
        _, arm, picture, seed, _ = key
        found, rows = trial(model, PAIRS[picture], replace(ARMS[arm], seed=seed, steps=steps), eye)
        done[key] = {"model": model, "arm": arm, "picture": picture, "seed": seed, "steps": steps} | found
        with log.open("a") as file:
            file.write(json.dumps(done[key]) + "\n")
        cells: list[Any] = [[("", image) for image in row] for row in rows]
        name = f"{arm.replace(' ', '-')}-{picture}-{seed}.png"
        grid(cells, points=10).save(out / (name if model == "glyph-sd" else f"{model}-{name}"))
        console.print(f"{arm}, picture {picture}, seed {seed}: {found['seconds']:.0f} s")
    table = Table("arm", "trainings", *MEASURES, "seconds", box=SIMPLE_HEAD)
    for arm in arms:
        own = [done[key] for key in wanted if key[1] == arm]
        told = [f"{mean(one[name] for one in own):.2f}{_spread([one[name] for one in own])}" for name in MEASURES]
        table.add_row(arm, str(len(own)), *told, f"{mean(one['seconds'] for one in own):.0f}")
    console.print(table)
    if len(arms) > 1:
        console.print(differences(done, wanted, arms))
    if lost := sum(not done[key]["masks"] for key in wanted):
        console.print(f"trainings without masks, since attention did not tell the things apart: {lost}")
    console.print(f"{log}")


def differences(done: dict[Any, dict[str, Any]], wanted: Sequence[Any], arms: Sequence[str]) -> Table:
    """Of each arm to the first, on the same pictures and seeds."""
    table = Table(f"against {arms[0]}", *MEASURES, box=SIMPLE_HEAD)
    first = [key for key in wanted if key[1] == arms[0]]
    for arm in arms[1:]:
        row = [arm]
        for name in MEASURES:
            gaps = [done[(key[0], arm, *key[2:])][name] - done[key][name] for key in first]
            row.append(f"{mean(gaps):+.2f}{_spread(gaps)}")
        table.add_row(*row)
    return table


def _spread(values: Sequence[float]) -> str:
    """The standard error of a mean."""
    return f" ±{stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
