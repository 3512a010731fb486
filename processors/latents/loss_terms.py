"""Loss: what a method asks of maps during one run, on top of the plain functions of its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from attnctl.engine.run import Run
from attnctl.processors.latents.map_gradient import PhraseTokens, Preparation
from attnctl.words.phrases import TextStream


@dataclass(frozen=True)
class View:
    """What a loss sees: the maps of some images in one extra forward.

    Attributes:
        maps: (images, phrases, height, width), prepared.
        tokens: (images, tokens, height, width), probabilities, those of `PhraseTokens.tokens`.
        images: which images of the run these are, by number.
        preparation: how `maps` were prepared.
    """

    maps: Tensor
    tokens: Tensor
    images: list[int]
    preparation: Preparation


@dataclass(frozen=True)
class Reading:
    """A loss read once.

    Attributes:
        total: (images,), with its gradient.
        floor: (images,), the least it can be.
        parts: (images, parts) less the least each can be, without gradient; NaN where an image has no such part.
    """

    total: Tensor
    floor: Tensor
    parts: Tensor


class Loss:
    """One loss in one run.

    Attributes:
        name: of the method, for reports.
        least: what each part is at least.
        whole_prompt: it reads the maps of every token of the prompts.
        phrases: those it reads.
        labels: names of its parts, for reports.
        always: (images,), True for images that are updated whatever a look ahead finds; set by `begin`. False: none.
    """

    name: ClassVar[str]
    least: ClassVar[float] = 0.0
    whole_prompt: ClassVar[bool] = False
    labels: tuple[str, ...]
    always: Tensor | Literal[False] = False

    def __init__(self, phrases: Sequence[str], weight: float = 1.0) -> None:
        self.phrases = tuple(dict.fromkeys(phrases))
        self.weight: float | Tensor = weight  # one for all parts, or one for each

    def begin(
        self, run: Run, names: tuple[str, ...], texts: Sequence[tuple[TextStream, ...]], found: PhraseTokens
    ) -> Tensor:
        """Learn where things are: maps come in the order of `names`.

        Returns:
            (images,) bool: there is something to do for the image.
        """
        raise NotImplementedError

    def begin_step(self, index: int) -> None:
        """A denoiser call begins."""

    def parts(self, view: View) -> tuple[Tensor, Tensor]:
        """(values, which of them count), each (images, parts); what does not count is 0 and has no gradient."""
        raise NotImplementedError

    def total(self, parts: Tensor) -> Tensor:
        """(images, parts) -> (images,)."""
        return parts.sum(-1)

    def read(self, view: View) -> Reading:
        """Work out the loss, weighted; the parts of a report are not."""
        values, counts = self.parts(view)
        weight = torch.as_tensor(self.weight).to(values)
        floor = (weight * self.least * counts).sum(-1)
        parts = torch.where(counts, values.detach() - self.least, torch.nan)
        return Reading(self.total(weight * values), floor, parts)


class OfPairs(Loss):
    """A loss whose parts are pairs of phrases."""

    def __init__(self, pairs: Sequence[tuple[str, str]], weight: float = 1.0) -> None:
        super().__init__([phrase for pair in pairs for phrase in pair], weight)
        self.named = tuple(pairs)
        self.labels = tuple(" | ".join(pair) for pair in pairs)

    def begin(
        self, run: Run, names: tuple[str, ...], texts: Sequence[tuple[TextStream, ...]], found: PhraseTokens
    ) -> Tensor:
        self.pairs = [(names.index(one), names.index(other)) for one, other in self.named]
        first, second = zip(*self.pairs, strict=True)
        self.present = found.present[:, first] & found.present[:, second]  # (images, pairs)
        return self.present.any(-1)


class OfPhrases(Loss):
    """A loss whose parts are phrases; one that is part of a longer one does not count."""

    def begin(
        self, run: Run, names: tuple[str, ...], texts: Sequence[tuple[TextStream, ...]], found: PhraseTokens
    ) -> Tensor:
        self.labels = self.phrases
        self.columns = [names.index(phrase) for phrase in self.phrases]
        self.present = found.whole(self.columns)
        return self.present.any(-1)
