"""PixArtTransformer2DModel: PixArt-Alpha, PixArt-Sigma."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnctl.engine.families.record import Family, Stream, plain_size


def _site(transformer: Any, name: str, attn: nn.Module) -> tuple[Any, int | None, Any] | None:
    if not name.startswith("transformer_blocks."):
        return None
    return ("cross" if name.endswith(".attn2") else "self"), transformer.config.patch_size, None


PIXART = Family(
    name="PixArt",
    denoiser="transformer",
    model="PixArtTransformer2DModel",
    sample="hidden_states",
    channel_dim=1,
    branches="batched",
    site=_site,
    latent_size=plain_size,
    latent_channels=lambda transformer: transformer.config.in_channels,  # its output also holds a learned variance
    scaled=True,
    hands_on=("hidden_states",),
    streams=(Stream("tokenizer", "prompt", rows="max_sequence_length"),),
    reads=lambda pipe, prompt: prompt.lower().strip(),
)
