"""Which families there are, and which one a pipeline is of."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnctl.engine.families.chroma import CHROMA
from attnctl.engine.families.flux import FLUX
from attnctl.engine.families.pixart import PIXART
from attnctl.engine.families.record import Family
from attnctl.engine.families.sd3 import SD3
from attnctl.engine.families.unet import UNET
from attnctl.engine.sites import Site
from attnctl.errors import ControlError, UnsupportedPipelineError

FAMILIES: list[Family] = [UNET, SD3, FLUX, PIXART, CHROMA]
REFUSED = (  # part of a pipeline's class name -> why; their denoisers are of families that are known
    ("Kolors", "its prompts are read by ChatGLM, where attnctl cannot tell which tokens are which words"),
    ("LatentUpscale", "it draws on a picture's latents without classifier-free rows of its own"),
)


def register(family: Family) -> None:
    """Make a kind of denoiser known; `attnctl.engine.verify.verify(pipe)` tells whether its record is true.

    Raises:
        ControlError: a family has that denoiser already.
    """
    if (other := next((one for one in FAMILIES if one.model == family.model), None)) is not None:
        raise ControlError(f"{family.model} is known already, as the denoiser of the family {other.name}")
    FAMILIES.append(family)


def unwrap(module: Any) -> Any:
    """The model itself if `torch.compile` wrapped it, else what came in."""
    return getattr(module, "_orig_mod", module)


def family_of(pipe_or_denoiser: Any) -> tuple[Family, nn.Module]:
    """The family record of a pipeline or denoiser, and the uncompiled denoiser.

    Raises:
        UnsupportedPipelineError: there is no record.
    """
    who = type(pipe_or_denoiser).__name__
    for part, reason in REFUSED:
        if part in who:
            raise UnsupportedPipelineError(f"{who} is not supported: {reason}")
    for family in FAMILIES:
        for candidate in (pipe_or_denoiser, getattr(pipe_or_denoiser, family.denoiser, None)):
            candidate = unwrap(candidate)
            if isinstance(candidate, nn.Module) and any(c.__name__ == family.model for c in type(candidate).__mro__):
                return family, candidate
    known = ", ".join(f"{family.name} ({family.model})" for family in FAMILIES)
    raise UnsupportedPipelineError(f"{who} is of no family attnctl knows; it knows {known}")


def discover(pipe_or_denoiser: Any) -> tuple[Site, ...]:
    """Every attention site of a pipeline's denoiser (or of a denoiser), in execution order. Runs nothing.

    Raises:
        UnsupportedPipelineError: no family record describes the denoiser.
    """
    family, denoiser = family_of(pipe_or_denoiser)
    return family.sites(denoiser)
