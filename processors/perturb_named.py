"""`Perturb` by the names that papers gave it, with the defaults of those papers or of diffusers."""

from __future__ import annotations

from dataclasses import dataclass

from attnctl.engine.heads import Heads

from .perturb import Kind, Perturb
from .perturbed_attention import Scope


@dataclass(frozen=True)
class Pag(Perturb):
    """Perturbed-attention guidance (arXiv 2403.17377) as diffusers has it: whole blocks, identity maps, scale 3.

    On SD 3 the picture's own block of the map is masked before the softmax, as in diffusers' pipeline.
    """

    scope: Scope = "image-masked"


@dataclass(frozen=True)
class Seg(Perturb):
    """Smoothed-energy guidance (arXiv 2408.00760): queries blurred over the picture, by default to their mean."""

    kind: Kind = "blur"
    scope: Scope = "image"


@dataclass(frozen=True)
class Slg(Perturb):
    """Skip-layer guidance with the defaults of diffusers' SD 3 pipeline: blocks 7 to 9, early steps, scale 2.8."""

    heads: Heads = "7-9"
    scale: float = 2.8
    kind: Kind = "skip"
    window: tuple[float, float] = (0.01, 0.2)


@dataclass(frozen=True)
class Tpg(Perturb):
    """Token-perturbation guidance (arXiv 2506.10036): tokens of the picture enter the chosen blocks in random order.

    The paper takes blocks on the way down of SDXL, heads="down"; the default is ours, and right for every family.
    """

    kind: Kind = "shuffle"
