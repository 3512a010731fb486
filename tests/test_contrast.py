"""The contrast of learnt words against the formula, pair by pair."""

import math

import pytest
import torch

from attnctl.processors.contrast import info_nce


def by_hand(words, nouns, present, temperature):
    anchors = [(r, k) for r in range(words.shape[0]) for k in range(words.shape[1]) if present[r, k]]

    def s(one, other):
        return (torch.dot(one, other) / (one.norm() * other.norm())).item() / temperature

    found = []
    for r, k in anchors:
        a = words[r, k]
        away = [math.exp(s(a, x[i, j])) for i, j in anchors if j != k for x in (words, nouns)]
        near = [math.exp(s(a, words[i, j])) for i, j in anchors if j == k and i != r]
        if away and near:
            found.append(sum(-math.log(one / (one + sum(away))) for one in near) / len(near))
    return sum(found) / len(found) if found else 0.0


@pytest.mark.parametrize("concepts", [2, 3])
def test_it_is_the_formula(concepts):
    torch.manual_seed(0)
    words, nouns = torch.randn(2, 4, concepts, 8, dtype=torch.float64)
    present = torch.ones(4, concepts, dtype=torch.bool)
    present[1, 0] = present[2, 1] = False
    for temperature in (0.1, 1.0):
        found = info_nce(words, nouns, present, temperature)
        assert found.item() == pytest.approx(by_hand(words, nouns, present, temperature), rel=1e-9)


@pytest.mark.parametrize("present", [[[True, True]], [[True, False], [True, False]], [[False, False]] * 2])
def test_without_a_positive_or_a_negative_it_is_nothing_and_has_a_gradient(present):
    words = torch.randn(len(present), 2, 8, requires_grad=True)
    loss = info_nce(words, torch.randn(len(present), 2, 8), torch.tensor(present))
    loss.backward()
    assert loss == 0 and not words.grad.any()


def test_it_moves_words_apart():
    """Two words that are alike: a step down the gradient turns them from each other."""
    torch.manual_seed(0)
    base = torch.randn(8)
    words = (base + 0.1 * torch.randn(2, 8)).repeat(3, 1, 1).requires_grad_()
    nouns = torch.randn(3, 2, 8, requires_grad=True)
    present = torch.tensor([[True, True], [True, False], [True, True]])
    info_nce(words, nouns, present).backward()
    assert not words.grad[1, 1].any() and not nouns.grad[1, 1].any() and nouns.grad[0].any()
    moved = (words - 0.1 * words.grad).detach()

    def alike(x):
        return torch.cosine_similarity(x[0, 0], x[0, 1], dim=0)

    assert alike(moved) < alike(words.detach()) - 1e-3


def test_half_precision_is_widened():
    words, nouns = torch.randn(2, 3, 2, 8).half()
    found = info_nce(words, nouns, torch.ones(3, 2, dtype=torch.bool))
    assert found.dtype == torch.float32 and torch.isfinite(found)
