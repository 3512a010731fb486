"""Personalizer: learn several new things from one picture, each as a new word, without mixing them.

    pipe = attnctl.load("glyph-sd")
    learnt = Personalizer(pipe, "cat, car").learn(Image.open("mine.png"))
    learnt.save("mine")
    pipe("a <v1> cat and a red bowl").images[0]

DisenDiff (Zhang et al., CVPR 2024, arXiv 2403.18551): keys and values of cross-attention and one new word for each
thing are trained on one picture, while the attention maps of the words are calibrated, see `processors.calibration`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnctl.concepts import Concept, Learnt
from attnctl.engine.families.registry import family_of
from attnctl.errors import AttnctlWarning, ControlError, UnsupportedPipelineError
from attnctl.pipelines.personalize.checkpoint import Checkpoints, about
from attnctl.pipelines.personalize.concepts import Encoders, caption, read_concepts
from attnctl.pipelines.personalize.files import learnt_of
from attnctl.pipelines.personalize.settings import Settings, settings_of
from attnctl.pipelines.personalize.trainer import Examples, Progress, Trainer
from attnctl.pipelines.personalize.views import make_views, pixels, squared

Stage = Callable[[str, int, int], None]

FAINT, SHARED = 0.05, 0.5  # glyph-sd gives things it sees 0.2 to 0.4, and things that are not there 0.03 to 0.05


class Personalizer:
    """Learns concepts into a pipeline of SD 1, SD 2 or SDXL.

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
        family, model = family_of(pipe)
        if family.denoiser != "unet":
            raise UnsupportedPipelineError(f"concepts are learnt by SD 1, SD 2 and SDXL, not by {family.name}")
        if model.dtype != torch.float32:
            raise ControlError(f"the pipeline is in {str(model.dtype).removeprefix('torch.')}: load it in float32")
        self.pipe = pipe

    @property
    def side(self) -> int:
        """Of the pictures that are trained on, in pixels."""
        size = self.pipe.unet.config.sample_size
        return int(size if isinstance(size, int) else size[0]) * int(self.pipe.vae_scale_factor)

    def learn(
        self,
        picture: Image.Image,
        watch: Callable[[Progress], None] | None = None,
        stage: Stage | None = None,
        folder: str | Path | None = None,
        resume: bool = False,
        every: int = 50,
        preview: Callable[[int], object] | None = None,
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

        Raises:
            ControlError: the training in `folder` was begun with something else, or a file cannot be written.

        Warns:
            AttnctlWarning: the model hardly finds a noun in the picture, or finds two of them in one place.
        """
        settings, tell = self.settings, stage or (lambda name, done, total: None)
        dice = torch.Generator().manual_seed(settings.seed)
        kept = Checkpoints(Path(folder), about(self.concepts, settings, picture, self.pipe)) if folder else None
        found = kept.prepared() if kept and resume else None
        views, regular = found or (self._views(picture, tell), self._regular(tell) if settings.regular_rows else None)
        if kept and found is None:
            kept.prepare(views, regular)
        encoders = Encoders(self.pipe, self.concepts, settings, dice)
        before = {name: p.detach().clone() for name, p in _keys_and_values(self.pipe.unet).items()}
        trainer = Trainer(self.pipe, self.concepts, encoders, settings, dice)
        if kept and found and (state := kept.state()) is not None:
            trainer.restore(state)
        else:
            for line in seen(self.concepts, trainer.look(views)):
                warnings.warn(line, AttnctlWarning, stacklevel=2)
        while trainer.step < settings.steps:
            trainer.train(views, regular, min(settings.steps, trainer.step + every), watch)
            if kept:
                kept.keep(trainer.state())
            if preview and trainer.step < settings.steps:
                preview(trainer.step)
        return learnt_of(trainer, before)

    @torch.no_grad()
    def _views(self, picture: Image.Image, tell: Stage) -> Examples:
        """The views of the picture, through the autoencoder."""
        settings, vae, side = self.settings, self.pipe.vae, self.side
        source = squared(picture, side)
        views = make_views(settings.views, settings.view_count, side, np.random.default_rng(settings.seed))
        latents = []
        for at in range(0, len(views), 8):
            tell("views of the picture", at, len(views))
            some = pixels([view.picture(source, side) for view in views[at : at + 8]])
            latents.append(vae.encode(some.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu())
        scaled = torch.cat(latents) * vae.config.scaling_factor
        spoken = caption([one.phrase for one in self.concepts], settings)
        valid = torch.stack([view.valid(scaled.shape[-1]) for view in views])
        return Examples(scaled, valid, [view.prefix + spoken for view in views])

    @torch.no_grad()
    def _regular(self, tell: Stage) -> Examples:
        """Pictures of the nouns, half of them of all together, drawn by the model as it is (prior preservation)."""
        settings = self.settings
        nouns = [one.noun for one in self.concepts]
        count, latents, captions = settings.regular, [], list[str]()
        for number in range(count):
            alone = number % 2 and len(nouns) > 1
            captions.append(caption([nouns[number // 2 % len(nouns)]] if alone else nouns, settings))
        for at in range(0, count, 4):
            tell("regular pictures", at, count)
            some = captions[at : at + 4]
            seeds = [torch.Generator().manual_seed(1000 * settings.seed + at + k) for k in range(len(some))]
            latents.append(self._draw(some, seeds).float().cpu())
        found = torch.cat(latents)
        return Examples(found, torch.ones(count, *found.shape[-2:]), captions)

    def _draw(self, prompts: list[str], seeds: list[torch.Generator]) -> Any:
        """Latents of pictures, at low guidance and in few steps: they keep what the model knows; none will see them."""
        bar = getattr(self.pipe, "_progress_bar_config", {})
        self.pipe.set_progress_bar_config(**{**bar, "disable": True})
        try:
            return self.pipe(
                prompts, num_inference_steps=20, guidance_scale=3.0, generator=seeds, output_type="latent"
            ).images
        finally:
            self.pipe.set_progress_bar_config(**{"disable": False, **bar})


def seen(concepts: Sequence[Concept], maps: torch.Tensor) -> list[str]:
    """What is wrong with the maps of the nouns before training, one line each.

    Args:
        concepts: what is to be learnt.
        maps: (concepts, height, width), probabilities.
    """
    lines = [
        f"the model hardly finds a {one.noun!r} in the picture (its map never exceeds {top:.3f}); another noun may do"
        for one, top in zip(concepts, maps.amax((1, 2)).tolist(), strict=True)
        if top < FAINT
    ]
    shares = maps / maps.sum((1, 2), keepdim=True).clamp_min(1e-12)
    for one, other in combinations(range(len(concepts)), 2):
        common = float(torch.minimum(shares[one], shares[other]).sum())
        if common > SHARED:
            names = f"{concepts[one].noun!r} and {concepts[other].noun!r}"
            lines.append(f"{names} look at the same place of the picture ({common:.0%} of their maps); use other nouns")
    return lines


def _keys_and_values(unet: Any) -> dict[str, torch.nn.Parameter]:
    """Weights of the keys and values of cross-attention, by name."""
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {name: p for name, p in unet.named_parameters() if name.endswith(ends)}
