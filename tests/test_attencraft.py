"""AttenCraft's masks and guidance, against values worked out by hand or by materialised references."""

import math

import numpy as np
import pytest
import torch

from attnctl.processors.attencraft import divergence, divided, fitted, guidance, relevance, similarity


def test_relevance_follows_attention_to_where_it_is_squared_and_stretched():
    """Two places attend to each other, two others to themselves; the word is seen at the first place alone."""
    own = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
    cross = torch.tensor([[[0.4, 0.0], [0.2, 0.0]]])  # squared and stretched: 1, 0, 0.25, 0
    found = relevance(cross, own, (2, 2), power=4)
    # own ** 4 is [[.5, .5], [.5, .5]] and the identity (min-max changes neither), so R before its min-max: .5 .5 .25 0
    assert torch.allclose(found, torch.tensor([[[1.0, 1.0], [0.5, 0.0]]]), atol=1e-6)
    first = relevance(cross, own, (2, 2), power=1)
    assert torch.allclose(first, torch.tensor([[[1.0, 1.0], [0.5, 0.0]]]), atol=1e-6)


def test_relevance_equals_the_materialised_formula():
    torch.manual_seed(0)
    cross, own = torch.rand(3, 4, 4).double(), torch.rand(64, 64).double().softmax(-1)
    large = torch.nn.functional.interpolate(cross[None], (8, 8), mode="bicubic")[0] ** 2

    def stretch(x, dims):
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        return (x - low) / (high - low)

    spread = stretch(own, (0, 1))
    spread = stretch(spread @ spread @ spread @ spread, (0, 1))
    wanted = torch.stack([stretch((spread @ c.flatten()).view(8, 8), (0, 1)) for c in stretch(large, (1, 2))])
    assert torch.allclose(relevance(cross, own, (8, 8)), wanted, atol=1e-6)


def test_a_place_is_whose_relevance_is_ahead_by_the_margin():
    relevant = torch.tensor([[[0.9, 0.5, 0.30]], [[0.2, 0.45, 0.30]], [[0.1, 0.1, 0.9]]])
    masks = divided(relevant, margin=0.1)
    assert masks.tolist() == [[[True, False, False]], [[False, False, False]], [[False, False, True]]]
    assert divided(relevant, margin=0.04)[0, 0].tolist() == [True, True, False]


def test_divergence_by_hand():
    one, other = torch.tensor([1.0, 1e-30]).log(), torch.tensor([1e-30, 1.0]).log()
    assert divergence(one, other).item() == pytest.approx(math.log(2), rel=1e-5)
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.75])
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)  # the middle is one half each
    assert divergence(p.log(), q.log()).item() == pytest.approx(wanted, rel=1e-5)
    assert divergence(p.log(), p.log()).item() == pytest.approx(0.0, abs=1e-7)


def test_guidance_is_least_on_the_own_mask_as_the_sheet_has_it():
    """A blob and its mask at 32 x 32: hardly anything, ten times as much for the other thing's, log 2 at most."""
    y, x = np.mgrid[0:16, 0:16]
    blob = torch.from_numpy(np.exp(-((x - 4) ** 2 + (y - 8) ** 2) / 12)).float()[None]
    own, other = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    own[:, 10:24, 2:16], other[:, 10:24, 18:32] = 1.0, 1.0
    for kind in ("jsd", "mse"):
        matched, wrong = guidance(blob, own, kind), guidance(blob, other, kind)
        assert matched.shape == (1,) and matched < wrong / 2 and wrong < math.log(2)


def test_guidance_by_mean_squared_error_by_hand():
    maps = torch.tensor([[0.2, 0.1], [0.0, 0.0]])
    masks = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert guidance(maps, masks, "mse").item() == pytest.approx(0.25 / 4)


def test_guidance_moves_a_map_towards_its_mask():
    torch.manual_seed(0)
    masks = torch.zeros(1, 8, 8)
    masks[:, :4] = 1
    for kind in ("jsd", "mse"):
        maps = torch.rand(1, 8, 8, requires_grad=True)
        guidance(maps, masks, kind).sum().backward()
        assert maps.grad[:, :4].mean() < maps.grad[:, 4:].mean(), kind


def test_half_precision_is_widened():
    maps = torch.full((1, 4, 4), 0.1, dtype=torch.float16)  # flat: min-max in half precision would be no number
    assert torch.isfinite(guidance(maps, torch.ones(1, 4, 4, dtype=torch.float16))).all()


def test_maps_keep_their_leading_dimensions_on_another_grid():
    assert fitted(torch.rand(2, 3, 4, 4), (8, 6)).shape == (2, 3, 8, 6)


def test_similarity_by_hand():
    """One window of 7 x 7: a mask of n cells and what it leaves."""
    mask = torch.zeros(7, 7)
    mask[:3] = 1
    p, small_1, small_2 = 21 / 49, 1e-4, 9e-4
    v = 49 / 48 * p * (1 - p)
    wanted = (2 * p * (1 - p) + small_1) * (-2 * v + small_2) / ((p**2 + (1 - p) ** 2 + small_1) * (2 * v + small_2))
    assert similarity(mask, 1 - mask).item() == pytest.approx(wanted, abs=1e-5) and wanted < -0.9
    flat = similarity(torch.full((2, 9, 9), 0.2), torch.full((2, 9, 9), 0.6))
    assert torch.allclose(flat, torch.full((2,), (0.24 + small_1) / (0.4 + small_1)), atol=1e-3)
    assert similarity(mask[:5, :6], mask[:5, :6]).item() == pytest.approx(1)  # smaller than the window


def test_similarity_is_the_mean_over_the_windows_inside():
    torch.manual_seed(0)
    one, other = torch.rand(2, 9, 11)
    parts = [similarity(one[i : i + 7, j : j + 7], other[i : i + 7, j : j + 7]) for i in range(3) for j in range(5)]
    assert torch.allclose(similarity(one, other), torch.stack(parts).mean(), atol=1e-6)
