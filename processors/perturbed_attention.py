"""What a broken attention head returns: the P of perturbation guidance, see `perturb`. No map is ever made.

First the maths on plain tensors, then how one attention call is put together from it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.engine.control import AttentionCall, Proceed

Scope = Literal["whole", "image", "image-masked", "image-diagonal"]

# --- maths ------------------------------------------------------------------------------------------------------------


def mix(out: Tensor, weak: Tensor, u: Tensor) -> Tensor:
    """(1 - u) out + u weak, exact at both ends; u is (batch, heads, 1, 1)."""
    return torch.where(u == 1, weak, out + u * (weak - out))


def blurred(q: Tensor, grid: tuple[int, int], sigma: float) -> Tensor:
    """Queries blurred over the picture by a Gaussian, each channel by itself.

    Args:
        q: (batch, heads, cells, head_dim), cells row by row.
        grid: (height, width) of the cells.
        sigma: in cells, above 0; inf gives the mean of all cells.

    Along each side the kernel has ceil(6 sigma) + 1 cells, made odd and no wider than the side allows; edges are
    reflected, as in SEG's code, which knows square grids only.
    """
    if math.isinf(sigma):
        return q.mean(2, keepdim=True).expand_as(q)
    batch, heads, _, channels = q.shape
    x = q.float().transpose(2, 3).reshape(batch * heads * channels, 1, *grid)
    for axis, side in enumerate(grid):
        size = min(math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2, side + 1 - side % 2)
        places = torch.arange(size, device=q.device) - size // 2
        weights = torch.exp(-0.5 * (places / sigma) ** 2)
        kernel = (weights / weights.sum()).reshape(1, 1, *((-1, 1) if axis == 0 else (1, -1)))
        padding = (0, 0, size // 2, size // 2) if axis == 0 else (size // 2, size // 2, 0, 0)
        x = F.conv2d(F.pad(x, padding, mode="reflect"), kernel)
    return x.reshape(batch, heads, channels, -1).transpose(2, 3).to(q.dtype)


def text_logsumexp(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """The log-sum-exp of each row's logits over few keys, (batch, heads, queries), in float32; a head at a time."""
    found = []
    for head in range(q.shape[1]):
        logits = q[:, head].float() @ k[:, head].float().mT * scale  # (batch, queries, keys)
        if bias is not None:
            logits = _biased(logits, bias[:, min(head, bias.shape[1] - 1)])
        found.append(logits.logsumexp(-1))
    return torch.stack(found, 1)


def _biased(logits: Tensor, bias: Tensor) -> Tensor:
    return logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias.float()


# --- one attention call -----------------------------------------------------------------------------------------------


def _full_bias(call: AttentionCall) -> Tensor | None:
    """The bias with four dimensions, or None."""
    return None if call.bias is None else call.bias[(None,) * (4 - call.bias.ndim)]


def queries_of(call: AttentionCall, rows: slice) -> AttentionCall:
    """The call of some queries alone."""
    bias = _full_bias(call)
    bias = bias[:, :, rows] if bias is not None and bias.shape[2] > 1 else bias
    return call.replace(q=call.q[:, :, rows], bias=bias)


def own_values(call: AttentionCall) -> Tensor:
    """The value of each query's own key, (batch, heads, queries, head_dim); grouped heads share theirs."""
    return call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], dim=1)


def uniform(call: AttentionCall, proceed: Proceed) -> Tensor:
    if call.bias is None:
        return own_values(call).mean(2, keepdim=True).expand(*call.q.shape[:-1], call.v.shape[-1])
    return proceed(call.replace(q=torch.zeros_like(call.q)))  # the logits that are left are those that controls set


def blur(call: AttentionCall, proceed: Proceed, sigma: float, scope: Scope) -> Tensor:
    if math.isinf(sigma) and (scope == "whole" or call.site.kind == "self"):
        mean = call.q.mean(2, keepdim=True)
        bias = _full_bias(call)
        if bias is None or bias.shape[2] == 1:  # one row of attention is that of all
            return proceed(call.replace(q=mean)).expand(*call.q.shape[:-1], call.v.shape[-1])
        return proceed(call.replace(q=mean.expand_as(call.q)))
    q = call.q.clone()
    q[:, :, call.image] = blurred(q[:, :, call.image], call.grid, sigma)
    return proceed(call.replace(q=q))


def temperature(call: AttentionCall, proceed: Proceed, tau: float) -> Tensor:
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    bias = call.bias if call.bias is None or call.bias.dtype == torch.bool else call.bias / tau
    return proceed(call.replace(scale=scale / tau, bias=bias))


def kept_by_text(call: AttentionCall, proceed: Proceed, scope: Scope) -> Tensor:
    """P of the scopes that leave text as it is, for the picture's rows: (batch, heads, cells, head_dim)."""
    rows = queries_of(call, call.image)
    count, image = call.k.shape[2], call.image
    own = own_values(call)[:, :, image]
    others = torch.cat([torch.arange(image.start), torch.arange(image.stop, count)]).to(call.q.device)
    bias = _full_bias(rows)
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], dim=1)

    def part(keys: Tensor | slice) -> Tensor | None:
        return bias[..., keys] if bias is not None and bias.shape[3] > 1 else bias

    text = proceed(rows.replace(k=call.k[:, :, others], v=call.v[:, :, others], bias=part(others)))
    spread = text_logsumexp(rows.q, k[:, :, others], scale, part(others))
    if scope == "image-masked":
        logits = (rows.q.float() * k[:, :, image].float()).sum(-1) * scale  # S_ii
        if bias is not None:
            inner = part(image)
            assert inner is not None
            square = inner.expand(*inner.shape[:2], rows.q.shape[2], rows.q.shape[2])
            logits = _biased(logits, square.diagonal(dim1=2, dim2=3))
        share = (logits - spread).sigmoid()
    else:  # how much of a row goes to the picture, by one more call whose values say what is picture
        here = torch.zeros_like(call.v)
        here[:, :, image, 0] = 1.0
        share = proceed(rows.replace(v=here))[..., 0].float()
    return (share[..., None] * own + (1 - share[..., None]) * text).to(call.q.dtype)
