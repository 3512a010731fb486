"""Masks of maps: where a map is high."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Literal["half", "otsu", "quantile"]


def binarise(maps: Tensor, rule: Rule = "half", share: float = 0.2) -> Tensor:
    """Where each map is high, as zeros and ones, without gradient. A map of zeros has an empty mask.

    A-STAR does not state its rule. "otsu" is InitNO's (Guo et al., CVPR 2024), the other two are ours.

    Args:
        maps: (..., height, width), not negative.
        rule:
            "half"      at least half of the map's highest value;
            "otsu"      above Otsu's threshold of the map's own values, and connected (sides or corners) to its peak;
            "quantile"  the highest cells, a `share` of all; cells equal to the last of them come along.
        share: for "quantile", in (0, 1].
    """
    maps = maps.detach()
    flat = maps.flatten(-2)
    top = flat.amax(-1, keepdim=True)
    if rule == "half":
        high = flat >= top / 2
    elif rule == "otsu":
        high = flat >= _otsu(flat)
    else:
        count = max(1, round(share * flat.shape[-1]))
        high = flat >= flat.topk(count, dim=-1).values[..., -1:]
    masks = (high & (flat > 0)).to(maps.dtype)
    if rule == "otsu":
        peak = F.one_hot(flat.argmax(-1), flat.shape[-1]).to(maps.dtype)
        return _connected((peak * masks).view(maps.shape), masks.view(maps.shape))
    return masks.view(maps.shape)


def _otsu(values: Tensor) -> Tensor:
    """The lowest value of the upper class when values (..., n) are split so that the variance between is largest.

    Returns:
        (..., 1).
    """
    ordered = values.sort(dim=-1).values
    count = ordered.shape[-1]
    below = torch.arange(1, count, device=values.device, dtype=values.dtype)  # how many are in the lower class
    sums = ordered.cumsum(-1)
    low = sums[..., :-1] / below
    high = (sums[..., -1:] - sums[..., :-1]) / (count - below)
    split = (below * (count - below) * (high - low).square()).argmax(-1, keepdim=True)
    return ordered.gather(-1, split + 1)


def _connected(seeds: Tensor, masks: Tensor) -> Tensor:
    """The parts of masks that touch their seeds, by spreading the seeds; both (..., height, width), 0 or 1."""
    grown, room = (x.reshape(-1, 1, *x.shape[-2:]) for x in (seeds, masks))
    while True:
        wider = F.max_pool2d(grown, 3, stride=1, padding=1) * room
        if torch.equal(wider, grown):
            return grown.view(masks.shape)
        grown = wider
