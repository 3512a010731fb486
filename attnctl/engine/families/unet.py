"""UNet2DConditionModel: SD 1, SD 2, SDXL."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from attnctl.engine.families.record import Family, Stream, plain_size
from attnctl.engine.seam import facts
from attnctl.errors import UnsupportedPipelineError


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


UNET = Family(
    name="UNet",
    denoiser="unet",
    model="UNet2DConditionModel",
    sample="sample",
    channel_dim=1,
    branches="batched",
    site=_unet_site,
    latent_size=plain_size,
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
