"""Attention calibration: a new word looks where its class noun looks, and the nouns look at places of their own.

DisenDiff: Attention Calibration for Disentangled Text-to-Image Personalization (Zhang et al., CVPR 2024, arXiv
2403.18551), from their formulas. Min-max and the 1 that smooths the IoU are in the authors' code only, as is the
weight 0.01 of the whole; all pairs of nouns are averaged there, while the paper adds them up.

    N(M) = (M - min M) / (max M - min M + 1e-8)             min-max, per map
    G(M) = 3 x 3 blur, taps exp(-((x - mu) / (2 sigma))^2) with sigma 0.5, normalised: 0.2119 0.5761 0.2119
    f(M) = M^power                                          suppression: 1 is none, 2 the paper's, 4 its "twice"
    m = G(N(M of the new word)),  c = f(G(N(M of its class noun)))
    IoU(a, b) = (sum ab + 1) / (sum a + sum b - sum ab + 1)
    binding of one concept = 1 - IoU(stopgrad(c), m)        moves the new word only
    separate and strengthen of two concepts = IoU(c, c')    moves both nouns

Everything is worked out in float32 or wider, with autocast off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.errors import ControlError

EPS = 1e-8
SIGMA = 0.5  # as the authors' code names it; the width of the Gaussian it makes is 0.5 * sqrt(2)
Pairs = Literal["mean", "sum"]


def min_max(maps: Tensor, eps: float = EPS) -> Tensor:
    """Each map stretched to 0 to 1; a flat one becomes zeros. The gradient also flows through the two ends.

    Args:
        maps: (..., height, width).
        eps: added to the spread. It is lost in half precision, where a flat map would be no number: see `prepared`.
    """
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + eps)


def blur(maps: Tensor, sigma: float = SIGMA) -> Tensor:
    """3 x 3 Gaussian, the rim reflected.

    Args:
        maps: (..., height, width), each side 2 or more.
        sigma: as in exp(-((x - mu) / (2 sigma))^2), so the standard deviation is sqrt(2) * sigma cells.
    """
    side = math.exp(-((1 / (2 * sigma)) ** 2))
    taps = maps.new_tensor([side, 1.0, side]) / (1 + 2 * side)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="reflect"), torch.outer(taps, taps)[None, None]).view(maps.shape)


def soft_iou(one: Tensor, other: Tensor) -> Tensor:
    """(sum ab + 1) / (sum a + sum b - sum ab + 1) over the last two dimensions, in (0, 1] for maps in [0, 1].

    Of a soft map with itself it is less than 1: the larger and the more binary the maps, the nearer it comes.
    """
    both = (one * other).sum((-2, -1))
    return (both + 1) / (one.sum((-2, -1)) + other.sum((-2, -1)) - both + 1)


@dataclass(frozen=True)
class Calibrated:
    """What the losses read from one batch: values without a row's share of it are 0 there.

    Attributes:
        binding: (rows, concepts), 1 - IoU of a new word with its noun; 0 where the row's caption lacks one of them.
        apart: (rows, pairs), IoU of two nouns; 0 where the caption lacks one of them.
        total: weighted sum over concepts and pairs, mean over rows that have any, with gradient; 0 if none has.
        coverage: (concepts,), mean over cells of the noun's min-max map, without gradient, mean over rows that have it.
            Near 1 the noun covers the background as well: it has been flooded.
    """

    binding: Tensor
    apart: Tensor
    total: Tensor
    coverage: Tensor


@dataclass(frozen=True)
class Calibration:
    """The losses of DisenDiff, with their settings.

    Args:
        bind: weight of the binding losses, summed over concepts.
        separate: weight of the separate-and-strengthen losses, of all pairs of nouns.
        power: of the suppression, 1, 2 or 4.
        smooth: blur maps before they are compared.
        detach: binding moves the new word only. False: its noun as well.
        pairs: how the pairs of three or more nouns are joined: "mean" as in the authors' code, "sum" as in the paper.
        only_overlap: compare nouns by mean(c c') instead of their IoU. The paper rejects it: it shrinks the maps.

    Raises:
        ControlError: a setting is out of its range.
    """

    bind: float = 0.01
    separate: float = 0.01
    power: int = 2
    smooth: bool = True
    detach: bool = True
    pairs: Pairs = "mean"
    only_overlap: bool = False

    def __post_init__(self) -> None:
        for name in ("bind", "separate"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ControlError(f"{name} is a weight from 0 up, not {value!r}")
        if self.power not in (1, 2, 4):
            raise ControlError(f"power is 1, 2 or 4, not {self.power!r}")
        if self.pairs not in ("mean", "sum"):
            raise ControlError(f"pairs is 'mean' or 'sum', not {self.pairs!r}")

    @property
    def acts(self) -> bool:
        """Whether any loss has a weight."""
        return self.bind > 0 or self.separate > 0

    def prepared(self, maps: Tensor) -> Tensor:
        """G(N(M)) of each map (..., height, width), float32 or wider."""
        wide = min_max(maps.to(torch.promote_types(maps.dtype, torch.float32)))
        return blur(wide) if self.smooth else wide

    def read(self, words: Tensor, nouns: Tensor, present: Tensor | None = None) -> Calibrated:
        """Work out the losses.

        Args:
            words: (rows, concepts, height, width), maps of the new words.
            nouns: of the same shape, maps of their class nouns.
            present: (rows, concepts), whether the row's caption has the concept, both words of it. None: all have.
        """
        if present is None:
            present = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        with torch.autocast(words.device.type, enabled=False):
            return self._read(words, nouns, present)

    def _read(self, words: Tensor, nouns: Tensor, present: Tensor) -> Calibrated:
        modifiers, softened = self.prepared(words), self.prepared(nouns)
        classes = softened**self.power
        target = classes.detach() if self.detach else classes
        binding = torch.where(present, 1 - soft_iou(target, modifiers), 0.0)
        pairs = list(combinations(range(words.shape[1]), 2))
        first, second = [one for one, _ in pairs], [other for _, other in pairs]
        both = present[:, first] & present[:, second]  # (rows, pairs)
        one, other = classes[:, first], classes[:, second]
        overlap = (one * other).mean((-2, -1)) if self.only_overlap else soft_iou(one, other)
        apart = torch.where(both, overlap, 0.0)
        share = max(len(pairs), 1) if self.pairs == "mean" else 1
        rows = present.any(1).sum().clamp_min(1)
        total = (self.bind * binding.sum() + self.separate * apart.sum() / share) / rows
        spread = torch.where(present, min_max(nouns.detach().float()).mean((-2, -1)), 0.0)
        return Calibrated(binding, apart, total, spread.sum(0) / present.sum(0).clamp_min(1))
