"""Binding: a colour looks where its thing looks, and neither where the rest of the prompt does.

SynGen: Linguistic Binding in Diffusion Models (Rassin et al., NeurIPS 2023, arXiv 2306.08877). Which word belongs to
which is said by hand here; the original reads it from the prompt's syntax. Words of several tokens are summed; the
original takes the worst of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnctl.errors import ControlError
from attnctl.prompts import TextStream, text_rows
from attnctl.run import Run

from .descent import MapDescent, phrases_first
from .loss_terms import Loss, OfPairs, View
from .losses import binding_parts
from .map_gradient import Wanted

Bond = tuple[str, str]  # modifier, noun


class Bind(OfPairs):
    """`binding_loss` of bonds. Its maps are always the shares of raw probabilities, whatever other losses see."""

    name = "binding"
    whole_prompt = True

    def begin(self, run: Run, names: tuple[str, ...], texts: Sequence[tuple[TextStream, ...]], found: Wanted) -> Tensor:
        useful = super().begin(run, names, texts, found)
        self.members = found.members
        own = torch.zeros_like(found.real)
        for image, text in enumerate(texts):
            own[image] = torch.isin(found.tokens[image], torch.tensor(text_rows(text)))
        own &= found.real
        bound = torch.stack([found.members[:, m] + found.members[:, n] for m, n in self.pairs], 1).bool()
        self.apart = own[:, None] & ~bound  # (images, bonds, tokens)
        return useful

    def parts(self, view: View) -> tuple[Tensor, Tensor]:
        members, apart, present = (
            x[view.images].to(view.tokens.device) for x in (self.members, self.apart, self.present)
        )
        maps = torch.einsum("ithw,ipt->iphw", view.tokens, members)
        return binding_parts(maps, self.pairs, view.tokens, apart, present), self.both(present)


@phrases_first
class Binding(MapDescent):
    """Brings each modifier to its noun: down the gradient of `binding_loss`.

    Args:
        phrases: bonds, each a tuple (modifier, noun), such as ("red", "car"). A word that is there twice is told apart
            by its number: ("red#2", "bowl").

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
            raise ControlError("Binding needs a modifier and its noun, such as Binding(('red', 'car'))")
        super().check()

    def losses(self) -> list[Loss]:
        return [Bind(self.phrases)]


def bonds_of(bonds: Any) -> tuple[Bond, ...]:
    """The bonds, checked: pairs of two different phrases."""
    found = []
    for bond in bonds:
        if isinstance(bond, str) or len(bond) != 2 or bond[0] == bond[1] or not all(isinstance(b, str) for b in bond):
            raise ControlError(f"a bond is a pair (modifier, noun), such as ('red', 'car'); not {bond!r}")
        found.append((bond[0], bond[1]))
    return tuple(dict.fromkeys(found))
