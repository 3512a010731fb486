"""Row groups: attention of a few sets of rows over a few sets of keys, as one fused call a set and without a mask.

A mask M of (queries, keys) keeps the fast kernels away and costs queries x keys of memory. But regions make few kinds
of rows: all places of one region may see the same keys. So, for group g with rows Q_g, keys K_g and weights w_g,

    out_i = sum_g w_g(i) softmax_{j in K_g}( q_i k_j scale + b_g(j) ) v_j

is one call of the model's own kernel for each group. Where every row is in one group this equals attention under the
dense mask; it costs no more than plain attention, since the groups' rows add up to all rows. A row in several groups
(soft edges of regions, a share of the base prompt) gets their mixture.

Nothing here knows a model. All tensors are in the canonical layout (batch, heads, rows, head_dim).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnctl.errors import ControlError

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]  # (q, k, v, bias, scale) -> output
Picked = slice | Tensor

CALL = 40_000
"""What a call of the kernel costs beside its sums, in cells of the (queries, keys) table; measured on a CPU."""
MASKED = 1.3
"""How much slower a cell is under a mask, at the least."""


@dataclass(frozen=True, eq=False)
class Group:
    """Some rows and the keys they may see.

    Attributes:
        rows: (n,) long, ascending: queries.
        keys: (m,) long, ascending.
        weight: (n,) float32, the share of this group in the output of each of its rows; None: all of it.
        bias: (m,) float32, added to the logits of each key; None: nothing.
    """

    rows: Tensor
    keys: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Part:
    """Batch rows that share their groups; None means all of the batch."""

    batch: slice | None
    groups: tuple[Group, ...]


@dataclass(eq=False)
class RowGroups:
    """A partition of an attention call, for each part of its batch.

    Args:
        parts: they do not overlap, and cover the batch.
        queries, keys: lengths of the call.

    Raises:
        ControlError: a row is in no group or its weights do not add up to 1, or a group has no key: then a place of the
            picture would see nothing at all.
    """

    parts: tuple[Part, ...]
    queries: int
    keys: int
    _kept: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in self.parts:
            total = torch.zeros(self.queries)
            for group in part.groups:
                if not len(group.keys):
                    raise ControlError(f"{len(group.rows)} rows would have no key to attend to")
                share = torch.ones(len(group.rows)) if group.weight is None else group.weight.float()
                total.index_add_(0, group.rows, share)
            if not torch.allclose(total, torch.ones(()), atol=1e-4):
                raise ControlError(f"the weights of row {int((total - 1).abs().argmax())} do not add up to 1")

    @property
    def mixed(self) -> bool:
        """Whether some row is in several groups; then no bias says the same, see `dense`."""
        return any(group.weight is not None for part in self.parts for group in part.groups)

    def worth_it(self) -> bool:
        """Whether the groups cost less than one call under a mask: not where the table or a group is tiny."""
        cost = sum(len(one.rows) * len(one.keys) + CALL for part in self.parts for one in part.groups)
        return self.mixed or cost < len(self.parts) * self.queries * self.keys * MASKED + CALL

    def dense(self, batch: int, like: Tensor) -> Tensor:
        """The same as a bias, (batch or 1, 1, queries, keys) in the dtype and on the device of `like`.

        Rows in several groups have the logarithm of the share each key is open with: exact for rows in one group, and
        for the others one softmax over the mixture instead of the mixture of their softmaxes.
        """
        known = "dense", batch, like.dtype, like.device
        if known not in self._kept:
            whole = torch.zeros(1 if self.parts[0].batch is None else batch, self.queries, self.keys)
            for part in self.parts:
                share = torch.zeros(self.queries, self.keys)
                for group in part.groups:
                    weight = torch.ones(len(group.rows)) if group.weight is None else group.weight
                    scale = torch.ones(len(group.keys)) if group.bias is None else group.bias.exp()
                    share[group.rows[:, None], group.keys] += weight[:, None] * scale
                whole[slice(None) if part.batch is None else part.batch] = share.log()
            self._kept[known] = whole[:, None].to(like)
        return self._kept[known]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, kernel: Kernel
    ) -> Tensor:
        """Attention by groups; `bias` is what comes on top, broadcast to (batch, heads, queries, keys)."""
        if not self.worth_it():
            extra = self.dense(q.shape[0], q)
            return kernel(q, k, v, extra if bias is None else additive(bias, q) + extra, scale)
        outs = [self._part(n, q, k, v, bias, scale, kernel) for n in range(len(self.parts))]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _part(
        self, number: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, kernel: Kernel
    ) -> Tensor:
        batch = self.parts[number].batch
        if batch is not None:
            q, k, v = q[batch], k[batch], v[batch]
            bias = bias if bias is None or bias.shape[0] == 1 else bias[batch]
        out: Tensor | None = None
        for rows, keys, weight, own in self._on(number, q):
            extra = None if bias is None else _cut(bias, rows, keys)
            if own is not None:
                own = own.expand(1, 1, 1, -1)
                extra = own if extra is None else additive(extra, q) + own
            part = kernel(_take(q, rows), _take(k, keys), _take(v, keys), extra, scale)
            if part.shape[2] == q.shape[2] and weight is None:
                return part
            if out is None:
                out = part.new_zeros(*q.shape[:3], part.shape[3])
            if weight is not None:
                part = part * weight[:, None]
            out = _added(out, rows, part, weight is not None)
        assert out is not None
        return out

    def _on(self, number: int, like: Tensor) -> list[tuple[Picked, Picked, Tensor | None, Tensor | None]]:
        """The groups of a part as `like` needs them: (rows, keys, weights, bias), indices as slices where they can."""
        known = number, like.dtype, like.device
        if known not in self._kept:
            self._kept[known] = [
                (
                    _run(group.rows, like.device),
                    _run(group.keys, like.device),
                    None if group.weight is None else group.weight.to(like),
                    None if group.bias is None else group.bias.to(like),
                )
                for group in self.parts[number].groups
            ]
        return self._kept[known]


def additive(bias: Tensor, like: Tensor) -> Tensor:
    """A bias as numbers to add: a bool one says which keys are open."""
    if bias.dtype != torch.bool:
        return bias
    return torch.zeros(bias.shape, dtype=like.dtype, device=bias.device).masked_fill_(~bias, -math.inf)


def together(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The same groups, those with the same keys as one."""
    found: dict[Any, list[Group]] = {}
    for number, group in enumerate(groups):
        own = None if group.bias is None else tuple(group.bias.tolist())
        alike = (tuple(group.keys.tolist()), own) if group.weight is None else number
        found.setdefault(alike, []).append(group)
    return tuple(
        Group(joined(*(one.rows for one in ones)), ones[0].keys, ones[0].weight, ones[0].bias)
        for ones in found.values()
    )


def alike(parts: Sequence[Part], total: int) -> tuple[Part, ...]:
    """Parts in the order of the batch; as one where every row of the batch, `total` of them, has the same groups."""

    def same(one: Group, other: Group) -> bool:
        pairs = ((one.rows, other.rows), (one.keys, other.keys), (one.weight, other.weight), (one.bias, other.bias))
        return all(
            (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
        )

    found: list[Part] = []
    for part in sorted(parts, key=lambda one: one.batch.start if one.batch else 0):
        last = found[-1] if found else None
        assert part.batch is not None
        if last is not None and len(last.groups) == len(part.groups) and all(map(same, last.groups, part.groups)):
            assert last.batch is not None
            found[-1] = Part(slice(last.batch.start, part.batch.stop), last.groups)
        else:
            found.append(part)
    if len(found) == 1 and found[0].batch == slice(0, total):
        return (Part(None, found[0].groups),)
    return tuple(found)


def by_membership(masks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The cells of each kind, (masks,) bool and (n,) long: those that are in the same masks, of (masks, cells) bool."""
    kinds, which = masks.mT.unique(dim=0, return_inverse=True)
    for number, kind in enumerate(kinds):
        yield kind, (which == number).nonzero().flatten()


def joined(*indices: Tensor | range | Sequence[int]) -> Tensor:
    """Several sets of indices as one, (n,) long, ascending."""
    parts = [one if isinstance(one, Tensor) else torch.tensor(list(one), dtype=torch.long) for one in indices]
    return torch.cat(parts).sort().values


def _run(indices: Tensor, device: Any) -> Picked:
    start, stop = int(indices[0]), int(indices[-1]) + 1
    return slice(start, stop) if stop - start == len(indices) else indices.to(device)


def _take(tensor: Tensor, picked: Picked) -> Tensor:
    return tensor[:, :, picked] if isinstance(picked, slice) else tensor.index_select(2, picked)


def _cut(bias: Tensor, rows: Picked, keys: Picked) -> Tensor:
    """The part of a bias that a group sees; what is broadcast stays so."""
    bias = bias[(None,) * (4 - bias.ndim)]
    bias = bias if bias.shape[2] == 1 else bias[:, :, rows]
    return bias if bias.shape[3] == 1 else bias[..., keys]


def _added(out: Tensor, rows: Picked, part: Tensor, several: bool) -> Tensor:
    if isinstance(rows, slice):
        if several:
            out[:, :, rows] += part
        else:
            out[:, :, rows] = part
        return out
    return out.index_add_(2, rows, part) if several else out.index_copy_(2, rows, part)
