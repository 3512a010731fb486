"""How good a glyph pipeline is: the judge on things, colours and pairs, and whether word maps lie on their things.

Accept a model only if its word maps pass: controls act on maps, and good pictures do not need good maps.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from attnctl.glyph import judge
from attnctl.glyph.words import ANIMALS, COLOURS, CONCEPTS, OBJECTS, Named, Prompt, is_held_out, phrase


@dataclass(frozen=True)
class Quality:
    """Parts in [0, 1] of pictures judged right at one guidance scale.

    singles: "a X" shows X and nothing else. colours: of "a C O", the part with O in C. present: of pairs of animals,
    the part with both; on pairs of the training scenes, and on pairs left out of them.
    """

    guidance: float
    singles: float
    colours: float
    present: float
    present_seen: float
    present_held_out: float


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
    """Draws and judges: all concepts, coloured objects, pairs of animals. `full`: 4 seeds a concept, every colour."""
    singles = [(concept, None) for concept in CONCEPTS for _ in range(4 if full else 1)]
    coloured = [(o, c) for i, o in enumerate(OBJECTS) for j, c in enumerate(COLOURS) if full or (i + j) % 4 == 0]
    pairs = list(combinations(ANIMALS, 2)) if full else list(combinations(ANIMALS, 2))[::2]
    things: list[tuple[Named, ...]] = [(thing,) for thing in (*singles, *coloured)]
    things += [((one, None), (other, None)) for one, other in pairs]
    prompts = [Prompt(" and ".join(phrase(*thing) for thing in scene), "", scene) for scene in things]
    readings = judge.load().read(_draw(pipe, [prompt.text for prompt in prompts], guidance, seed, bar))
    checked = [(prompt, reading, *reading.satisfies(prompt)) for prompt, reading in zip(prompts, readings, strict=True)]
    first, second = checked[: len(singles)], checked[len(singles) : len(singles) + len(coloured)]
    both = [
        (all(present), is_held_out(*pair))
        for (_, _, present, _), pair in zip(checked[-len(pairs) :], pairs, strict=True)
    ]
    return Quality(
        guidance,
        singles=_mean(all(present) and len(reading.things) == 1 for _, reading, present, _ in first),
        colours=_mean(bool(colours[0]) for *_, colours in second),
        present=_mean(hit for hit, _ in both),
        present_seen=_mean(hit for hit, held_out in both if not held_out),
        present_held_out=_mean(hit for hit, held_out in both if held_out),
    )


def score(folder: Path, scales: Sequence[float], seed: int, out: Path) -> dict[str, Any]:
    """Sweeps guidance on a part of the prompts, scores the best scale on all, and tests the maps; writes `out`.

    The best scale is the one with the most single concepts and colours right.
    """
    from diffusers import StableDiffusionPipeline

    from attnctl.glyph.train.sd import map_scores

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
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
    }
    out.write_text(json.dumps(found, indent=1))
    return found
