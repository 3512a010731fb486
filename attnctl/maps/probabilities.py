"""Token probabilities: how much each query attends to a few named keys, without the (queries, keys) matrix.

Under the softmax over all keys, the probability of one key is exp(logit - L), L being the log-sum-exp of the row's
logits. Fused kernels compute L anyway. Three routes, all exact:

- Few keys (cross-attention over a prompt): the plain softmax; differentiable.
- Many keys, L known: only the columns asked for. `Listener` catches L as the model's own kernel returns it.
- Many keys, L unknown or a gradient needed: fused attention once more with one-hot values, so that "what attention
  returns" is the probability of each named key. Differentiable, and no (queries, keys) tensor exists at any time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnctl.engine.control import AttentionCall, Proceed

FEW = 512  # up to so many keys, the plain softmax costs less than listening or than a second fused call


def token_maps(
    q: Tensor,
    k: Tensor,
    tokens: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Probability that each query gives to the named keys, under the softmax over all keys.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, heads, keys, head_dim); with grouped queries fewer heads, a divisor of q's.
        tokens: indices of keys, (tokens,) or, different for each row of the batch, (batch, tokens).
        scale: factor of the logits; None means head_dim ** -0.5.
        bias: bool (True = may attend) or additive; broadcasts to (batch, heads, queries, keys).
        lse: (batch, heads, queries), the log-sum-exp of each row of biased logits, if known. No gradient flows into it.

    Returns:
        (batch, heads, queries, tokens), each in [0, 1]; float32, or float64 if q is. Computed in that precision except
        on the one-hot route, which runs in q's. Differentiable if lse is None.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if lse is not None:
        return known(q, k, tokens, scale, bias, lse)
    if k.shape[2] <= FEW:
        return direct(q, k, tokens, scale, bias)
    return one_hot(q, k, tokens, scale, bias)


def known(q: Tensor, k: Tensor, tokens: Tensor, scale: float, bias: Tensor | None, lse: Tensor) -> Tensor:
    """`token_maps` where the row's log-sum-exp is known."""
    k = _pick(k, tokens, 2)  # (batch, heads, tokens, head_dim)
    if bias is not None and bias.shape[-1] > 1:
        bias = _pick(bias[(None,) * (4 - bias.ndim)], tokens, 3)
    return torch.exp(_logits(q, k, scale, bias) - lse.unsqueeze(-1))


def direct(q: Tensor, k: Tensor, tokens: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """`token_maps` by the plain softmax."""
    every = torch.softmax(_logits(q, k, scale, bias), dim=-1)  # (batch, heads, queries, keys)
    return _pick(every, tokens, 3)


def one_hot(q: Tensor, k: Tensor, tokens: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """`token_maps` by fused attention whose values are one-hot, `head_dim` tokens at a time."""
    found = []
    for part in tokens.split(q.shape[-1], dim=-1):
        v = F.one_hot(part, k.shape[2]).mT.to(q.dtype)  # (keys, tokens) or (batch, keys, tokens)
        v = F.pad(v, (0, q.shape[-1] - part.shape[-1]))  # most kernels want values as wide as keys
        v = v.unsqueeze(-3).expand(k.shape)
        out = F.scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
        found.append(out[..., : part.shape[-1]])
    return torch.cat(found, dim=-1).to(_wide(q))


def _pick(x: Tensor, tokens: Tensor, dim: int) -> Tensor:
    """The named keys of x, whose dimension `dim` is keys."""
    if tokens.ndim == 1:
        return x.index_select(dim, tokens)
    return torch.take_along_dim(x, tokens[:, None, :, None] if dim == 2 else tokens[:, None, None, :], dim=dim)


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _logits(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    wide = _wide(q)
    k = k.to(wide) * scale
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.to(wide) @ k.mT
    if bias is None:
        return logits
    return logits.masked_fill(~bias, float("-inf")) if bias.dtype == torch.bool else logits + bias


def call_maps(call: AttentionCall, rows: slice, tokens: Tensor, lse: Tensor | None = None) -> Tensor:
    """`token_maps` of one attention call: from its image queries to tokens of its text.

    Args:
        call: the call.
        rows: which rows of the batch.
        tokens: (tokens,) or (rows, tokens), counted from the first text key.
        lse: (batch, heads, queries) of the whole call, if known.

    Returns:
        (rows, heads, cells, tokens); cells are those of `call.grid`, row by row.
    """
    bias = call.bias
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
        bias = bias[rows] if bias.shape[0] > 1 else bias
        bias = bias[:, :, call.image] if bias.shape[2] > 1 else bias
    lse = lse[rows, :, call.image] if lse is not None else None
    tokens = tokens + call.text.start if call.text.start else tokens
    return token_maps(call.q[rows, :, call.image], call.k[rows], tokens, call.scale, bias, lse)


_aten: Any = torch.ops.aten
WHOLE = _aten.scaled_dot_product_attention.default
# Kernels whose second result is always the log-sum-exp, in natural units, (batch, heads, queries). The CPU one is
# tested; the CUDA one has the same contract but was not at hand.
KERNELS = [
    getattr(_aten, name).default
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
    if hasattr(_aten, name)
]
# These leave it out unless their fifth argument asks for it. The one adds rows up to a multiple of 32, the other a
# dimension of one. Neither was at hand, so what they tell is compared with a few rows worked out here, the first time.
ASKED = [
    getattr(_aten, name).default
    for name in ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
    if hasattr(_aten, name)
]
_true: dict[Any, bool] = {}  # kernel -> whether what it tells has been found to be the log-sum-exp


class Listener(TorchDispatchMode):
    """While entered, catches the log-sum-exp that the fused kernel returns when it is run on exactly this call.

    It hears only: what runs, and what it returns, stays as it is. If the kernel returns none, or runs on something else
    because a control further in edited the call, `lse` stays None.

    Attributes:
        lse: (batch, heads, queries) or None.
    """

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call
        self.lse: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is WHOLE:  # in inference mode we come before it has chosen its kernel
            with self:
                return func.decompose(*args, **kwargs)
        if func in ASKED and self._ours(args, args[3], kwargs):
            out = func(*args[:4], True, *args[5:], **kwargs)
            lse = out[1].flatten(2)[..., : args[0].shape[2]]
            if func not in _true:
                _true[func] = _is_lse(self.call, lse)
            self.lse = lse if _true[func] else None
            return out
        out = func(*args, **kwargs)
        if func in KERNELS and self._ours(args, kwargs.get("attn_mask"), kwargs):
            self.lse = out[1]
        return out

    def _ours(self, args: Any, mask: Tensor | None, kwargs: Any) -> bool:
        """Whether a kernel is run on exactly this call."""
        call = self.call
        masked = mask is call.bias is None or (mask is not None and call.bias is not None and same(mask, call.bias))
        return masked and kwargs.get("scale") == call.scale and same(args[0], call.q) and same(args[1], call.k)


def _is_lse(call: AttentionCall, told: Tensor) -> bool:
    """Whether numbers, (batch, heads, queries), are the log-sum-exp of a call's logits; looks at its first rows."""
    few, bias = slice(0, 4), call.bias
    if bias is not None:
        bias = bias[(None,) * (4 - bias.ndim)]
        bias = bias[:, :, few] if bias.shape[2] > 1 else bias
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    want = torch.logsumexp(_logits(call.q[:, :, few], call.k, scale, bias), dim=-1)
    return told.shape == call.q.shape[:3] and torch.allclose(told[:, :, few].to(want), want, atol=0.02, rtol=1e-3)


def with_lse(call: AttentionCall, proceed: Proceed) -> tuple[Tensor, Tensor | None]:
    """(`proceed(call)`, the log-sum-exp of its rows where that is worth having and the kernel tells it)."""
    if call.k.shape[2] <= FEW:
        return proceed(call), None
    with Listener(call) as kernel:
        return proceed(call), kernel.lse


def same(one: Tensor, other: Tensor) -> bool:
    """True if two tensors are views of the same numbers in the same order."""
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(), other.shape, other.stride(), other.dtype,
    )  # fmt: skip
