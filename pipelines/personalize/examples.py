"""What a personalisation trains on: views of the picture, of all its things or of some, and regular pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from attnctl.concepts import Concept
from attnctl.pipelines.personalize.concepts import caption
from attnctl.pipelines.personalize.denoising import Denoising
from attnctl.pipelines.personalize.settings import Settings
from attnctl.pipelines.personalize.views import View, box_of, make_views, painted_out, pixels, views_around

Stage = Callable[[str, int, int], None]
Subset = tuple[int, ...]

SEEN = 0.5  # of each thing that a view names, so much must be inside it
TRIES = 20
RIM = 0.04  # of the picture's side: how far a mask is widened before its thing is painted out


@dataclass(frozen=True)
class Examples:
    """What is trained on, encoded once.

    Attributes:
        latents: (examples, channels, height, width), scaled as the model wants them.
        valid: (examples, height, width), 0 to 1: how much the denoising loss counts.
        captions: one each.
        subset: (examples,), which subset of the concepts the caption names, by number; 0 is all of them.
        masks: (examples, concepts, height, width), 0 to 1, where each thing is in the view; None: nobody knows.
        places: (examples, 9), see `View.numbers`, where masks may be renewed.
    """

    latents: Tensor
    valid: Tensor
    captions: list[str]
    subset: Tensor
    masks: Tensor | None = None
    places: Tensor | None = None

    @property
    def subsets(self) -> int:
        """How many there are."""
        return int(self.subset.max()) + 1


@dataclass(frozen=True)
class Rows:
    """What one pass trains on, see `Examples`.

    Attributes:
        times: (rows,) timesteps.
        subset: of the views, which come before the regular pictures.
        masks: of the views.
        share: of the words that the step's views name, how many this pass has, times the number of passes.
    """

    latents: Tensor
    valid: Tensor
    captions: list[str]
    times: Tensor
    subset: list[int]
    masks: Tensor | None
    share: float


def subsets(count: int) -> list[Subset]:
    """The subsets of so many concepts that captions name: all of them first, then each alone; of three also pairs."""
    sizes = [count, *range(1, count)] if count <= 3 else [count, 1]
    return [one for size in sizes for one in combinations(range(count), size)]


@torch.no_grad()
def encoded(pipe: Any, pictures: Sequence[Image.Image], tell: Callable[[int], None]) -> Tensor:
    """(pictures, channels, height, width): latents, scaled as the model wants them."""
    vae, latents = pipe.vae, []
    for at in range(0, len(pictures), 8):
        tell(at)
        some = pixels(list(pictures[at : at + 8])).to(vae.device, vae.dtype)
        latents.append(vae.encode(some).latent_dist.mode().float().cpu())
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    found = (torch.cat(latents) - shift) * float(vae.config.scaling_factor)
    return found.contiguous()  # as a file gives them back: convolutions of other strides differ in the last bit


def views_of(
    pipe: Any, source: Image.Image, concepts: Sequence[Concept], settings: Settings, masks: Tensor | None, tell: Stage
) -> Examples:
    """Views of the picture: of all its things, and where masks say which is which, of each subset of them.

    Args:
        pipe: whose autoencoder encodes them.
        source: the square picture.
        concepts: in the picture.
        settings: those of the training.
        masks: (concepts, side, side) bool, or None.
        tell: how far it is.
    """
    rng = np.random.default_rng(settings.seed)
    side, count = source.width, settings.view_count
    asked: list[Subset] = subsets(len(concepts)) if masks is not None and settings.subsets != "all" else [()]
    layers = [] if masks is None else [Image.fromarray((one.numpy() * 255).astype(np.uint8)) for one in masks]
    pictures, captions, numbers, shown = [], list[str](), [], list[View]()
    cells = side // int(pipe.vae_scale_factor)
    for number, subset in enumerate(asked):
        chosen = subset or tuple(range(len(concepts)))
        base, views = source, make_views(settings.views, count, side, rng)
        if masks is not None:
            if settings.zoom and number:
                base = painted_out(source, _widened(masks[[k for k in range(len(masks)) if k not in chosen]], side))
                views = views_around(box_of(masks[list(chosen)].any(0)), count, rng)
            else:
                views = [_showing(view, settings, side, [layers[k] for k in chosen], rng) for view in views]
        spoken = caption([concepts[k].phrase for k in chosen], settings)
        for view in views:
            pictures.append(view.picture(base, side))
            captions.append(view.prefix + spoken)
        numbers += [number] * len(views)
        shown += views
    latents = encoded(pipe, pictures, lambda at: tell("views of the picture", at, len(pictures)))
    which, places = torch.tensor(numbers), torch.tensor([one.numbers for one in shown], dtype=torch.float64)
    if masks is None:
        return Examples(latents, torch.stack([view.valid(cells) for view in shown]), captions, which)
    bare = Examples(latents, torch.empty(0), captions, which, places=places if settings.refresh else None)
    return _masked(bare, shown, layers, settings)


def remasked(views: Examples, masks: Tensor, settings: Settings) -> Examples:
    """The same views with other masks: what each view shows stays, also where things were painted out.

    Args:
        views: with `places`.
        masks: (concepts, height, width) bool, of the square picture.
        settings: those of the training.
    """
    assert views.places is not None
    layers = [Image.fromarray((one.numpy() * 255).astype(np.uint8)) for one in masks]
    return _masked(views, [View.of(one) for one in views.places.tolist()], layers, settings)


def _masked(views: Examples, shown: Sequence[View], layers: list[Image.Image], settings: Settings) -> Examples:
    """The views with masks, and with what counts of their loss by them."""
    cells, side = views.latents.shape[-1], layers[0].width
    asked: list[Subset] = subsets(len(layers)) if settings.subsets != "all" else [tuple(range(len(layers)))]
    seen = [torch.stack([_on_cells(view.mask(one, side), cells) for one in layers]) for view in shown]
    valid = [
        _counted(view.valid(cells), own, asked[number], settings)
        for view, own, number in zip(shown, seen, views.subset.tolist(), strict=True)
    ]
    return replace(views, valid=torch.stack(valid), masks=torch.stack(seen))


def _counted(valid: Tensor, masks: Tensor, chosen: Subset, settings: Settings) -> Tensor:
    """How much each cell's denoising loss counts: where the view shows the picture, and what the caption names."""
    if settings.counted == "view":
        return valid
    if settings.counted == "union":
        return valid * masks[list(chosen)].amax(0)
    others = [k for k in range(len(masks)) if k not in chosen]
    if not others:
        return valid
    wide = F.max_pool2d(masks[others].amax(0)[None, None], 3, 1, 1)[0, 0]
    return valid * (wide < 0.1)


def _showing(view: View, settings: Settings, side: int, layers: list[Image.Image], rng: np.random.Generator) -> View:
    """This view, or another of its kind in which enough of each thing is seen."""
    for _ in range(TRIES):
        if all(_share(view, layer, side) >= SEEN for layer in layers):
            return view
        view = make_views(settings.views, 2, side, rng)[1]
    return View()


def _share(view: View, layer: Image.Image, side: int) -> float:
    """How much of a thing a view shows, of what it would show if it showed all of it."""
    scale = (view.place[2] - view.place[0]) / (view.box[2] - view.box[0])
    whole = float(np.asarray(layer, np.float32).sum()) * scale**2
    return float(np.asarray(view.mask(layer, side), np.float32).sum()) / max(whole, 1.0)


def _on_cells(mask: Image.Image, cells: int) -> Tensor:
    return F.adaptive_avg_pool2d(torch.from_numpy(np.asarray(mask, np.float32))[None] / 255, cells)[0]


def _widened(masks: Tensor, side: int) -> Tensor:
    """Any of these masks, wider by a rim: their edges are rough, and things have shadows."""
    rim = max(1, round(RIM * side))
    return F.max_pool2d(masks.any(0)[None, None].float(), 2 * rim + 1, 1, rim)[0, 0] > 0


def regular_of(denoising: Denoising, concepts: Sequence[Concept], settings: Settings, tell: Stage) -> Examples:
    """Pictures that the model draws before it is trained, which keep what it knows (prior preservation).

    Of four, one has all the nouns and one has one of them; with `others` one has a noun beside something else, and one
    something else alone, and else they have nouns as well.
    """
    nouns, count = [one.noun for one in concepts], settings.regular
    captions, latents = list[str](), []
    others = [one for one in settings.others if not any(noun in one for noun in nouns)]
    for number in range(count):
        noun, part = nouns[number // 2 % len(nouns)], number % 4
        other = others[number // 2 % len(others)] if others else None
        names = nouns if not number % 2 else [noun]
        if other and part == 2:
            names = [noun, other]
        elif other and part == 3:
            names = [other]
        captions.append(caption(names, settings))
    for at in range(0, count, 4):
        tell("regular pictures", at, count)
        some = captions[at : at + 4]
        seeds = [torch.Generator().manual_seed(1000 * settings.seed + at + k) for k in range(len(some))]
        latents.append(_draw(denoising, some, seeds).float().cpu())
    found = torch.cat(latents).contiguous()
    return Examples(found, torch.ones(count, *found.shape[-2:]), captions, torch.zeros(count, dtype=torch.long))


@torch.no_grad()
def _draw(denoising: Denoising, prompts: list[str], seeds: list[torch.Generator]) -> Tensor:
    """Latents of pictures, at low guidance and in few steps: they keep what the model knows; none will see them."""
    pipe = denoising.pipe
    bar = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        drawn = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=seeds, output_type="latent").images
        return denoising.unpacked(drawn)
    finally:
        pipe.set_progress_bar_config(**{"disable": False, **bar})
