"""Measuring sets of attention heads by drawing with them: candidates in one batch, every score kept in a file."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

import numpy as np
import torch
from PIL import Image

from attnctl.engine.attachment import attach
from attnctl.engine.run import Step
from attnctl.errors import AttnctlWarning, ControlError
from attnctl.pipelines.head_race import Case, Floats
from attnctl.processors import Perturb

Objective = Callable[[list[Image.Image], list[str]], Sequence[float]]
Spread = Callable[[Iterable[list["Item"]]], Iterable[list[float]]]  # batches -> their scores, in the same order


class Item(NamedTuple):
    """One measurement: heads ("" is no perturbation), prompt by number, seed, steps (0: the size of the effect)."""

    heads: str
    prompt: int
    seed: int
    steps: int


@dataclass(frozen=True)
class Progress:
    """Where a search stands.

    Attributes:
        stage: what it does.
        spent: forward passes so far, of `budget`.
        budget: of the whole search.
        seconds: that the rest will take if the whole budget is spent, judged by what was drawn; NaN before that.
    """

    stage: str
    spent: int
    budget: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """What candidates have cost, drawn as a search draws them.

    Attributes:
        steps: of all pictures with broken heads.
        passes: that really ran for them, in whole forward passes; what was shared did not run.
        full: passes they would have cost without sharing.
        seconds: of drawing.
    """

    steps: int = 0
    passes: float = 0.0
    full: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.steps + other.steps,
            self.passes + other.passes,
            self.full + other.full,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Whole(Perturb):
    """`Perturb` that shares nothing with the pipeline's own forward: what a candidate costs outside of a search."""

    def before_denoise(self, step: Step) -> None:
        return


class Measure(Protocol):
    """What a bench asks: the numbers of one batch of items, all with heads or all without, of equal steps."""

    def price(self, heads: str, steps: int) -> int:
        """Forward passes of one item."""

    def __call__(self, items: Sequence[Item]) -> list[float]:
        """A number for each."""


class Drawer:
    """Draws with sets of heads and asks an objective.

    Args:
        pipe: the pipeline.
        objective: pictures, prompts -> scores, the higher the better.
        prompts: that items speak of.
        perturb: kind, scope, u and scale; its heads are not read.
        call: further arguments of the pipeline call.
    """

    def __init__(
        self, pipe: Any, objective: Objective, prompts: Sequence[str], perturb: Perturb, call: dict[str, Any]
    ) -> None:
        self.pipe, self.objective, self.prompts, self.perturb, self.call = pipe, objective, prompts, perturb, call
        self.cost = Cost()
        self.guided = float(call.get("true_cfg_scale", call.get("guidance_scale", 1.0))) > 1

    def price(self, heads: str, steps: int) -> int:
        """A weak pass counts whole, though it may start at the first perturbed block."""
        base = 1 + self.guided
        return steps * (base + bool(heads)) if steps else 2 * base + 1

    def __call__(self, items: Sequence[Item]) -> list[float]:
        return self._scores(items) if items[0].steps else self._effects(items)

    def alone(self, items: Sequence[Item]) -> Cost:
        """What candidates cost when each is drawn by itself and nothing is shared."""
        found = Cost()
        own = {name: getattr(self.perturb, name) for name in ("u", "scale", "kind", "scope")}
        for one in items:
            perturb = Whole(one.heads, **own)
            start = time.perf_counter()
            with warnings.catch_warnings(), attach(self.pipe, perturb) as run:
                warnings.simplefilter("ignore", AttnctlWarning)
                self.pipe(
                    self.prompts[one.prompt],
                    num_inference_steps=one.steps,
                    generator=torch.Generator().manual_seed(one.seed),
                    **self.call,
                )
            seconds = time.perf_counter() - start
            found += Cost(one.steps, sum(run.report.passes.values()), self.price(one.heads, one.steps), seconds)
        return found

    def _draw(self, items: Sequence[Item], steps: int, **more: Any) -> tuple[Any, Any]:
        perturb = replace(self.perturb, candidates=tuple(one.heads for one in items), **more.pop("control", {}))
        generators = [torch.Generator().manual_seed(one.seed) for one in items]
        with warnings.catch_warnings(), attach(self.pipe, *([perturb] if items[0].heads else [])) as run:
            warnings.simplefilter("ignore", AttnctlWarning)  # that a set is inert is a result here
            asked = [self.prompts[one.prompt] for one in items]
            out = self.pipe(asked, num_inference_steps=steps, generator=generators, **self.call | more)
        return out.images, run.report

    def _scores(self, items: Sequence[Item]) -> list[float]:
        start = time.perf_counter()
        try:
            images, report = self._draw(items, items[0].steps)
        except ControlError as error:
            if not _inert(error):
                raise
            if len(items) == 1:
                return self._scores([items[0]._replace(heads="")])  # such heads change no picture
            return [score for one in items for score in self._scores([one])]
        if items[0].heads:
            full = sum(self.price(one.heads, one.steps) for one in items)
            passes = len(items) * sum(report.passes.values())
            steps = sum(one.steps for one in items)
            self.cost += Cost(steps, passes, full, time.perf_counter() - start)
        scores = [float(one) for one in self.objective(images, [self.prompts[one.prompt] for one in items])]
        if len(scores) != len(items) or not all(map(math.isfinite, scores)):
            raise ControlError(f"the objective gave {scores} for {len(items)} pictures; it should be a number for each")
        return scores

    def _effects(self, items: Sequence[Item]) -> list[float]:
        """|c - p| / |c| after half of a two-step schedule, where a picture has begun to show."""
        try:
            _, report = self._draw(items, 2, output_type="latent", control={"window": (0.5, 1.0)})
        except ControlError as error:
            if not _inert(error):
                raise
            return [0.0] if len(items) == 1 else [size for one in items for size in self._effects([one])]
        (trace,) = (trace for _, trace in report.traces)
        return [float(value) for value in np.mean(list(trace.effects.values()), axis=0)]


def _inert(error: ControlError) -> bool:
    """`Perturb` refuses heads that move nothing, be it one set of a batch."""
    return "changes nothing" in str(error)


class Log:
    """The measurements of a search, a line of JSON for each batch; what a kill cut short is measured again.

    Raises:
        ControlError: the file is of a search with other settings, or another process has it.
    """

    def __init__(self, file: TextIO | None, setting: dict[str, Any]) -> None:
        self.file, self.setting, self.done = file, setting, dict[str, list[float]]()
        self.begun = False  # the settings are written
        if file is None:
            return
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            file.write("\n")
        for line in lines:
            try:
                found = json.loads(line)
            except json.JSONDecodeError:
                continue
            if "setting" in found and found["setting"] != setting:
                other = [name for name in setting if found["setting"].get(name) != setting[name]]
                raise ControlError(
                    f"{file.name} holds scores of a search with another {', '.join(other)}; move it away to start anew"
                )
            self.begun = self.begun or "setting" in found
            if self.begun and "items" in found:
                self.done[json.dumps(found["items"])] = found["scores"]

    def get(self, items: Sequence[Item]) -> list[float] | None:
        """The scores of a batch, if it was measured before."""
        return self.done.get(json.dumps(items))

    def add(self, items: Sequence[Item], scores: list[float]) -> None:
        """Keep the scores of a batch."""
        if self.file is None:
            return
        lines = [] if self.begun else [{"setting": self.setting}]
        self.file.write("".join(json.dumps(line) + "\n" for line in [*lines, {"items": items, "scores": scores}]))
        self.file.flush()
        self.begun = True


@contextmanager
def opened(path: Path | None, setting: dict[str, Any]) -> Iterator[Log]:
    """The log in a file, for this process alone; None: nothing is kept."""
    if path is None:
        yield Log(None, setting)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ControlError(f"another process is searching into {path}; wait, or choose another file") from None
        try:
            yield Log(file, setting)
        finally:
            if not os.fstat(file.fileno()).st_size:  # nothing was measured
                path.unlink()


class LoggedBench:
    """A `Bench` on top of what measures batches: batches, counts forward passes, tells how it goes.

    Batches are the same in every run of a search, measured or read: their size decides a picture's last bits.
    """

    def __init__(
        self,
        measure: Measure,
        prompts: Sequence[str],
        log: Log,
        budget: int,
        batch: int,
        progress: Callable[[Progress], None] | None,
        spread: Spread | None = None,
    ) -> None:
        self.spread: Spread = spread or partial(map, measure)
        self.measure, self.prompts, self.log, self.budget, self.batch = measure, prompts, log, budget, batch
        self.progress, self.spent = progress, 0
        self._known: dict[Item, float] = {}
        self._fresh, self._seconds = 0, 0.0

    def price(self, heads: str, steps: int) -> int:
        return self.measure.price(heads, steps)

    def effect_price(self) -> int:
        return self.measure.price("all", 0)

    def effects(self, heads: Sequence[str], cases: Sequence[Case]) -> Floats:
        return self._table(heads, cases, 0, "prune")

    def gains(self, heads: Sequence[str], cases: Sequence[Case], steps: int, stage: str) -> Floats:
        table = self._table(["", *heads], cases, steps, stage)
        return table[1:] - table[0]

    def _table(self, heads: Sequence[str], cases: Sequence[Case], steps: int, stage: str) -> Floats:
        asked = [[Item(one, *case, steps) for case in cases] for one in heads]
        batches: list[list[Item]] = []
        for plain in (True, False):
            new = [one for row in asked for one in row if one not in self._known and (not one.heads) == plain]
            batches += [new[first : first + self.batch] for first in range(0, len(new), self.batch)]
        fresh = iter(self.spread([items for items in batches if self.log.get(items) is None]))
        for items in batches:
            self._batch(items, fresh, stage)
        return np.array([[self._known[one] for one in row] for row in asked], dtype=np.float64)

    def _batch(self, items: list[Item], fresh: Iterator[list[float]], stage: str) -> None:
        scores = self.log.get(items)
        cost = sum(self.price(one.heads, one.steps) for one in items)
        if scores is None:
            start = time.perf_counter()
            scores = next(fresh)
            self._seconds += time.perf_counter() - start
            self._fresh += cost
            self.log.add(items, scores)
        self.spent += cost
        self._known |= dict(zip(items, scores, strict=True))
        if self.progress is not None:
            left = self._seconds / self._fresh * (self.budget - self.spent) if self._fresh else math.nan
            self.progress(Progress(stage, self.spent, self.budget, left))
