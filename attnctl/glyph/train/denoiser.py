"""What the trainings of both denoisers share: scenes, dropped captions, reports, and the folder that ships."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from attnctl import attach
from attnctl.app.recipe import modules_hash
from attnctl.engine.attachment import Attachment
from attnctl.glyph.scenes import SIDE
from attnctl.glyph.tokenizer import build_tokenizer
from attnctl.glyph.train.autoencoder import sheet
from attnctl.glyph.train.composed import Composer
from attnctl.glyph.train.encoded import source
from attnctl.glyph.train.explicit import Explicit
from attnctl.glyph.train.grounding import GRID, MapScore, owners
from attnctl.glyph.train.loop import Losses
from attnctl.loading import ModelError, load, load_autoencoder

PROMPTS = (
    "a cat", "a red car", "a black bench", "a purple apple",
    "a cat and a dog", "a bear and a mouse", "a lion and a frog", "a horse and a turtle",
    "a bird and a yellow suitcase", "a monkey with a crown",
    "a green chair and a pink bowl", "a red balloon and a blue bow",
)  # fmt: skip
"""What the report pictures while training."""


class Denoiser(ABC):
    """A `Task` of the loop. Captions are dropped in one row of ten; a grounding loss holds words to their things.

    composer: makes new scenes at every step; without it, `scenes` of them are drawn once and kept in `cache`.
    weights: of concepts that are to be seen more often than others (1); a composer has its own.
    start: a pipeline that an earlier training wrote, to go on from its weights with new scenes and other settings.

    Raises:
        ModelError: `vae` makes latents of another size, or `start` is another kind of pipeline or has another
            autoencoder.
    """

    name: ClassVar[str]  # of the folder that is written
    guidance: ClassVar[float]  # of the report's pictures
    rows: ClassVar[int]  # of a step, where the caller does not say
    explicit: Explicit
    network: Any

    def __init__(
        self,
        vae: Path,
        scenes: int,
        seed: int,
        device: str,
        cache: Path,
        grounding: float = 0.05,
        batch: int | None = None,
        composer: Composer | None = None,
        weights: Mapping[str, float] = {},  # noqa: B006
        start: Path | None = None,
    ) -> None:
        batch = batch or self.rows
        self.vae: AutoencoderKL = load_autoencoder(vae).to(device).eval().requires_grad_(False)
        if (cells := SIDE // 2 ** (len(self.vae.config.block_out_channels) - 1)) != GRID:
            raise ModelError(f"{vae} makes latents of {cells} x {cells} from a scene; {GRID} x {GRID} are wanted")
        self.device, self.grounding, self.batch = device, grounding, batch
        self.made_by: dict[str, Any] = {
            "steps": 0,
            "batch": batch,
            "scenes": scenes,
            "seed": seed,
            "grounding": grounding,
        }
        if weights:
            self.made_by["weights"] = dict(weights)
        self.tokenizer = build_tokenizer()
        self.empty = owners(self.tokenizer, [""])[0].to(device)
        torch.manual_seed(seed)
        self.build()
        if start is not None:
            self._take(start)
        self.source = source(self.vae, self.tokenizer, scenes, seed, cache, composer, weights)

    def _take(self, folder: Path) -> None:
        """The weights of a pipeline of this kind, and how they were made."""
        theirs, ours = load(folder.absolute()), self.pipeline(self.network)
        if type(theirs) is not type(ours):
            raise ModelError(f"{folder} is a {type(theirs).__name__}; {self.name} is a {type(ours).__name__}")
        if modules_hash({"vae": theirs.vae}) != modules_hash({"vae": self.vae}):
            raise ModelError(f"{folder} has another autoencoder than --vae: its weights draw other latents")
        for name, module in ours.components.items():
            if name != "vae" and isinstance(module, nn.Module):
                module.load_state_dict(getattr(theirs, name).float().state_dict())
        self.made_by["after"] = json.loads((folder / "training.json").read_text())

    @abstractmethod
    def build(self) -> None:
        """Makes `network`, with new weights, and `explicit`."""

    @abstractmethod
    def loss(self, step: int, rng: torch.Generator) -> Losses:
        """See `Task`."""

    @abstractmethod
    def pipeline(self, network: Any) -> Any:
        """The pipeline around a network, as it draws."""

    @abstractmethod
    def map_scores(self, pipe: Any) -> dict[int, MapScore]:
        """The map test."""

    @cached_property
    def attached(self) -> Attachment:
        """Attached at the first loss, when the loop has copied the network for its average."""
        return attach(self.pipeline(self.network), self.explicit)

    def dropped(self, rows: dict[str, Tensor], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Token ids and owners, (batch, 77), with the captions of one row in ten left out."""
        dropped = (torch.rand(self.batch, generator=rng) < 0.1).to(self.device)
        ids = torch.where(dropped[:, None], self.empty, rows["ids"].long())
        return ids, rows["owner"].long().masked_fill(dropped[:, None], -1)

    def report(self, network: Any, folder: Path, step: int) -> str:
        """Draws `PROMPTS` and tests the maps."""
        self.made_by["steps"] = step
        pipe = self.pipeline(network)
        seeds = [torch.Generator().manual_seed(k) for k in range(len(PROMPTS))]
        settings = {"num_inference_steps": 20, "guidance_scale": self.guidance, "generator": seeds}
        images = pipe(list(PROMPTS), **settings, output_type="np").images
        sheet((images * 255).round().astype(np.uint8), 4).save(folder / f"report-{step:06d}.png")
        return "pointing / own share " + ", ".join(
            f"t={t}: {score.pointing:.1%} / {score.share:.2f}" for t, score in self.map_scores(pipe).items()
        )

    def export(self, network: Any, folder: Path) -> None:
        """Writes the pipeline, in half precision, and how it was made."""
        self.vae.register_to_config(_name_or_path=self.name)  # not the folder of the machine it was trained on
        self.pipeline(network.to("cpu")).to(torch.float16).save_pretrained(folder / self.name)
        (folder / self.name / "training.json").write_text(json.dumps(self.made_by, indent=1) + "\n")
