"""Composition: an object is put into a picture by steering self-attention and the words' attention (PrimeComposer).

After PrimeComposer (Wang et al., ACM MM 2024, arXiv 2403.05053). Beside the picture that is drawn, z, there is a
*composite* z*: the inversion latents of a background with those of the object in its cells F, at the noise level of z.
A pass over z* gives queries Q*, keys K* at each self-attention. *Infusion* then sets, in the conditional rows of z,

    S_ij = Q*_i K*_j scale    where i or j lies in F ("own" rows),       S_ij = Q_i K_j scale    elsewhere

before the softmax, and keeps the values of z. The paper takes the columns, S_ij for j in F, and for the rows their
transpose, S_ij = Q*_j K*_i scale for i in F ("columns"). "all" takes every logit from z*, as TF-ICON injects the
background's attention, too (Lu et al., ICCV 2023, arXiv 2307.12493).

No S is ever made. A row that takes some of its logits from elsewhere is one softmax over doubled heads,

    [Q_i, Q*_i] [(1 - b_j) K_j, b_j K*_j] = (1 - b_j) Q_i K_j + b_j Q*_i K*_j,     b_j = 1 where key j is borrowed,

which is exact and runs in the fused kernel. `ObjectWords` is region-constrained attention (RCA): the object's words
act in F only and, which is ours, the background's words outside of F only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.engine.control import AttentionCall, Control, Lane, Proceed
from attnctl.engine.run import Run, Step
from attnctl.engine.sites import Selection, Site, select
from attnctl.errors import ControlError, PhraseError
from attnctl.processors.regions import Masks, Placed, Regions
from attnctl.words.phrases import tokens

Rows = Literal["own", "columns", "all"]
COMPOSITE, PLAIN = "composite", "without infusion"  # names of passes

# --- maths ------------------------------------------------------------------------------------------------------------


def pasted(one: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """`one` with `other` where the mask is 1; the paper's PC."""
    return torch.lerp(one, other.to(one), mask.to(one))


def object_cells(cover: Tensor, least: float = 0.1) -> Tensor:
    """The cells of an object, (height, width) bool: those it covers by more than `least`, or else its best cells.

    Wide on purpose: by one half, strings, stalks and tips would be lost.
    """
    inside = cover > least
    return inside if inside.any() else cover >= cover.max()


def pooled(cells: Tensor, factor: int) -> Tensor:
    """The mask on a coarser grid, (height, width) bool, rounded up: a cell that holds any part of it. Never empty."""
    return F.max_pool2d(cells.float()[None, None], factor, factor, ceil_mode=True)[0, 0] > 0


def factor_of(cells: tuple[int, int], grid: tuple[int, int]) -> int:
    """How many cells a cell of a coarser grid spans along one side; halving rounds up."""
    for factor in (2**power for power in range(12)):
        if grid == (-(-cells[0] // factor), -(-cells[1] // factor)):
            return factor
    raise ControlError(f"a grid of {grid[0]} x {grid[1]} is no halving of {cells[0]} x {cells[1]} latents")


def borrowing(
    q: Tensor, k: Tensor, v: Tensor, q2: Tensor, k2: Tensor, borrowed: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention whose logits are q k, but q2 k2 for the borrowed keys; one softmax over both.

    Args:
        q, q2: (batch, heads, queries, head_dim).
        k, v, k2: (batch, heads, keys, head_dim).
        borrowed: (keys,) bool.
        scale: of the logits.
        bias: added to the logits; broadcasts to (batch, heads, queries, keys).

    Returns:
        (batch, heads, queries, head_dim).
    """
    if borrowed.all():
        return F.scaled_dot_product_attention(q2, k2, v, bias, scale=scale)
    if not borrowed.any():
        return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    chosen = borrowed[:, None]
    keys = torch.cat([k.masked_fill(chosen, 0), k2.masked_fill(~chosen, 0)], -1)
    values = F.pad(v, (0, k.shape[-1]))  # fused kernels want values as wide as keys
    out = F.scaled_dot_product_attention(torch.cat([q, q2], -1), keys, values, bias, scale=scale)
    return out[..., : v.shape[-1]]


def infused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2: Tensor,
    k2: Tensor,
    inside: Tensor,
    image: slice,
    scale: float,
    bias: Tensor | None = None,
    rows: Rows = "own",
) -> Tensor:
    """Self-attention of one picture with the logits of an object's rows and columns from its composite.

    Args:
        q, k, v: (1, heads, tokens, head_dim), of the picture that is drawn.
        q2, k2: the same of the composite.
        inside: (cells,) bool, the object's among the picture's cells.
        image: which of the tokens are the picture's cells; the others, of text, are left as they are.
        scale: of the logits.
        bias: added to the logits; broadcasts to (1, heads, tokens, tokens).
        rows: "own": the object's rows from the composite's rows. "columns": from its columns, turned, as in the paper.
            "all": every row and column of the picture.

    Returns:
        (1, heads, tokens, head_dim).
    """
    count = q.shape[2]
    everywhere = torch.zeros(count, dtype=torch.bool, device=q.device)
    everywhere[image] = True
    mine = torch.zeros_like(everywhere)
    mine[image] = True if rows == "all" else inside.to(q.device)
    out = torch.empty_like(q)
    first, second = (k2, q2) if rows == "columns" else (q2, k2)
    for chosen, borrowed, other, keys in (
        (mine, everywhere, first, second),
        (everywhere & ~mine, mine, q2, k2),
        (~everywhere, torch.zeros_like(mine), q2, k2),
    ):
        if not chosen.any():
            continue
        at = chosen.nonzero().flatten()
        own = bias if bias is None or bias.shape[-2] == 1 else bias.index_select(-2, at)
        part = borrowing(q.index_select(2, at), k, v, other.index_select(2, at), keys, borrowed, scale, own)
        out.index_copy_(2, at, part)
    return out


# --- the controls -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Infusing:
    """What infusion keeps of one run: the composite's queries and keys at each site, for the step under way."""

    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    most: int = 0  # bytes that were kept at once


@dataclass(frozen=True, eq=False)
class Infusion(Control):
    """The self-attention of an object comes from a composite, see above.

    Settings:
        objects: (images, height, width) bool, the object's cells among the latents of each image.
        composite: (number of the step) -> the composite's latents, shaped like those of the step.
        until: so many steps are infused.
        rows: see `infused`.
        extended: add to the conditional prediction what infusion changed in it, by one pass more: the paper's extended
            guidance, u + s (c - u) + s (c - c without infusion).
        where: sites to act at. None: all where the picture attends to itself.
    """

    objects: Tensor
    composite: Callable[[int], Tensor]
    until: int
    rows: Rows = "own"
    extended: bool = False
    where: Selection = None

    lane: ClassVar[Lane] = Lane.PROBS

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return select(available, ("self", "joint") if self.where is None else self.where)

    def begin(self, run: Run) -> Infusing:
        if len(self.objects) != run.images:
            raise ControlError(f"{len(self.objects)} objects do not fit {run.images} pictures")
        return Infusing()

    def before_denoise(self, step: Step) -> None:
        state: Infusing = step.run.state(self)
        state.kept.clear()
        if step.index >= self.until:
            return
        edited = step.sample.edited
        step.latents = self.composite(step.index)
        step.forward(COMPOSITE)
        step.sample.edited = edited
        sizes = (one.numel() * one.element_size() for pair in state.kept.values() for one in pair)
        state.most = max(state.most, sum(sizes))

    def after_denoise(self, step: Step, output: Tensor) -> Tensor | None:
        state: Infusing = step.run.state(self)
        if not (self.extended and state.kept and step.rows.cond is not None):
            return None
        with_it, rows = output[step.rows.cond], step.rows.cond
        output = output.clone()
        output[rows] = 2 * with_it - step.forward(PLAIN).to(with_it)
        return output

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        state: Infusing = call.step.run.state(self)
        rows, name = call.step.rows, call.step.pass_name
        if name == COMPOSITE:
            state.kept[call.site.name] = call.q, call.k
            return proceed(call)
        if name == PLAIN or rows.cond is None or call.site.name not in state.kept:
            return proceed(call)
        assert call.site.factor is not None
        q2, k2 = state.kept[call.site.name]
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        out = call.q.new_empty(*call.q.shape[:-1], call.v.shape[-1])
        if rows.uncond is not None:
            own = slice(rows.uncond.start, rows.uncond.stop)
            out[own] = F.scaled_dot_product_attention(
                call.q[own], call.k[own], call.v[own], _of_rows(call.bias, own), scale=scale
            )
        for row, image in zip(range(rows.cond.start, rows.cond.stop), call.step.images, strict=True):
            one, star = slice(row, row + 1), slice(image, image + 1)
            inside = pooled(self.objects[image], call.site.factor).flatten()
            out[one] = infused(
                call.q[one], call.k[one], call.v[one], q2[star], k2[star], inside, call.image, scale,
                _of_rows(call.bias, one), self.rows,
            )  # fmt: skip
        return out


def _of_rows(bias: Tensor | None, rows: slice) -> Tensor | None:
    return bias if bias is None or bias.ndim < 4 or bias.shape[0] == 1 else bias[rows]


@dataclass(frozen=True)
class ObjectWords(Regions):
    """RCA for one object in each picture: its words act in its cells only, other words outside of them only.

    Settings:
        objects: (images, height, width) bool, as for `Infusion`.
        words: of each image, phrases that act inside.
        others: of each image, phrases that act outside.
        masks: not read; the settings beside it as for `Regions`.
    """

    masks: Masks = ()
    inside: float = 0.0
    objects: Any = None
    words: tuple[tuple[str, ...], ...] = ()
    others: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        """The masks are the objects'; nothing else is to be checked."""

    def begin(self, run: Run) -> Placed:
        if len(self.objects) != run.images:
            raise ControlError(f"{len(self.objects)} objects do not fit {run.images} pictures")
        found: list[list[list[int]]] = []
        for image in range(run.images):
            inside, outside = (
                sorted({row for phrase in named[image] for row in tokens(run, phrase, image)})
                for named in (self.words, self.others)
            )
            if both := set(inside) & set(outside):
                raise PhraseError(f"words of the object and of the background share {len(both)} tokens")
            found.append([[]] * (2 * image) + [inside, outside] + [[]] * (2 * (run.images - image - 1)))
        return Pooled((), found, run.whole, run.view, cells=self.objects)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        if call.step.pass_name == COMPOSITE:
            return proceed(call)
        return super().attend(call, proceed)


@dataclass(eq=False)
class Pooled(Placed):
    """Regions of several objects: number 2 n is the n-th object, 2 n + 1 all around it."""

    cells: Any = None

    def masks(self, grid: tuple[int, int], chosen: Any) -> Tensor:
        if grid not in self.grids:
            factor = factor_of(tuple(self.cells.shape[-2:]), grid)
            on = [pooled(one, factor).flatten() for one in self.cells]
            self.grids[grid] = torch.stack([mask for one in on for mask in (one, ~one)])
        return self.grids[grid][list(chosen)]
