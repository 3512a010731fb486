"""Looking ahead: where plain drawing would lead, roughly, by a few large deterministic steps of our own.

The scheduler of a pipeline keeps a state that cannot be wound back, so it is only asked for its noise levels. The
steps are DDIM's (Song et al., ICLR 2021, arXiv 2010.02502, equation 12 at sigma = 0) for models of noise, Euler's for
flow matching: both go along the line between the picture and the noise that the model sees. Over the scheduler's own
timesteps they are the steps of `DDIMScheduler`, `EulerDiscreteScheduler` and `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnctl.engine.calls import rows_kept
from attnctl.engine.run import Rows, Step
from attnctl.errors import ControlError


@dataclass(frozen=True)
class Level:
    """What latents are made of at one timestep, as the denoiser is given them: picture * picture + noise * noise."""

    timestep: float
    picture: float
    noise: float


def look_ahead(step: Step, steps: int, reach: float, images: Sequence[int] | None = None) -> Step:
    """Draw the step's pictures ahead by large plain steps, in which controls that change attention act.

    Classifier-free guidance is the pipeline's where it runs in one batch; where it runs in two calls, the conditional
    one is followed alone.

    Args:
        step: the denoiser call under way.
        steps: how many; each is one forward of the denoiser.
        reach: how far, as a part of what is left of the schedule, in (0, 1]; at most the schedule's last timestep.
        images: which of the step's images, by number; the others cost nothing. None: all.

    Returns:
        A step at the timestep reached, of these images, with the latents there as its `latents` and scale 1; it is
        there to be probed.

    Raises:
        ControlError: the scheduler's noise levels are of no kind we know, no timestep is left, or the pipeline does not
            tell its guidance scale.
    """
    step = step if images is None else _of(step, images)
    now = step.run.start + step.index
    last = min(now + max(round(reach * (step.run.schedule - now)), 1), step.run.schedule - 1)
    if last <= now:
        raise ControlError("there is no timestep left to look ahead to")
    stops = np.unique(np.linspace(now, last, steps + 1).round().astype(int)).tolist()
    levels = [level(step, position) for position in stops]
    z = step.latents * step.scale
    for here, there in zip(levels, levels[1:], strict=False):
        picture, noise = foreseen(step, z, here)
        z = (there.picture * picture + there.noise * noise).to(z.dtype)
    own = step.run.family.sample
    sample = replace(step.sample, scale=1.0, edited=z, raw=step.sample.replaced(step.arguments[own], z))
    return replace(step, sample=sample, scale=1.0, arguments=_arguments(step, z, levels[-1]))


def _of(step: Step, images: Sequence[int]) -> Step:
    """The same step as if only some of its images were drawn."""
    rows, sample, count = step.rows, step.sample, len(images)
    assert rows.cond is not None
    kept = [block.start + image for block in (rows.uncond, rows.cond) if block is not None for image in images]
    if kept == list(range(rows.total)):
        return step
    cond = slice(len(kept) - count, len(kept))
    own = Rows(cond, None if rows.uncond is None else slice(0, count), len(kept))
    edited = None if sample.edited is None else sample.edited[list(images)]
    few = replace(sample, raw=sample.raw[kept], rows=cond, edited=edited, _base=None)
    numbers = tuple(step.images[image] for image in images)
    return replace(step, rows=own, sample=few, arguments=rows_kept(step, kept), images=numbers)


def level(step: Step, position: int) -> Level:
    """The noise level at a position of the schedule.

    Raises:
        ControlError: it cannot be read from the scheduler.
    """
    scheduler = step.run.pipe.scheduler
    timestep = float(scheduler.timesteps[position])
    sigmas, signals = getattr(scheduler, "sigmas", None), getattr(scheduler, "alphas_cumprod", None)
    if sigmas is None and signals is not None:
        signal = float(signals[int(timestep)])
        return Level(timestep, signal**0.5, (1 - signal) ** 0.5)
    if sigmas is not None and flows(scheduler):
        return Level(timestep, 1 - float(sigmas[position]), float(sigmas[position]))
    if sigmas is not None and signals is not None:  # they are noise per picture
        picture = (1 + float(sigmas[position]) ** 2) ** -0.5
        return Level(timestep, picture, float(sigmas[position]) * picture)
    raise ControlError(f"{type(scheduler).__name__} has no noise levels that looking ahead knows how to read")


def flows(scheduler: Any) -> bool:
    """The model predicts a flow, from picture to noise."""
    return scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"


def foreseen(step: Step, z: Tensor, here: Level) -> tuple[Tensor, Tensor]:
    """The picture and the noise that the denoiser sees in latents, (images, ...) each, in float32."""
    rows, run = step.rows, step.run
    output = step.passes.plain(step, "look-ahead", _arguments(step, z, here)).float()
    guess = output[rows.cond]
    if rows.uncond is not None:
        plain = output[rows.uncond]
        guess = plain + run.guidance_scale * (guess - plain)
    guess = guess.narrow(step.sample.dim, 0, z.shape[step.sample.dim])  # a learned variance is no part of it
    guess = guess if step.sample.tokens is None else guess[:, : step.sample.tokens]  # nor a reference picture
    z, a, s = z.float(), here.picture, here.noise
    kind = run.pipe.scheduler.config.get("prediction_type")
    if flows(run.pipe.scheduler):
        return z - s * guess, z + a * guess
    if kind == "epsilon":
        return (z - s * guess) / a, guess
    if kind == "v_prediction":
        return a * z - s * guess, s * z + a * guess
    raise ControlError(f"looking ahead knows models that predict noise, velocity or flow; not {kind!r}")


def _arguments(step: Step, z: Tensor, at: Level) -> dict[str, Any]:
    """The denoiser call's arguments for other latents, as the denoiser is given them, at another timestep."""
    name = step.run.family.sample
    arguments = rows_kept(step, slice(0, step.rows.total))
    arguments[name] = step.sample.replaced(arguments[name], z)
    timestep = at.timestep / step.run.family.time
    old = arguments["timestep"]
    arguments["timestep"] = torch.full_like(old, timestep) if isinstance(old, Tensor) else timestep
    return arguments
