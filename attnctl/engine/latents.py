"""The latents of one denoising step, and how a control's edit of them gets into the denoiser and the scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnctl.errors import ControlError


@dataclass(eq=False)
class Sample:
    """The latents of one denoising step: as the denoiser is given them, and as a control has edited them."""

    raw: Tensor  # (rows.total, ...) scaled, with any extra channels
    rows: slice  # the conditional rows of `raw`
    channels: int  # how many channels are latents
    dim: int  # which dimension of `raw` they are in
    scale: float
    tokens: int | None = None  # how many rows of dimension 1 are drawn; behind them a reference picture (Kontext)
    edited: Tensor | None = None
    _base: Tensor | None = None

    def replaced(self, raw: Tensor, scaled: Tensor) -> Tensor:
        """`raw` with its latent channels replaced by these (already scaled) latents, repeated over its row blocks."""
        scaled = scaled.to(raw.dtype)
        scaled = torch.cat([scaled] * (raw.shape[0] // scaled.shape[0]))
        if self.tokens is not None:
            scaled = torch.cat([scaled, raw[:, self.tokens :]], 1)
        rest = raw.shape[self.dim] - self.channels
        return torch.cat([scaled, raw.narrow(self.dim, self.channels, rest)], self.dim) if rest else scaled

    @property
    def base(self) -> Tensor:
        """The conditional latents as they came, unscaled; never an inference tensor, so gradients may start here."""
        if self._base is None:
            latents = self.raw[self.rows].narrow(self.dim, 0, self.channels)
            latents = latents if self.tokens is None else latents[:, : self.tokens]
            with torch.inference_mode(False):
                latents = latents.clone() if latents.is_inference() else latents
                self._base = latents if self.scale == 1.0 else latents / self.scale
        return self._base


def written(pipe: Any, sample: Sample, raw: Tensor, timestep: Any) -> Tensor:
    """The denoiser's input with the edited latents in it, for every branch, scaled as the pipeline would have.

    An image whose latents nobody changed keeps its input to the bit.
    """
    edited = sample.edited
    assert edited is not None
    if sample.scale != 1.0:
        scaled = pipe.scheduler.scale_model_input(edited, timestep)
        own = sample.raw[sample.rows].narrow(sample.dim, 0, sample.channels)
        same = (edited == sample.base).flatten(1).all(dim=1)
        edited = torch.where(same.view(-1, *[1] * (own.ndim - 1)), own, scaled.to(own.dtype))
    return sample.replaced(raw, edited)


def stepped(sample: Sample, latents: Tensor) -> Tensor:
    """The sample `scheduler.step` should see in place of `latents`, given what the controls made of the step's."""
    edited = sample.edited
    if edited is None:
        return latents
    if latents.shape != edited.shape:
        raise ControlError(f"the scheduler steps latents of shape {tuple(latents.shape)}, not {tuple(edited.shape)}")
    if sample.scale == 1.0 and latents.dtype == edited.dtype:
        return edited
    return latents + (edited - sample.base).to(latents.dtype)  # keeps what rounding or a lower precision lost
