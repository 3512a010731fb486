"""Excitation: every named phrase has a place in the picture that looks at it.

Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image Diffusion Models (Chefer et al., SIGGRAPH 2023,
arXiv 2301.13826).
"""

from __future__ import annotations

from torch import Tensor

from attnctl.processors.latents.descent import MapDescent, check_phrases, phrases_first
from attnctl.processors.latents.map_gradient import Preparation

from .loss_terms import Loss, OfPhrases, View
from .losses import excitation_parts


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
