"""Personalizer: learn several new things from one picture, each as a new word, without mixing them.

    pipe = attnctl.load("glyph-sd")
    learnt = Personalizer(pipe, "cat, car").learn(Image.open("mine.png"))
    learnt.save("mine")
    pipe("a <v1> cat and a red bowl").images[0]

DisenDiff (Zhang et al., CVPR 2024, arXiv 2403.18551): keys and values of cross-attention and one new word for each
thing are trained on one picture, while the attention maps of the words are calibrated, see `processors.calibration`.
What that means for joint attention is ours, see `pipelines.personalize.flow`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from attnctl.concepts import Concept, Learnt
from attnctl.errors import AttnctlWarning, ControlError
from attnctl.pipelines.personalize.accelerated import check_precision
from attnctl.pipelines.personalize.checkpoint import Checkpoints, about
from attnctl.pipelines.personalize.concepts import Encoders, read_concepts
from attnctl.pipelines.personalize.examples import Examples, Stage, encoded, regular_of, views_of
from attnctl.pipelines.personalize.files import learnt_of
from attnctl.pipelines.personalize.kinds import denoising_of
from attnctl.pipelines.personalize.masks import Found, given_masks, look, masks_from
from attnctl.pipelines.personalize.settings import Settings, settings_of
from attnctl.pipelines.personalize.trainer import Progress, Trainer
from attnctl.pipelines.personalize.views import squared

SHARED = 0.5


class Personalizer:
    """Learns concepts into a pipeline of SD 1, SD 2, SDXL, SD 3 or FLUX.1.

    Args:
        pipe: the pipeline, in float32. It is trained in place: when `learn` is done, its prompts know the new words.
        concepts: "cat, car", whose words are <v1> and <v2>, or with words of one's own "<rex>=dog, <kit>=cat".
        preset: "ours" or "paper", see `PRESETS`.
        settings: see `Settings`.

    Raises:
        ControlError: concepts or settings make no sense, or the pipeline is not in float32.
        UnsupportedPipelineError: it is of another family.
    """

    def __init__(
        self, pipe: Any, concepts: str | Iterable[str | Concept], preset: str = "ours", **settings: Any
    ) -> None:
        self.concepts = read_concepts(concepts)
        self.settings: Settings = settings_of(preset, **settings)
        self.denoising = denoising_of(pipe)
        if (dtype := self.denoising.model.dtype) != torch.float32:
            raise ControlError(f"the pipeline is in {str(dtype).removeprefix('torch.')}: load it in float32")
        check_precision(self.settings, self.denoising.model.device)
        if self.settings.contrast and len(self.concepts) < 2:
            raise ControlError("contrast keeps concepts apart, and there is one; set contrast to 0")
        self.pipe = pipe

    @property
    def side(self) -> int:
        """Of the pictures that are trained on, in pixels."""
        return self.denoising.side

    def learn(
        self,
        picture: Image.Image,
        watch: Callable[[Progress], None] | None = None,
        stage: Stage | None = None,
        folder: str | Path | None = None,
        resume: bool = False,
        every: int = 50,
        preview: Callable[[int], object] | None = None,
        masks: Mapping[str, Image.Image] | None = None,
        found: Callable[[Found], object] | None = None,
    ) -> Learnt:
        """Train.

        Args:
            picture: one picture with all the things in it.
            watch: told after each step.
            stage: told what is being prepared, how much of it is done, and how much there is.
            folder: where checkpoints are kept, in `training`, until the training is done; None keeps none.
            resume: go on from the latest checkpoint in `folder`, to the same weights as without a break; begin if there
                is none.
            every: how many steps lie between two checkpoints, and between two previews.
            preview: called with the number of steps done, while the pipeline draws with the words as they are by then.
            masks: noun or word -> where its thing is, a picture of the shape of `picture`, white or not transparent
                there; one for each thing. None: they are looked for, see `Settings.masks`.
            found: told which masks were found.

        Raises:
            ControlError: the training in `folder` was begun with something else, a file cannot be written, or masks
                make no sense.
            MaskError: the model cannot tell the things apart; the pipeline is as it was.

        Warns:
            AttnctlWarning: the model hardly finds a noun in the picture, or, without masks given, finds two of
                them in one place.
        """
        settings, tell = self.settings, stage or (lambda name, done, total: None)
        dice = torch.Generator().manual_seed(settings.seed)
        source = squared(picture, self.side)
        own = given_masks(masks, self.concepts, self.side, picture.size) if masks else None
        if settings.refresh and (own is not None or len(self.concepts) < 2):
            why = "yours stay as they are" if own is not None else "one concept has none"
            raise ControlError(f"refresh renews masks that the model found, and {why}; set refresh to 0")
        told = about(self.concepts, settings, picture, self.denoising.model, own)
        kept = Checkpoints(Path(folder), told) if folder else None
        ready = kept.prepared() if kept and resume else None
        views, regular = ready or self._prepared(source, own, tell, found)
        if kept and ready is None:
            kept.prepare(views, regular)
        encoders = Encoders(self.denoising.encoders, self.concepts, settings, dice)
        trainer = Trainer(self.denoising, self.concepts, encoders, settings, dice)
        trainer.prepare(views, regular)
        if kept and ready and (state := kept.state()) is not None:
            trainer.restore(state)
        else:
            for line in seen(self.concepts, trainer.look(views), self.denoising.faint, apart=own is None):
                warnings.warn(line, AttnctlWarning, stacklevel=2)
        while trainer.step < settings.steps:
            trainer.train(views, regular, min(settings.steps, trainer.step + every), watch)
            if kept:
                kept.keep(trainer.state())
            if preview and trainer.step < settings.steps:
                preview(trainer.step)
        learnt = learnt_of(trainer, trainer.before)
        return learnt if own is None else replace(learnt, settings=learnt.settings | {"masks": "given"})

    def _prepared(
        self, source: Image.Image, given: Tensor | None, tell: Stage, watch: Callable[[Found], object] | None
    ) -> tuple[Examples, Examples | None]:
        """Views of the square picture, and regular pictures."""
        settings, masks = self.settings, given
        if masks is None and settings.masks != "none" and len(self.concepts) > 1:
            tell("masks", 0, 1)
            latents = encoded(self.pipe, [source], lambda at: None)
            found = look(self.denoising, latents, [one.noun for one in self.concepts], settings.masks, settings.seed)
            told = masks_from(found, self.concepts, source)
            if watch is not None:
                watch(told)
            masks = told.masks
        views = views_of(self.pipe, source, self.concepts, settings, masks, tell)
        return views, regular_of(self.denoising, self.concepts, settings, tell) if settings.regular_rows else None


def seen(concepts: Sequence[Concept], maps: torch.Tensor, faint: float, apart: bool = True) -> list[str]:
    """What is wrong with the maps of the nouns before training, one line each.

    Args:
        concepts: what is to be learnt.
        maps: (concepts, height, width), probabilities.
        faint: below that nothing is found.
        apart: nouns should look at different places; not so where the caller gave masks.
    """
    lines = [
        f"the model hardly finds a {one.noun!r} in the picture (its map never exceeds {top:.3f}); another noun may do"
        for one, top in zip(concepts, maps.amax((1, 2)).tolist(), strict=True)
        if top < faint
    ]
    if not apart:
        return lines
    shares = maps / maps.sum((1, 2), keepdim=True).clamp_min(1e-12)
    for one, other in combinations(range(len(concepts)), 2):
        common = float(torch.minimum(shares[one], shares[other]).sum())
        if common > SHARED:
            names = f"{concepts[one].noun!r} and {concepts[other].noun!r}"
            lines.append(
                f"{names} look at the same place of the picture ({common:.0%} of their maps); other nouns may do better"
            )
    return lines
