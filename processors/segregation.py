"""Segregation: words of the prompt are kept from looking at the same places of the picture.

A-STAR: Test-time Attention Segregation and Retention (Agarwal et al., ICCV 2023, arXiv 2306.14544), equation 2.

The paper acts on every picture and at every step. By default we look ahead first, leave a picture alone that will be
complete, and guide the early steps of the others. The paper does not state its step size, layers or preparation of
maps. Those are settings, and their defaults are ours.

Maps are (images, phrases, height, width), not negative; a loss is worked out image by image, in the maps' precision.
"..._parts" gives one value per pair, "..._loss" one per image. A part whose phrase an image does not have is 0, without
gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.engine.run import Run
from attnctl.errors import ControlError, of_image
from attnctl.processors.latents.descent import MapDescent, phrases_first
from attnctl.processors.latents.loss_terms import Loss, OfPairs, View
from attnctl.processors.latents.map_gradient import PhraseTokens
from attnctl.words.phrases import TextStream

Pair = tuple[str, str]
Pairs = Sequence[tuple[int, int]]
PRESETS: dict[str, dict[str, Any]] = {
    "thorough": {"window": (0.0, 0.5)},
    "always": {"look_ahead": 0},
    "down": {"where": ("down_blocks.*attn2",)},
    "paper": {"maps": "attend-and-excite", "relative": None, "window": (0.0, 1.0), "look_ahead": 0},
}
"""Settings by name.

"thorough": the first half of the schedule. "always": no look ahead, every picture is guided. "down": maps of the way
down of a UNet only, so that the extra forward ends early; half the extra time in SD 1. "paper": every picture, at every
step, with what A-STAR leaves open as Attend-and-Excite has it.
"""
USUAL_PEAK = 0.3  # probability; told complete pictures of glyph-sd from others on the development half


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


class Apart(OfPairs):
    """`segregation_loss` of pairs of phrases.

    Of phrases that were named by themselves, an image leaves out those that are part of a longer one; of any pair, it
    takes none whose phrases share a word.
    """

    name = "segregation"

    def __init__(self, phrases: Sequence[str | Pair], bonds: Sequence[Pair] = (), weight: float = 1.0) -> None:
        super().__init__(every_pair(phrases, bonds), weight)
        self.alone = {phrase for phrase in phrases if isinstance(phrase, str)}
        self.chosen = {phrase for phrase in phrases if not isinstance(phrase, str)}

    def begin(
        self, run: Run, names: tuple[str, ...], texts: Sequence[tuple[TextStream, ...]], found: PhraseTokens
    ) -> Tensor:
        super().begin(run, names, texts, found)
        alone = [column for column, name in enumerate(names) if name in self.alone]
        whole = found.present.clone()
        whole[:, alone] = found.whole(alone)
        first, second = (found.members[:, [pair[side] for pair in self.pairs]] for side in (0, 1))
        shared = (first * second).any(-1)  # (images, pairs)
        same = shared & (first == second).all(-1)
        if same.any():
            image, number = same.nonzero()[0].tolist()
            raise of_image(_inseparable(self.named[number]), image, run.prompts)
        entire = whole[:, [pair[0] for pair in self.pairs]] & whole[:, [pair[1] for pair in self.pairs]]
        chosen = torch.tensor([pair in self.chosen for pair in self.named])
        lost = self.present & shared
        self.present &= ~shared & (entire | chosen)
        useful = self.present.any(-1)
        if (stuck := lost & ~useful[:, None]).any():  # not even one pair is left
            image = int(stuck.any(1).int().argmax())
            raise of_image(_inseparable(self.named[int(stuck[image].int().argmax())]), image, run.prompts)
        return useful

    def parts(self, view: View) -> tuple[Tensor, Tensor]:
        counts = self.present[view.images].to(view.maps.device)
        return torch.where(counts, segregation_parts(view.maps, self.pairs), 0.0), counts


def _inseparable(pair: Pair) -> ControlError:
    one, other = pair
    return ControlError(f"{one!r} and {other!r} cannot be kept apart: they share words of the prompt")


def every_pair(phrases: Sequence[str | Pair], bonds: Sequence[Pair] = ()) -> list[Pair]:
    """Every two of the phrases, and the pairs among them; never a noun and its own adjective, which `bonds` names."""
    alone = [phrase for phrase in phrases if isinstance(phrase, str)]
    pairs = [*combinations(alone, 2), *(phrase for phrase in phrases if not isinstance(phrase, str))]
    bound = {frozenset(bond) for bond in bonds}
    return [pair for pair in pairs if frozenset(pair) not in bound]


@phrases_first
class Segregation(MapDescent):
    """Keeps phrases apart, so that two things do not melt into one: the gradient of `segregation_loss` of their maps.

    An image of a batch uses the phrases that its own prompt has. A noun and its adjective are never a pair: of "a red
    car and a cat", say Segregation("red car", "cat"), or "car" and "cat". Phrases that share a word are none, and where
    a prompt has "red car", the shorter phrase "car" is not asked for again.

    Args:
        phrases: what to keep apart; every two of them are a pair. Or pairs, each a tuple of two phrases.
        look_ahead, peak_target, window: as for `MapDescent`; by default a look ahead of 2 steps for 0.3, and the early
            steps.
        preset: "thorough", "always", "down" or "paper", see `PRESETS`; settings beside it come first. It is not kept:
            the other settings hold what it stands for.

    The other settings are those of `MapDescent`.

    Raises:
        ControlError: a setting is out of its range.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has not even one pair.
        ControlError: at the pipeline call, if the phrases of a pair are the same words of a prompt.
    """

    phrases: tuple[str | Pair, ...]
    look_ahead: int = 2
    window: tuple[float, float] | None = None
    preset: str | None = None

    usual_peak: ClassVar[float | None] = USUAL_PEAK
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def check(self) -> None:
        pairs = every_pair(self.phrases)
        if not pairs or any(len(set(pair)) != 2 for pair in pairs):
            raise ControlError("Segregation needs two phrases to keep apart, such as Segregation('cat', 'dog')")
        super().check()

    def losses(self) -> list[Loss]:
        return [Apart(self.phrases)]
