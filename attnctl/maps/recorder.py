"""TokenMaps: the control that records which places of the picture look at which word."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.engine.control import AttentionCall, Control, Lane, Proceed, check_window
from attnctl.engine.run import NO_WORDS, Run
from attnctl.engine.sites import Selection, Site, with_text
from attnctl.errors import AttnctlWarning, ControlError
from attnctl.maps.probabilities import with_lse
from attnctl.maps.reader import KEEP, Kept, Maps
from attnctl.words.phrases import of_negative, streams


@dataclass(frozen=True, init=False)
class TokenMaps(Control):
    """Records how much each place of the picture attends to each word. The picture stays what it was, bit for bit.

    Probabilities are those of the softmax over all keys, averaged over heads, sites and steps, conditional rows only.
    What is recorded is the attention as this control sees it, so put it last to see what the other controls do.
    Costs little: at joint sites the model's own kernel already computes what each row's softmax is divided by.

    Args:
        phrases: which phrases to record; without any, every word of each prompt. Fewer are cheaper. "negative:blurry"
            is the "blurry" of the negative prompt, which the unconditional rows attend to.
        where: which sites, see `attnctl.select`; those without text keys are passed over.
        keep: what to keep apart instead of averaging: any of "step", "layer", "head"; a head is kept for its layer.
        window: part of the schedule to record, from 0 (noise) to 1 (picture): a step at f counts if start <= f < end.

    Raises:
        ControlError: a setting is out of its range.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if a phrase is in no prompt. Without phrases, embeddings whose words nobody
            told are a warning instead: there are no maps then.
    """

    phrases: tuple[str, ...] = ()
    where: Selection = None
    keep: tuple[Kept, ...] = ()
    window: tuple[float, float] = (0.0, 1.0)

    lane: ClassVar[Lane] = Lane.MAPS
    gives_maps: ClassVar[bool] = True

    def __init__(
        self,
        *phrases: str,
        where: Selection = None,
        keep: tuple[Kept, ...] | Kept = (),
        window: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if wrong := [one for one in phrases if not isinstance(one, str)]:
            raise ControlError(
                f"TokenMaps takes phrases one after the other, as TokenMaps('cat', 'dog'); not {wrong[0]!r}"
            )
        kept = (keep,) if isinstance(keep, str) else tuple(keep)
        for name, value in (("phrases", phrases), ("where", where), ("keep", kept), ("window", tuple(window))):
            object.__setattr__(self, name, value)
        if unknown := [one for one in self.keep if one not in KEEP]:
            raise ControlError(f"TokenMaps cannot keep {unknown[0]!r}; it keeps any of {', '.join(KEEP)}")
        check_window(self.window)

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return with_text(available, self.where)

    def begin(self, run: Run) -> Maps:
        images = range(run.images)
        if not self.phrases and "prompt" not in run.texts:
            warnings.warn(f"there are no maps: {NO_WORDS}", AttnctlWarning, stacklevel=2)
            return Maps([()] * run.images, None, self.keep)
        negative = None
        if any(of_negative(phrase) is not None for phrase in self.phrases):
            negative = [streams(run, image, negative=True) for image in images]
        return Maps([streams(run, image) for image in images], self.phrases or None, self.keep, negative)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        maps: Maps = call.step.run.state(self)
        rows = call.step.rows
        own = [(part, where) for part, where in ((maps, rows.cond), (maps.negative, rows.uncond)) if part and where]
        if not own or not self.window[0] <= call.step.fraction < self.window[1]:
            return proceed(call)
        out, lse = with_lse(call, proceed)
        with torch.no_grad():
            for part, where in own:
                part.add(call, where, lse)
        return out
