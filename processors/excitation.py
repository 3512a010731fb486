"""Excitation: every named phrase has a place in the picture that looks at it.

Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models (Chefer et al., SIGGRAPH 2023,
arXiv 2301.13826).

Maps are (images, phrases, height, width), not negative; a loss is worked out image by image, in the maps' precision.
"..._parts" gives one value per phrase, "..._loss" one per image. A part whose phrase an image does not have is 0,
without gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnctl.processors.latents.descent import MapDescent, check_phrases, phrases_first
from attnctl.processors.latents.loss_terms import Loss, OfPhrases, View
from attnctl.processors.latents.map_gradient import Preparation


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


class Excite(OfPhrases):
    """`excitation_loss` of phrases."""

    name = "excitation"

    def parts(self, view: View) -> tuple[Tensor, Tensor]:
        present = self.present[view.images].to(view.maps.device)
        return excitation_parts(view.maps[:, self.columns], present), present

    def total(self, parts: Tensor) -> Tensor:
        return parts.amax(-1)


@phrases_first
class Excitation(MapDescent):
    """Leaves no phrase out: some place of the picture looks at each (Attend-and-Excite, gradient of `excitation_loss`).

    The step is ours by default. Theirs, for 50 steps of SD 1, is `relative=None, window=(0, 0.5), refine={0: 0.95,
    10: 0.5, 20: 0.2}`; with `maps="attend-and-excite-padded"` also, it is what diffusers' pipeline does.

    Args:
        phrases: what must not be left out.

    The other settings are those of `MapDescent`.

    Raises:
        ControlError: a setting is out of its range.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has none of them.
    """

    phrases: tuple[str, ...]
    maps: Preparation = "attend-and-excite"

    def check(self) -> None:
        check_phrases("Excitation", self.phrases, 1, "Excitation('cat', 'dog')")
        super().check()

    def losses(self) -> list[Loss]:
        return [Excite(self.phrases)]
