"""What all controls by a loss on word maps share: differentiable maps of phrases, and the step of the latents.

The recipe is that of Attend-and-Excite (Chefer et al., SIGGRAPH 2023, arXiv 2301.13826), from their formulas; what we
changed says so. Everything here works on each image by itself, so a batch gives what its pictures give alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.engine.control import AttentionCall
from attnctl.engine.run import Step
from attnctl.engine.sites import Site
from attnctl.errors import PhraseError, of_image
from attnctl.maps.probabilities import call_maps
from attnctl.maps.reader import check_rows, join_grids
from attnctl.words.phrases import TextStream, positions, text_rows
from attnctl.words.spelling import NUMBERED

Preparation = Literal["attend-and-excite", "attend-and-excite-padded", "share", "mean"]
Columns = Literal["phrases", "prompt", "padded"]

ENOUGH = 192  # cells; 16 x 12 is the 4:3 brother of the papers' 16 x 16


@dataclass(frozen=True)
class PhraseTokens:
    """Which tokens to read for which phrases, for each image.

    Attributes:
        tokens: (images, tokens) text rows; short lists are filled up with row 0.
        real: (images, tokens), False where it was filled up.
        members: (images, phrases, tokens), 1 where a token is part of a phrase.
        words: (images, phrases, words, tokens), 1 where a token is part of that word of a phrase; 0 beyond the last.
    """

    tokens: Tensor
    real: Tensor
    members: Tensor
    words: Tensor

    @property
    def present(self) -> Tensor:
        """(images, phrases), True where the image's prompt has the phrase."""
        return self.members.any(dim=-1)

    def whole(self, columns: Sequence[int] | None = None) -> Tensor:
        """(images, columns), True where the image has the phrase and it is no part of a longer one among `columns`.

        So "car" does not count in "a red car" if "red car" is asked for too; in another prompt of the batch it may.
        """
        members = self.members if columns is None else self.members[:, list(columns)]
        sizes, shared = members.sum(-1), members @ members.mT
        part = (shared == sizes[:, :, None]) & (sizes[:, :, None] < sizes[:, None])
        return members.any(-1) & ~part.any(-1)

    def to(self, device: torch.device) -> PhraseTokens:
        return PhraseTokens(*(x.to(device) for x in (self.tokens, self.real, self.members, self.words)))

    def pick(self, images: Sequence[int]) -> PhraseTokens:
        """The same of some of the images."""
        numbers = list(images)
        return PhraseTokens(*(x[numbers] for x in (self.tokens, self.real, self.members, self.words)))


def phrase_tokens(texts: Sequence[tuple[TextStream, ...]], phrases: Sequence[str], columns: Columns) -> PhraseTokens:
    """Find phrases in the prompt of each image.

    Args:
        texts: the text streams of each image.
        phrases: an image whose prompt lacks one does without it.
        columns: which tokens to read: those of the "phrases"; all of the "prompt"; or "padded", every row but the first
            and the last of each stream, as diffusers' Attend-and-Excite does.

    Raises:
        PhraseError: no prompt has the phrase.
    """
    places: list[list[list[int]]] = []  # image, phrase, rows
    trouble: dict[str, PhraseError] = {}
    for text in texts:
        places.append([])
        for phrase in phrases:
            try:
                places[-1].append(positions(text, phrase))
            except PhraseError as error:
                trouble.setdefault(phrase, error)
                places[-1].append([])
    for column, phrase in enumerate(phrases):
        if not any(image[column] for image in places):
            raise of_image(trouble[phrase], 0, [text[0].prompt for text in texts], everywhere=True)
    rows = [_columns(text, image, columns) for text, image in zip(texts, places, strict=True)]
    most = max(map(len, rows))
    members = torch.zeros(len(rows), len(phrases), most)
    words = torch.zeros(len(rows), len(phrases), max(len(phrase.split()) for phrase in phrases), most)
    for i, (text, image) in enumerate(zip(texts, places, strict=True)):
        for j, (phrase, found) in enumerate(zip(phrases, image, strict=True)):
            members[i, j, [rows[i].index(row) for row in found]] = 1.0
            for k, word in enumerate(words_of(text, phrase, found)):
                words[i, j, k, [rows[i].index(row) for row in word]] = 1.0
    tokens = torch.tensor([one + [0] * (most - len(one)) for one in rows])
    real = torch.arange(most) < torch.tensor([len(one) for one in rows])[:, None]
    return PhraseTokens(tokens, real, members, words)


def _columns(text: tuple[TextStream, ...], found: list[list[int]], columns: Columns) -> list[int]:
    """Text rows to read for one image, ascending."""
    own = {row for rows in found for row in rows}
    if columns == "prompt":
        return sorted(own | set(text_rows(text)))
    if columns == "padded":
        return sorted(own | {one.offset + row for one in text for row in range(1, one.length - 1)})
    return sorted(own)


def words_of(text: tuple[TextStream, ...], phrase: str, rows: Sequence[int]) -> list[list[int]]:
    """The rows of a phrase, word by word; all of them as one where its words cannot be told apart."""
    numbered = NUMBERED.fullmatch(phrase)
    found = []
    for word in (numbered[1] if numbered else phrase).split():
        try:
            own = set(positions(text, word)).intersection(rows)
        except PhraseError:
            own = set()
        found.append(sorted(own))
    return found if rows and all(found) else [list(rows)]


def default_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    """Candidates for reading maps: all cross sites; where there are none, the middle third of the joint ones (ours)."""
    cross = tuple(site for site in sites if site.kind == "cross")
    joint = tuple(site for site in sites if site.kind == "joint")
    third = len(joint) // 3
    return cross or joint[third : len(joint) - third]


def coarsest(sites: Sequence[Site], latent_size: tuple[int, int]) -> tuple[Site, ...]:
    """The sites of the coarsest grid that still has 192 cells; if none has, of the finest.

    At 512 x 512 these are Attend-and-Excite's 16 x 16 sites of SD 1, at 1024 x 1024 the 32 x 32 ones of SDXL; the rule
    that extends their choice to other sizes is ours.
    """

    def cells(site: Site) -> int:
        height, width = site.grid(*latent_size)
        return height * width

    counts = {cells(site) for site in sites}
    best = min((count for count in counts if count >= ENOUGH), default=max(counts, default=0))
    return tuple(site for site in sites if cells(site) == best)


def read_maps(
    step: Step,
    latents: Tensor,
    sites: Sequence[Site],
    tokens: Tensor,
    images: Sequence[int] | None = None,
    checkpoint: bool = False,
    bfloat16: bool = False,
) -> Tensor:
    """Probabilities of tokens in an extra forward with these latents; differentiable in the latents.

    Args:
        step: the denoiser call under way.
        latents: unscaled, like `step.latents`, or like its rows of `images`.
        sites: where to read; several grids are averaged on the finest.
        tokens: (images, tokens) text rows.
        images: which of the step's images these are. None: all.
        checkpoint, bfloat16: see `Step.probe`.

    Returns:
        (images, tokens, height, width), float32, mean over heads and sites.
    """
    calls: list[AttentionCall] = []
    step.probe(latents, dict.fromkeys(sites, calls.append), images, checkpoint, bfloat16)
    sums: dict[tuple[int, int], Tensor] = {}
    last = int(tokens.max())
    for call in calls:  # only now: what is computed inside a checkpointed block would be missing when it runs again
        check_rows(call, last)
        maps = call_maps(call, slice(0, tokens.shape[0]), tokens).mean(dim=1)  # (images, cells, tokens)
        maps = maps.mT.unflatten(-1, call.grid)
        sums[call.grid] = sums[call.grid] + maps if call.grid in sums else maps
    return join_grids(sums) / len(sites)


def columns_of(preparation: Preparation) -> Columns:
    """The tokens that a preparation of maps needs."""
    return {"attend-and-excite": "prompt", "attend-and-excite-padded": "padded"}.get(preparation, "phrases")  # type: ignore[return-value]


def phrase_maps(maps: Tensor, phrase_tokens: PhraseTokens, preparation: Preparation) -> Tensor:
    """Maps of phrases from probabilities of tokens. The tokens of a phrase are summed.

    Args:
        maps: (images, tokens, height, width) probabilities, mean over heads and sites.
        phrase_tokens: which token is part of what.
        preparation: of these, the tokens in `phrase_tokens` must be those of `columns_of`.
            "attend-and-excite"  softmax of 100 p over the prompt's own tokens (no start, end and padding), then a
                                 blur: values in [0, 1], and words compete for each place;
            "attend-and-excite-padded"  the same over every column but the first and the last, end and padding
                                 included, as diffusers' port does (and SD 1's padding is end tokens, which compete);
            "share"              each phrase's map divided by its sum, so that no word can win by fading (ours);
            "mean"               the probabilities as they are.

    Returns:
        (images, phrases, height, width); zeros where an image does not have the phrase.
    """
    competing = preparation.startswith("attend-and-excite")
    if competing:
        real = phrase_tokens.real[:, :, None, None]
        maps = (100 * maps).masked_fill(~real, float("-inf")).softmax(dim=1)
    maps = torch.einsum("ithw,ipt->iphw", maps, phrase_tokens.members.to(maps))
    if competing:
        return blur(maps)
    if preparation == "share":
        return maps / maps.sum(dim=(-2, -1), keepdim=True).clamp_min(1e-8)
    return maps


def lowest_peak(maps: Tensor, phrase_tokens: PhraseTokens) -> Tensor:
    """The highest probability with which a place looks at a phrase, mean over its words, of the phrase worst off.

    The tokens of a word are summed. A phrase that is part of a longer one does not count.

    Args:
        maps: (images, tokens, height, width) probabilities.

    Returns:
        (images,).
    """
    words = phrase_tokens.words.to(maps)
    peaks = torch.einsum("itc,ipwt->ipwc", maps.flatten(2), words).amax(-1)
    means = peaks.sum(-1) / words.any(-1).sum(-1).clamp_min(1)
    return means.masked_fill(~phrase_tokens.whole(), torch.inf).amin(-1)


def blur(maps: Tensor) -> Tensor:
    """The 3 x 3 Gaussian of Attend-and-Excite's code, reflected at the borders; its true sigma is 0.5 ** 0.5.

    Args:
        maps: (images, phrases, height, width). Where a side is 1 there is nothing to reflect; its border is repeated.
    """
    line = torch.tensor([-1.0, 0.0, 1.0], dtype=maps.dtype, device=maps.device).square().neg().exp()
    kernel = torch.outer(line, line) / line.sum().square()
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    padded = F.pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode=mode)
    return F.conv2d(padded, kernel[None, None]).view(maps.shape)


def step_size(position: int, steps: int) -> float:
    """Attend-and-Excite's step of the latents: 20 at the first of `steps` positions, falling to 20 * sqrt(0.5).

    Meant for latents of unit variance (DDIM and its kin). A sampler whose latents have variance 1 + sigma^2 (Euler,
    LMS, Heun) needs (1 + sigma^2) times as much, because the gradient passes the scaling once and the step once more.
    """
    return 20.0 * (1.0 - 0.5 * position / max(steps - 1, 1)) ** 0.5


def gradients(losses: Tensor, latents: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of each image's loss with respect to its own latents.

    Args:
        losses: (images,).
        latents: (images, ...), a leaf of the graph.
        scale: (images,) powers of two; losses are multiplied by them on the way through a half-precision model, so that
            small gradients survive, and gradients are divided by them after.

    Returns:
        (gradient shaped like latents, (images,) True where it is finite); where it is not, the gradient is zero.
    """
    gradient = torch.autograd.grad((losses * scale).sum(), latents)[0] / _rows(scale, latents)
    finite = gradient.flatten(1).isfinite().all(dim=1)
    return torch.where(_rows(finite, gradient), gradient, 0.0), finite


def descend(latents: Tensor, gradient: Tensor, size: float, relative: bool, keep_norm: bool = False) -> Tensor:
    """One step down the gradient.

    Args:
        latents: (images, ...).
        gradient: of the same shape; an image whose gradient is zero stays what it was, bit for bit.
        size: factor of the gradient, or, if `relative`, length of the step as a share of the length of the latents.
        keep_norm: give each image back the length it had.
    """
    length, slope = _length(latents), _length(gradient)
    if relative:
        size = size * length / slope.clamp_min(torch.finfo(slope.dtype).tiny)  # type: ignore[assignment]
    moved = latents - size * gradient
    if keep_norm:
        moved = moved * (length / _length(moved))
    return torch.where(slope > 0, moved, latents)


def _length(x: Tensor) -> Tensor:
    return _rows(x.flatten(1).norm(dim=1), x)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(images,) -> (images, 1, ...), to go with a tensor of images."""
    return values.view(-1, *[1] * (like.ndim - 1))
