"""The smallest control of each kind, to test the engine with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.engine.control import AttentionCall, Control, Lane, Proceed
from attnctl.engine.run import Run, Step
from attnctl.engine.sites import Selection, Site, select


def cond(call: AttentionCall) -> slice | None:
    return call.step.rows.cond


@dataclass(frozen=True)
class Identity(Control):
    """Passes every call on."""

    where: Selection = None

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return select(available, self.where)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        return proceed(call)


@dataclass(frozen=True)
class Bias(Identity):
    """Adds to the logits of the conditional rows' first words, more at the top of the picture than at the bottom."""

    lane: ClassVar[Lane] = Lane.BIAS
    strength: float = 4.0
    where: Selection = ("cross", "joint")

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        rows = cond(call)
        if not self.strength or rows is None:
            return proceed(call)
        height, width = call.grid
        extra = call.q.new_zeros(call.q.shape[0], 1, call.q.shape[2], call.k.shape[2])
        slope = torch.linspace(self.strength, 0.0, height, dtype=extra.dtype).repeat_interleave(width)
        extra[rows, 0, call.image, call.text.start + 1 : call.text.start + 4] = slope[:, None]
        return proceed(call.add_bias(extra))


@dataclass(frozen=True)
class Output(Identity):
    """Scales what attention returns in the conditional rows."""

    lane: ClassVar[Lane] = Lane.OUTPUT
    strength: float = 0.5

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        out, rows = proceed(call), cond(call)
        if not self.strength or rows is None:
            return out
        out = out.clone()
        out[rows] = out[rows] * (1 - self.strength)
        return out


@dataclass(frozen=True)
class Push(Control):
    """Moves the latents before every step by a pattern of their own shape, as strong as they are."""

    strength: float = 0.3

    def before_denoise(self, step: Step) -> None:
        if self.strength:
            latents = step.latents
            step.latents = latents + self.strength * size(latents) * pattern(latents)


@dataclass(frozen=True)
class Guide(Control):
    """Adds the same term to both halves of the prediction, so that CFG lets it through unchanged."""

    strength: float = 0.1

    def after_denoise(self, step: Step, output: Tensor) -> Tensor | None:
        return output + self.strength * pattern(output) if self.strength else None


@dataclass(frozen=True)
class Descend(Identity):
    """Moves the latents down the gradient of how much the first words are attended to."""

    lane: ClassVar[Lane] = Lane.GRADIENT
    strength: float = 0.3
    where: Selection = ("cross", "joint")

    def before_denoise(self, step: Step) -> None:
        if not self.strength:
            return
        chosen = self.sites(tuple(step.passes.target.sites.values()))
        calls: list[AttentionCall] = []
        leaf = step.latents.detach().float().requires_grad_()
        step.probe(leaf, dict.fromkeys(chosen, calls.append))
        with torch.enable_grad():
            loss = torch.stack([self.loss(call) for call in calls]).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        step.latents = leaf - self.strength * size(leaf) * gradient / size(gradient)

    @staticmethod
    def loss(call: AttentionCall) -> Tensor:
        words = call.k[:, :, call.text][:, :, 1:4].float()
        logits = call.q[:, :, call.image].float() @ words.transpose(-1, -2) * call.q.shape[-1] ** -0.5
        return logits.mean((1, 2, 3)).sum()


def size(latents: Tensor) -> Tensor:
    """Root mean square of each row, shaped to multiply with."""
    squares = latents.detach().double().flatten(1).square().mean(1).clamp_min(1e-36)
    return squares.sqrt().reshape(-1, *[1] * (latents.ndim - 1)).to(latents)


def pattern(like: Tensor) -> Tensor:
    """A fixed smooth pattern, the same for every row."""
    return torch.linspace(-1, 1, like[0].numel(), dtype=torch.float32).sin().reshape(like[0].shape).to(like)


@dataclass(frozen=True, eq=False)
class Spy(Identity):
    """Remembers what it was shown. `look` picks what to keep of a call."""

    look: Callable[[AttentionCall], Any] = lambda call: (call.site.name, call.q.shape, call.k.shape, call.index)
    seen: list[Any] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    ended: list[Run] = field(default_factory=list)

    def begin(self, run: Run) -> Any:
        self.runs.append(run)
        return len(self.runs)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        self.seen.append(self.look(call))
        return proceed(call)

    def before_denoise(self, step: Step) -> None:
        self.steps.append(step)

    def end(self, run: Run) -> None:
        self.ended.append(run)
