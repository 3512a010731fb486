"""Retention: words of the prompt go on looking where they looked a step ago, or look where they are told to.

A-STAR: Test-time Attention Segregation and Retention (Agarwal et al., ICCV 2023, arXiv 2306.14544), equation 3. With
masks of the user's own, as in its figure 12, it controls the layout.

Maps are (images, phrases, height, width), not negative; a loss is worked out image by image, in the maps' precision.
"..._parts" gives one value per phrase, "..._loss" one per image. A part whose phrase an image does not have is 0,
without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from attnctl.engine.run import Run
from attnctl.errors import ControlError
from attnctl.processors.latents.descent import MapDescent, check_phrases, phrases_first
from attnctl.processors.latents.loss_terms import Loss, OfPhrases, View
from attnctl.processors.latents.map_gradient import PhraseTokens
from attnctl.processors.latents.masks import Rule, binarise
from attnctl.processors.segregation import overlap
from attnctl.regions import Region, named_regions
from attnctl.words.phrases import TextStream

Masks = tuple[tuple[str, Any], ...]  # (phrase, anything a Region is made of)
RULE: Rule = "quantile"
SHARE = 0.14  # of the cells


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


class Keep(OfPhrases):
    """`retention_loss` of phrases.

    A phrase's mask is the high part of its map as it was last read in the step before, or a region given for it.
    Without a region a phrase has no mask, and no loss, until a step is over; where a part of it has a region, as the
    "cat" of "black cat" may, that alone counts. Steps are counted as calls of the denoiser, since a scheduler may
    repeat a timestep. `weight` is of phrases without a region, `placing` of those with one, which are always met.
    """

    name = "retention"
    least = 0.5

    def __init__(
        self, phrases: Sequence[str], masks: Masks = (), rule: Rule = RULE, share: float = SHARE, weight: float = 1.0,
        placing: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(phrases)
        self.regions, self.rule, self.share = dict(masks), rule, share
        self.weight = torch.tensor([placing if phrase in self.regions else weight for phrase in self.phrases])
        self.step = -1
        self.latest: Tensor | None = None  # (all images, phrases, height, width): maps as last read
        self.masks: Tensor | None = None  # of the same shape

    def begin(
        self, run: Run, names: tuple[str, ...], texts: Sequence[tuple[TextStream, ...]], found: PhraseTokens
    ) -> Tensor:
        self.whole, self.view = run.whole, run.view
        super().begin(run, names, texts, found)
        members = found.members[:, self.columns]
        given = torch.tensor([phrase in self.regions for phrase in self.phrases])
        placed = given & members.any(-1)  # (images, phrases)
        within = members @ members.mT == members.sum(-1)[:, None]  # the second phrase is all in the first
        self.present = placed | (self.present & ~(within & placed[:, None]).any(-1))
        self.present &= self.weight > 0
        self.always = (placed & self.present).any(-1)
        return self.present.any(-1)

    def begin_step(self, index: int) -> None:
        if index != self.step and self.latest is not None:
            self.masks = binarise(self.latest, self.rule, self.share)
            self._place(self.masks)
        self.step = index

    def parts(self, view: View) -> tuple[Tensor, Tensor]:
        maps = view.maps[:, self.columns]
        if self.latest is None:
            self.latest = maps.new_zeros(len(self.present), *maps.shape[1:])
            self._place(self.latest)  # until the first step is over, the regions are all there is
            self.masks = self.latest.clone()
        assert self.masks is not None
        self.latest[view.images] = maps.detach()
        masks = self.masks[view.images]
        counts = self.present[view.images].to(maps.device) & masks.flatten(-2).any(-1)
        if view.preparation == "share":  # maps that sum to 1 are compared with masks that do
            masks = masks / masks.sum((-2, -1), keepdim=True).clamp_min(1e-8)
        return retention_parts(maps, masks, counts), counts

    def _place(self, masks: Tensor) -> None:
        """Put the given regions in the place of what is there."""
        grid = masks.shape[-2], masks.shape[-1]
        for column, phrase in enumerate(self.phrases):
            if phrase in self.regions:
                masks[:, column] = Region(self.regions[phrase]).on(grid, self.whole, self.view).to(masks)


@phrases_first
class Retention(MapDescent):
    """Keeps each phrase where it was a step ago, or where you want it: the gradient of `retention_loss`.

    Args:
        phrases: what to keep in its place; may be left out if there are masks.
        masks: regions for phrases, as a dict or pairs: a box, a mask, a picture or layer or the path of one, see
            `attnctl.regions.Region`. Their phrases need not be named again. Phrases without one keep to the mask of
            their own last step.
        rule: how a mask is made of a map, see `losses.binarise`. The paper does not say; "quantile" is ours. A mask
            smaller than the thing makes the thing small, as "half" does with maps="share": it keeps 3 % of the cells.
        share: of the cells, for the rule "quantile": above 0 and up to 1, about the part of the picture a thing covers.

    The other settings are those of `MapDescent`. With maps="share" a mask is divided by its sum, as maps are (ours):
    against masks of zeros and ones such small values would have hardly any slope, see `losses.retention_loss`.

    Raises:
        ControlError: a setting is out of its range, or a region is none.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has none of them.
    """

    phrases: tuple[str, ...]
    masks: Masks = ()
    rule: Rule = RULE
    share: float = SHARE

    def check(self) -> None:
        self._set(masks=named_regions(self.masks))
        self._set(phrases=tuple(dict.fromkeys((*self.phrases, *(phrase for phrase, _ in self.masks)))))
        check_phrases("Retention", self.phrases, 1, "Retention('cat', 'dog')")
        check_rule(self.rule, self.share)
        super().check()

    def losses(self) -> list[Loss]:
        return [Keep(self.phrases, self.masks, self.rule, self.share)]


def check_rule(rule: str, share: float) -> None:
    """Raise unless masks can be made like that."""
    if rule not in get_args(Rule):
        raise ControlError(f"a mask is made by one of {', '.join(get_args(Rule))}; not {rule!r}")
    if not 0 < share <= 1:
        raise ControlError(f"share is part of the cells, above 0 and up to 1; not {share}")
