"""What is special to a kind of model when it is trained: how rows are noised, what it predicts, and what is tuned.

`Denoising` is what the rest of a personalisation asks of a model; there is one class for each kind, see `kinds.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnctl.concepts import ENCODERS
from attnctl.engine.sites import Kind
from attnctl.errors import ControlError, UnsupportedPipelineError

Pair = tuple[Any, Any]  # tokenizer, text encoder


class Denoising(ABC):
    """One pipeline whose denoiser is trained.

    Attributes:
        pipe: the pipeline.
        model: its denoiser.
        family: its family, see `attnctl.concepts.ENCODERS`.
        part: the pipeline's name of it.
        ends: how the names of modules end that make keys and values of the text.
        reads: the kind of sites at which pictures attend to text.
        own: the kind of sites at which pictures attend to themselves.
        rows: how many rows of text T5 makes; None: there is no T5.
        starts: the text that the blocks read has a start token.
        packed: how many latent cells one token holds, where the pipeline packs them.
        faint: a noun whose map never exceeds that is not found in the picture.
    """

    family: ClassVar[str]
    part: ClassVar[str]
    ends: ClassVar[tuple[str, ...]]
    reads: ClassVar[Kind]
    own: ClassVar[Kind]
    rows: ClassVar[int | None] = None
    starts: ClassVar[bool] = True
    packed: ClassVar[int] = 1
    faint: ClassVar[float] = 0.05  # glyph-sd gives things it sees 0.2 to 0.4, and others 0.03 to 0.05

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.model = pipe, getattr(pipe, self.part)

    @property
    def count(self) -> int:
        """How many text encoders read a word: all that the family has."""
        return len(ENCODERS[self.family])

    @property
    def encoders(self) -> list[Pair]:
        """(tokenizer, text encoder), in the order in which a word's rows are kept.

        Raises:
            UnsupportedPipelineError: one is missing, so no word can be learnt.
        """
        pipe, ends = self.pipe, [*ENCODERS[self.family]][: self.count]
        found = [(getattr(pipe, f"tokenizer{end}"), getattr(pipe, f"text_encoder{end}")) for end in ends]
        if any(part is None for pair in found for part in pair):
            raise UnsupportedPipelineError(f"{type(pipe).__name__} lacks a text encoder, so it can learn no word")
        return found

    @abstractmethod
    def text(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """The arguments of the denoiser that come from captions, with the gradient of what the encoders look up.

        Args:
            captions: one for each row.
            size: (height, width) of the pictures in pixels.
        """

    @abstractmethod
    def padding(self, captions: Sequence[str]) -> Tensor:
        """(captions, text rows) bool: which rows of the text that the blocks read come after the end of a caption."""

    @abstractmethod
    def times(self, shares: Tensor) -> Tensor:
        """Where in the schedule rows are: shares from 0, the picture, to 1, noise -> what `predict` takes."""

    @abstractmethod
    def predict(
        self, latents: Tensor, times: Tensor, dice: torch.Generator, text: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """What the model predicts from noised latents, and what it should have.

        Args:
            latents: (rows, channels, height, width).
            times: (rows,), see `times`.
            dice: where the noise comes from.
            text: see `text`.
        """

    @abstractmethod
    def weight(self, times: Tensor, gamma: float | None) -> Tensor:
        """(rows,): min-SNR weights of the losses of rows, see `snr_weight`; ones for None."""

    @property
    def keys_and_values(self) -> dict[str, nn.Parameter]:
        """Weights of the keys and values of the text, by name."""
        found = {name.replace(".base_layer", ""): p for name, p in self.model.named_parameters()}
        return {name: p for name, p in found.items() if name.removesuffix(".weight").endswith(self.ends)}

    @property
    def side(self) -> int:
        """Of the pictures that the model draws, in pixels."""
        size = self.model.config.sample_size
        return int(size if isinstance(size, int) else size[0]) * int(self.pipe.vae_scale_factor)

    def unpacked(self, latents: Tensor) -> Tensor:
        """(rows, channels, height, width): latents as the pipeline hands them out."""
        return latents

    def picture_size(self, latents: Tensor) -> tuple[int, int]:
        """(height, width) in pixels of what latents hold."""
        factor = int(getattr(self.pipe, "vae_scale_factor", 8))
        return latents.shape[-2] * factor, latents.shape[-1] * factor


class UNetDenoising(Denoising):
    """SD 1, SD 2 and SDXL: noise by the schedule's alphas; the model predicts noise, or velocity."""

    family, part, ends, reads, own = "UNet", "unet", ("attn2.to_k", "attn2.to_v"), "cross", "self"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self.kind  # noqa: B018  # or it cannot be trained

    @property
    def alphas(self) -> Tensor:
        """(timesteps,): how much of the picture's square is left."""
        alphas: Tensor = self.pipe.scheduler.alphas_cumprod
        return alphas

    @property
    def kind(self) -> str:
        """What the model predicts, "epsilon" or "v_prediction".

        Raises:
            ControlError: something else.
        """
        kind = str(self.pipe.scheduler.config.prediction_type)
        if kind not in ("epsilon", "v_prediction"):
            raise ControlError(f"the scheduler predicts {kind!r}; epsilon and v_prediction can be trained")
        return kind

    @property
    def count(self) -> int:
        """One of SD 1 and SD 2, two of SDXL."""
        return 2 if hasattr(self.pipe, "text_encoder_2") else 1

    def text(self, captions: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """See `Denoising.text`; SDXL is told the size."""
        states, pooled, encoders = [], None, self.encoders
        for tokenizer, model in encoders:
            ids = ids_of(tokenizer, captions).to(model.get_input_embeddings().weight.device)
            if len(encoders) == 1:
                return {"encoder_hidden_states": model(ids)[0]}
            output = model(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        assert pooled is not None
        times = torch.tensor([[*size, 0, 0, *size]], dtype=pooled.dtype, device=pooled.device)
        added = {"text_embeds": pooled, "time_ids": times.repeat(len(captions), 1)}
        return {"encoder_hidden_states": torch.cat(states, -1), "added_cond_kwargs": added}

    def padding(self, captions: Sequence[str]) -> Tensor:
        return ended(self.encoders[0][0], captions)

    def times(self, shares: Tensor) -> Tensor:
        return (shares * len(self.alphas)).long()

    def predict(
        self, latents: Tensor, times: Tensor, dice: torch.Generator, text: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        noise = torch.randn(latents.shape, generator=dice)
        a = self.alphas[times].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        target = noise if self.kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
        device = self.model.device
        return self.model(noisy.to(device), times.to(device), **text).sample, target.to(device)

    def weight(self, times: Tensor, gamma: float | None) -> Tensor:
        return snr_weight(self.alphas[times], gamma, self.kind)


def ids_of(tokenizer: Any, captions: Sequence[str], length: int | None = None) -> Tensor:
    """(captions, length): tokens, padded and cut; to the tokenizer's own length for None."""
    found: Tensor = tokenizer(
        list(captions),
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return found


def ended(tokenizer: Any, captions: Sequence[str], length: int | None = None) -> Tensor:
    """(captions, length) bool: which of `ids_of` come after the end of a caption."""
    ids = ids_of(tokenizer, captions, length)
    ends = (ids == tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    return torch.arange(ids.shape[1]) > ends


def snr_weight(alphas: Tensor, gamma: float | None, kind: str) -> Tensor:
    """min-SNR weights (Hang et al., ICCV 2023, arXiv 2303.09556) of the losses at these alphas; ones for None.

    min(snr, gamma) / snr for a model that predicts noise, min(snr, gamma) / (snr + 1) for one that predicts velocity.
    """
    if gamma is None:
        return torch.ones_like(alphas)
    snr = alphas / (1 - alphas)
    return snr.clamp(max=gamma) / (snr if kind == "epsilon" else snr + 1)
