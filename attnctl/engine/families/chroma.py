"""ChromaTransformer2DModel: Chroma, which is FLUX.1 without CLIP and with guidance in two calls."""

from __future__ import annotations

from dataclasses import replace

from attnctl.engine.families.flux import FLUX
from attnctl.engine.families.record import Stream

CHROMA = replace(
    FLUX,
    name="Chroma",
    model="ChromaTransformer2DModel",
    streams=(Stream("tokenizer", "prompt", rows="max_sequence_length"),),
)
