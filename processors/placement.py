"""Placement: words look into their region, and not out of it, by a gradient on the latents.

BoxDiff: Text-to-Image Synthesis with Training-Free Box-Constrained Diffusion (Xie et al., ICCV 2023, arXiv 2307.10816).
For a phrase with map A and region M, A and M in [0, 1],

    inner    max(0, 1 - mean of the highest share P of A inside M)
    outer    mean of the highest share P of A outside M
    corner   mean |max_y A - max_y M| near the region's edges in x, and the same along y

It helps where closing keys alone does not make a thing appear; `Regions` beside it keeps the word out of other places.

Maps are (images, phrases, height, width), not negative; a loss is worked out image by image, in the maps' precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.areas import on_grid
from attnctl.engine.run import Run
from attnctl.errors import ControlError
from attnctl.processors.latents.descent import MapDescent, check_phrases, phrases_first
from attnctl.processors.latents.loss_terms import Loss, OfPhrases, View
from attnctl.processors.latents.map_gradient import PhraseTokens, Preparation
from attnctl.regions import Region, named_regions
from attnctl.words.phrases import TextStream

from .regions import Masks


def highest_mean(maps: Tensor, masks: Tensor, share: float) -> Tensor:
    """The mean of the highest values of each map within its mask, (images, phrases); 0 where the mask is empty.

    Args:
        maps: (images, phrases, height, width).
        masks: (phrases, height, width) bool.
        share: how many values count, as a share of the mask's cells; at least one.
    """
    found = []
    for phrase, mask in enumerate(masks):
        inside = maps[:, phrase, mask]  # (images, cells)
        if not inside.shape[-1]:
            found.append(maps.new_zeros(maps.shape[0]))
            continue
        found.append(inside.topk(max(1, int(share * inside.shape[-1])), -1).values.mean(-1))
    return torch.stack(found, -1)


def edge_gap(maps: Tensor, masks: Tensor, reach: int) -> Tensor:
    """How far the maps' outlines are from the masks' near their edges, (images, phrases).

    An outline is the largest value along one side; `reach` is how many cells from an edge of the mask still count.
    """
    total = maps.new_zeros(maps.shape[:2])
    for side in (-1, -2):
        outline, wanted = maps.amax(side), masks.to(maps).amax(side)  # (images, phrases, cells), (phrases, cells)
        padded = torch.nn.functional.pad(wanted, (1, 1))
        edge = (padded.diff() != 0).to(maps)  # (phrases, cells + 1): between which cells the outline begins and ends
        near = torch.nn.functional.max_pool1d(edge, 2 * reach, 1, reach)[:, 1 : wanted.shape[-1] + 1]
        total = total + ((outline - wanted).abs() * near).sum(-1) / near.sum(-1).clamp_min(1)
    return total


def placement_parts(maps: Tensor, masks: Tensor, share: float = 0.2, reach: int = 1) -> Tensor:
    """BoxDiff's loss of each phrase: inner + outer + corner, (images, phrases), from 0 for maps in [0, 1].

    Args:
        maps: (images, phrases, height, width).
        masks: (phrases, height, width) bool.
        share: of the cells inside, and of those outside, whose values count; the paper's code has 0.2.
        reach: cells from an edge that count at the corners; the paper's code has 1.
    """
    inner = (1 - highest_mean(maps, masks, share)).clamp_min(0)
    return inner + highest_mean(maps, ~masks, share) + edge_gap(maps, masks, reach)


class Place(OfPhrases):
    """`placement_parts` of phrases with their regions."""

    name = "placement"

    def __init__(self, masks: Masks, share: float) -> None:
        super().__init__([phrase for phrase, _ in masks])
        self.regions, self.share = dict(masks), share

    def begin(
        self, run: Run, names: tuple[str, ...], texts: Sequence[tuple[TextStream, ...]], found: PhraseTokens
    ) -> Tensor:
        self.whole, self.view = run.whole, run.view
        found_some = super().begin(run, names, texts, found)
        self.always = self.present.any(-1)  # a look ahead sees what is there, not where
        return found_some

    def parts(self, view: View) -> tuple[Tensor, Tensor]:
        maps = view.maps[:, self.columns]
        grid = maps.shape[-2], maps.shape[-1]
        masks = [on_grid(Region(self.regions[phrase]), grid, self.whole, self.view) for phrase in self.phrases]
        present = self.present[view.images].to(maps.device)
        parts = placement_parts(maps, torch.stack(masks).to(maps.device), self.share)
        return torch.where(present, parts, 0.0), present


@phrases_first
class Placement(MapDescent):
    """Draws each phrase into its region by the gradient of `placement_parts` (BoxDiff).

    Args:
        phrases: what to place. With masks they may be left out.
        masks: regions by phrase, as for `Regions`. Without any, the phrases stand side by side, from left to right.
        share: of the cells inside, and of those outside, whose values count.

    The other settings are those of `MapDescent`. Theirs, for 50 steps of SD 1, is `relative=None, window=(0, 0.5)`.

    Raises:
        ControlError: a setting is out of its range, or there is no region.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has none of them.
    """

    phrases: tuple[str, ...]
    masks: Masks = ()
    share: float = 0.2
    maps: Preparation = "attend-and-excite"

    def __init__(self, *phrases: Any, **settings: Any) -> None:
        regions = [one for one in phrases if isinstance(one, Mapping)]  # first, as `Regions` takes them
        if regions and len(phrases) == 1:
            super().__init__(**{"masks": regions[0]} | settings)
        else:
            super().__init__(*phrases, **settings)

    def check(self) -> None:
        count = len(self.phrases)
        columns = {phrase: (n / count, 0, (n + 1) / count, 1) for n, phrase in enumerate(self.phrases)}
        self._set(masks=named_regions(self.masks or columns))
        own = tuple(phrase for phrase, _ in self.masks)
        if not own:
            raise ControlError("Placement takes at least one region, such as masks={'cat': (0, 0, 0.5, 1)}")
        if extra := [phrase for phrase in self.phrases if phrase not in own]:
            raise ControlError(f"Placement has no region for {extra[0]!r}")
        self._set(phrases=own)
        check_phrases("Placement", self.phrases, 1, "Placement(masks={'cat': (0, 0, 0.5, 1)})")
        if not 0 < self.share <= 1:
            raise ControlError(f"share is part of the cells, above 0 and up to 1; not {self.share}")
        super().check()

    def losses(self) -> list[Loss]:
        return [Place(self.masks, self.share)]
