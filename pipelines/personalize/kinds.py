"""Which kinds of models can be trained, and which one a pipeline is of."""

from __future__ import annotations

from typing import Any

from attnctl.engine.families.registry import family_of
from attnctl.errors import UnsupportedPipelineError
from attnctl.pipelines.personalize.denoising import Denoising, UNetDenoising
from attnctl.pipelines.personalize.flow import FluxDenoising, SD3Denoising


def denoising_of(pipe: Any) -> Denoising:
    """How a pipeline is trained.

    Raises:
        ControlError: it cannot be trained as it is.
        UnsupportedPipelineError: it is of a family that cannot be trained.
    """
    family, _ = family_of(pipe)
    kinds = {"SD3": SD3Denoising, "FLUX": FluxDenoising}
    kind: type[Denoising] | None = UNetDenoising if family.denoiser == "unet" else kinds.get(family.name)
    if kind is None:
        raise UnsupportedPipelineError(
            f"concepts are learnt by SD 1, SD 2, SDXL, SD 3 and FLUX.1, not by {family.name}"
        )
    found = kind(pipe)
    if found.model.config.in_channels != found.packed * pipe.vae.config.latent_channels:
        raise UnsupportedPipelineError(
            f"the denoiser of this {type(pipe).__name__} reads more than the picture (a mask, another picture): "
            "learn with the plain model of that family"
        )
    return found
