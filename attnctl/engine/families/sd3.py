"""SD3Transformer2DModel: SD 3, SD 3.5."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnctl.engine.families.record import Family, Stream, plain_size
from attnctl.engine.seam import facts


def _sd3_site(transformer: Any, name: str, attn: nn.Module) -> tuple[Any, int | None, Any] | None:
    if not name.startswith("transformer_blocks."):
        return None
    patch = transformer.config.patch_size
    *_, joined = facts(attn)  # SD 3.5 medium: attn2 is a second, image-only attention
    return ("joint", patch, "image-first") if joined else ("self", patch, None)


SD3 = Family(
    name="SD3",
    denoiser="transformer",
    model="SD3Transformer2DModel",
    sample="hidden_states",
    channel_dim=1,
    branches="batched",
    site=_sd3_site,
    latent_size=plain_size,
    streams=(
        Stream("tokenizer", "prompt"),
        Stream("tokenizer_2", "prompt_2"),
        Stream("tokenizer_3", "prompt_3", offset=77, rows="max_sequence_length"),
    ),
)
