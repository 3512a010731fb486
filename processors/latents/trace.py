"""Trace: what a control by gradients has done in one run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from attnctl.engine.sites import Site
from attnctl.processors.latents.map_gradient import PhraseTokens

from .loss_terms import Loss


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One extra forward.

    Attributes:
        step: denoiser call, from 0.
        images: which images it ran, by number.
        parts: loss -> (images, parts), each less the least it can be; NaN where an image has no such part.
        excess: (images,), the sum of all losses, weighted, less the least it can be.
        peaks: (images,), the highest probability with which a place looks at a phrase, mean over its words, of the
            phrase where it is least.
    """

    step: int
    images: tuple[int, ...]
    parts: dict[str, Tensor]
    excess: Tensor
    peaks: Tensor


@dataclass(frozen=True, eq=False)
class Update:
    """One step of the latents.

    Attributes:
        step: denoiser call, from 0.
        images: which images were to move, by number.
        losses: (all images,), the excess before; NaN for those that were not to move.
        share: (images,), length of the update as a share of the length of the latents; 0 where it was skipped.
    """

    step: int
    images: tuple[int, ...]
    losses: Tensor
    share: Tensor


@dataclass(frozen=True, eq=False)
class Foreseen:
    """What a look ahead found.

    Attributes:
        step: denoiser call before which it was, from 0.
        peaks: (all images,), as for `Evaluation`, where plain drawing leads; NaN where nobody looked.
        forwards: of the denoiser that it cost.
        alone: images that are left alone, by number, since every phrase met its target.
    """

    step: int
    peaks: Tensor
    forwards: int
    alone: tuple[int, ...] = ()


@dataclass(eq=False)
class DescentTrace:
    """What a control by gradients has done in one run. Losses are less the least they can be.

    Attributes:
        sites: where maps were read.
        phrase_tokens: which tokens.
        terms: the losses.
        images: which images the control acts on, by number.
        always: (all images,), True where an image is always updated, see `Loss.always`.
        scale: (images,), of the losses on their way through the model, see `map_gradient.gradients`.
        skipped: (images,), gradients that were not finite; their updates were not made.
        foreseen: what a look ahead found, if there was one.
    """

    sites: tuple[Site, ...]
    phrase_tokens: PhraseTokens
    terms: list[Loss]
    images: tuple[int, ...]
    always: Tensor
    scale: Tensor
    skipped: Tensor
    evaluations: list[Evaluation] = field(default_factory=list)
    updates: list[Update] = field(default_factory=list)
    foreseen: Foreseen | None = None

    @property
    def losses(self) -> list[Tensor]:
        """One (images,) tensor per update, before that update; NaN for images that were left out."""
        return [update.losses for update in self.updates]

    def to(self, device: torch.device) -> None:
        """What the loop works with, onto a device."""
        self.phrase_tokens = self.phrase_tokens.to(device)
        self.scale, self.skipped = self.scale.to(device), self.skipped.to(device)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: for each step its evaluations and updates. Values per image; None is a value that is not there.

        `forwards` counts extra forwards with gradients, `image_forwards` the images in them; a look ahead, whose
        forwards are plain, counts its own.
        """
        labels = {term.name: list(term.labels) for term in self.terms}

        def evaluation(one: Evaluation) -> dict[str, Any]:
            losses = {
                name: {label: _plain(values[:, k]) for k, label in enumerate(labels[name])}
                for name, values in one.parts.items()
            }
            return {
                "images": list(one.images),
                "losses": losses,
                "total": _plain(one.excess),
                "peaks": _plain(one.peaks),
            }

        def update(one: Update) -> dict[str, Any]:
            return {"images": list(one.images), "share": _plain(one.share)}

        updates = {step: [update(one) for one in same] for step, same in groupby(self.updates, lambda one: one.step)}
        steps = [
            {"step": step, "evaluations": [evaluation(one) for one in same], "updates": updates.get(step, [])}
            for step, same in groupby(self.evaluations, lambda one: one.step)
        ]
        ahead = self.foreseen
        return {
            "sites": [site.name for site in self.sites],
            "look_ahead": None
            if ahead is None
            else {
                "step": ahead.step,
                "peaks": _plain(ahead.peaks),
                "forwards": ahead.forwards,
                "left_alone": list(ahead.alone),
            },
            "forwards": len(self.evaluations),
            "image_forwards": sum(len(one.images) for one in self.evaluations),
            "updates": len(self.updates),
            "skipped": self.skipped.tolist(),
            "steps": steps,
        }

    def __str__(self) -> str:
        if not self.updates:
            return "no update" if self.foreseen is None else "no update, since a look ahead finds all phrases"
        first, last = (
            ", ".join(f"{value:.3g}" for value in one.losses.tolist()) for one in (self.updates[0], self.updates[-1])
        )
        text = f"{len(self.updates)} updates at {len(self.sites)} sites, loss {first} -> {last}"
        if self.foreseen is not None and self.foreseen.alone:
            text += f", image {', '.join(map(str, self.foreseen.alone))} left alone"
        return text + (f", skipped {self.skipped.tolist()}" if self.skipped.any() else "")


def _plain(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
