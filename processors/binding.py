"""Binding: a colour looks where its thing looks, and neither where the rest of the prompt does.

SynGen: Linguistic Binding in Diffusion Models (Rassin et al., NeurIPS 2023, arXiv 2306.08877). Which word belongs to
which is said by hand here; the original reads it from the prompt's syntax. Words of several tokens are summed; the
original takes the worst of their tokens.

Maps are (images, phrases, height, width), not negative; a loss is worked out image by image, in the maps' precision.
"..._parts" gives one value per bond, "..._loss" one per image. A part whose phrase an image does not have is 0, without
gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.engine.run import Run
from attnctl.errors import ControlError
from attnctl.processors.latents.descent import MapDescent, phrases_first
from attnctl.processors.latents.loss_terms import Loss, View
from attnctl.processors.latents.map_gradient import PhraseTokens
from attnctl.words.phrases import TextStream, text_rows
from attnctl.words.spelling import NUMBERED

Bond = str | tuple[str, str]
Pairs = Sequence[tuple[int, int]]


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


class Bind(Loss):
    """`binding_loss` of bonds. Its maps are always those of raw probabilities, whatever other losses see."""

    name = "binding"
    whole_prompt = True

    def __init__(self, bonds: Sequence[Bond], weight: float = 1.0) -> None:
        self.bonds = tuple(bonds)
        self.labels = tuple(label(bond) for bond in bonds)
        written = [(bond, ends(bond)[1]) if isinstance(bond, str) else bond for bond in bonds]
        super().__init__([phrase for pair in written for phrase in pair], weight)

    def begin(
        self, run: Run, names: tuple[str, ...], texts: Sequence[tuple[TextStream, ...]], found: PhraseTokens
    ) -> Tensor:
        members = {name: found.members[:, column] for column, name in enumerate(names)}  # (images, tokens) each
        modifiers, nouns = [], []
        for bond in self.bonds:
            if isinstance(bond, str):  # of "red car", the car that is in it, and what else is in it
                noun = members[bond] * members[ends(bond)[1]]
                modifiers.append(members[bond] - noun)
            else:
                noun = members[bond[1]]
                modifiers.append(members[bond[0]])
            nouns.append(noun)
        self.modifiers, self.nouns = torch.stack(modifiers, 1), torch.stack(nouns, 1)  # (images, bonds, tokens)
        self.present = self.modifiers.any(-1) & self.nouns.any(-1)
        own = found.real.clone()  # neither padding nor what was filled up
        for image, text in enumerate(texts):
            own[image] &= torch.isin(found.tokens[image], torch.tensor(text_rows(text)))
        self.apart = own[:, None] & ~(self.modifiers + self.nouns).bool()
        return self.present.any(-1)

    def parts(self, view: View) -> tuple[Tensor, Tensor]:
        modifiers, nouns, apart, present = (
            x[view.images].to(view.tokens.device) for x in (self.modifiers, self.nouns, self.apart, self.present)
        )
        maps = torch.einsum("ithw,ibt->ibhw", view.tokens, torch.cat([modifiers, nouns], 1).to(view.tokens))
        count = len(self.bonds)
        pairs = [(bond, count + bond) for bond in range(count)]
        return binding_parts(maps, pairs, view.tokens, apart, torch.cat([present, present], 1)), present


@phrases_first
class Binding(MapDescent):
    """Keeps each modifier on its noun, so that the red of "red car" is on the car: the gradient of `binding_loss`.

    Args:
        phrases: bonds. "red car" binds its last word to the words before it, where the prompt has them in a row, so
            that another red thing is no matter; ("red", "car") binds two phrases wherever they are.

    The other settings are those of `MapDescent`; `maps` does not matter, since the loss has maps of its own. It has no
    least value, so reports hold the loss itself.

    Raises:
        ControlError: a setting is out of its range.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has no bond.
    """

    phrases: tuple[Bond, ...]

    def check(self) -> None:
        self._set(phrases=bonds_of(self.phrases))
        if not self.phrases:
            raise ControlError("Binding needs a modifier and its noun, such as Binding('red car')")
        super().check()

    def losses(self) -> list[Loss]:
        return [Bind(self.phrases)]


def ends(bond: Bond) -> tuple[str, str]:
    """(modifier, noun) of a bond; of "red car#2" the car is any car, and which one the whole phrase says."""
    if not isinstance(bond, str):
        return bond
    numbered = NUMBERED.fullmatch(bond)
    modifier, _, noun = (numbered[1] if numbered else bond).rpartition(" ")
    return modifier, noun


def label(bond: Bond) -> str:
    """ "red | car", "red | car#2"."""
    numbered = NUMBERED.fullmatch(bond) if isinstance(bond, str) else None
    return " | ".join(ends(bond)) + (f"#{numbered[2]}" if numbered else "")


def bonds_of(bonds: Any) -> tuple[Bond, ...]:
    """The bonds, checked: each two words or more, or a pair of different phrases.

    Raises:
        ControlError: one is neither.
    """
    found: list[Bond] = []
    if not isinstance(bonds, (str, Iterable)):
        raise ControlError(f"bonds are several of 'red car' or ('red', 'car'), not {bonds!r}")
    for bond in (bonds,) if isinstance(bonds, str) else bonds:
        if not isinstance(bond, (str, Iterable)):
            raise ControlError(f"a bond is 'red car' or a pair ('red', 'car'), not {bond!r}")
        one: Any = " ".join(bond.split()) if isinstance(bond, str) else tuple(bond)
        pair = ends(one) if isinstance(one, str) else one
        if len(pair) != 2 or not all(isinstance(end, str) and end for end in pair) or pair[0] == pair[1]:
            raise ControlError(f"a bond is 'red car' or a pair ('red', 'car'), not {bond!r}")
        found.append(one)
    return tuple(dict.fromkeys(found))
