"""The training loop: denoising loss on views of the picture and on regular pictures, and calibration of the maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.concepts import Concept
from attnctl.engine.attachment import attach
from attnctl.engine.control import AttentionCall, Control, Lane, Proceed
from attnctl.engine.families.registry import discover
from attnctl.engine.sites import Site, select
from attnctl.errors import ControlError
from attnctl.maps.live import LiveMaps
from attnctl.pipelines.personalize.concepts import Encoders
from attnctl.pipelines.personalize.settings import Settings

ATTENTION_GRID = 16  # cells along one side: where the papers read maps


@dataclass(frozen=True)
class Examples:
    """What is trained on, encoded once.

    Attributes:
        latents: (examples, channels, height, width), scaled as the model wants them.
        valid: (examples, height, width), 1 where the denoising loss counts.
        captions: one each.
    """

    latents: Tensor
    valid: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Progress:
    """One step, for whoever watches.

    Attributes:
        step: from 1 to `steps`.
        losses: "denoise", "binding" (mean over concepts) and "apart" (mean over pairs), unweighted.
        coverage: of each noun's map, see `Calibrated`.
    """

    step: int
    steps: int
    losses: dict[str, float]
    coverage: tuple[float, ...]


@dataclass(frozen=True)
class StartApart(Control):
    """Nothing is learnt through the start token: its keys and values have no gradient (Custom Diffusion)."""

    lane = Lane.QKV

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in available if site.kind == "cross")

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        k, v = (torch.cat([x[:, :, :1].detach(), x[:, :, 1:]], 2) for x in (call.k, call.v))
        return proceed(call.replace(k=k, v=v))


def calibrated_sites(pipe: Any, latent_side: int, factor: int | None) -> tuple[Site, ...]:
    """The cross-attention sites whose maps are calibrated: those of this factor, or nearest to 16 x 16."""
    cross = select(discover(pipe), "cross")
    there = sorted({site.factor for site in cross if site.factor})
    if factor is None:
        factor = min(there, key=lambda one: abs(latent_side / one - ATTENTION_GRID))
    found = tuple(site for site in cross if site.factor == factor)
    if not found:
        raise ControlError(f"no cross-attention site has factor {factor}; there are {', '.join(map(str, there))}")
    return found


class Trainer:
    """A personalisation under way: what is trained, its optimiser, and the dice.

    Attributes:
        step: steps done.
        tuned: name -> parameter of the keys and values that are trained.
    """

    def __init__(
        self, pipe: Any, concepts: Sequence[Concept], encoders: Encoders, settings: Settings, dice: torch.Generator
    ) -> None:
        self.pipe, self.concepts, self.encoders, self.settings, self.dice = pipe, concepts, encoders, settings, dice
        self.unet, self.step = pipe.unet, 0
        self.tuned = _tuned(self.unet, settings)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": encoders.parameters, "lr": settings.word_rate, "weight_decay": 0.0},
                {"params": list(self.tuned.values()), "lr": settings.kv_rate, "weight_decay": settings.decay},
            ]
        )
        self.alphas = pipe.scheduler.alphas_cumprod
        self.kind = pipe.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise ControlError(f"the scheduler predicts {self.kind!r}; epsilon and v_prediction can be trained")

    def train(self, views: Examples, regular: Examples | None, watch: Callable[[Progress], None] | None = None) -> None:
        """All steps that are left."""
        settings = self.settings
        words, nouns = ([getattr(one, name) for one in self.concepts] for name in ("word", "noun"))
        where = calibrated_sites(self.pipe, views.latents.shape[-1], settings.factor)
        live = LiveMaps(*words, *nouns, where=list(where))
        with self.ready(), attach(self.pipe, StartApart(), live) as attached:
            while self.step < settings.steps:
                some = torch.randint(len(views.captions), (settings.rows,), generator=self.dice)
                chosen = [(views, some)]
                if regular is not None and settings.regular_rows:
                    chosen.append(
                        (regular, torch.randint(len(regular.captions), (settings.regular_rows,), generator=self.dice))
                    )
                latents, valid = (torch.cat([getattr(x, name)[i] for x, i in chosen]) for name in ("latents", "valid"))
                captions = [x.captions[i] for x, rows in chosen for i in rows.tolist()]
                times = self._times([len(rows) for _, rows in chosen])
                with attached.batch(captions) as batch:
                    errors = self.errors(latents, valid, captions, times)  # (rows,)
                weight = torch.ones_like(errors)
                weight[settings.rows :] = settings.regular_weight
                denoise = (weight * errors).mean()
                state, count = batch.state(live), len(self.concepts)
                maps = state.maps()
                present = state.present[:, :count] & state.present[:, count:]
                read = settings.calibration.read(maps[:, :count], maps[:, count:], present)
                self.optimizer.zero_grad(set_to_none=True)
                (denoise + read.total if settings.calibration.acts else denoise).backward()
                self.optimizer.step()
                self.step += 1
                if watch is not None:
                    rows = present.any(1)
                    losses = {"denoise": denoise.item(), "binding": read.binding[rows].mean().item()}
                    if read.apart.shape[1]:
                        losses["apart"] = read.apart[rows].mean().item()
                    watch(Progress(self.step, settings.steps, losses, tuple(read.coverage.tolist())))
        for encoder in self.encoders.all:
            encoder.write()

    def errors(self, latents: Tensor, valid: Tensor, captions: list[str], times: Tensor) -> Tensor:
        """The denoising loss of each row, mean over what is valid: (rows,), with gradient."""
        device = self.unet.device
        noise = torch.randn(latents.shape, generator=self.dice)
        a = self.alphas[times].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        target = noise if self.kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
        factor = getattr(self.pipe, "vae_scale_factor", 8)
        text = self.encoders.encode(captions, (latents.shape[-2] * factor, latents.shape[-1] * factor))
        got = self.unet(noisy.to(device), times.to(device), **text).sample
        real = valid[:, None].to(device)
        square = (got.float() - target.to(device)).square() * real
        error = square.sum((1, 2, 3)) / (real.sum((1, 2, 3)) * latents.shape[1])
        return error * snr_weight(self.alphas[times], self.settings.snr, self.kind).to(device)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """While it is open, only what is trained asks for gradients, and new words are looked up where they are."""
        models = [self.unet, *(one.model for one in self.encoders.all)]
        asked = [p for model in models for p in model.parameters() if p.requires_grad]
        modes = [model.training for model in models]
        with ExitStack() as stack:
            for model in models:
                model.requires_grad_(False).train()  # gradient checkpointing acts in training alone
            for parameter in self.tuned.values():
                parameter.requires_grad_(True)
            stack.enter_context(self.encoders.trained())
            try:
                yield
            finally:
                for model, mode in zip(models, modes, strict=True):
                    model.requires_grad_(False).train(mode)
                for parameter in asked:
                    parameter.requires_grad_(True)

    def _times(self, counts: Sequence[int]) -> Tensor:
        """Timesteps, uniform over the schedule, and spread over it within the rows of one kind."""
        shares = [(torch.arange(count) + torch.rand(count, generator=self.dice)) / count for count in counts]
        return (torch.cat(shares) * len(self.alphas)).long()


def snr_weight(alphas: Tensor, gamma: float | None, kind: str) -> Tensor:
    """min-SNR weights (Hang et al., ICCV 2023, arXiv 2303.09556) of the losses at these alphas; ones for None.

    min(snr, gamma) / snr for a model that predicts noise, min(snr, gamma) / (snr + 1) for one that predicts velocity.
    """
    if gamma is None:
        return torch.ones_like(alphas)
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)


def _tuned(unet: nn.Module, settings: Settings) -> dict[str, nn.Parameter]:
    """Keys and values of cross-attention: the weights themselves, or adapters that are put on them."""
    ends = ("attn2.to_k", "attn2.to_v")
    if settings.trained == "full":
        return {name: p for name, p in unet.named_parameters() if name.removesuffix(".weight").endswith(ends)}
    from attnctl.pipelines.personalize.adapters import add_adapters

    return add_adapters(unet, ends, settings.rank or 16, settings.seed)
