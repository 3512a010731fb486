"""Mixed precision and accumulated gradients through accelerate, and how much memory a training took."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from attnctl.errors import ControlError
from attnctl.pipelines.personalize.settings import Settings


def check_precision(settings: Settings, device: torch.device) -> None:
    """Refuse what accelerate cannot do.

    Raises:
        ControlError: half precision on a processor, or several processes.
    """
    if settings.precision == "fp16" and device.type == "cpu":
        raise ControlError("precision fp16 needs a GPU; on the processor take bf16, or no")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ControlError("concepts are learnt by one process; start it without accelerate launch or torchrun")


@contextmanager
def accelerated(settings: Settings, device: torch.device, scaler: dict[str, Any] | None) -> Iterator[Any]:
    """An `accelerate.Accelerator` for one training; another one in the same process finds its state as it left it.

    Args:
        settings: `accumulate` passes make one step, and `precision` is that of what autocast may narrow.
        device: of the model, which stays where it is.
        scaler: the state in which the last one left the scaling of losses, which fp16 needs.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kept = [(kind._shared_state, dict(kind._shared_state)) for kind in (PartialState, AcceleratorState, GradientState)]
    for shared, _ in kept:
        shared.clear()
    try:
        accelerator = Accelerator(
            mixed_precision=settings.precision,
            gradient_accumulation_steps=settings.accumulate,
            cpu=device.type == "cpu",
            device_placement=False,
        )
        if scaler is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(scaler)
        yield accelerator
    finally:
        for shared, before in kept:
            shared.clear()
            shared.update(before)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that the process has held so far: of the GPU, or of the machine; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most) * (1 if sys.platform == "darwin" else 1024)
