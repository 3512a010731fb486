"""The judge: reads a picture of the glyph world back, which things are in it, in which colours and where.

It needs neither the font nor diffusers. A thing counts when about 70 % of it are there: of the halves of two animals
glued together, or of two things shining through each other, neither does.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from attnctl.glyph.words import ANIMALS, COLOURS, CONCEPTS, Prompt, phrase

SIDE, LOOKED_AT, GRID = 128, 64, 32  # sides: of a picture as it comes, as the network sees it, and of the masks
SHIPPED = Path(__file__).parent / "models" / "judge"

Floats = NDArray[np.float32]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Seen:
    """One concept in a picture.

    `colour` is one of the 11 names, the nearest for objects in natural colours, and None for animals. `confidence` is a
    probability. `mask`, (32, 32) in [0, 1], is how much of each cell the concept covers. `box` is (x0, y0, x1, y1) in
    [0, 1], x to the right and y down, around the largest connected part of the mask: a concept that appears twice is
    seen once, with both in its mask and the larger one in its box.
    """

    concept: str
    colour: str | None
    box: Box
    confidence: float
    mask: Floats


@dataclass(frozen=True, eq=False)
class Reading:
    """What is in a picture, most certain first; empty if it shows none of the 24 concepts."""

    things: tuple[Seen, ...]

    def __str__(self) -> str:
        """As in "a cat and a red car", or "none of its things"."""
        names = [phrase(thing.concept, thing.colour) for thing in self.things]
        return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]])) or "none of its things"

    def _find(self, concept: str) -> Seen | None:
        if concept not in CONCEPTS:
            raise ValueError(f"the judge does not know {concept!r}, only {', '.join(CONCEPTS)}")
        return next((thing for thing in self.things if thing.concept == concept), None)

    def has(self, concept: str) -> bool:
        """Whether `concept` is in the picture; ValueError if it is none of the 24."""
        return self._find(concept) is not None

    def colour_of(self, concept: str) -> str | None:
        """The colour of an object; None for animals and what is absent. ValueError if it is none of the 24."""
        thing = self._find(concept)
        return thing.colour if thing else None

    def area_of(self, concept: str) -> float:
        """The part of the picture, from 0 to 1, that `concept` covers: mask cells of 0.5 or more. 0 if it is absent."""
        thing = self._find(concept)
        return float((thing.mask >= 0.5).mean()) if thing else 0.0

    def satisfies(self, prompt: Prompt) -> tuple[tuple[bool, ...], tuple[bool | None, ...]]:
        """For each thing of the prompt: whether it is present, and whether it has the colour asked for.

        The latter is None where no colour is asked for, and False where the thing is absent.
        """
        present = tuple(self.has(concept) for concept, _ in prompt.things)
        colours = tuple(self.colour_of(concept) == colour if colour else None for concept, colour in prompt.things)
        return present, colours

    def to_dict(self) -> dict[str, list[dict[str, object]]]:
        """{"things": [{"concept", "colour", "box", "confidence"}]}, plain values; the masks are left out."""
        things: list[dict[str, object]] = [
            {
                "concept": thing.concept,
                "colour": thing.colour,
                "box": [round(edge, 3) for edge in thing.box],
                "confidence": round(thing.confidence, 4),
            }
            for thing in self.things
        ]
        return {"things": things}


class _Block(nn.Sequential):
    """Convolution, normalisation, ReLU; normalised over the batch, for a picture's own mean is part of its colours."""

    def __init__(self, inside: int, outside: int, stride: int = 1, kernel: int = 3) -> None:
        convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2 - (kernel + 1) % 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outside), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _Block(width, width), _Block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(self.first(x))
        return out


class Network(nn.Module):
    """Pictures, (n, 3, 64, 64) in [-1, 1], to logits: of presence (n, 24), masks (n, 24, 32, 32), colours (n, 24, 11).

    Down to 4 x 4, where whole things are seen, and back up to 16 x 16. Each concept looks where its mask is and decides
    there on its presence and colour.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        w, concepts = width, len(CONCEPTS)
        self.fine = nn.Sequential(_Block(3, w, 2, 4), _Block(w, w))  # 32 x 32
        self.middle = nn.Sequential(_Block(w, 2 * w, 2), _Residual(2 * w))  # 16 x 16
        self.coarse = nn.Sequential(_Block(2 * w, 4 * w, 2), _Residual(4 * w))  # 8 x 8
        self.whole = nn.Sequential(_Block(4 * w, 4 * w, 2), _Block(4 * w, 4 * w))  # 4 x 4
        self.up = _Block(4 * w, 2 * w, kernel=1)
        self.out = _Block(2 * w, 2 * w)
        self.masks = nn.Conv2d(2 * w, 4 * concepts, 1)  # 2 x 2 values a cell
        nn.init.constant_(self.masks.bias, -4.0)  # type: ignore[arg-type]  # most of a picture is background
        self.presence = nn.Parameter(torch.zeros(concepts, 2 * w))
        self.doubt = nn.Parameter(torch.full((concepts,), -2.0))
        self.colours = nn.Sequential(nn.Linear(2 * w + 3, 2 * w), nn.ReLU(), nn.Linear(2 * w, len(COLOURS)))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        middle = self.middle(self.fine(pictures))
        coarse = self.coarse(middle)
        coarse = coarse + F.interpolate(self.whole(coarse), scale_factor=2.0)
        features = self.out(middle + F.interpolate(self.up(coarse), scale_factor=2.0))
        masks = F.pixel_shuffle(self.masks(features), 2)
        look = F.avg_pool2d(masks, 2).flatten(2).softmax(-1)  # (n, 24, 256)
        found = look @ features.flatten(2).transpose(1, 2)  # (n, 24, 2 w)
        rgb = look @ F.avg_pool2d(pictures, 4).flatten(2).transpose(1, 2)  # (n, 24, 3)
        presence = (found * self.presence).sum(-1) + self.doubt
        return presence, masks, self.colours(torch.cat([found, rgb], -1))


def shrunk(image: Image.Image) -> NDArray[np.uint8]:
    """What the network sees of a picture of any size: (64, 64, 3), by way of 128 x 128; other shapes are stretched."""
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image.reduce(SIDE // LOOKED_AT))


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """(n, h, w, 3) to (n, 3, h, w) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _largest_part(on: NDArray[np.bool_], mask: Floats) -> NDArray[np.bool_]:
    """Of the cells `on`, those of the connected part (corners connect) that has most of `mask`."""
    part = np.where(on, np.arange(1, on.size + 1).reshape(on.shape), 0)
    while True:  # each cell takes the largest number around it
        padded = np.pad(part, 1)
        shifts = [padded[y : y + on.shape[0], x : x + on.shape[1]] for y in range(3) for x in range(3)]
        spread = np.where(on, np.max(shifts, axis=0), 0)
        if (spread == part).all():
            break
        part = spread
    largest = np.bincount(part.ravel(), weights=(mask * on).ravel()).argmax()
    return on & (part == largest)


def box_of(mask: Floats, least: float = 0.1) -> Box:
    """(x0, y0, x1, y1) in [0, 1] around the largest connected part of a (n, n) mask.

    A cell belongs to it from `least` on. Into the cells at its edges it reaches as far as the root of what it covers of
    them, for what sticks out is narrow: ears, handles, the top of a round thing.
    """
    on = mask >= min(least, mask.max())
    mask = mask * _largest_part(on, mask)
    edges = []
    for profile in np.sqrt([mask.max(0), mask.max(1)]):
        inside = np.flatnonzero(profile)
        first, last = inside[0], inside[-1]
        low, high = first + 1 - profile[first], last + profile[last]
        edges.append((low, high) if low < high else (first, last + 1))
    (x0, x1), (y0, y1) = edges
    n = mask.shape[0]
    return float(x0 / n), float(y0 / n), float(x1 / n), float(y1 / n)


class Judge:
    """A trained network with the probability from which on a concept counts as present."""

    def __init__(self, network: nn.Module, threshold: float, device: str | torch.device = "cpu") -> None:
        self.network = network.to(device).eval()
        self.threshold, self.device = threshold, device

    @torch.inference_mode()
    def logits(self, images: Sequence[Image.Image], batch: int = 32) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The network's logits, one triple for each picture: (24,), (24, 32, 32) and (24, 11)."""
        out: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(images), batch):
            seen = np.stack([shrunk(image) for image in images[start : start + batch]])
            out += zip(*(part.float().cpu() for part in self.network(pixels(seen).to(self.device))), strict=True)
        return out

    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """One reading for each picture; any sizes and modes. A picture is read the same in any company."""
        return [self._reading(*logits) for logits in self.logits(images)]

    def _reading(self, presence: Tensor, masks: Tensor, colours: Tensor) -> Reading:
        confidence = presence.sigmoid()
        things = []
        for k in confidence.argsort(descending=True).tolist():
            if confidence[k] < self.threshold:
                break
            mask: Floats = masks[k].sigmoid().numpy()
            colour = None if CONCEPTS[k] in ANIMALS else list(COLOURS)[int(colours[k].argmax())]
            things.append(Seen(CONCEPTS[k], colour, box_of(mask), float(confidence[k]), mask))
        return Reading(tuple(things))


def load(folder: Path | None = None, device: str | torch.device = "cpu", threshold: float | None = None) -> Judge:
    """The judge in `folder`, or the one that ships.

    threshold: probability from which on a concept counts as present, above 0 and below 1; None is the judge's own, 0.5.
    Probabilities lie close to 0 and 1: 0.98 is stricter on things that are half there, and misses a few that are.

    Raises FileNotFoundError if the folder lacks config.json or judge.safetensors, ValueError if it was trained on other
    words than those of this version, or for another threshold.
    """
    if threshold is not None and not 0 < threshold < 1:
        raise ValueError(f"a judge's threshold lies between 0 and 1, not at {threshold:g}")
    folder = Path(folder or SHIPPED)
    for name in ("config.json", "judge.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no judge in {folder}: {name} is missing")
    config = json.loads((folder / "config.json").read_text())
    if config["concepts"] != list(CONCEPTS) or config["colours"] != list(COLOURS):
        raise ValueError(f"the judge in {folder} was trained on other concepts or colours: train it again")
    network = Network(config["width"])
    weights = load_file(folder / "judge.safetensors")
    network.load_state_dict({name: value.float() for name, value in weights.items()})
    return Judge(network, config["threshold"] if threshold is None else threshold, device)
