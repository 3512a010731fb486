"""Calibrate: the losses that calibrate maps in training (`calibration`), as a gradient on the latents while drawing.

DisenDiff (Zhang et al., CVPR 2024, arXiv 2403.18551) uses them in training alone; in sampling they are ours. A new
word that was learnt, or any adjective, looks where its noun looks; nouns look at places of their own:

    sum over bonds of bind * (1 - IoU(c, m))  +  sum over pairs of nouns of separate * IoU(c, c')

with m, c and IoU as in `calibration`, but the gradient also flows through the nouns' maps in the first sum: latents
move all maps at once, and along half of a gradient the loss goes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from attnctl.engine.run import Run
from attnctl.errors import ControlError
from attnctl.processors.binding import Bond, bonds_of, ends, label
from attnctl.processors.calibration import Calibration
from attnctl.processors.latents.descent import MapDescent, phrases_first
from attnctl.processors.latents.loss_terms import Loss, View
from attnctl.processors.latents.map_gradient import PhraseTokens
from attnctl.words.phrases import TextStream


class Calibrates(Loss):
    """The losses of bonds, then those of pairs of their nouns, on maps of raw probabilities."""

    name = "calibration"

    def __init__(self, bonds: Sequence[Bond], settings: Calibration) -> None:
        self.bonds, self.settings = tuple(bonds), settings
        self.pairs = list(combinations(range(len(bonds)), 2))
        nouns = [ends(bond)[1] for bond in bonds]
        self.labels = (*map(label, bonds), *(f"{nouns[one]} | {nouns[other]}" for one, other in self.pairs))
        written = [(bond, ends(bond)[1]) if isinstance(bond, str) else bond for bond in bonds]
        super().__init__([phrase for pair in written for phrase in pair])
        self.weight = torch.tensor([settings.bind] * len(bonds) + [settings.separate] * len(self.pairs))

    def begin(
        self, run: Run, names: tuple[str, ...], texts: Sequence[tuple[TextStream, ...]], found: PhraseTokens
    ) -> Tensor:
        members = {name: found.members[:, column] for column, name in enumerate(names)}  # (images, tokens) each
        words, nouns = [], []
        for bond in self.bonds:
            if isinstance(bond, str):  # of "<v1> cat", the cat that is in it, and what else is in it
                noun = members[bond] * members[ends(bond)[1]]
                words.append(members[bond] - noun)
            else:
                noun = members[bond[1]]
                words.append(members[bond[0]])
            nouns.append(noun)
        self.words, self.nouns = torch.stack(words, 1), torch.stack(nouns, 1)  # (images, bonds, tokens)
        self.present = self.words.any(-1) & self.nouns.any(-1)
        return self.present.any(-1)

    def parts(self, view: View) -> tuple[Tensor, Tensor]:
        words, nouns, present = (x[view.images].to(view.tokens.device) for x in (self.words, self.nouns, self.present))
        looks, seen = (torch.einsum("ithw,ibt->ibhw", view.tokens, own.to(view.tokens)) for own in (words, nouns))
        read = self.settings.read(looks, seen, present)
        both = [present[:, one] & present[:, other] for one, other in self.pairs]
        counts = torch.stack([*present.unbind(1), *both], 1)
        return torch.cat([read.binding, read.apart], 1).to(view.tokens), counts


@phrases_first
class Calibrate(MapDescent):
    """Keeps new words on their nouns, and nouns apart, by the gradient of the losses that calibrate a training.

    For concepts that were learnt (`attnctl personalize`) and run into each other: `Calibrate("<v1> cat", "<v2> car")`.

    Args:
        phrases: bonds, as `Binding` takes them: "<v1> cat" binds its last word to the words before it; ("red", "car")
            binds two phrases wherever they are.
        bind, separate: weights of the two losses.
        power: of the suppression of nouns' maps, 1, 2 or 4.
        smooth: blur maps before they are compared.

    The other settings are those of `MapDescent`; `maps` does not matter, since the losses have maps of their own.

    Raises:
        ControlError: a setting is out of its range.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has no bond.
    """

    phrases: tuple[Bond, ...]
    bind: float = 1.0
    separate: float = 1.0
    power: int = 2
    smooth: bool = True

    def check(self) -> None:
        self._set(phrases=bonds_of(self.phrases))
        if not self.phrases:
            raise ControlError("Calibrate needs a word and its noun, such as Calibrate('<v1> cat')")
        if not self._losses.acts:
            raise ControlError("bind and separate are both 0, so there is nothing to do; strength=0 switches it off")
        super().check()

    @property
    def _losses(self) -> Calibration:
        return Calibration(self.bind, self.separate, self.power, self.smooth, detach=False)

    def losses(self) -> list[Loss]:
        return [Calibrates(self.phrases, self._losses)]
