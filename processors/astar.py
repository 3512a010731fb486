"""A-STAR: segregation and retention together, in one gradient.

A-STAR: Test-time Attention Segregation and Retention (Agarwal et al., ICCV 2023, arXiv 2306.14544), equation 4.

What is ours: the paper acts on every picture and at every step; we by default leave alone what a look ahead finds
complete and guide the early steps of the rest, with little retention. What the paper leaves open (size of a step,
sites, preparation of maps, how a mask is made) is a setting each. `AStar(..., preset="paper")` is as near to it as its
text allows.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any, ClassVar

from attnctl.engine.run import Step
from attnctl.errors import ControlError
from attnctl.processors.latents.descent import MapDescent, check_phrases, phrases_first
from attnctl.processors.latents.loss_terms import Loss
from attnctl.processors.latents.masks import Rule
from attnctl.regions import named_regions

from .binding import Bind, Bond, bonds_of, ends
from .retention import RULE, SHARE, Keep, Masks, check_rule
from .segregation import PRESETS as SEGREGATION
from .segregation import USUAL_PEAK, Apart, every_pair

PRESETS: dict[str, dict[str, Any]] = {
    **SEGREGATION,
    "paper": {**SEGREGATION["paper"], "rule": "half", "retention": 1.0},
}
"""Those of `Segregation`; as in the paper, retention has the weight 1. Its masks are where a map has half its peak."""


@phrases_first
class AStar(MapDescent):
    """Keeps things apart and each in its place: A-STAR, segregation and retention in one gradient, with binding.

    Segregation and Retention attached side by side would make two updates a step, each with a forward of its own.

    Args:
        phrases: the things of the picture, best with their colours, as "red car"; every two are kept apart, except a
            noun and its own modifier.
        bonds: modifiers and their nouns, such as ("red car",), see `Binding`: adds its loss (not in the paper).
        masks: regions for phrases, see `Retention`.
        rule, share: how masks are made of maps, see `Retention`.
        segregation, retention, binding: weights of the losses, not negative; at 0 a loss is left out. The paper has 1
            and 1; with so little retention, things change their size least (ours).
            binding None: 0.5, or 0.03 where there are masks, because it knows no bound and would drown them.
        placing: weight of retention for phrases with a region, which the paper does not set apart (ours). A picture
            with a region is never left alone, whatever a look ahead sees.
        look_ahead, peak_target, window: as for `MapDescent`; by default a look ahead of 2 steps for 0.3, and the early
            steps, or all steps if there are masks.
        preset: "thorough", "always", "down" or "paper", see `PRESETS`; settings beside it come first. It is not kept:
            the other settings hold what it stands for.

    The other settings are those of `MapDescent`.

    Raises:
        ControlError: a setting is out of its range.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has none of them.
    """

    phrases: tuple[str, ...]
    bonds: tuple[Bond, ...] = ()
    masks: Masks = ()
    rule: Rule = RULE
    share: float = SHARE
    segregation: float = 1.0
    retention: float = 0.03
    binding: float | None = None
    placing: float = 3.0
    look_ahead: int = 2
    window: tuple[float, float] | None = None
    preset: str | None = None

    usual_peak: ClassVar[float | None] = USUAL_PEAK
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def check(self) -> None:
        self._set(bonds=bonds_of(self.bonds), masks=named_regions(self.masks))
        check_phrases("AStar", self.phrases, 2, "AStar('cat', 'dog')")
        check_rule(self.rule, self.share)
        if self.binding is None:
            self._set(binding=0.03 if self.masks else 0.5)
        weights = {name: getattr(self, name) for name in ("segregation", "retention", "binding", "placing")}
        said = ", ".join(f"{name} {weight}" for name, weight in weights.items())
        if not all(isinstance(weight, (int, float)) and 0 <= weight < inf for weight in weights.values()):
            raise ControlError(f"weights are numbers, not negative; they are {said}")
        self.losses()  # raises if there are none
        super().check()

    def acts(self, step: Step) -> bool:
        return (self.window is None and bool(self.masks and self.placing)) or super().acts(step)

    def losses(self) -> list[Loss]:
        found: list[Loss] = []
        bonds = [ends(bond) for bond in self.bonds]
        if self.segregation and every_pair(self.phrases, bonds):
            found.append(Apart(self.phrases, bonds, self.segregation))
        if self.retention or (self.masks and self.placing):
            placed = (*self.phrases, *(phrase for phrase, _ in self.masks))
            found.append(Keep(placed, self.masks, self.rule, self.share, self.retention, self.placing))
        if self.binding and self.bonds:
            found.append(Bind(self.bonds, self.binding))
        if not found:
            raise ControlError("AStar has nothing to do: what has a weight has neither pairs, masks nor bonds")
        return found
