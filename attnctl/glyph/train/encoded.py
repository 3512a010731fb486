"""Scenes as a denoiser is trained on them: latents, token ids, which thing each word speaks of, and masks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from attnctl.glyph.scenes import Renderer, Scene
from attnctl.glyph.train.autoencoder import pixels
from attnctl.glyph.train.composed import Composer
from attnctl.glyph.train.grounding import coverage, owners
from attnctl.glyph.words import CONCEPTS


def _batches(scenes: int, seed: int, size: int = 64) -> Iterator[list[Scene]]:
    render = Renderer(stream=3)
    for first in track(range(0, scenes, size), description="drawing and encoding scenes"):
        yield [render.scene(seed * 10_000_000 + k) for k in range(first, min(first + size, scenes))]


@torch.no_grad()
def encode(vae: AutoencoderKL, tokenizer: CLIPTokenizer, scenes: list[Scene]) -> dict[str, Tensor]:
    """Scaled latents (n, c, 16, 16), token ids and owners (n, 77), masks (n, 3, 16, 16); on the CPU, in small types."""
    images = pixels(np.stack([scene.image for scene in scenes])).to(vae.device)
    latents = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
    ids, owner = owners(tokenizer, [scene.caption for scene in scenes])
    masks = torch.stack([coverage(scene) for scene in scenes])
    latents = latents.half().cpu().contiguous()
    return {"latents": latents, "ids": ids.short(), "owner": owner.to(torch.int8), "masks": masks.half()}


def encoded_scenes(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, scenes: int, seed: int, cache: Path
) -> dict[str, Tensor]:
    """All training scenes of a seed, `encode`d; kept in the folder `cache`, as drawing takes minutes."""
    file = cache / f"scenes-{scenes}-{seed}.safetensors"
    if not file.exists():
        with torch.autocast(vae.device.type, torch.bfloat16):  # four times as fast, and 1 % off
            parts = [encode(vae, tokenizer, batch) for batch in _batches(scenes, seed)]
        cache.mkdir(parents=True, exist_ok=True)
        save_file({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, file)
    return load_file(file)


class Source(Protocol):
    """Where a denoiser's training rows come from."""

    def rows(self, count: int, rng: torch.Generator) -> tuple[dict[str, Tensor], list[str]]:
        """As `encode` gives them, on the training device, and their captions."""


@dataclass(frozen=True, eq=False)
class Stored:
    """Rows of scenes that were drawn and encoded beforehand.

    weights: (scenes,) how often each is taken, in proportion; None takes all alike.
    """

    data: dict[str, Tensor]
    captions: list[str]
    device: str
    weights: Tensor | None = None

    def rows(self, count: int, rng: torch.Generator) -> tuple[dict[str, Tensor], list[str]]:
        if self.weights is None:
            which = torch.randint(len(self.captions), (count,), generator=rng)
        else:
            which = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        rows = {key: value[which].to(self.device) for key, value in self.data.items()}
        return rows, [self.captions[k] for k in which.tolist()]


@dataclass(frozen=True, eq=False)
class Fresh:
    """Rows of new scenes at every step, composed and encoded on the training device."""

    composer: Composer
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer

    @torch.no_grad()
    def rows(self, count: int, rng: torch.Generator) -> tuple[dict[str, Tensor], list[str]]:
        scenes = self.composer.draw(count, rng)
        with torch.autocast(self.vae.device.type, torch.bfloat16):
            latents = self.vae.encode(scenes.images).latent_dist.mode() * self.vae.config.scaling_factor
        ids, owner = owners(self.tokenizer, scenes.captions)
        device = self.vae.device
        rows = {"latents": latents, "ids": ids.to(device), "owner": owner.to(device), "masks": scenes.masks}
        return rows, scenes.captions


def scene_weights(captions: Sequence[str], weights: Mapping[str, float]) -> Tensor:
    """(captions,) the largest weight of the concepts that a caption names; 1 for concepts without one."""
    named = [max(weights.get(word, 1.0) for word in caption.split() if word in CONCEPTS) for caption in captions]
    return torch.tensor(named)


def source(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    scenes: int,
    seed: int,
    cache: Path,
    composer: Composer | None,
    weights: Mapping[str, float],
) -> Source:
    """Fresh scenes where there is a composer, else `scenes` of them, drawn once and taken by `scene_weights`."""
    if composer is not None:
        return Fresh(composer, vae, tokenizer)
    data = encoded_scenes(vae, tokenizer, scenes, seed, cache)
    captions = tokenizer.batch_decode(data["ids"].long(), skip_special_tokens=True)
    return Stored(data, captions, str(vae.device), scene_weights(captions, weights) if weights else None)
