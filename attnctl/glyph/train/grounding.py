"""Do the words of a caption look at their own things? A training loss that teaches it and a test that measures it.

The loss follows TokenCompose (arXiv 2312.03626): the part of a word's attention that falls outside its thing, squared.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from attnctl.glyph.scenes import Scene
from attnctl.glyph.words import COLOURS, CONCEPTS

GRID = 16


def owners(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids, (n, 77), and for each token the index of the thing it speaks of, (n, 77); -1 for all other tokens."""
    ids = tokenizer(list(captions), padding="max_length", max_length=77, return_tensors="pt").input_ids
    owner, lengths = torch.full_like(ids, -1), dict[str, int]()
    for row, caption in enumerate(captions):
        at, thing = 1, 0  # behind the start token
        for word in caption.replace(",", " ,").split():
            if word not in lengths:
                lengths[word] = len(tokenizer(word).input_ids) - 2
            pieces = lengths[word]
            if word in COLOURS or word in CONCEPTS:
                owner[row, at : at + pieces] = thing
                thing += word in CONCEPTS
            at += pieces
    return ids, owner


def coverage(scene: Scene, things: int = 3) -> Tensor:
    """(things, 16, 16) in [0, 1]: how much of each cell each thing covers; zeros where there are fewer things."""
    masks = torch.zeros(things, GRID, GRID)
    for k, thing in enumerate(scene.things):
        masks[k] = F.adaptive_avg_pool2d(torch.from_numpy(thing.mask).float()[None], GRID)[0]
    return masks


def grounding_loss(maps: dict[int, list[Tensor]], owner: Tensor, masks: Tensor, weight: Tensor) -> Tensor:
    """Mean over owned tokens, sites and rows of weight * (1 - mass on the own thing / mass anywhere)^2, a scalar.

    owner: (batch, 77); masks: (batch, things, 16, 16); weight: (batch,).
    """
    rows, tokens = torch.nonzero(owner >= 0, as_tuple=True)
    losses = []
    for side, sites in maps.items():
        own = F.adaptive_avg_pool2d(masks, side)[rows, owner[rows, tokens]].flatten(1)  # (words, cells)
        for site in sites:
            word = site[rows, :, tokens].float()  # (words, cells)
            inside = (word * own).sum(1) / word.sum(1).clamp_min(1e-8)
            losses.append(((1 - inside).square() * weight[rows]).mean())
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class MapScore:
    """pointing: part of nouns whose map peaks on their own thing. share: mass on the own thing over mass on both."""

    pointing: float
    share: float


@torch.no_grad()
def map_test(maps: Sequence[Tensor], owner: Tensor, nouns: Tensor, masks: Tensor) -> MapScore:
    """Scores two-thing scenes by the 16 x 16 maps, mean over sites and heads.

    maps: (batch, 256, 77) each; owner, nouns: (batch, 77), `nouns` true at the pieces of concept words; masks:
    (batch, things, 16, 16). A cell is on a thing where the thing covers half of it.
    """
    mean = torch.stack([site.float() for site in maps]).mean(0)
    hits, shares = [], []
    for row in range(len(mean)):
        own = masks[row].flatten(1)  # (things, cells)
        for thing in range(2):
            word = mean[row][:, (owner[row] == thing) & nouns[row]].sum(1)
            mass = own @ word
            hits.append(bool(own[thing, word.argmax()] >= 0.5))
            shares.append(float(mass[thing] / mass[:2].sum()))
    return MapScore(sum(hits) / len(hits), sum(shares) / len(shares))
