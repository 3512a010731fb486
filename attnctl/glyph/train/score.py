"""How good a glyph pipeline is: the judge on things, colours and pairs, and whether word maps lie on their things.

Accept a model only if its word maps pass: controls act on maps, and good pictures do not need good maps.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from attnctl.app.command import UsageError, check_writable
from attnctl.glyph import judge
from attnctl.glyph.scenes import font_path
from attnctl.glyph.train.card import card
from attnctl.glyph.words import ANIMALS, COLOURS, CONCEPTS, OBJECTS, Named, Prompt, is_held_out, phrase
from attnctl.loading import check_folder, load

MADE_BY = ("scenes", "batch", "steps", "seed", "grounding")
"""What `sd` writes into training.json, for the model card."""

WEAK = 0.9


@dataclass(frozen=True)
class Quality:
    """Parts in [0, 1] of pictures judged right at one guidance scale.

    singles: "a X" shows X and nothing else. colours: of "a C O", the part with O in C. present: of pairs of animals,
    the part with both; on pairs of the training scenes, and on pairs left out of them. weak: of each concept that is
    there, and nothing else, in less than 90 % of the pictures of it alone (in its own and in other colours): that part.
    """

    guidance: float
    singles: float
    colours: float
    present: float
    present_seen: float
    present_held_out: float
    weak: dict[str, float] = field(default_factory=dict)


def _draw(pipe: Any, prompts: Sequence[str], guidance: float, seed: int, bar: Progress, batch: int = 12) -> list[Any]:
    images: list[Any] = []
    line = bar.add_task(f"guidance {guidance:g}", total=len(prompts))
    for first in range(0, len(prompts), batch):
        texts = list(prompts[first : first + batch])
        generators = [torch.Generator().manual_seed(1000 * seed + first + k) for k in range(len(texts))]
        images += pipe(texts, num_inference_steps=20, guidance_scale=guidance, generator=generators).images
        bar.advance(line, len(texts))
    return images


def _mean(hits: Iterable[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values) if values else float("nan")


def quality(pipe: Any, guidance: float, seed: int, full: bool, bar: Progress) -> Quality:
    """Draws and judges: all concepts, coloured objects, pairs of animals.

    full: 4 seeds a concept and every colour; `weak` counts 12 seeds of an animal and 4 of an object and its colours.
    """
    singles = [(concept, None) for concept in CONCEPTS for _ in range(4 if full else 1)]
    coloured = [(o, c) for i, o in enumerate(OBJECTS) for j, c in enumerate(COLOURS) if full or (i + j) % 4 == 0]
    pairs = list(combinations(ANIMALS, 2)) if full else list(combinations(ANIMALS, 2))[::2]
    things: list[tuple[Named, ...]] = [(thing,) for thing in (*singles, *coloured)]
    things += [((one, None), (other, None)) for one, other in pairs]
    things += [((animal, None),) for animal in ANIMALS for _ in range(8 if full else 0)]
    prompts = [Prompt(" and ".join(phrase(*thing) for thing in scene), "", scene) for scene in things]
    readings = judge.load().read(_draw(pipe, [prompt.text for prompt in prompts], guidance, seed, bar))
    checked = [(prompt, reading, *reading.satisfies(prompt)) for prompt, reading in zip(prompts, readings, strict=True)]
    rest = iter(checked)
    first, second, third = (list(islice(rest, len(some))) for some in (singles, coloured, pairs))
    alone: dict[str, list[bool]] = {concept: [] for concept in CONCEPTS}
    for prompt, reading, present, _ in (*first, *second, *rest):
        alone[prompt.things[0][0]].append(all(present) and len(reading.things) == 1)
    both = [(all(present), is_held_out(*pair)) for (_, _, present, _), pair in zip(third, pairs, strict=True)]
    return Quality(
        guidance,
        singles=_mean(all(present) and len(reading.things) == 1 for _, reading, present, _ in first),
        colours=_mean(bool(colours[0]) for *_, colours in second),
        present=_mean(hit for hit, _ in both),
        present_seen=_mean(hit for hit, held_out in both if not held_out),
        present_held_out=_mean(hit for hit, held_out in both if held_out),
        weak={concept: mean for concept, hits in alone.items() if (mean := _mean(hits)) < WEAK},
    )


def how_made(folder: Path) -> dict[str, Any]:
    """How the glyph pipeline in a folder was made; refuses any other folder."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder: a glyph pipeline is wanted, as this training writes it")
    check_folder(folder)
    try:
        made = json.loads((folder / "training.json").read_text())
        whole = set(MADE_BY) <= set(made)
    except (FileNotFoundError, ValueError, TypeError):
        whole = False
    if not whole:
        raise UsageError(
            f"{folder} is no glyph pipeline: its training.json is missing or was not written by this training"
        )
    return made


def score(folder: Path, scales: Sequence[float], seed: int) -> dict[str, Any]:
    """Sweeps guidance on a part of the prompts, scores the best scale on all, and tests the maps.

    The best scale is the one with the most single concepts and colours right. Writes scores.json and the model card
    into `folder`.
    """
    made = how_made(folder)
    check_writable(folder, "score")
    font_path()
    pipe = load(folder.absolute())  # or a folder named as an embedded model would be that model
    if hasattr(pipe, "unet"):
        from attnctl.glyph.train.sd import map_scores
    else:
        from attnctl.glyph.train.sd3 import map_scores

    pipe.set_progress_bar_config(disable=True)
    with Progress() as bar:
        sweep = [quality(pipe, scale, seed, False, bar) for scale in scales]
        best = max(sweep, key=lambda q: q.singles + q.colours).guidance
        final = quality(pipe, best, seed + 1, True, bar)
    found = {
        "guidance": best,
        "quality": asdict(final),
        "sweep": [asdict(q) for q in sweep],
        "maps": {t: asdict(s) for t, s in map_scores(pipe, scenes=200).items()},
        "autoencoder_psnr": autoencoder_psnr(pipe.vae),
    }
    (folder / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / "README.md").write_text(card(found, made, pipe))
    return found


@torch.no_grad()
def autoencoder_psnr(vae: Any, scenes: int = 200) -> float:
    """Mean PSNR in dB of scenes of other seeds, there and back."""
    import numpy as np

    from attnctl.glyph.scenes import Renderer
    from attnctl.glyph.train.autoencoder import pixels, psnr

    values = pixels(np.stack([Renderer(stream=5).scene(k, "all").image for k in range(scenes)]))
    again = [vae.decode(vae.encode(some).latent_dist.mode()).sample for some in values.split(20)]
    return psnr(values, torch.cat(again))
