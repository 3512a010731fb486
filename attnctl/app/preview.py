"""A picture of what is drawn so far, after a step: for people who wait. It changes nothing of the drawing."""

import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

SHARE = 0.2  # of the time, at most, that goes into previews


def previewed(pipe: "DiffusionPipeline", size: tuple[int, int] | None, show: Callable[[Image.Image], None]) -> Any:
    """Arguments of a pipeline call that then shows its latents, decoded; none where it has no such callback.

    Args:
        pipe: the pipeline.
        size: (width, height) of the picture; None: the pipeline's own.
        show: gets each preview. Some steps have none, so that previews take no more than a fifth of the time.
    """
    if "callback_on_step_end" not in inspect.signature(pipe.__call__).parameters:
        return {}
    began, spent = time.monotonic(), 0.0

    def after(pipe: Any, step: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        nonlocal spent
        start = time.monotonic()
        if spent <= SHARE * (start - began):
            show(decoded(pipe, kept["latents"], size))
            spent += time.monotonic() - start
        return {}

    return {"callback_on_step_end": after}


def decoded(pipe: Any, latents: "Tensor", size: tuple[int, int] | None) -> Image.Image:
    """The first of these latents as a picture."""
    import torch

    with torch.no_grad():
        latents = latents[:1]
        if latents.ndim == 3:  # FLUX packs them
            factor = pipe.vae_scale_factor
            width, height = size or (pipe.default_sample_size * factor,) * 2
            latents = pipe._unpack_latents(latents, height, width, factor)
        config = pipe.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        image = pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
        return pipe.image_processor.postprocess(image.nan_to_num())[0]
