"""Attention written out, as the reference for everything that reads maps without the matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@contextmanager
def written_out(denoiser: Any) -> Iterator[list[list[Tensor]]]:
    """Inside, the denoiser's attention is the plain softmax.

    Yields:
        For each forward so far, the probabilities of its attention calls in order, (batch, heads, queries, keys).
    """
    forwards: list[list[Tensor]] = []
    running = False

    def enter(*_: Any) -> None:
        nonlocal running
        running = True
        forwards.append([])

    def leave(*_: Any) -> None:
        nonlocal running
        running = False

    fused = F.scaled_dot_product_attention

    def plain(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not running:
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        assert attn_mask is None and not is_causal and not enable_gqa
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        forwards[-1].append((query.float() @ key.float().mT * scale).softmax(-1))
        return (forwards[-1][-1] @ value.float()).to(value.dtype)

    hooks = denoiser.register_forward_pre_hook(enter), denoiser.register_forward_hook(leave)
    F.scaled_dot_product_attention = plain
    try:
        yield forwards
    finally:
        F.scaled_dot_product_attention = fused
        for hook in hooks:
            hook.remove()
