"""The conditions of effect.py: which controls a batch of prompts is drawn with."""

from collections.abc import Callable, Sequence
from typing import Any

from attnctl.engine.control import Control
from attnctl.glyph.words import Prompt
from attnctl.processors import AStar, Excitation, Retention, Segregation


def nouns(prompts: Sequence[Prompt]) -> list[str]:
    """The things of all prompts; an image ignores those that its prompt does not have."""
    return sorted({concept for prompt in prompts for concept, _ in prompt.things})


def subjects(prompts: Sequence[Prompt]) -> list[str]:
    """The same, with their colours: "red car"."""
    return sorted({f"{colour} {concept}" if colour else concept for p in prompts for concept, colour in p.things})


def bonds(prompts: Sequence[Prompt]) -> list[str]:
    """Only those that have colours."""
    return sorted({f"{colour} {concept}" for prompt in prompts for concept, colour in prompt.things if colour})


# The controls' defaults and these settings were chosen on the development half. With look_ahead, a picture is touched
# only if two large plain steps show a thing that the model hardly looks at. "peak_target" tells complete pictures of
# glyph-sd from others; for another model it is another.
EVERY: dict[str, Any] = {"window": (0.0, 0.5), "relative": 0.03, "look_ahead": 0}
SET: dict[str, Any] = {**EVERY, "look_ahead": 2, "peak_target": 0.26}
# Attend-and-Excite's schedule, its thresholds at the same parts of 20 steps as of 50.
THEIRS: dict[str, Any] = {"relative": None, "window": (0.0, 0.5), "refine": {0: 0.95, 4: 0.5, 8: 0.2}}
STEP = 0.25  # factor of its step size: the best of 0.125, 0.25, 0.5, 1 and 2 on 22 prompts of the development half


def bound(prompts: Sequence[Prompt], **settings: Any) -> list[Control]:
    """A-STAR with binding, of things with their colours."""
    return [AStar(*subjects(prompts), bonds=bonds(prompts), **settings)]


CONDITIONS: dict[str, Callable[[Sequence[Prompt]], list[Control]]] = {
    "none": lambda prompts: [],
    "attend-and-excite": lambda prompts: [Excitation(*nouns(prompts), **THEIRS, strength=STEP)],
    "attend-and-excite-paper": lambda prompts: [Excitation(*nouns(prompts), **THEIRS)],
    "excitation": lambda prompts: [Excitation(*subjects(prompts), **SET)],
    "segregation": lambda prompts: [Segregation(*subjects(prompts))],
    "retention": lambda prompts: [Retention(*subjects(prompts), **SET)],
    # A-STAR as written, and its presets
    "astar": lambda prompts: [AStar(*subjects(prompts))],
    "astar-paper": lambda prompts: [AStar(*nouns(prompts), preset="paper")],
    "astar-thorough": lambda prompts: [AStar(*subjects(prompts), preset="thorough")],
    "astar-always": lambda prompts: [AStar(*subjects(prompts), preset="always")],
    "astar-down": lambda prompts: [AStar(*subjects(prompts), preset="down")],
    "astar-binding": lambda prompts: bound(prompts),
    # with binding, of half the schedule, dearer or cheaper
    "half": lambda prompts: bound(prompts, **SET),
    "ungated": lambda prompts: bound(prompts, **EVERY),
    "seen-by-step": lambda prompts: bound(prompts, peak_target=SET["peak_target"], **EVERY),
    "down-sites": lambda prompts: bound(prompts, preset="down", **SET),
    "bfloat16": lambda prompts: bound(prompts, bfloat16=True, **SET),
    "down-bfloat16": lambda prompts: bound(prompts, preset="down", bfloat16=True, **SET),
}
"""A condition gets the prompts of a batch. Phrases are those of all; an image ignores what its prompt does not have."""
