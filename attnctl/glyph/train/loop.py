"""The loop that trains every model of the glyph world: progress, checkpoints, averaged weights, exact resume."""

import os
import time
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from attnctl.errors import AttnctlError
from attnctl.glyph.train.muon import Muon

Losses = dict[str, Tensor]


class CheckpointError(AttnctlError):
    """A checkpoint that cannot be read, or that another run has written."""


class DivergedError(AttnctlError, FloatingPointError):
    """The loss is no number any more."""


class Task(Protocol):
    """What is trained: a network, and its loss at a step.

    `loss` must depend on nothing but the network and the generator, which the loop seeds by (seed, step): that makes a
    resumed run equal to one that was never interrupted.
    """

    network: nn.Module

    def loss(self, step: int, rng: torch.Generator) -> Losses: ...

    def report(self, network: nn.Module, folder: Path, step: int) -> str: ...

    def export(self, network: nn.Module, folder: Path) -> None: ...


@dataclass(frozen=True)
class Settings:
    """steps: length of the whole run. minutes: stop, with a checkpoint, after so long; 0 never stops early.

    rate: peak learning rate of matrices and kernels, by Muon. small_rate: that of vectors and embeddings, by Adam.
    task: the settings of the task, as far as they determine the run.
    """

    out: Path
    steps: int
    rate: float
    small_rate: float = 1e-3
    seed: int = 0
    minutes: float = 0
    resume: bool = False
    every: int = 500
    average: float = 0.999
    timed: bool = False  # `minutes` is the length of the run, as well: the learning rate falls by the clock
    ease: float = 0.3  # last part of the run in which the learning rate falls linearly to almost nothing
    task: Mapping[str, object] = field(default_factory=dict)

    def determining(self) -> dict[str, object]:
        """All that a run depends on, but its length: only with the same can it go on exactly."""
        loop = {name: getattr(self, name) for name in ("seed", "rate", "small_rate", "average", "ease")}
        return {**self.task, **loop}

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"


def warmth(step: int, settings: Settings, spent: float = 0) -> float:
    """Part of the peak learning rate at a step, 0 to 1: up over 100 steps, flat, down over the last `ease` of the run.

    A flat middle lets a longer run take over from an earlier checkpoint. spent: minutes so far, for a timed run.
    """
    left = (settings.steps - step) / max(1.0, settings.ease * settings.steps)
    if settings.timed:
        left = min(left, (settings.minutes - spent) / (settings.ease * settings.minutes))
    return min(1.0, (step + 1) / 100, max(0.02, left))


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@torch.no_grad()
def _blend(average: nn.Module, network: nn.Module, weight: float) -> None:
    ours: list[Tensor] = list(average.parameters())
    theirs: list[Tensor] = list(network.parameters())
    torch._foreach_lerp_(ours, theirs, weight)
    for mine, its in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(its)


def _optimisers(network: nn.Module, settings: Settings) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    tables = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in network.parameters() if p.ndim > 1 and id(p) not in tables]
    others = [p for p in network.parameters() if p.ndim <= 1 or id(p) in tables]
    adam = torch.optim.AdamW(others, lr=settings.small_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    return Muon(matrices, settings.rate), adam


def save_atomically(state: object, path: Path) -> None:
    """Writes beside `path`, then renames: a kill leaves the old file or the new one."""
    beside = path.with_suffix(".partial")
    torch.save(state, beside)
    os.replace(beside, path)


def read_checkpoint(settings: Settings) -> dict[str, Any] | None:
    """What a run goes on from, on the CPU; None for one that starts.

    Raises:
        FileExistsError: there is a checkpoint, but no `resume`.
        FileNotFoundError: it is the other way round.
        CheckpointError: it cannot be read, or was made with other settings.
    """
    path = settings.checkpoint
    if path.exists() != settings.resume:
        if settings.resume:
            raise FileNotFoundError(f"nothing to resume: {path} does not exist")
        raise FileExistsError(f"{path} exists: pass --resume to go on with it, or another --out")
    if not settings.resume:
        return None
    state = _loaded(path)
    _check_same(settings.determining(), state.get("made_with", {}), path)
    return state


def _loaded(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what torch raises for a broken file is not a closed set
            raise CheckpointError(f"{path} is cut short or no checkpoint of a training") from error
    if not isinstance(state, dict) or not {"network", "average", "optimisers", "step"} <= set(state):
        raise CheckpointError(f"{path} is no checkpoint of a training")
    return state


def _check_same(wanted: Mapping[str, object], made_with: Mapping[str, object], path: Path) -> None:
    """Compares what both name: older checkpoints know fewer settings, or none."""
    other = [
        f"{name} {made_with[name]}, not {value}"
        for name, value in wanted.items()
        if name in made_with and made_with[name] != value
    ]
    if other:
        raise CheckpointError(
            f"{path} was made with {'; '.join(other)}: --resume goes on with the settings of the checkpoint alone"
        )


def _restore(
    state: dict[str, Any], network: nn.Module, average: nn.Module, optimisers: tuple[torch.optim.Optimizer, ...]
) -> int:
    """Puts all back as it was, and returns the number of steps done."""
    network.load_state_dict(state["network"])
    average.load_state_dict(state["average"])
    for optimiser, own in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(own)
    return int(state["step"])


def train(task: Task, settings: Settings) -> nn.Module:
    """Runs to `settings.steps` or `settings.minutes` and returns the averaged network.

    In `settings.out`: checkpoint.pt, report-*.png (what `task.report` draws), log.txt, and what `task.export` writes.
    Raises what `read_checkpoint` does, and DivergedError once the loss is no number.
    """
    found = read_checkpoint(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    log = settings.out / "log.txt"
    torch.set_flush_denormal(True)  # else steps on a CPU slow down as moments of dead weights fade
    network = task.network.train()
    average = deepcopy(network).requires_grad_(False).eval()
    optimisers = _optimisers(network, settings)
    try:
        first = _restore(found, network, average, optimisers) if found else 0
    except (RuntimeError, ValueError, KeyError, TypeError) as error:  # names, shapes or groups of another network
        raise CheckpointError(f"{settings.checkpoint} is of another network than this one") from error

    def save(step: int) -> None:
        state = {"network": network.state_dict(), "average": average.state_dict(), "step": step}
        state |= {"spent": spent, "optimisers": [optimiser.state_dict() for optimiser in optimisers]}
        save_atomically(state | {"made_with": settings.determining()}, settings.checkpoint)
        line = f"step {step}: {task.report(average, settings.out, step)}"
        print(line, flush=True)
        with log.open("a") as file:
            file.write(line + "\n")

    start, done = time.monotonic(), first
    before = spent = float(found.get("spent", 0)) if found and settings.timed else 0.0
    with _progress() as show:
        for step in show(range(first, settings.steps)):
            rng = generator(settings.seed, step)
            torch.manual_seed(rng.initial_seed())  # dropout, if any
            for optimiser, rate in zip(optimisers, (settings.rate, settings.small_rate), strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = rate * warmth(step, settings, spent)
            losses = task.loss(step, rng)
            total = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(total):
                raise DivergedError(f"the loss at step {step} is {total.item()}; the last checkpoint is good")
            network.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for optimiser in optimisers:
                optimiser.step()
            _blend(average, network, 1 - min(settings.average, (step + 1) / (step + 10)))
            done = step + 1
            show.tell(step, {name: float(value.detach()) for name, value in losses.items()}, log)
            spent = before + (time.monotonic() - start) / 60
            if done % settings.every == 0 and done < settings.steps:
                save(done)
            if settings.minutes and spent >= settings.minutes:
                break
    save(done)
    task.export(average, settings.out)
    return average


class _progress:
    """A progress bar with a moving average of the losses; a line to the log every 50 steps."""

    def __enter__(self) -> "_progress":
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.bar = Progress(*columns, TimeRemainingColumn())
        self.bar.start()
        self.means: dict[str, float] = {}
        self.clock = time.monotonic()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def __call__(self, steps: range) -> Iterator[int]:
        self.line = self.bar.add_task("training", total=steps.stop, completed=steps.start)
        for step in steps:
            yield step
            self.bar.advance(self.line)

    def tell(self, step: int, losses: dict[str, float], log: Path) -> None:
        for name, value in losses.items():
            self.means[name] = self.means.get(name, value) * 0.98 + value * 0.02
        text = "  ".join(f"{name} {value:.4f}" for name, value in self.means.items())
        self.bar.update(self.line, description=text)
        if step % 50 == 49:
            now = time.monotonic()
            with log.open("a") as file:
                file.write(f"{step + 1}: {text}  ({(now - self.clock) / 50:.2f} s/step)\n")
            self.clock = now
