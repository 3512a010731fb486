"""LoRA adapters on keys and values, through peft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnctl.concepts import ADAPTER
from attnctl.errors import ControlError


def add_adapters(unet: Any, ends: tuple[str, ...], rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Put adapters with alpha = rank on the modules whose names end so; by name, what is trained of them.

    Raises:
        ControlError: peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ModuleNotFoundError:
        raise ControlError('adapters need peft: pip install peft, or train with trained="full"') from None
    targets = [name for name, _ in unet.named_modules() if name.endswith(ends)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws the first matrix from torch's own dice
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter_name=ADAPTER)
    return {name: p for name, p in unet.named_parameters() if f".{ADAPTER}." in name}


def adapters_of(unet: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """module -> (down, up) of the adapters."""
    found: dict[str, Any] = {}
    for name, module in unet.named_modules():
        if ADAPTER in getattr(module, "lora_A", {}):
            pair = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            found[name] = tuple(one.detach().float().cpu().clone() for one in pair)
    return found
