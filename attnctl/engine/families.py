"""Families: one short record per kind of denoiser. All that attnctl must know about a model beyond its attention calls.

A record is plain facts: where the denoiser is, what its attention modules are, where text sits among the keys, how many
latent cells a grid cell spans, and how the pipeline runs classifier-free guidance. `attnctl.engine.verify` checks a
record against a living pipeline by moving the text and watching which keys move.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from attnctl.engine.seam import attentions, facts
from attnctl.engine.sites import Site
from attnctl.errors import UnsupportedPipelineError


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
        channels: dimension of that tensor that holds channels; an inpainting model has more of them than latents do.
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
    """

    name: str
    denoiser: str
    model: str
    sample: str
    channels: int
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

    def latent_channels(self, denoiser: Any) -> int:
        """How many channels of the denoiser's input are the latents themselves; the rest are masks or pictures."""
        config = denoiser.config
        return config.out_channels or config.in_channels


# --- UNet2DConditionModel: SD 1, SD 2, SDXL ---------------------------------------------------------------------------


def _unet_factor(unet: Any, name: str) -> int:
    """Latent cells per grid cell: doubled by each downsampler passed on the way in, halved on the way out."""
    downs = [block.downsamplers is not None for block in unet.down_blocks]
    if match := re.match(r"down_blocks\.(\d+)\.", name):
        return 2 ** sum(downs[: int(match[1])])
    if match := re.match(r"up_blocks\.(\d+)\.", name):
        ups = [block.upsamplers is not None for block in unet.up_blocks]
        return 2 ** (sum(downs) - sum(ups[: int(match[1])]))
    return 2 ** sum(downs)


def _unet_site(unet: Any, name: str, attn: nn.Module) -> tuple[Any, int | None, Any] | None:
    if not name.startswith(("down_blocks.", "mid_block.", "up_blocks.")):
        return None  # image projections of IP-Adapter live elsewhere
    *_, cross, joined = facts(attn)
    if joined:
        raise UnsupportedPipelineError(
            f"{name} joins text and image keys inside a UNet (Kandinsky, DeepFloyd); SD 1, SD 2 and SDXL are supported"
        )
    return ("cross" if cross else "self"), _unet_factor(unet, name), None


def _cells(denoiser: Any, sample: Tensor, arguments: Mapping[str, Any]) -> tuple[int, int]:
    return sample.shape[-2], sample.shape[-1]


UNET = Family(
    name="UNet",
    denoiser="unet",
    model="UNet2DConditionModel",
    sample="sample",
    channels=1,
    branches="batched",
    site=_unet_site,
    latent_size=_cells,
    scaled=True,
    stages=("down_blocks", "mid_block", "up_blocks"),
    keep_output=("down_blocks.", "mid_block"),  # a ControlNet adds to the middle, in the size it has there
    hands_on=("hidden_states",),
    # SDXL joins its two encoders on the channel axis, so both speak of the same rows.
    streams=(Stream("tokenizer", "prompt"), Stream("tokenizer_2", "prompt_2")),
    position=lambda name: ("down_blocks", "mid_block", "up_blocks", "").index(
        next((stage for stage in ("down_blocks", "mid_block", "up_blocks") if name.startswith(stage)), "")
    ),
)


# --- SD3Transformer2DModel: SD 3, SD 3.5 ------------------------------------------------------------------------------


def _sd3_site(transformer: Any, name: str, attn: nn.Module) -> tuple[Any, int | None, Any] | None:
    if not name.startswith("transformer_blocks."):
        return None
    patch = transformer.config.patch_size
    *_, joined = facts(attn)  # SD 3.5 medium: attn2 is a second, image-only attention
    return ("joint", patch, "image-first") if joined else ("self", patch, None)


SD3 = Family(
    name="SD3",
    denoiser="transformer",
    model="SD3Transformer2DModel",
    sample="hidden_states",
    channels=1,
    branches="batched",
    site=_sd3_site,
    latent_size=_cells,
    streams=(
        Stream("tokenizer", "prompt"),
        Stream("tokenizer_2", "prompt_2"),
        Stream("tokenizer_3", "prompt_3", offset=77, rows="max_sequence_length"),
    ),
)


# --- FluxTransformer2DModel: FLUX.1 -----------------------------------------------------------------------------------


def _flux_site(transformer: Any, name: str, attn: nn.Module) -> tuple[Any, int | None, Any] | None:
    if not name.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        return None
    return "joint", 2, "text-first"  # latents are packed 2 x 2 outside the model


def _flux_size(transformer: Any, sample: Tensor, arguments: Mapping[str, Any]) -> tuple[int, int]:
    ids = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids  # (image tokens, 3): picture, row, column
    drawn = ids[ids[:, 0] == 0]  # Kontext appends the tokens of a reference picture, numbered 1
    return 2 * (int(drawn[:, 1].max()) + 1), 2 * (int(drawn[:, 2].max()) + 1)


FLUX = Family(
    name="FLUX",
    denoiser="transformer",
    model="FluxTransformer2DModel",
    sample="hidden_states",
    channels=2,
    branches="sequential",
    site=_flux_site,
    latent_size=_flux_size,
    streams=(Stream("tokenizer_2", "prompt_2", rows="max_sequence_length"),),  # CLIP enters pooled only
    shared=frozenset({"img_ids", "txt_ids"}),
    time=1000.0,
    stages=("transformer_blocks", "single_transformer_blocks"),
)

FAMILIES = (UNET, SD3, FLUX)


def unwrap(module: Any) -> Any:
    """The model itself if `torch.compile` wrapped it, else what came in."""
    return getattr(module, "_orig_mod", module)


def family_of(pipe_or_denoiser: Any) -> tuple[Family, nn.Module]:
    """The family record of a pipeline or denoiser, and the uncompiled denoiser.

    Raises:
        UnsupportedPipelineError: there is no record.
    """
    for family in FAMILIES:
        for candidate in (pipe_or_denoiser, getattr(pipe_or_denoiser, family.denoiser, None)):
            candidate = unwrap(candidate)
            if isinstance(candidate, nn.Module) and any(c.__name__ == family.model for c in type(candidate).__mro__):
                return family, candidate
    known = ", ".join(f"{family.name} ({family.model})" for family in FAMILIES)
    raise UnsupportedPipelineError(f"{type(pipe_or_denoiser).__name__} is of no family attnctl knows; it knows {known}")
