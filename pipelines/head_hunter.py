"""HeadHunter: finds the attention heads whose perturbation helps an objective, and says how sure it is.

    hunter = HeadHunter(pipe, objective, prompts)
    found = hunter.hunt(budget=20_000, log="heads.scores.jsonl")
    found.save("heads.json")
    with attnctl.attach(pipe, Perturb(preset="heads.json")):
        ...

The greedy search of the paper (Ahn et al., NeurIPS 2025, arXiv 2506.10978, algorithm 1) is `method="greedy"`. Ours, the
default, spends the pictures where they tell something: heads of hardly any effect are left out, whole sites are
screened by quick pictures, the heads of good sites race with paired seeds and successive halving, and what wins is
measured again on seeds that chose nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image

from attnctl.engine.families.registry import discover, family_of
from attnctl.engine.heads import Heads, pick_heads, shape_of
from attnctl.errors import ControlError
from attnctl.pipelines.head_bench import Drawer, Item, LoggedBench, Objective, Progress, opened
from attnctl.pipelines.head_grid import head_grid
from attnctl.pipelines.head_race import Rank, cases, greedy, race
from attnctl.pipelines.head_workers import spread_over
from attnctl.processors import Perturb
from attnctl.processors.perturb_presets import name_of, sample_of

Method = Literal["race", "greedy"]


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        heads: the chosen set, as text.
        ranks: all sets that were measured, the chosen one first.
        spent: forward passes of the denoiser, each for one picture.
        shape: of the denoiser, see `attnctl.engine.heads.shape_of`.
        settings: model, weights, scope, kind, u, scale and all else that decided it.
    """

    heads: str
    ranks: tuple[Rank, ...]
    spent: int
    shape: str
    settings: dict[str, Any]

    @property
    def best(self) -> Rank:
        """The chosen set, as it was confirmed on unseen seeds."""
        return self.ranks[0]

    @property
    def sure(self) -> bool:
        """On unseen seeds it gains more than two standard errors."""
        return self.best.gain > 2 * self.best.error

    @property
    def u(self) -> float:
        """How far the heads were broken."""
        return float(self.settings["u"])

    @property
    def scale(self) -> float:
        """The weight they were found with."""
        return float(self.settings["scale"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the content of the file."""
        names = ("model", "revision", "weights", "sample", "scope", "kind", "u", "scale")
        first = {name: self.settings[name] for name in names}
        rest = {name: value for name, value in self.settings.items() if name not in first}
        ranks = [one.to_dict() for one in self.ranks]
        known = {"heads": self.heads, "shape": self.shape, **first, "sure": self.sure, "spent": self.spent}
        return known | {"settings": rest, "ranks": ranks}

    def save(self, path: str | Path) -> Path:
        """Write a preset that `Perturb(preset="FILE.json")` reads, and a picture of the search beside it, FILE.png.

        The preset appears whole or not at all.

        Raises:
            ControlError: its name does not end in .json, by which `Perturb` knows files.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise ControlError(f"heads are read from files that end in .json, not {path.name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        part.replace(path)
        self.picture().save(path.with_suffix(".png"))
        return path

    def picture(self) -> Image.Image:
        """Blocks by heads, as colours: what was measured of each, and how sure it is."""
        return head_grid(self.ranks, self.heads, str(self.settings.get("objective", "score")))


@dataclass(frozen=True)
class Saved:
    """What a candidate costs in a search, in parts of two full forwards at each step, drawn one by one.

    Attributes:
        passes: forwards that ran, for blocks before the first broken one are shared; counted in blocks, in levels of a
            UNet.
        time: the same in seconds, with what batches save.
    """

    passes: float
    time: float

    def __str__(self) -> str:
        return f"a candidate took {self.time:.2f} of the time of full passes, one by one (passes {self.passes:.2f})"


class HeadHunter:
    """Searches the heads of a pipeline.

    Args:
        pipe: a text-to-image pipeline.
        objective: a callable, pictures, prompts -> scores; the higher the better.
        prompts: what is drawn, in turn, each time with another seed.
        heads: where to search, see `attnctl.engine.heads`.
        steps: of a picture.
        u: how far heads are broken; the paper searches at 1, where effects are largest.
        scale: weight w of the difference.
        kind: of perturbation, see `Perturb`; not skip or shuffle, which know no heads.
        scope: see `Perturb`.
        call: further arguments of every pipeline call; default: guidance_scale=1, no classifier-free guidance.
        batch: pictures drawn together; each may have other heads.
        model: its name, for the file; default: what the pipeline tells.
        objective_name: for the file, and to tell logs apart; default: the name of the callable.

    Raises:
        ControlError: a setting is out of its range.
        NoSiteError: `heads` names heads that do not exist.
    """

    def __init__(
        self,
        pipe: Any,
        objective: Objective,
        prompts: Sequence[str],
        *,
        heads: Heads = "all",
        steps: int = 10,
        u: float = 1.0,
        scale: float = 3.0,
        kind: str = "identity",
        scope: str = "whole",
        call: dict[str, Any] | None = None,
        batch: int = 16,
        model: str | None = None,
        objective_name: str | None = None,
    ) -> None:
        if isinstance(prompts, str) or not prompts:
            raise ControlError("prompts are a list of at least one")
        for name, value in (("steps", steps), ("batch", batch)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ControlError(f"{name} is a whole number from 1, not {value!r}")
        if not callable(objective):
            raise ControlError("objective is a callable: pictures, prompts -> scores")
        perturb = Perturb("all", u=u, scale=scale, kind=kind, scope=scope, candidates=("all",))  # type: ignore[arg-type]
        if not scale:
            raise ControlError("scale = 0 switches the perturbation off, so no heads could be told apart")
        available = discover(pipe)
        self.sites: dict[str, list[str]] = {}
        for site, own in pick_heads(available, heads).items():
            numbered = [one for one in pick_heads(available, str(site.block)) if one is site]
            place = str(site.block) if numbered else site.name
            whole = place if len(own) == site.heads else " ".join(f"{place}:{head}" for head in own)
            self.sites[whole] = [f"{place}:{head}" for head in own]
        self.pipe, self.prompts, self.steps, self.batch = pipe, list(prompts), steps, batch
        self.call = {"guidance_scale": 1.0} if call is None else dict(call)
        self.drawer = Drawer(pipe, objective, self.prompts, perturb, self.call)
        self.shape = shape_of(available)
        self.settings: dict[str, Any] = {
            "model": model or name_of(pipe)[0],
            "revision": name_of(pipe)[1],
            "weights": _weights(family_of(pipe)[1]),
            "sample": sample_of(family_of(pipe)[1]),
            "scope": scope,
            "kind": kind,
            "u": u,
            "scale": scale,
            "steps": steps,
            "batch": batch,
            "call": {name: repr(value) for name, value in self.call.items()},
            "searched": list(self.sites),
            "objective": objective_name or getattr(objective, "__qualname__", type(objective).__qualname__),
            "prompts": self.prompts,
        }

    def hunt(
        self,
        budget: int,
        *,
        method: Method = "race",
        rounds: int = 1,
        each: int = 3,
        quick: int = 2,
        sure: float = 2.0,
        log: str | Path | None = None,
        devices: Sequence[str] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> Found:
        """Search.

        Args:
            budget: forward passes of the denoiser, each for one picture; the search never spends more.
            method: "race", ours, or "greedy", the paper's.
            rounds: R of greedy.
            each: k of greedy, how many heads a round adds.
            quick: of race, steps of a picture where whole sites are screened.
            sure: of race, how many standard errors behind the leader a set is given up.
            log: a file for the scores; a search that was killed goes on from it, to the same result.
            devices: a process for each of them draws, with a copy of the pipeline; default: this process, on the
                pipeline's own. Scores are the same however many there are. As always where Python starts processes, a
                script needs `if __name__ == "__main__":` around what it runs.
            progress: called after each batch.

        Raises:
            ControlError: the budget is too small, says what is needed; the log is of another search; the objective
                gives no numbers.
        """
        if method not in get_args(Method):
            raise ControlError(f"method is one of {', '.join(get_args(Method))}; not {method!r}")
        for name, value in (("budget", budget), ("rounds", rounds), ("each", each), ("quick", quick)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ControlError(f"{name} is a whole number from 1, not {value!r}")
        if not (math.isfinite(sure) and sure > 0):
            raise ControlError(f"sure is a number above 0, not {sure!r}")
        bars = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(**bars | {"disable": True})
        try:
            with opened(None if log is None else Path(log), self.settings) as kept, ExitStack() as stack:
                spread = stack.enter_context(spread_over(self.drawer, devices)) if devices else None
                bench = LoggedBench(self.drawer, self.prompts, kept, budget, self.batch, progress, spread)
                if method == "race":
                    heads, ranks = race(bench, self.sites, budget, self.steps, min(quick, self.steps), sure)
                    own: dict[str, Any] = {"quick": quick, "sure": sure}
                else:
                    every = [head for one in self.sites.values() for head in one]
                    heads, ranks = greedy(bench, every, budget, self.steps, rounds, each)
                    own = {"rounds": rounds, "each": each}
        finally:
            self.pipe.set_progress_bar_config(**bars)
        settings = {**self.settings, "method": method, "budget": budget, **own}
        return Found(heads, tuple(ranks), bench.spent, self.shape, settings)

    def saved(self, heads: str, pictures: int = 2) -> Saved | None:
        """What a candidate cost in the searches of this hunter, in parts of what it costs alone and in full.

        For that, a few pictures with these heads are drawn one by one, without anything shared. None: nothing was
        drawn, since all was in the log.
        """
        spent = self.drawer.cost
        if not spent.steps:
            return None
        alone = self.drawer.alone([Item(heads, *case, self.steps) for case in cases(len(self.prompts), pictures)])
        return Saved(spent.passes / spent.full, spent.seconds / spent.steps * alone.steps / alone.seconds)


def _weights(model: torch.nn.Module) -> str:
    """One hash over all weights of the denoiser."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
