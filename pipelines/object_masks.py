"""Object masks from words: where in a picture the model looks for an object."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from attnctl.engine.attachment import attach
from attnctl.maps.recorder import TokenMaps
from attnctl.pipelines.inversion import Schedule, Solver, diffusion_schedule, encode, is_flow, sampling

FLOW = Schedule((1000.0, 500.0, 0.0), (0.0, 0.5, 1.0), (1.0, 0.5, 0.0), "flow")
LEAST = 0.12
"""A place belongs to the object if its map has this share of its highest value; chosen on eight things of glyph-sd."""


def mask_from_words(
    pipe: Any, picture: Image.Image, size: tuple[int, int], words: tuple[str, ...], seed: int = 0, tries: int = 4,
    **arguments: Any,
) -> NDArray[np.float32]:  # fmt: skip
    """Where the attention maps of some words lie in a picture: rough, but where the object is.

    The picture is noised to the middle of the schedule, several times, and the denoiser called once on all of them.

    Args:
        pipe: the pipeline.
        picture: an object before anything.
        size: (width, height) to look at it in.
        words: what the object is.
        seed: of the noise.
        tries: how many noises the maps are averaged over.
        arguments: further ones of the pipeline.

    Returns:
        (height, width) of the picture, float32: from 0 to 1, soft at the border.
    """
    schedule = FLOW if is_flow(pipe.scheduler) else diffusion_schedule(
        pipe.scheduler.alphas_cumprod, pipe.scheduler.config.get("prediction_type", "epsilon"), 2
    )  # fmt: skip
    clean = encode(pipe, [picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)] * tries)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).to(clean)
    solver, maps = Solver(pipe.scheduler, 2, "ddim", start=1, schedule=schedule), TokenMaps(*words)
    common: dict[str, Any] = {"height": size[1], "width": size[0], "num_inference_steps": 2, "guidance_scale": 1.0}
    with sampling(pipe, solver), attach(pipe, maps) as run:
        latents = schedule.noised(clean, noise, 1)
        pipe(prompt=[f"a {', '.join(words)}"] * tries, latents=latents, output_type="latent", **common | arguments)
    found = torch.stack([run.maps[word] for word in words]).mean((0, 1))  # (height, width)
    shape = picture.height, picture.width
    whole = torch.nn.functional.interpolate(found[None, None].float().cpu(), shape, mode="bicubic")[0, 0]
    return ((whole / whole.max() - LEAST) / LEAST + 0.5).clamp(0, 1).numpy()
