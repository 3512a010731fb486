"""Where the things of a picture are: masks from the model's attention, or the caller's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attnctl.concepts import Concept
from attnctl.engine.attachment import attach
from attnctl.engine.families.registry import discover
from attnctl.engine.sites import Site, select
from attnctl.errors import ControlError
from attnctl.maps.live import LiveMaps
from attnctl.maps.pictures import heat, overlay
from attnctl.maps.self_maps import SelfMaps
from attnctl.pipelines.personalize.denoising import Denoising
from attnctl.pipelines.personalize.settings import Settings
from attnctl.processors.attencraft import ALIKE, POWER, divided, fitted, relevance, similarity
from attnctl.processors.calibration import min_max
from attnctl.sheets import grid as sheet

Recipe = Literal["ours", "paper"]
NOISE = (0.05, 0.12, 0.19, 0.26)  # parts of the schedule; AttenCraft looks at one below 0.3
CROSS, OWN = 16, 32  # cells along one side where AttenCraft reads cross- and self-attention
OUR_POWER = 2
SMOOTHER = 4  # cells of a renewed mask for each one that attention gave, along a side
STRETCHED = 0.03  # by so much the shape of a mask may differ from the picture's: sizes are whole numbers
LEAST = 0.01  # of the picture: a smaller mask is chance


class MaskError(ControlError):
    """The model cannot tell the things of the picture apart.

    Attributes:
        picture: the picture, the maps of the nouns and the masks they gave.
    """

    def __init__(self, text: str, picture: Image.Image) -> None:
        super().__init__(text)
        self.picture = picture


@dataclass(frozen=True)
class Found:
    """Masks that attention gave.

    Attributes:
        masks: (concepts, height, width) bool, of the square picture.
        relevant: (concepts + 1, height, width), 0 to 1; the last is the background.
        picture: of them.
    """

    masks: Tensor
    relevant: Tensor
    picture: Image.Image


@torch.no_grad()
def look(denoising: Denoising, latents: Tensor, nouns: Sequence[str], recipe: Recipe, seed: int = 0) -> Tensor:
    """(concepts + 1, height, width): relevance of each place of the picture to each noun and, last, the background.

    "paper" is AttenCraft's: cross-attention near 16 x 16 alone, the start token as the background, fourth power.
    "ours" also reads the next coarser grid, calls background what no noun looks at, and takes the second power: models
    whose start token is no background, and things in the tone of their background, need that.

    Args:
        denoising: of the pipeline as it is.
        latents: (1, channels, height, width), the picture.
        nouns: of the things, or phrases with the new words.
        recipe: which.
        seed: of the noise.
    """
    side = latents.shape[-1]
    sites = discover(denoising.pipe)
    cross, own = select(sites, denoising.reads), select(sites, denoising.own)
    factors = sorted({site.factor for site in cross if site.factor}, key=lambda one: abs(side / one - CROSS))
    used = [factors[0], *(one for one in factors if recipe == "ours" and one == 2 * factors[0])]
    names = [*nouns, "<start>"] if recipe == "paper" else list(nouns)
    lives = [LiveMaps(*names, where=_of(cross, factor)) for factor in used]
    selves = SelfMaps(_of(own, min({one.factor for one in own if one.factor}, key=lambda one: abs(side / one - OWN))))
    times = denoising.times(torch.tensor(NOISE))
    rows, captions = latents.repeat(len(times), 1, 1, 1), [" and ".join(f"a {noun}" for noun in nouns)] * len(times)
    text = denoising.text(captions, denoising.picture_size(latents))
    with (
        attach(denoising.pipe, *lives, selves) as attached,
        attached.batch(captions, max_sequence_length=denoising.rows) as batch,
    ):
        denoising.predict(rows, times, torch.Generator().manual_seed(seed), text)
    seen = [batch.state(live).maps().mean(0) for live in lives]
    state = batch.state(selves)
    if recipe == "paper":
        return relevance(seen[0], state.mean(), state.grid, POWER).cpu()
    size = (seen[0].shape[-2], seen[0].shape[-1])
    things = torch.stack([fitted(min_max(maps), size).clamp(0, 1) for maps in seen]).mean(0)
    rest = 1 - min_max(things).amax(0, keepdim=True)
    return relevance(torch.cat([things, rest]), state.mean(), state.grid, OUR_POWER).cpu()


def masks_from(relevant: Tensor, concepts: Sequence[Concept], picture: Image.Image) -> Found:
    """Masks of the concepts, (concepts, height, width) bool at the picture's size.

    Args:
        relevant: see `look`.
        concepts: in the order of the maps.
        picture: the square picture.

    Raises:
        MaskError: a thing has no place of its own, or two look at one place.
    """
    masks = divided(relevant)
    shown = drawn(relevant, masks, concepts, picture)
    hint = "give masks of your own, name the things otherwise, or set masks=none"
    names = [*(repr(one.noun) for one in concepts), "the background"]
    for k, one in enumerate(concepts):
        if masks[k].float().mean() >= LEAST:
            continue
        ahead = int(relevant.flatten(1)[:, relevant[k].argmax()].argmax())  # where the noun looks most
        if ahead == k:
            raise MaskError(f"hardly any place of the picture is that of {one.noun!r} alone; {hint}", shown)
        raise MaskError(f"{one.noun!r} and {names[ahead]} look at the same place of the picture; {hint}", shown)
    return Found(enlarged(masks[:-1], picture.size[::-1]), relevant, shown)


def enlarged(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(concepts, *size) bool: masks with smooth edges on a finer grid."""
    return F.interpolate(masks[None].float(), size, mode="bilinear", align_corners=False)[0] > 0.5


def renewed(
    denoising: Denoising, latents: Tensor, former: Tensor, concepts: Sequence[Concept], settings: Settings
) -> Tensor | None:
    """(concepts, height, width) bool: what the model finds by now, by new words with their nouns (AttenCraft).

    None if they are not to be had: each must still have a place of its own, and be as the former (SSIM of 0.8).

    Args:
        denoising: of a model that knows the new words.
        latents: (1, channels, height, width), the picture.
        former: (concepts, height, width), 0 to 1, on any grid.
        concepts: in the order of the masks.
        settings: those of the training.
    """
    recipe: Recipe = "paper" if settings.masks == "paper" else "ours"
    masks = divided(look(denoising, latents, [one.phrase for one in concepts], recipe, settings.seed))[:-1]
    size = (masks.shape[-2], masks.shape[-1])
    alike = similarity(masks.float(), F.adaptive_avg_pool2d(former[None], size)[0].round())
    if masks.float().mean((1, 2)).min() < LEAST or alike.min() < ALIKE:
        return None
    return enlarged(masks, (SMOOTHER * size[0], SMOOTHER * size[1]))


def drawn(relevant: Tensor, masks: Tensor, concepts: Sequence[Concept], picture: Image.Image) -> Image.Image:
    """A sheet: the picture, where each noun looks, and the mask it won."""
    size = (192, 192)
    shown = picture.resize(size)
    rows: list[Any] = [[("the picture", shown)], [("", Image.new("RGB", size, "white"))]]
    for k, name in enumerate([*(one.noun for one in concepts), "background"]):
        rows[0].append((name, heat(relevant[k], size)))
        rows[1].append((f"mask of {name}", overlay(shown, masks[k].float() + 1e-6)))
    return sheet(rows)


def given_masks(
    given: Mapping[str, Image.Image], concepts: Sequence[Concept], side: int, shape: tuple[int, int]
) -> Tensor:
    """The caller's masks, (concepts, side, side) bool: white, or not transparent, is the thing.

    Args:
        given: noun or word -> a mask of the picture's own shape.
        concepts: all of them must have one.
        side: of the square picture.
        shape: (width, height) of the picture as it came; masks may be larger or smaller, but no wider or narrower.

    Raises:
        ControlError: a name is no concept, a concept has no mask, a mask is empty or of another shape than the picture,
            or two overlap by more than half.
    """
    named = {name: k for k, one in enumerate(concepts) for name in (one.noun, one.word, one.phrase)}
    found: dict[int, Tensor] = {}
    for name, picture in given.items():
        if name not in named:
            raise ControlError(f"there is a mask for {name!r}; concepts are {', '.join(one.noun for one in concepts)}")
        if abs(picture.width * shape[1] / (picture.height * shape[0]) - 1) > STRETCHED:
            sizes = [f"{width} x {height}" for width, height in (picture.size, shape)]
            raise ControlError(f"the mask of {name!r} is {sizes[0]}, another shape than the picture, {sizes[1]}")
        found[named[name]] = _mask(picture, side)
        if not found[named[name]].any():
            raise ControlError(f"the mask of {name!r} is empty: white is where the thing is")
    if missing := [one.noun for k, one in enumerate(concepts) if k not in found]:
        raise ControlError(f"{missing[0]!r} has no mask; give one for each thing, or none")
    masks = torch.stack([found[k] for k in range(len(concepts))])
    for k, one in enumerate(concepts):
        for j in range(k):
            common = (masks[k] & masks[j]).sum() / torch.minimum(masks[k].sum(), masks[j].sum())
            if common > 0.5:
                raise ControlError(f"the masks of {concepts[j].noun!r} and {one.noun!r} show the same place")
    return masks


def _mask(picture: Image.Image, side: int) -> Tensor:
    """As `squared` places the picture, with nothing around it."""
    alpha = picture.getchannel("A") if "A" in picture.getbands() else picture.convert("L")
    scale = side / max(alpha.size)
    width, height = (max(1, round(length * scale)) for length in alpha.size)
    whole = Image.new("L", (side, side))
    whole.paste(alpha.resize((width, height), Image.Resampling.BOX), ((side - width) // 2, (side - height) // 2))
    return torch.from_numpy(np.asarray(whole) > 127)


def _of(sites: Sequence[Site], factor: int | None) -> list[Site]:
    return [site for site in sites if site.factor == factor]
