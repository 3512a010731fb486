"""The peer of regions: a pass per region, their noise predictions mixed, as in MultiDiffusion (arXiv 2302.08113).

With views of the whole picture, its mixed latents are the step of a mixed prediction, since a step of DDIM is linear:

    e = sum_r m_r e(prompt_r)    m_r: 1 in region r, 0 outside of it; the picture's prompt has what no region covers

Its bootstrapping, backgrounds of one colour in the first steps, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from attnctl.areas import shares
from attnctl.regions import Region


@torch.no_grad()
def draw_mixed(
    pipe: Any, prompt: str, regions: Sequence[tuple[str, Any]], seeds: Sequence[int], steps: int, guidance: float
) -> list[Image.Image]:
    """Pictures of a Stable Diffusion pipeline, one for each seed, from the noise the pipeline would start from."""
    side, count = pipe.unet.config.sample_size, len(seeds)
    size = side * pipe.vae_scale_factor
    texts = [prompt, *(own for own, _ in regions)]
    positive, negative = pipe.encode_prompt(texts, pipe.device, 1, True)
    part = shares([Region(where) for _, where in regions], (side, side), (size, size)).view(-1, 1, 1, side, side)
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = pipe.prepare_latents(count, pipe.unet.config.in_channels, size, size, positive.dtype, pipe.device, noise)
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        mixed = torch.zeros_like(latents)
        for text, against, own in zip(positive, negative, part, strict=True):
            rows = torch.cat([against.expand(count, -1, -1), text.expand(count, -1, -1)])
            without, given = pipe.unet(torch.cat([latents] * 2), timestep, rows).sample.chunk(2)
            mixed += own * (without + guidance * (given - without))
        latents = pipe.scheduler.step(mixed, timestep, latents).prev_sample
    picture = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return pipe.image_processor.postprocess(picture)
