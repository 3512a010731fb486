"""Inversion: the noise a picture came from, by running the sampler backwards; and a sampler that runs either way.

At node i of a schedule the noised latents are z = a x + sigma e. A denoiser's prediction gives the clean latents x and
the noise e. From node i to node j (a, sigma -> b, tau), in either direction:

    DDIM, and Euler for flow matching     z' = b x + tau e
    DPM-Solver++(2M)                      z' = (tau / sigma) z - b (exp(-h) - 1) X,   h = log(b / tau) - log(a / sigma)

where X is x, extrapolated with the x of the step before: X = x + (x - x_before) h / (2 h_before) (Lu et al., 2022,
arXiv 2211.01095). The last step to the picture is of the first order. DDIM backwards takes e at the wrong end of the
step, so its result is put right by rounds of a fixed-point iteration: e at the latents found so far, and the step anew
(Pan et al., ICCV 2023, arXiv 2309.04907).

A `Solver` stands in the place of a pipeline's scheduler. So inverting is a call of the pipeline itself, and whatever
it does (text encoders, sizes, packing, LoRA, IP-Adapter, offload) holds in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnctl.errors import ControlError

Method = Literal["auto", "dpm", "ddim"]
Path = list[Tensor]  # latents at each node of a schedule, from noise to picture
SMALLEST = 2**-24
"""Of the cumulated alphas: a schedule that ends in pure noise has a zero there, whose logarithm is none."""

# --- the schedule -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Nodes from noise (0) to picture (the last).

    Attributes:
        times: what the denoiser is told at each node.
        a, sigma: shares of the picture and of noise at each node.
        kind: what the denoiser predicts: "epsilon", "v_prediction", "sample", or "flow" (noise minus picture).
    """

    times: tuple[float, ...]
    a: tuple[float, ...]
    sigma: tuple[float, ...]
    kind: str

    def split(self, prediction: Tensor, z: Tensor, node: int) -> tuple[Tensor, Tensor]:
        """(clean latents, noise) from a prediction at a node."""
        a, sigma = self.a[node], self.sigma[node]
        if self.kind == "flow":
            return z - sigma * prediction, z + a * prediction
        if self.kind == "v_prediction":
            return a * z - sigma * prediction, a * prediction + sigma * z
        if self.kind == "sample":
            return prediction, (z - a * prediction) / sigma
        return (z - sigma * prediction) / a, prediction

    def noised(self, clean: Tensor, noise: Tensor, node: int) -> Tensor:
        """Clean latents with this noise, as they are at a node."""
        return self.a[node] * clean + self.sigma[node] * noise

    def log_ratio(self, node: int) -> float:
        return math.log(self.a[node] / self.sigma[node])


def diffusion_schedule(alphas: Sequence[float] | Tensor, kind: str, steps: int) -> Schedule:
    """Evenly spaced times, the last of all first ("trailing"), down to the first, which stands for the picture.

    Args:
        alphas: cumulated, by time.
        kind: what the denoiser predicts.
        steps: how many there are.
    """
    total = len(alphas)
    times = [max(round(total - total * i / steps) - 1, 0) for i in range(steps + 1)]
    bars = [max(float(alphas[time]), SMALLEST) for time in times]
    return Schedule(
        tuple(times), tuple(math.sqrt(bar) for bar in bars), tuple(math.sqrt(1 - bar) for bar in bars), kind
    )


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler is for flow matching.

    Raises:
        ControlError: it is neither that nor one with cumulated alphas.
    """
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        return False
    if "FlowMatch" in type(scheduler).__name__:
        return True
    raise ControlError(f"{type(scheduler).__name__} cannot be run backwards: it tells no schedule that we know")


# --- the sampler ------------------------------------------------------------------------------------------------------


class Solver:
    """A sampler in the place of a pipeline's scheduler; it runs from noise to picture, or back.

    Args:
        scheduler: the pipeline's own, which tells the schedule.
        steps: of the whole schedule.
        method: "dpm", DPM-Solver++(2M); "ddim", which is Euler for flow matching; "auto": dpm, or for flow matching
            ddim.
        backwards: from picture to noise.
        rounds: of the fixed-point iteration, for ddim backwards.
        start: first node, for the way forwards; so many steps are left out.
        after: called with the latents at each node that was reached forwards, and the node; returns what to go on with.
        schedule: instead of the scheduler's.

    Attributes:
        path: the latents at each node that was reached.

    Raises:
        ControlError: the scheduler tells no schedule that we know, or dpm is asked for with flow matching.
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        method: Method = "auto",
        backwards: bool = False,
        rounds: int = 3,
        start: int = 0,
        after: Callable[[Tensor, int], Tensor] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        flow = is_flow(scheduler)
        if flow and method == "dpm":
            raise ControlError("dpm is for diffusion models; this one is of flow matching, which takes ddim (Euler)")
        self.scheduler, self.config = scheduler, scheduler.config
        self.steps, self.start, self.after, self._given = steps, start, after, schedule
        self.backwards, self.multistep = backwards, not flow and method != "ddim"
        self.rounds = rounds if backwards and not self.multistep else 0
        self.path: dict[int, Tensor] = {}
        self.timesteps = torch.zeros(0)
        self._last: tuple[float, Tensor] | None = None  # log ratio and clean latents of the step before
        self._base: Tensor | None = None  # where a step of the fixed-point iteration began
        self._plan: list[tuple[int, int, int]] = []  # of each denoiser call: its node; the step it is for
        self._done = 0

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        """Begin. The number of steps is ours; what a flow-matching pipeline adds shapes the schedule."""
        self.schedule = self._given or self._schedule(device, sigmas, mu)
        if not self.backwards:
            self._plan = [(i, i, i + 1) for i in range(self.start, self.steps)]
        elif not self.rounds:
            self._plan = [(i, i, i - 1) for i in range(self.steps, 0, -1)]
        else:  # a round's noise is the next step's first guess, so only the first step needs a call for that
            self._plan = [(self.steps, self.steps, self.steps - 1)]
            self._plan += [(i - 1, i, i - 1) for i in range(self.steps, 0, -1) for _ in range(self.rounds)]
        times = [self.schedule.times[node] for node, _, _ in self._plan]
        whole = self.schedule.kind != "flow"
        self.timesteps = torch.tensor(times, dtype=torch.long if whole else torch.float32, device=device)
        self._last, self._base, self._done, self.path = None, None, 0, {}

    def _schedule(self, device: Any, sigmas: Any, mu: float | None) -> Schedule:
        if not is_flow(self.scheduler):
            kind = self.config.get("prediction_type", "epsilon")
            return diffusion_schedule(self.scheduler.alphas_cumprod, kind, self.steps)
        inner = type(self.scheduler).from_config(self.config)
        given = {name: value for name, value in (("sigmas", sigmas), ("mu", mu)) if value is not None}
        inner.set_timesteps(self.steps, device=device, **given)
        noise = [float(one) for one in inner.sigmas]
        return Schedule((*map(float, inner.timesteps), 0.0), tuple(1 - one for one in noise), tuple(noise), "flow")

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Schedulers of flow matching are told where they begin; we know."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Nothing is scaled."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """The latents of the next denoiser call; the last time, those at the end.

        Args:
            model_output: the guided prediction.
            timestep: not read; the calls come in their order.
            sample: the latents of this call.
            return_dict: not read.
        """
        node, origin, target = self._plan[self._done]
        if not self._done:
            self.path[origin] = sample
        z = sample.float()
        clean, noise = self.schedule.split(model_output.float(), z, node)
        self._done += 1
        if self.multistep:
            moved = self._second_order(z, clean, origin, target)
        elif self.rounds:
            moved = self._round(z, noise, origin, target)
        else:
            moved = self.schedule.noised(clean, noise, target)
        if not self.backwards and self.after is not None:
            moved = self.after(moved, target)
        moved = moved.to(sample.dtype)
        if not self.rounds:
            self.path[target] = moved
        return (moved,)

    def _second_order(self, z: Tensor, clean: Tensor, origin: int, target: int) -> Tensor:
        schedule = self.schedule
        now, h = schedule.log_ratio(origin), schedule.log_ratio(target) - schedule.log_ratio(origin)
        ahead = clean
        if self._last is not None and target != self.steps:
            before, last = self._last
            ahead = clean + (clean - last) * h / (2 * (now - before))
        self._last = now, clean
        return schedule.sigma[target] / schedule.sigma[origin] * z - schedule.a[target] * math.expm1(-h) * ahead

    def _round(self, z: Tensor, noise: Tensor, origin: int, target: int) -> Tensor:
        """A guess at the latents of the target; after its last round, one at those of the node behind it."""
        if self._base is None:
            self._base = z
            return self._moved(z, noise, origin, target)
        found = self._moved(self._base, noise, origin, target)
        if (self._done - 1) % self.rounds:
            return found
        self.path[target] = found.to(self.path[self.steps].dtype)
        self._base = found
        return self._moved(found, noise, target, target - 1) if target else found

    def _moved(self, z: Tensor, noise: Tensor, origin: int, target: int) -> Tensor:
        clean = (z - self.schedule.sigma[origin] * noise) / self.schedule.a[origin]
        return self.schedule.noised(clean, noise, target)


@contextmanager
def sampling(pipe: Any, solver: Solver) -> Iterator[Solver]:
    """The pipeline samples with this solver; afterwards with its own scheduler again."""
    before = pipe.scheduler
    pipe.scheduler = solver
    try:
        yield solver
    finally:
        pipe.scheduler = before


# --- pictures and latents ---------------------------------------------------------------------------------------------


def encode(pipe: Any, pictures: Sequence[Any]) -> Tensor:
    """The latents of pictures of one size, (pictures, channels, height, width), in the pipeline's own form and type."""
    vae = pipe.vae
    with torch.no_grad(), _exact(vae):
        pixels = pipe.image_processor.preprocess(list(pictures)).to(vae.device, vae.dtype)
        mode = vae.encode(pixels).latent_dist.mode()
    latents = (mode - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    return packed(pipe, latents).to(denoiser_of(pipe).dtype)


def decode(pipe: Any, latents: Tensor, size: tuple[int, int]) -> list[Any]:
    """The pictures of latents in the pipeline's own form.

    Args:
        pipe: the pipeline.
        latents: as `encode` makes them.
        size: (height, width) in pixels.
    """
    vae = pipe.vae
    if latents.ndim == 3:
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    with torch.no_grad(), _exact(vae):
        latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
    return list(pipe.image_processor.postprocess(pixels.float(), output_type="pil"))


@contextmanager
def _exact(vae: Any) -> Iterator[None]:
    """An autoencoder that overflows in float16 (SDXL's) runs in float32 meanwhile."""
    dtype = vae.dtype
    upcast = dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)


def denoiser_of(pipe: Any) -> Any:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """Latents, (pictures, channels, height, width), as the pipeline takes them: FLUX packs 2 x 2 cells into a token."""
    return pipe._pack_latents(latents, *latents.shape) if hasattr(pipe, "_pack_latents") else latents


def invert(
    pipe: Any,
    latents: Tensor,
    size: tuple[int, int],
    steps: int = 20,
    method: Method = "auto",
    rounds: int = 3,
    **arguments: Any,
) -> Path:
    """The latents that lead to pictures, at every node of the schedule; by the empty prompt, without guidance.

    Args:
        pipe: the pipeline.
        latents: of the pictures, as `encode` makes them.
        size: (height, width) of the pictures.
        steps, method, rounds: see `Solver`.
        arguments: further ones of the pipeline.

    Returns:
        steps + 1 tensors shaped like `latents`, from noise to picture.
    """
    solver = Solver(pipe.scheduler, steps, method, backwards=True, rounds=rounds)
    _run(pipe, solver, latents, size, **arguments)
    return [solver.path[node] for node in range(steps + 1)]


def redrawn(
    pipe: Any, path: Path, size: tuple[int, int], method: Method = "auto", start: int = 0, **arguments: Any
) -> Tensor:
    """The way back from a node of an inversion, by the empty prompt and without guidance: what the inversion lost."""
    solver = Solver(pipe.scheduler, len(path) - 1, method, start=start)
    _run(pipe, solver, path[start], size, **arguments)
    return solver.path[len(path) - 1]


def _run(pipe: Any, solver: Solver, latents: Tensor, size: tuple[int, int], **arguments: Any) -> None:
    texts = [""] * len(latents)
    common = {"height": size[0], "width": size[1], "num_inference_steps": solver.steps, "output_type": "latent"}
    with sampling(pipe, solver):
        pipe(prompt=texts, latents=latents, guidance_scale=1.0, **common | arguments)
