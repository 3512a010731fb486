"""Masks of things from attention, and losses on them: each new word is taught by the part of the picture it names.

AttenCraft: Attention-based Disentanglement of Multiple Concepts for Text-to-Image Customization (Shentu et al., arXiv
2405.17965), from the authors' procedure. C are maps of the things' words and, as the background, of the start token; S
is how much each place attends to each other place.

    C_k = N(up(M_k)^2)                          M_k on the grid of S, squared, min-max
    P = N(N(S)^4)                               a power of the matrix; both min-max are of all its entries at once
    R_k = N(P C_k)                              relevance
    place p is in mask k  iff  R_k(p) - R_j(p) > margin for all j other than k; else it is in no mask
    guidance_k = JSD(softmax N(up(M_k)), softmax mask_k)    natural logarithms, softmax over all places
    masks that a trained model gives replace the former  iff  SSIM of each with the former is 0.8 or more

N is min-max. Mean squared error to the mask of M_k / max M_k (Break-a-Scene, Avrahami et al., SIGGRAPH Asia 2023, arXiv
2305.16311) is the other form of guidance. Everything is worked out in float32 or wider.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.processors.calibration import EPS, min_max

MARGIN = 0.1
POWER = 4
WINDOW, ALIKE = 7, 0.8  # of the structural similarity that masks are renewed by
Guidance = Literal["jsd", "mse"]
Grid = tuple[int, int]


def fitted(maps: Tensor, grid: Grid) -> Tensor:
    """Maps (..., height, width) on another grid, bicubic: between the cells it may leave their range a little."""
    if maps.shape[-2:] == grid:
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, grid, mode="bicubic", align_corners=False).reshape(*maps.shape[:-2], *grid)


def relevance(cross: Tensor, own: Tensor, grid: Grid, power: int = POWER) -> Tensor:
    """R of each class, (classes, *grid), from 0 to 1.

    Args:
        cross: (classes, height, width), attention to each class's word, mean over heads and sites.
        own: (cells, cells), self-attention of the places of `grid`, row by row; mean over heads and sites.
        grid: (height, width) of `own`.
        power: of the matrix: over how many steps attention is followed.
    """
    classes = min_max(fitted(cross, grid).square()).flatten(1)  # (classes, cells)
    spread = torch.linalg.matrix_power(min_max(own), power)
    return min_max((min_max(spread) @ classes.mT).mT.unflatten(1, grid))


def divided(relevant: Tensor, margin: float = MARGIN) -> Tensor:
    """Which place is whose: (classes, height, width) bool, no place in two classes, some in none.

    The authors then ask that each mask's relevance adds up to most for another word. Masks made so always pass, unless
    one is empty.

    Args:
        relevant: (classes, height, width), see `relevance`; two classes or more.
        margin: by how much a class must be ahead of each other one.
    """
    first, second = relevant.topk(2, 0).values
    return (relevant == first) & (first - second > margin)


def similarity(one: Tensor, other: Tensor, window: int = WINDOW) -> Tensor:
    """Structural similarity (Wang et al., IEEE TIP 2004) of pictures with values from 0 to 1: (...), up to 1.

    As scikit-image works it out by default: the same weight all over the window, variances of a sample, the mean over
    all windows that lie inside.

    Args:
        one, other: (..., height, width).
        window: side of the window, odd; pictures that are smaller have a smaller one.
    """
    size = min(window, *one.shape[-2:])
    size -= 1 - size % 2
    flat = [x.reshape(-1, 1, *x.shape[-2:]) for x in (one, other)]
    mean_1, mean_2 = (F.avg_pool2d(x, size, 1) for x in flat)
    share = size**2 / max(size**2 - 1, 1)
    square_1, square_2, product = (
        share * (F.avg_pool2d(x * y, size, 1) - mean_x * mean_y)
        for x, y, mean_x, mean_y in (
            (flat[0], flat[0], mean_1, mean_1),
            (flat[1], flat[1], mean_2, mean_2),
            (flat[0], flat[1], mean_1, mean_2),
        )
    )
    small_1, small_2 = 0.01**2, 0.03**2
    found = (2 * mean_1 * mean_2 + small_1) * (2 * product + small_2)
    found = found / ((mean_1**2 + mean_2**2 + small_1) * (square_1 + square_2 + small_2))
    return found.mean((1, 2, 3)).reshape(one.shape[:-2])


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence, in nats, over the last dimension of logarithms of probabilities: 0 to log 2."""
    middle = torch.logaddexp(one, other) - torch.log(one.new_tensor(2.0))
    return 0.5 * ((one.exp() * (one - middle)).sum(-1) + (other.exp() * (other - middle)).sum(-1))


def guidance(maps: Tensor, masks: Tensor, kind: Guidance = "jsd") -> Tensor:
    """How far maps of words are from the masks of their things, (...).

    Args:
        maps: (..., height, width), not negative.
        masks: (..., other height, other width), 0 to 1; "jsd" compares on their grid, "mse" on that of the maps.
        kind: "jsd" as in AttenCraft; "mse" as in Break-a-Scene.
    """
    wide = torch.promote_types(maps.dtype, torch.float32)
    maps, masks = maps.to(wide), masks.to(wide)
    if kind == "mse":
        flat = masks.reshape(-1, 1, *masks.shape[-2:])
        small = F.adaptive_avg_pool2d(flat, (maps.shape[-2], maps.shape[-1])).reshape(
            *masks.shape[:-2], *maps.shape[-2:]
        )
        return (maps / maps.amax((-2, -1), keepdim=True).clamp_min(EPS) - small).square().mean((-2, -1))
    stretched = fitted(min_max(maps), (masks.shape[-2], masks.shape[-1]))
    return divergence(stretched.flatten(-2).log_softmax(-1), masks.flatten(-2).log_softmax(-1))
