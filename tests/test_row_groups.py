"""Row groups: the same as a dense mask, no row without a key, and a mask where that is cheaper."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from contract_table import close, differs

from attnctl import attach
from attnctl.errors import ControlError
from attnctl.processors import Couple, Isolation, Regions
from attnctl.processors.row_groups import Group, Part, RowGroups, by_membership


def sdpa(q, k, v, bias, scale):
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)


def tensors(queries=40, keys=56, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, rows, 8, generator=generator) for rows in (queries, keys, keys)]


def reference(q, k, v, parts, bias=None, scale=None):
    """The sum over groups of softmax over each group's keys, by materialised probabilities."""
    out = torch.zeros(*q.shape[:3], v.shape[-1])
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if bias is None else logits + bias
    for part in parts:
        own = slice(None) if part.batch is None else part.batch
        for group in part.groups:
            extra = 0 if group.bias is None else group.bias
            p = (logits[own][:, :, group.rows][..., group.keys] + extra).softmax(-1)
            weight = torch.ones(len(group.rows)) if group.weight is None else group.weight
            out[own.start or 0 : own.stop, :, group.rows] += weight[:, None] * (p @ v[own][:, :, group.keys])
    return out


def random_groups(generator, queries, keys, soft):
    """Every row in one group; soft: some also in the last, which has all keys."""
    which = torch.randint(0, 4, (queries,), generator=generator)
    found = []
    for number in range(4):
        rows = (which == number).nonzero().flatten()
        if len(rows):
            open_keys = torch.rand(keys, generator=generator) < 0.4
            open_keys[torch.randint(0, keys, (), generator=generator)] = True
            bias = torch.randn(int(open_keys.sum()), generator=generator) if number % 2 else None
            weight = torch.rand(len(rows), generator=generator) if soft else None
            found.append(Group(rows, open_keys.nonzero().flatten(), weight, bias))
    if soft:
        rest = torch.ones(queries)
        for group in found:
            rest[group.rows] -= group.weight
        found.append(Group(torch.arange(queries), torch.arange(keys), rest))
    return tuple(found)


@pytest.mark.parametrize(("by", "soft"), [("groups", False), ("groups", True), ("mask", False)])
def test_equal_to_the_mask(by, soft, monkeypatch):
    monkeypatch.setattr(RowGroups, "worth_it", lambda self: by == "groups")
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = tensors(seed=seed)
        parts = (
            Part(slice(0, 1), random_groups(generator, 40, 56, soft)),
            Part(slice(1, 2), random_groups(generator, 40, 56, soft)),
        )
        bias = torch.randn(1, 1, 40, 56, generator=generator) if seed % 2 else None
        scale = 0.3 if seed % 3 else None
        got = RowGroups(parts, 40, 56).attend(q, k, v, bias, scale, sdpa)
        assert (got - reference(q, k, v, parts, bias, scale)).abs().max() < 1e-5


def test_dense_says_the_same():
    q, k, v = tensors()
    parts = (Part(None, random_groups(torch.Generator().manual_seed(1), 40, 56, False)),)
    groups = RowGroups(parts, 40, 56)
    dense = groups.dense(2, q)
    assert dense.shape == (1, 1, 40, 56) and groups.dense(2, q) is dense
    assert (sdpa(q, k, v, dense, None) - reference(q, k, v, parts)).abs().max() < 1e-5


def test_gradients_pass():
    q, k, v = (tensor.requires_grad_() for tensor in tensors())
    parts = (Part(None, random_groups(torch.Generator().manual_seed(2), 40, 56, True)),)
    got = RowGroups(parts, 40, 56).attend(q, k, v, None, None, sdpa)
    want = reference(q, k, v, parts)
    for one, other in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, want)), strict=True):
        assert (one - other).abs().max() < 1e-4


def test_a_row_or_a_group_without_anything_is_refused():
    rows, keys = torch.arange(4), torch.arange(6)
    with pytest.raises(ControlError, match="row 3 do not add up"):
        RowGroups((Part(None, (Group(rows[:3], keys),)),), 4, 6)
    with pytest.raises(ControlError, match="no key"):
        RowGroups((Part(None, (Group(rows, keys[:0]),)),), 4, 6)
    with pytest.raises(ControlError, match="do not add up"):
        RowGroups((Part(None, (Group(rows, keys), Group(rows[:1], keys))),), 4, 6)


LEFT, RIGHT, TOP = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 0.5)
CONTROLS = {
    "regions": lambda: Regions({"cat": LEFT, "dog": TOP}),
    "closed alone": lambda: Regions({"cat": LEFT, "dog": TOP}, inside=0.0),
    "isolation": lambda: Isolation({"one": LEFT, "other": TOP}, window=(0, 1)),
    "couple": lambda: Couple({"a red dog": LEFT, "a blue cat": RIGHT}),
}


@pytest.mark.parametrize("family", tuple(tiny.FAMILIES))
@pytest.mark.parametrize("name", tuple(CONTROLS))
def test_pictures_by_groups_are_those_by_masks(family, name, monkeypatch):
    pipe, prompts, drawn = tiny.FAMILIES[family](), ["a cat and a dog", "a dog and a red cat"], []
    for groups in (True, False):
        monkeypatch.setattr(RowGroups, "worth_it", lambda self, groups=groups: groups)
        with attach(pipe, CONTROLS[name]()):
            drawn.append(tiny.draw(pipe, prompts))
    assert close(*drawn, 1e-4)
    assert differs(drawn[0], tiny.draw(pipe, prompts))


def test_a_mask_where_it_is_cheaper():
    """Four groups of a small table are a mask; of a large one, four calls."""

    def quarters(size):
        rows = torch.arange(size).chunk(4)
        return RowGroups((Part(None, tuple(Group(own, own) for own in rows)),), size, size)

    calls = []

    def counting(*call):
        calls.append(call[3])
        return sdpa(*call)

    for size in (16, 2048):
        q = torch.randn(1, 1, size, 8)
        quarters(size).attend(q, q, q, None, None, counting)
    assert [bias is None for bias in calls] == [False, True, True, True, True]


def test_whole_runs_of_rows_are_not_copied():
    """Rows that follow one another are taken as a view."""
    q, k, v = tensors(2048, 64, 1)
    seen = []

    def kernel(q, k, v, bias, scale):
        seen.append(q.data_ptr())
        return sdpa(q, k, v, bias, scale)

    halves = torch.arange(2048).chunk(2)
    parts = (Part(None, tuple(Group(own, torch.arange(n, 64, 2)) for n, own in enumerate(halves))),)
    groups = RowGroups(parts, 2048, 64)
    groups.worth_it = lambda: True
    groups.attend(q, k, v, None, None, kernel)
    assert seen[0] == q.data_ptr()


def test_membership():
    masks = torch.tensor([[True, True, False, False], [False, True, False, False]])
    found = {tuple(kind.tolist()): cells.tolist() for kind, cells in by_membership(masks)}
    assert found == {(False, False): [2, 3], (True, False): [0], (True, True): [1]}
