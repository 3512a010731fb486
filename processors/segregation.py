"""Segregation: words of the prompt are kept from looking at the same places of the picture.

A-STAR: Test-time Attention Segregation and Retention (Agarwal et al., ICCV 2023, arXiv 2306.14544), equation 2, at
every step as there. The paper does not state its step size, layers or preparation of maps. Those are settings; their
defaults are ours, and Attend-and-Excite's choices are `maps="attend-and-excite", relative=None`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations
from math import inf
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from attnctl.control import Control, Lane
from attnctl.errors import ControlError
from attnctl.maps import check_window, with_text
from attnctl.prompts import positions, streams
from attnctl.run import Run, Step
from attnctl.sites import Selection, Site, discover

from .map_gradient import (
    Preparation,
    Wanted,
    coarsest,
    default_sites,
    descend,
    gradients,
    phrase_maps,
    read_maps,
    step_size,
    wanted,
)


def segregation_loss(
    maps: Tensor, pairs: Sequence[tuple[int, int]], present: Tensor | None = None, eps: float = 1e-8
) -> Tensor:
    """A-STAR, equation 2: the sum over pairs of sum(min(a, b)) / sum(a + b).

    Each pair adds from 0 (the maps do not overlap) to 0.5 (they are the same map). For maps that sum to 1 it is
    (1 - total variation distance) / 2.

    Args:
        maps: (images, phrases, height, width), not negative.
        pairs: phrases to keep apart, by number.
        present: (images, phrases); a pair counts only in images that have both phrases. None: all have all.
        eps: smallest denominator, so that two empty maps have loss 0.

    Returns:
        (images,).
    """
    one, other = (maps[:, [pair[side] for pair in pairs]].flatten(2) for side in (0, 1))  # (images, pairs, cells)
    ratio = torch.minimum(one, other).sum(-1) / (one + other).sum(-1).clamp_min(eps)
    if present is not None:
        both = present[:, [m for m, _ in pairs]] & present[:, [n for _, n in pairs]]
        ratio = torch.where(both, ratio, 0.0)
    return ratio.sum(-1)


def _refuse_same_rows(found: Wanted, names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> None:
    """Raise ControlError if a pair is the same tokens twice, as "cat" and "Cat" are: nothing keeps those apart."""
    for image, (m, n) in ((image, pair) for image in range(len(found.members)) for pair in pairs):
        if found.present[image, m] and torch.equal(found.members[image, m], found.members[image, n]):
            raise ControlError(
                f"Segregation cannot keep {names[m]!r} and {names[n]!r} apart: they are the same words of the prompt"
            )


@dataclass
class Trace:
    """What a control by gradients has done in one run.

    Attributes:
        losses: one (images,) tensor per update, before that update.
        skipped: (images,) updates not made because a gradient was not finite.
    """

    sites: tuple[Site, ...]
    wanted: Wanted
    pairs: tuple[tuple[int, int], ...]
    scale: Tensor  # (images,) of the losses, see `gradients`
    skipped: Tensor
    losses: list[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.losses:
            return "no update"
        first, last = (
            ", ".join(f"{value:.3g}" for value in losses.tolist()) for losses in (self.losses[0], self.losses[-1])
        )
        text = f"{len(self.losses)} updates at {len(self.sites)} sites, loss {first} -> {last}"
        return text + (f", skipped {self.skipped.tolist()}" if self.skipped.any() else "")


@dataclass(frozen=True, init=False)
class Segregation(Control):
    """Keeps the maps of phrases apart: before each step, the latents move down the gradient of `segregation_loss`.

    An image of a batch uses the phrases that its own prompt has. A noun and its adjective are not a pair unless you
    name both: of "a red car and a cat", say Segregation("car", "cat").

    Args:
        phrases: what to keep apart; every two of them are a pair. Or pairs, each a tuple of two phrases.
        strength: factor of the step; 0 does nothing at all.
        maps: how maps are prepared, see `phrase_maps`. "share" does not depend on how much attention words get at all,
            which differs between models, and leaves no word anything to win by fading.
        relative: length of an update as a share of the length of the latents; this too means the same in every model
            and sampler. None: Attend-and-Excite's step size, see `step_size`, which was made for SD 1.
        updates: how many updates at each step; each is an extra forward, as far as the last site, and its backward.
        keep_norm: give the latents back their length after each update.
        window: part of the schedule to act in, from 0 (noise) to 1 (picture): a step at f counts if start <= f < end.
        where: sites to read maps from. None: the cross sites of the coarsest grid with 192 cells; where there are no
            cross sites, the middle third of the joint ones.

    Raises:
        ControlError: a setting is out of its range.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has not even one pair.
        ControlError: at the pipeline call, if the phrases of a pair are the same words of a prompt.
    """

    phrases: tuple[str | tuple[str, str], ...]
    strength: float = 1.0
    maps: Preparation = "share"
    relative: float | None = 0.02
    updates: int = 1
    keep_norm: bool = False
    window: tuple[float, float] = (0.0, 1.0)
    where: Selection = None

    lane: ClassVar[Lane] = Lane.GRADIENT

    def __init__(
        self, *phrases: str | tuple[str, str], strength: float = 1.0, maps: Preparation = "share",
        relative: float | None = 0.02, updates: int = 1, keep_norm: bool = False,
        window: tuple[float, float] = (0.0, 1.0), where: Selection = None,
    ) -> None:  # fmt: skip
        settings: dict[str, Any] = locals()
        for one in fields(self):
            object.__setattr__(self, one.name, settings[one.name])
        pairs = self._pairs()
        if not pairs or any(len(set(pair)) != 2 for pair in pairs):
            raise ControlError("Segregation needs two phrases to keep apart, such as Segregation('cat', 'dog')")
        if not 0 <= strength < inf or (relative is not None and not 0 < relative < inf):
            raise ControlError(
                f"strength may not be negative and relative must be positive, both finite; not {strength}, {relative}"
            )
        if updates < 1:
            raise ControlError(f"updates must be at least 1, not {updates}; strength=0 switches Segregation off")
        if maps not in get_args(Preparation):
            raise ControlError(f"maps are prepared as one of {', '.join(get_args(Preparation))}; not {maps!r}")
        check_window(window)

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return with_text(available, default_sites(available) if self.where is None else self.where)

    def begin(self, run: Run) -> Trace:
        sites = self.sites(discover(run.pipe))
        if self.where is None:
            sites = coarsest(sites, run.latent_size)
        texts = [streams(run, image) for image in range(run.images)]
        names = list(dict.fromkeys(phrase for pair in self._pairs() for phrase in pair))
        pairs = tuple((names.index(one), names.index(other)) for one, other in self._pairs())
        found = wanted(texts, names, whole_prompt=self.maps == "attend-and-excite")
        for text, present in zip(texts, found.present.tolist(), strict=True):
            if not any(present[m] and present[n] for m, n in pairs):
                positions(text, names[present.index(False)])  # raises, and says what the prompt has instead
        _refuse_same_rows(found, names, pairs)
        ones, zeros = torch.ones(run.images), torch.zeros(run.images, dtype=torch.long)
        return Trace(sites, found, pairs, 2.0**12 * ones, zeros)

    def before_denoise(self, step: Step) -> None:
        if self.strength == 0 or not self.window[0] <= step.fraction < self.window[1]:
            return
        trace: Trace = step.run.state(self)
        start = step.latents
        trace.wanted, trace.scale = trace.wanted.to(start.device), trace.scale.to(start.device)
        z = start.detach().to(torch.promote_types(start.dtype, torch.float32))
        for _ in range(self.updates):
            z = self._update(step, trace, z)
        step.latents = z

    def _update(self, step: Step, trace: Trace, latents: Tensor) -> Tensor:
        """The latents after one step down, (images, ...) float32 or wider."""
        with torch.enable_grad():
            z = latents.clone().requires_grad_()
            tokens = read_maps(step, z, trace.sites, trace.wanted.tokens)
            maps = phrase_maps(tokens, trace.wanted, self.maps)
            losses = segregation_loss(maps, trace.pairs, trace.wanted.present)
            gradient, finite = gradients(losses, z, trace.scale)
        trace.losses.append(losses.detach())
        trace.skipped = trace.skipped.to(finite.device) + ~finite
        trace.scale = torch.where(finite, trace.scale, trace.scale / 16)  # half precision overflowed: be gentler
        if self.relative is not None:
            return descend(latents, gradient, self.strength * self.relative, True, self.keep_norm)
        size = step_size(step.run.start + step.index, step.run.schedule)
        return descend(latents, gradient, self.strength * size / step.scale**2, False, self.keep_norm)

    def _pairs(self) -> list[tuple[str, str]]:
        alone = [phrase for phrase in self.phrases if isinstance(phrase, str)]
        return [*combinations(alone, 2), *(pair for pair in self.phrases if not isinstance(pair, str))]
