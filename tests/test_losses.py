import math

import pytest
import torch

from attnctl.processors.binding import binding_loss, binding_parts, divergence
from attnctl.processors.excitation import excitation_loss, excitation_parts
from attnctl.processors.latents.masks import binarise
from attnctl.processors.retention import retention_loss, retention_parts
from attnctl.processors.segregation import overlap, segregation_loss


def fields(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64)


def rows(*lines):
    return torch.tensor(lines, dtype=torch.float64)


# --- segregation ------------------------------------------------------------------------------------------------------


def test_segregation_by_hand():
    a, b, c = rows([1, 3], [0, 0]), rows([0, 0], [2, 4]), rows([1, 1], [2, 0])

    def loss(*maps):
        return segregation_loss(torch.stack(maps)[None], [(0, 1)]).item()

    assert loss(a, a) == 0.5
    assert loss(a, b) == 0
    assert loss(a, c) == pytest.approx((1 + 1) / (4 + 4))
    assert loss(a, c) == loss(c, a)
    assert loss(a, 0.01 * a) == pytest.approx(0.01 / 1.01)  # why a word must not win by fading
    assert loss(a * 0, a * 0) == 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_every_pair_counts_once_and_lies_between_0_and_a_half(count):
    pairs = [(m, n) for m in range(count) for n in range(m)]
    same = fields(1, 1, 4, 6).expand(1, count, 4, 6)
    assert segregation_loss(same, pairs).item() == pytest.approx(0.5 * count * (count - 1) / 2)
    one = fields(3, count, 4, 6)
    total = segregation_loss(one, pairs)
    assert total.shape == (3,) and (total > 0).all() and (total < 0.5 * len(pairs)).all()
    torch.testing.assert_close(total, sum(segregation_loss(one, [pair]) for pair in pairs))


def test_of_maps_that_sum_to_one_it_is_half_of_what_they_share():
    maps = fields(2, 2, 5, 3)
    maps = maps / maps.sum((-2, -1), keepdim=True)
    variation = 0.5 * (maps[:, 0] - maps[:, 1]).abs().sum((-2, -1))
    torch.testing.assert_close(segregation_loss(maps, [(0, 1)]), (1 - variation) / 2)


def test_a_pair_counts_only_where_both_are_present():
    maps = fields(3, 3, 4, 4)
    present = torch.tensor([[True, True, True], [True, False, True], [False, False, True]])
    got = segregation_loss(maps, [(0, 1), (0, 2)], present)
    assert got[0] == segregation_loss(maps[:1], [(0, 1), (0, 2)])[0]
    assert got[1] == segregation_loss(maps[1:2], [(0, 2)])[0]
    assert got[2] == 0


# --- retention --------------------------------------------------------------------------------------------------------


def test_retention_by_hand():
    mask = rows([1, 1], [0, 0])

    def loss(one, mask=mask):
        return retention_loss(one[None, None], mask[None, None]).item()

    assert loss(mask) == 0.5
    assert loss(0 * mask) == 1
    assert loss(0.1 * mask) == pytest.approx(1 - 0.2 / 2.2)  # 0.909: the trap of small probabilities
    assert loss(rows([1, 0], [1, 0])) == pytest.approx(1 - 1 / 4)
    assert loss(mask, 0 * mask) == 1


def test_retention_lies_between_a_half_and_one_per_phrase():
    maps, masks = fields(4, 3, 5, 5), binarise(fields(4, 3, 5, 5, seed=1))
    parts = retention_parts(maps, masks)
    assert parts.shape == (4, 3) and (parts > 0.5).all() and (parts < 1).all()
    torch.testing.assert_close(retention_loss(maps, masks), parts.sum(-1))
    some = torch.tensor([True, False, True]).expand(4, 3)
    torch.testing.assert_close(retention_loss(maps, masks, some), parts[:, 0] + parts[:, 2])


# --- excitation -------------------------------------------------------------------------------------------------------


def test_excitation_by_hand():
    maps = torch.stack([rows([0.1, 0.7], [0.2, 0]), rows([0, 0.4], [0.3, 0]), rows([1.2, 0], [0, 0])])[None]
    torch.testing.assert_close(excitation_parts(maps), rows([0.3, 0.6, 0]))
    assert excitation_loss(maps).item() == pytest.approx(0.6)
    assert excitation_loss(maps, torch.tensor([[True, False, True]])).item() == pytest.approx(0.3)


def test_only_the_phrase_that_is_worst_off_is_pulled():
    maps = (fields(2, 3, 3, 3) * 0.5).requires_grad_()
    gradient = torch.autograd.grad(excitation_loss(maps).sum(), maps)[0]
    worst = maps.detach().flatten(2).amax(-1).argmin(1)
    for i in range(2):
        assert gradient[i].count_nonzero() == 1 and gradient[i, worst[i]].min() == -1


# --- binding ----------------------------------------------------------------------------------------------------------


def test_divergence_by_hand():
    p, q = rows([0.5, 0.5]), rows([0.9, 0.1])
    forth = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    back = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert divergence(p, q).item() == pytest.approx((forth + back) / 2)
    assert divergence(p, q).item() == pytest.approx(divergence(7 * q, 3 * p).item())
    assert divergence(p, p).item() == 0 and divergence(p, 0 * p).isfinite()


def test_binding_pulls_a_bond_together_and_off_the_rest():
    m, n, u, v = (fields(4, 5, seed=s) for s in range(4))
    maps, others = torch.stack([m, n])[None], torch.stack([u, v])[None]
    both, one, none = (torch.tensor([[row]]) for row in ([True, True], [False, True], [False, False]))
    near = divergence(m, n)
    far = [(divergence(m, x) + divergence(n, x)) / 2 for x in (u, v)]
    torch.testing.assert_close(binding_loss(maps, [(0, 1)], others, both)[0], near - sum(far) / 2)
    torch.testing.assert_close(binding_loss(maps, [(0, 1)], others, one)[0], near - far[1])
    torch.testing.assert_close(binding_loss(maps, [(0, 1)], others, none)[0], near)


def test_two_bonds_have_rests_of_their_own():
    maps, others = fields(2, 4, 3, 4), fields(2, 5, 3, 4, seed=1)
    apart = torch.rand(2, 2, 5) > 0.4
    parts = binding_parts(maps, [(0, 1), (2, 3)], others, apart)
    assert parts.shape == (2, 2)
    for k, bond in enumerate([(0, 1), (2, 3)]):
        torch.testing.assert_close(parts[:, k], binding_loss(maps, [bond], others, apart[:, k : k + 1]))


# --- all of them ------------------------------------------------------------------------------------------------------

APART = torch.tensor([[[True, False, True]], [[False, True, True]]])
LOSSES = {
    "segregation": lambda maps, present: segregation_loss(maps, [(0, 1), (1, 2)], present),
    "retention": lambda maps, present: retention_loss(maps, binarise(fields(2, 3, 4, 3, seed=5)), present),
    "excitation": excitation_loss,
    "binding": lambda maps, present: binding_loss(maps, [(0, 1)], maps[:, [2, 2, 2]], APART, present),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_equal_finite_differences(name):
    maps = (fields(2, 3, 4, 3) + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda maps: LOSSES[name](maps, None), maps)


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_is_worth_the_same_alone(name):
    maps = fields(2, 3, 4, 3)
    both, swapped = LOSSES[name](maps, None), LOSSES[name](maps.flip(0), None)
    assert both.shape == (2,)
    if name in ("segregation", "excitation"):
        torch.testing.assert_close(both, swapped.flip(0))


@pytest.mark.parametrize("name", LOSSES)
def test_what_an_image_does_not_have_gives_no_loss_and_no_gradient(name):
    maps = fields(2, 3, 4, 3)
    maps[1] = 0
    maps.requires_grad_()
    present = torch.tensor([[True] * 3, [False] * 3])
    losses = LOSSES[name](maps, present)
    gradient = torch.autograd.grad(losses.sum(), maps)[0]
    assert losses[1] == 0 and gradient.isfinite().all() and not gradient[1].any() and gradient[0].any()


def test_an_empty_mask_gives_no_gradient():
    maps = fields(1, 2, 3, 3)
    maps[0, 0, 0, 0] = 0  # where zero meets zero
    maps.requires_grad_()
    masks = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    masks[0, 1, 1, 1] = 1
    losses = retention_parts(maps, masks)
    gradient = torch.autograd.grad(losses.sum(), maps)[0]
    assert losses[0, 0] == 1 and not gradient[0, 0].any() and gradient[0, 1].any()


def test_overlap_of_nothing():
    assert overlap(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)).tolist() == [0, 0]


# --- masks ------------------------------------------------------------------------------------------------------------

HILLS = rows([9, 8, 1, 0, 0], [8, 7, 1, 0, 6], [1, 1, 1, 0, 7], [0, 4, 0, 0, 0])


def test_half_of_the_highest():
    assert binarise(HILLS, "half").tolist() == (HILLS >= 4.5).double().tolist()


def test_otsu_keeps_the_part_with_the_peak():
    want = torch.zeros_like(HILLS)
    want[:2, :2] = 1
    assert torch.equal(binarise(HILLS, "otsu"), want)  # the threshold is 4 or above, the hill on the right is another
    bridge = HILLS.clone()
    bridge[2, 2], bridge[3, 3], bridge[3, 1] = 8, 8, 0  # corners touch
    want[2, 2] = want[3, 3] = want[2, 4] = want[1, 4] = 1
    assert torch.equal(binarise(bridge, "otsu"), want)


def test_otsu_threshold_is_the_best_of_all():
    values = fields(1, 30, seed=3)[0]
    high = binarise(values.view(5, 6), "otsu").flatten().bool()

    def between(split):
        low, up = values[values < split], values[values >= split]
        return len(low) * len(up) * (low.mean() - up.mean()) ** 2

    best = max(values.sort().values[1:], key=between)
    assert not (high & (values < best)).any() and high[values.argmax()]


def test_a_share_of_the_cells():
    assert binarise(HILLS, "quantile", 0.25).sum() == 5  # 9 8 8 7 7
    assert binarise(fields(2, 3, 10, 10), "quantile", 0.1).sum((-2, -1)).tolist() == [[10] * 3] * 2
    assert binarise(HILLS, "quantile", 0.001).sum() == 1


@pytest.mark.parametrize("rule", ["half", "otsu", "quantile"])
def test_masks_of_each_map_by_itself(rule):
    maps = fields(3, 2, 6, 5) * torch.tensor([1.0, 1e-4, 50]).double().view(3, 1, 1, 1)
    maps[2, 1] = 0
    masks = binarise(maps.requires_grad_(), rule)
    assert masks.shape == maps.shape and not masks.requires_grad and not masks[2, 1].any()
    for i in range(3):
        for j in range(2):
            assert torch.equal(masks[i, j], binarise(maps[i, j], rule))
            assert torch.equal(masks[i, j], binarise(maps[i, j] * 7, rule))
