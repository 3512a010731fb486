"""Flow matching on joint attention: Stable Diffusion 3 and FLUX.1.

Pictures and noise are joined by straight lines, z = (1 - s) x + s e, and the model predicts the velocity e - x (Esser
et al., ICML 2024, arXiv 2403.03206). Trained are the text's keys and values, `attn.add_k_proj` and `attn.add_v_proj` of
the blocks where text and picture have weights of their own. The choice is ours: neither paper trains such models, and
these are the weights that do what keys and values of cross-attention do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.pipelines.personalize.denoising import Denoising, ended


class FlowDenoising(Denoising):
    """What both have in common."""

    part, ends, reads, own = "transformer", ("attn.add_k_proj", "attn.add_v_proj"), "joint", "joint"
    faint = 0.005  # all keys of text and picture share one softmax; glyph-sd3 gives things it sees 0.015 to 0.09

    def times(self, shares: Tensor) -> Tensor:
        """Parts of noise, shifted towards noise as the scheduler shifts the steps of a picture of this size."""
        scheduler = self.pipe.scheduler
        if not scheduler.config.use_dynamic_shifting:
            return scheduler.shift * shares / (1 + (scheduler.shift - 1) * shares)
        config, tokens = scheduler.config, (self.side // int(self.pipe.vae_scale_factor) // 2) ** 2
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        return shift * shares / (1 + (shift - 1) * shares)

    def predict(
        self, latents: Tensor, times: Tensor, dice: torch.Generator, text: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        noise, device = torch.randn(latents.shape, generator=dice), self.model.device
        noisy = torch.lerp(latents, noise, times.view(-1, 1, 1, 1)).to(device)
        return self.velocity(noisy, times.to(device), text), (noise - latents).to(device)

    def velocity(self, noisy: Tensor, times: Tensor, text: dict[str, Any]) -> Tensor:
        """What the model predicts from noised latents, (rows, channels, height, width)."""
        return self.model(noisy, timestep=1000 * times, **text).sample

    def weight(self, times: Tensor, gamma: float | None) -> Tensor:
        """min(snr, gamma) s^2 with snr = ((1 - s) / s)^2: as for a diffusion model that predicts velocity."""
        if gamma is None:
            return torch.ones_like(times)
        return torch.minimum((1 - times).square(), gamma * times.square())


class SD3Denoising(FlowDenoising):
    """Stable Diffusion 3: two CLIPs side by side, then T5 if the pipeline has it."""

    family, rows = "SD3", 256  # of T5, as in `encode_prompt`

    @property
    def count(self) -> int:
        """Two, or three with T5."""
        return 2 if self.pipe.text_encoder_3 is None else 3

    def text(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        states, _, pooled, _ = self.pipe.encode_prompt(
            list(captions), None, None, device=self.model.device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def padding(self, captions: Sequence[str]) -> Tensor:
        clip = ended(self.pipe.tokenizer, captions, self.pipe.tokenizer_max_length)
        if self.pipe.text_encoder_3 is None:
            return torch.cat([clip, torch.ones(len(captions), self.rows, dtype=torch.bool)], 1)
        return torch.cat([clip, ended(self.pipe.tokenizer_3, captions, self.rows)], 1)


class FluxDenoising(FlowDenoising):
    """FLUX.1: T5 states in the blocks, CLIP pooled. Blocks whose weights are the same for text and picture stay."""

    family, rows, starts, packed = "FLUX", 512, False, 4  # rows as in `encode_prompt`
    guidance = 3.5  # that the pipeline tells guidance-distilled models

    @property
    def side(self) -> int:
        """Of the pictures that the model draws, in pixels."""
        return int(self.pipe.default_sample_size) * int(self.pipe.vae_scale_factor)

    def text(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        states, pooled, ids = self.pipe.encode_prompt(list(captions), None, device=self.model.device)
        return {"encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": ids}

    def padding(self, captions: Sequence[str]) -> Tensor:
        return ended(self.pipe.tokenizer_2, captions, self.rows)

    def velocity(self, noisy: Tensor, times: Tensor, text: dict[str, Any]) -> Tensor:
        height, width = noisy.shape[-2:]
        packed = F.pixel_unshuffle(noisy, 2).flatten(2).mT  # (rows, tokens, 4 channels)
        ids = torch.zeros(height // 2, width // 2, 3, dtype=noisy.dtype, device=noisy.device)
        ids[..., 1] += torch.arange(height // 2, device=noisy.device)[:, None]
        ids[..., 2] += torch.arange(width // 2, device=noisy.device)
        told = torch.full_like(times, self.guidance) if self.model.config.guidance_embeds else None
        got = self.model(packed, timestep=times, img_ids=ids.flatten(0, 1), guidance=told, **text).sample
        return F.pixel_shuffle(got.mT.unflatten(2, (height // 2, width // 2)), 2)

    def unpacked(self, latents: Tensor) -> Tensor:
        cells = self.side // int(self.pipe.vae_scale_factor) // 2
        return F.pixel_shuffle(latents.mT.unflatten(2, (cells, cells)), 2)
