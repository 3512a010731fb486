"""Scenes put together on the device that trains, from an atlas: the distribution of `scenes.Renderer`, in batches.

Three things differ from the renderer: turns are whole degrees, sprites are resampled bilinearly, and whether a thing
hides another is judged by their boxes. A share of the scenes may go to chosen concepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.glyph.scenes import SIDE, caption
from attnctl.glyph.train.atlas import ANGLES, THINGS, Atlas
from attnctl.glyph.words import COLOURS, CONCEPTS, OBJECTS, is_held_out

MOST = 3
_MARGIN = 2.0
_SIZES = torch.tensor([[0.45, 0.85], [0.35, 0.55], [0.28, 0.40]])  # longer side by number of things
_GRID = 16


@dataclass(frozen=True, eq=False)
class Scenes:
    """A batch of scenes on the device.

    images: (n, 3, 128, 128) in [-1, 1]. captions: one each. masks: (n, 3, 16, 16), how much of each cell a thing
    covers, in the order of the caption; zeros where there are fewer things.
    """

    images: Tensor
    captions: list[str]
    masks: Tensor


@dataclass(frozen=True)
class _Laid:
    """Where things are, in pixels; (n, 3) each, and (n, 3, 2) for pairs in the order x, y."""

    there: Tensor
    sprites: Tensor
    turns: Tensor
    scale: Tensor  # pixels of the scene for one of the unit square of a sprite
    middle: Tensor
    order: Tensor  # rank from the front


@dataclass(frozen=True)
class Composer:
    """Draws batches.

    counts: probabilities of 1, 2 and 3 things. natural, named: as for `Renderer`. weights: how often a concept is
    drawn, 1 for those not named.
    """

    atlas: Atlas
    counts: tuple[float, float, float] = (0.3, 0.55, 0.15)
    natural: float = 0.2
    named: float = 0.85
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.atlas.boxes.device

    def draw(self, count: int, rng: torch.Generator) -> Scenes:
        """`count` scenes; the random numbers are those of a CPU generator, so every device draws the same scenes."""
        concepts, there = self._concepts(count, rng)
        colours = torch.randint(len(COLOURS), (count, MOST), generator=rng) + 1
        plain = torch.rand(count, MOST, generator=rng) < self.natural
        named = torch.rand(count, MOST, generator=rng) < self.named
        joint = torch.rand(count, generator=rng) < 0.7
        is_object = concepts >= len(CONCEPTS) - len(OBJECTS)
        colours = torch.where(is_object & ~plain, colours, 0)
        first = torch.tensor([THINGS.index((concept, None)) for concept in CONCEPTS])
        captions = [
            _told(concepts[row], torch.where(named, colours, 0)[row], int(there[row].sum()), bool(joint[row]))
            for row in range(count)
        ]
        laid = self._lay(first[concepts] + colours, concepts, there, rng)
        images, masks = self._paint(laid, self._backgrounds(laid, rng))
        return Scenes(images * 2 - 1, captions, F.avg_pool2d(masks.float(), SIDE // _GRID))

    def _concepts(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """(count, 3) concepts without a held-out pair among those that are there, and which are there."""
        weights = torch.tensor([self.weights.get(concept, 1.0) for concept in CONCEPTS])
        many = torch.multinomial(torch.tensor(self.counts).float(), count, replacement=True, generator=rng) + 1
        there = torch.arange(MOST) < many[:, None]
        pairs = torch.tensor([[is_held_out(a, b) for a in CONCEPTS] for b in CONCEPTS])
        found = torch.multinomial(weights.expand(count, -1), MOST, generator=rng)
        while (wrong := self._forbidden(found, there, pairs)).any():
            again = torch.multinomial(weights.expand(int(wrong.sum()), -1), MOST, generator=rng)
            found = found.masked_scatter(wrong[:, None], again)
        return found, there

    @staticmethod
    def _forbidden(concepts: Tensor, there: Tensor, pairs: Tensor) -> Tensor:
        both = there[:, :, None] & there[:, None, :]
        return (pairs[concepts[:, :, None], concepts[:, None, :]] & both).flatten(1).any(1)

    def _lay(self, sprites: Tensor, concepts: Tensor, there: Tensor, rng: torch.Generator) -> _Laid:
        count = len(sprites)
        turns = torch.randint(len(ANGLES), (count, MOST), generator=rng)
        boxes = self.atlas.boxes.cpu()[sprites, turns]  # (n, 3, 4)
        shape = boxes[..., 2:] - boxes[..., :2]
        low, high = _SIZES[there.sum(1) - 1].unbind(-1)
        sizes = low[:, None] + (high - low)[:, None] * torch.rand(count, MOST, generator=rng)
        sizes = torch.where(there, sizes, 0)
        room, total, number = 1 - 2 * _MARGIN / SIDE, sizes.sum(1), there.sum(1)
        surplus = (total - low * number).clamp_min(1e-6)
        shrunk = low[:, None] + (sizes - low[:, None]) * ((room - low * number) / surplus)[:, None]
        sizes = torch.where((total > room)[:, None] & there, shrunk, sizes)
        scale = sizes * SIDE / shape.amax(-1)
        extent = shape * scale[..., None]  # (n, 3, 2) pixels
        in_line = self._in_line(extent, there, rng)
        free, fits = self._anywhere(extent, there, rng)
        loose = (torch.randint(3, (count,), generator=rng) == 2) & fits
        corner = torch.where(loose[:, None, None], free, in_line)
        order = torch.rand(count, MOST, generator=rng).argsort(1).argsort(1)
        return _Laid(there, sprites, turns, scale, corner - boxes[..., :2] * scale[..., None], order)

    @staticmethod
    def _in_line(extent: Tensor, there: Tensor, rng: torch.Generator) -> Tensor:
        """(n, 3, 2) corners of things side by side or one above the other, in random order, without overlap."""
        count = len(extent)
        axis = torch.randint(2, (count,), generator=rng)
        rows = torch.arange(count)
        along, across = extent[rows, :, axis], extent[rows, :, 1 - axis]
        gaps = -torch.rand(count, MOST + 1, generator=rng).clamp_min(1e-6).log()
        gaps[:, :MOST] *= there
        gaps *= ((SIDE - 2 * _MARGIN - along.sum(1)).clamp_min(0) / gaps.sum(1))[:, None]
        place = torch.where(there, torch.rand(count, MOST, generator=rng), 2).argsort(1).argsort(1)
        before = place[:, None, :] < place[:, :, None]  # (n, thing, those before it)
        start = _MARGIN + (before * (along + gaps[:, :MOST])[:, None, :]).sum(2) + gaps[:, :MOST]
        slack = SIDE - across
        wobble = (torch.rand(count, MOST, generator=rng) * 0.4 - 0.2) * SIDE
        other = (slack / 2 + wobble).clamp_min(_MARGIN).minimum((slack - _MARGIN).clamp_min(0))
        corner = torch.stack([start, other], -1)
        return torch.where((axis == 1)[:, None, None], corner.flip(-1), corner)

    @staticmethod
    def _anywhere(extent: Tensor, there: Tensor, rng: torch.Generator, tries: int = 12) -> tuple[Tensor, Tensor]:
        """(n, 3, 2) corners anywhere, and whether no box lies on more than a quarter of another."""
        count = len(extent)
        at = torch.rand(tries, count, MOST, 2, generator=rng) * (SIDE - 2 * _MARGIN - extent).clamp_min(0) + _MARGIN
        left = torch.maximum(at[..., :, None, :], at[..., None, :, :])
        right = torch.minimum((at + extent)[..., :, None, :], (at + extent)[..., None, :, :])
        common = (right - left).clamp_min(0).prod(-1) / extent.prod(-1).clamp_min(1)[:, :, None]  # (tries, n, 3, 3)
        pairs = there[:, :, None] & there[:, None, :] & ~torch.eye(MOST, dtype=torch.bool)
        fine = ~((common > 0.25) & pairs).flatten(2).any(2)  # (tries, n)
        best = fine.float().argmax(0)
        return at[best, torch.arange(count)], fine.any(0)

    def _backgrounds(self, laid: _Laid, rng: torch.Generator) -> Tensor:
        """(n, 3, 128, 128) soft gradients: the first of 16 that stands off from all things, else the best."""
        count = len(laid.there)
        low, high = torch.tensor([0, 0.04, 0.55]), torch.tensor([1, 0.28, 0.97])
        one = low + (high - low) * torch.rand(count, 16, 3, generator=rng)
        two = one + torch.tensor([0.15, 0, 0.15]) * (torch.rand(count, 16, 3, generator=rng) * 2 - 1)
        ends = _rgb(torch.stack([one, two], 2).clamp(torch.tensor([-1, 0, 0.5]), torch.tensor([2, 1.0, 1.0])))
        tones = self.atlas.tones.cpu()[laid.sprites].flatten(1, 2)  # (n, 6, 3)
        unused = ~laid.there.repeat_interleave(2, 1)
        contrast = (ends[:, :, :, None] - tones[:, None, None]).norm(dim=-1)  # (n, 16, 2, 6)
        contrast = contrast.masked_fill(unused[:, None, None], 9).amin((2, 3))
        best = ends[torch.arange(count), contrast.clamp(max=90 / 255).argmax(1)].to(self.device)  # (n, 2, 3)
        angle = (2 * torch.pi * torch.rand(count, generator=rng)).to(self.device)
        line = torch.linspace(-1, 1, SIDE, device=self.device)
        along = angle.sin()[:, None, None] * line[:, None] + angle.cos()[:, None, None] * line
        along = ((along / along.amax((1, 2), keepdim=True) + 1) / 2)[:, None]  # (n, 1, 128, 128)
        return best[:, 0, :, None, None] * (1 - along) + best[:, 1, :, None, None] * along

    def _paint(self, laid: _Laid, canvas: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures, (n, 3, 128, 128) in [0, 1], and (n, 3, 128, 128), what each thing covers by more than half."""
        count, device = len(laid.there), self.device
        sprites = self.atlas.pictures[laid.sprites.flatten().to(device)].float() / 255  # (n * 3, 4, 128, 128)
        small = (laid.scale < 60).flatten().to(device)  # much reduced: smoothed first, or it flickers
        sprites = torch.where(small[:, None, None, None], F.avg_pool2d(sprites, 3, 1, 1), sprites)
        angle = torch.tensor(ANGLES)[laid.turns].flatten().float().deg2rad()
        scale = laid.scale.flatten().clamp_min(1e-3)
        unit = SIDE / 2
        # From a place in the scene to one in the sprite: off the middle, into its unit, turned back (x, y; y down).
        cos, sin = angle.cos() * unit / scale, angle.sin() * unit / scale
        middle = laid.middle.flatten(0, 1) / unit - 1
        turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        shift = -(turn @ middle[..., None])
        moves = torch.cat([turn, shift], -1).to(device)
        grid = F.affine_grid(moves, [count * MOST, 4, SIDE, SIDE], align_corners=False)
        placed = F.grid_sample(sprites, grid, align_corners=False).unflatten(0, (count, MOST))
        placed = placed * laid.there.to(device)[:, :, None, None, None]
        order = laid.order.argsort(1).to(device)
        placed = placed[torch.arange(count, device=device)[:, None], order]  # front first
        clear = torch.ones(count, 1, SIDE, SIDE, device=device)
        masks = []
        for k in range(MOST):
            masks.append(placed[:, k, 3] * clear[:, 0] > 0.5)
            clear = clear * (1 - placed[:, k, 3:])
        for k in reversed(range(MOST)):
            canvas = placed[:, k, :3] + canvas * (1 - placed[:, k, 3:])
        stacked = torch.stack(masks, 1)[torch.arange(count, device=device)[:, None], laid.order.to(device)]
        return canvas.clamp(0, 1), stacked


def _told(concepts: Tensor, colours: Tensor, number: int, joint: bool) -> str:
    names = list(COLOURS)
    pairs = zip(concepts.tolist()[:number], colours.tolist(), strict=False)
    things = [(CONCEPTS[concept], names[colour - 1] if colour else None) for concept, colour in pairs]
    return caption(things, "with" if joint else "and")


def _rgb(hsv: Tensor) -> Tensor:
    """(..., 3) hue, saturation and value (hue wraps) to RGB in [0, 1]."""
    hue, saturation, value = (channel[..., None] for channel in hsv.unbind(-1))
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue) % 6
    return value * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1))
