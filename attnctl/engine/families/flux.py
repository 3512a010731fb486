"""FluxTransformer2DModel: FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnctl.engine.families.record import Family, Stream


def _flux_site(transformer: Any, name: str, attn: nn.Module) -> tuple[Any, int | None, Any] | None:
    if not name.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        return None
    return "joint", 2, "text-first"  # latents are packed 2 x 2 outside the model


def _flux_size(transformer: Any, sample: Tensor, arguments: Mapping[str, Any]) -> tuple[int, int]:
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids  # (image tokens, 3): picture, row, column
    drawn = ids[ids[:, 0] == 0]  # Kontext appends the tokens of a reference picture, numbered 1
    return 2 * (int(drawn[:, 1].max()) + 1), 2 * (int(drawn[:, 2].max()) + 1)


FLUX = Family(
    name="FLUX",
    denoiser="transformer",
    model="FluxTransformer2DModel",
    sample="hidden_states",
    channel_dim=2,
    branches="sequential",
    site=_flux_site,
    latent_size=_flux_size,
    streams=(Stream("tokenizer_2", "prompt_2", rows="max_sequence_length"),),  # CLIP enters pooled only
    shared=frozenset({"img_ids", "txt_ids"}),
    time=1000.0,
    stages=("transformer_blocks", "single_transformer_blocks"),
    packing=2,
)
