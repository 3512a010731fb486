"""LoRAs of joint-attention models under the names of ComfyUI's own modules, in which queries, keys and values are one.

What ComfyUI reads: `model_lora_keys_unet` (comfy/lora.py) takes any weight of the model by its own name, such as
`diffusion_model.joint_blocks.0.context_block.attn.qkv`, and `LoRAAdapter.load` (comfy/weight_adapter/lora.py) looks for
`.lora_A.weight` and `.lora_B.weight` behind it; without `.alpha` the scale is 1. For SD 3 and FLUX it also takes the
names of diffusers behind `transformer.`, of which `mmdit_to_diffusers` and `flux_to_diffusers` (comfy/utils.py) know
the rows of `qkv` that they stand for; so it loads the file for diffusers as well. Programs that read only the first
form need the fused one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from attnctl.errors import ControlError

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
FUSED = {"SD3": "joint_blocks.{}.context_block.attn.qkv", "FLUX": "double_blocks.{}.txt_attn.qkv"}
"""Family -> the module that makes queries, keys and values of the text, of a block by its number."""
PARTS = ("add_q_proj", "add_k_proj", "add_v_proj")  # of `qkv`, from the top
MODULE = re.compile(r"transformer_blocks\.(\d+)\.attn\.(\w+)")


def fused_keys(lora: Mapping[str, tuple[Tensor, Tensor]], family: str) -> dict[str, Tensor]:
    """The tensors of a file for ComfyUI; exact.

    Args:
        lora: module of diffusers' transformer -> (down, up) with down (rank, in) and up (out, rank).
        family: of `FUSED`.

    Raises:
        ControlError: a module is no query, key or value of the text.
    """
    blocks: dict[int, dict[str, tuple[Tensor, Tensor]]] = {}
    for module, pair in lora.items():
        found = MODULE.fullmatch(module)
        if found is None or found[2] not in PARTS:
            raise ControlError(
                f"{module} makes no queries, keys or values of the text; ComfyUI has no name for it here"
            )
        blocks.setdefault(int(found[1]), {})[found[2]] = pair
    keys = {}
    for number, parts in sorted(blocks.items()):
        name = "diffusion_model." + FUSED[family].format(number)
        keys[name + DOWN], keys[name + UP] = _one(parts)
    return keys


def _one(parts: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(down, up) of all three, one above the other, from those of some of them."""
    some = next(iter(parts.values()))
    height, width = some[1].shape[0], some[0].shape[1]
    if sum(len(down) for down, _ in parts.values()) >= width:  # then the change itself is no larger
        nothing = some[1].new_zeros(height, width)
        change = torch.cat([parts[part][1] @ parts[part][0] if part in parts else nothing for part in PARTS])
        return torch.eye(width, dtype=change.dtype), change
    downs = torch.cat([parts[part][0] for part in PARTS if part in parts])
    up, at = some[1].new_zeros(3 * height, len(downs)), 0
    for row, part in enumerate(PARTS):
        if part in parts:
            rank = parts[part][1].shape[1]
            up[row * height : (row + 1) * height, at : at + rank] = parts[part][1]
            at += rank
    return downs.contiguous(), up
