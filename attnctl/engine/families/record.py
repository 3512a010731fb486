"""What attnctl knows about one kind of denoiser beyond its attention calls: a short record of plain facts.

A record says where the denoiser is, what its attention modules are, where text sits among the keys, how many latent
cells a grid cell spans, and how the pipeline runs classifier-free guidance. `attnctl.engine.verify` checks a record
against a living pipeline by moving the text and watching which keys move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from attnctl.engine.seam import attentions, facts
from attnctl.engine.sites import Site


@dataclass(frozen=True)
class Stream:
    """Rows of a site's text keys that come from one tokenizer of the pipeline.

    Attributes:
        tokenizer: attribute of the pipeline.
        prompt: which argument of `encode_prompt` it reads; if that was not given, it reads `prompt`.
        offset: first row.
        rows: how many rows, or the `encode_prompt` argument that says so; longer prompts are cut there.
    """

    tokenizer: str
    prompt: str
    offset: int = 0
    rows: int | str = 77


@dataclass(frozen=True)
class Family:
    """What attnctl knows about one kind of denoiser.

    Attributes:
        name: for messages.
        denoiser: attribute of the pipeline.
        model: class name of the denoiser.
        sample: name of the denoiser's latent argument; always its first.
        channel_dim: dimension of that tensor that holds channels; an inpainting model has more of them than latents do.
        branches: CFG in one batch, [uncond; cond], or in two calls inside `cache_context("cond" | "uncond")`.
        site: (denoiser, module name, module) -> (kind, factor, order), or None for what is not part of the trunk.
        position: sort key of a module name where module order is not execution order.
        latent_size: (denoiser, sample, keyword arguments) -> (height, width) in unpacked latent cells.
        streams: where each tokenizer's tokens are among the text keys.
        shared: tensor arguments that have no batch dimension.
        scaled: the pipeline puts its latents through `scheduler.scale_model_input`.
        time: what to multiply the denoiser's timestep by to find it among the scheduler's.
        stages: attributes of the denoiser that are its trunk, in execution order: modules or lists of modules.
        keep_output: how the names of stages begin that must hand on their own output even where a later one does too.
        hands_on: which of its arguments a transformer block returns, changed.
        text: name of the denoiser's text argument, (rows, text rows, channels).
        packing: latent cells per token along one side, where the pipeline packs latents into tokens; else 1.
        latent_channels: denoiser -> how many channels of its input are the latents themselves; the rest are masks or
            pictures.
        reads: (pipeline, prompt) -> the text that its tokenizers are given.
    """

    name: str
    denoiser: str
    model: str
    sample: str
    channel_dim: int
    branches: Literal["batched", "sequential"]
    site: Callable[[Any, str, nn.Module], tuple[Any, int | None, Any] | None]
    latent_size: Callable[[Any, Tensor, Mapping[str, Any]], tuple[int, int]]
    streams: tuple[Stream, ...]
    position: Callable[[str], int] = lambda name: 0
    shared: frozenset[str] = frozenset()
    scaled: bool = False
    time: float = 1.0
    stages: tuple[str, ...] = ("transformer_blocks",)
    keep_output: tuple[str, ...] = ()
    hands_on: tuple[str, ...] = ("encoder_hidden_states", "hidden_states")
    text: str = "encoder_hidden_states"
    packing: int = 1
    latent_channels: Callable[[Any], int] = lambda denoiser: denoiser.config.out_channels or denoiser.config.in_channels
    reads: Callable[[Any, str], str] = lambda pipe, prompt: prompt

    def sites(self, denoiser: nn.Module) -> tuple[Site, ...]:
        """Every attention site of the denoiser in execution order."""
        found: list[Site] = []
        blocks: dict[str, int] = {}
        for name, attn in sorted(attentions(denoiser), key=lambda pair: self.position(pair[0])):  # a stable sort
            if (described := self.site(denoiser, name, attn)) is not None:
                heads, head_dim, *_ = facts(attn)
                number = blocks.setdefault(name.rpartition(".")[0], len(blocks))
                found.append(Site(name, described[0], heads, head_dim, len(found), *described[1:], block=number))
        return tuple(found)


def plain_size(denoiser: Any, sample: Tensor, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of latents that are not packed."""
    return sample.shape[-2], sample.shape[-1]
