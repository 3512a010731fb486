"""Losses on the maps of phrases, and the masks some of them aim at: plain functions on tensors.

Maps are (images, phrases, height, width), not negative. Every loss is worked out image by image, in the precision of
its maps, and comes in two forms: `..._parts`, one value per phrase, pair or bond, and `..._loss`, one per image. A part
whose phrase an image does not have is 0 and has no gradient.

Equations: segregation and retention from A-STAR (Agarwal et al., ICCV 2023, arXiv 2306.14544, equations 2 and 3),
excitation from Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826), binding from SynGen (Rassin et al.,
NeurIPS 2023, arXiv 2306.08877).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Rule = Literal["half", "otsu", "quantile"]
Pairs = Sequence[tuple[int, int]]


def overlap(one: Tensor, other: Tensor, eps: float = 1e-8) -> Tensor:
    """sum(min(a, b)) / sum(a + b) over the last two dimensions: from 0 (apart) to 0.5 (the same); 0 if both are empty.

    Of maps that sum to 1 it is (1 - total variation distance) / 2.
    """
    return torch.minimum(one, other).sum((-2, -1)) / (one + other).sum((-2, -1)).clamp_min(eps)


def segregation_parts(maps: Tensor, pairs: Pairs, present: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """The overlap of each pair, (images, pairs), from 0 to 0.5. Arguments as `segregation_loss`."""
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    parts = overlap(maps[:, first], maps[:, second], eps)
    return parts if present is None else torch.where(present[:, first] & present[:, second], parts, 0.0)


def segregation_loss(maps: Tensor, pairs: Pairs, present: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """A-STAR, equation 2: the sum over pairs of sum(min(a, b)) / sum(a + b).

    Args:
        maps: (images, phrases, height, width), not negative.
        pairs: phrases to keep apart, by number.
        present: (images, phrases); a pair counts only in images that have both phrases. None: all have all.
        eps: smallest denominator, so that two empty maps have loss 0.

    Returns:
        (images,), from 0 to 0.5 per pair.
    """
    return segregation_parts(maps, pairs, present, eps).sum(-1)


def retention_parts(maps: Tensor, masks: Tensor, present: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """1 - overlap with its mask for each phrase, (images, phrases), from 0.5 to 1. Arguments as `retention_loss`.

    An empty mask gives 1 and no gradient.
    """
    some = masks.flatten(-2).any(-1)
    parts = 1 - torch.where(some, overlap(maps, masks, eps), 0.0)
    return parts if present is None else torch.where(present, parts, 0.0)


def retention_loss(maps: Tensor, masks: Tensor, present: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """A-STAR, equation 3: the sum over phrases of 1 - sum(min(a, b)) / sum(a + b), b being the phrase's mask.

    The least it can be is 0.5 per phrase. Maps whose highest value is far from 1 have a loss near 1 and hardly any
    slope against masks of zeros and ones: then bring both to the same scale first.

    Args:
        maps: (images, phrases, height, width), not negative.
        masks: of the same shape, not negative, without gradient.
        present: (images, phrases), which phrases count. None: all.
        eps: smallest denominator.

    Returns:
        (images,), from 0.5 to 1 per phrase.
    """
    return retention_parts(maps, masks, present, eps).sum(-1)


def excitation_parts(maps: Tensor, present: Tensor | None = None) -> Tensor:
    """What each phrase's highest value lacks to 1, (images, phrases), 0 if it lacks nothing."""
    parts = (1 - maps.flatten(-2).amax(-1)).clamp_min(0)
    return parts if present is None else torch.where(present, parts, 0.0)


def excitation_loss(maps: Tensor, present: Tensor | None = None) -> Tensor:
    """Attend-and-Excite: the largest over phrases of max(0, 1 - the map's highest value).

    Args:
        maps: (images, phrases, height, width).
        present: (images, phrases), which phrases count. None: all.

    Returns:
        (images,), from 0 to 1 for maps in [0, 1]; only the phrase that is worst off has a gradient.
    """
    return excitation_parts(maps, present).amax(-1)


def divergence(one: Tensor, other: Tensor, eps: float = 1e-8) -> Tensor:
    """Symmetric Kullback-Leibler divergence, the mean of both directions, of maps over the last two dimensions.

    Args:
        one, other: shapes that broadcast; each map is divided by its sum first, and no cell counts as less than `eps`.
    """
    p, q = (x / x.sum((-2, -1), keepdim=True).clamp_min(eps) for x in (one, other))
    p, q = p.clamp_min(eps), q.clamp_min(eps)
    return 0.5 * ((p - q) * (p.log() - q.log())).sum((-2, -1))


def binding_parts(
    maps: Tensor, bonds: Pairs, others: Tensor, apart: Tensor, present: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """The loss of each bond, (images, bonds). Arguments as `binding_loss`."""
    first, second = ([bond[side] for bond in bonds] for side in (0, 1))
    modifier, noun = maps[:, first], maps[:, second]  # (images, bonds, height, width)
    count = apart.sum(-1).clamp_min(1)

    def away(own: Tensor) -> Tensor:
        each = divergence(own[:, :, None], others[:, None], eps)  # (images, bonds, others)
        return torch.where(apart.bool(), each, 0.0).sum(-1) / count

    parts = divergence(modifier, noun, eps) - 0.5 * (away(modifier) + away(noun))
    return parts if present is None else torch.where(present[:, first] & present[:, second], parts, 0.0)


def binding_loss(
    maps: Tensor, bonds: Pairs, others: Tensor, apart: Tensor, present: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """SynGen: a modifier looks where its noun looks, and both look elsewhere than the rest of the prompt.

    For a modifier m and its noun n, D being `divergence` and u running over the other tokens:
    D(m, n) - (mean over u of D(m, u) + mean over u of D(n, u)) / 2, summed over the bonds. It has no lower bound but
    that of `eps`.

    Args:
        maps: (images, phrases, height, width), not negative.
        bonds: (modifier, noun), phrases by number.
        others: (images, others, height, width), the maps to keep away from.
        apart: (images, bonds, others), which of them a bond keeps away from; with none, only D(m, n) is left.
        present: (images, phrases); a bond counts only in images that have both phrases. None: all have all.
        eps: smallest share of a cell.

    Returns:
        (images,).
    """
    return binding_parts(maps, bonds, others, apart, present, eps).sum(-1)


# --- masks ------------------------------------------------------------------------------------------------------------


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
