"""The maths of attention calibration, against values worked out by hand."""

import math

import pytest
import tiny
import torch

from attnctl import attach
from attnctl.errors import ControlError
from attnctl.processors import Calibrate
from attnctl.processors.calibrate import Calibrates
from attnctl.processors.calibration import Calibration, blur, min_max, soft_iou
from attnctl.processors.latents.loss_terms import View
from attnctl.processors.latents.map_gradient import PhraseTokens


def blob(y, x, width=2.0, side=16):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * width**2)).float()


def test_min_max_stretches_each_map_by_itself():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[0.2, 0.2], [0.2, 0.2]]])
    assert torch.allclose(min_max(maps), torch.tensor([[[0.0, 1.0], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]))


def test_min_max_has_a_gradient_through_both_ends():
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.5]]], requires_grad=True)
    min_max(maps)[0, 1, 0].backward()  # (b - a) / (c - a) with a = 1, b = 2, c = 3
    assert torch.allclose(maps.grad, torch.tensor([[[-0.25, -0.25], [0.5, 0.0]]]), atol=1e-6)


def test_the_blur_has_the_taps_of_the_authors_code():
    point = torch.zeros(5, 5)
    point[2, 2] = 1
    taps = torch.tensor([0.0, 0.2119, 0.5761, 0.2119, 0.0])
    assert torch.allclose(blur(point), torch.outer(taps, taps), atol=1e-4)


def test_the_blur_reflects_at_the_rim():
    corner = torch.zeros(3, 3)
    corner[0, 1] = 1
    # reflected without the rim itself, row 1 stands on both sides of row 0, so the top row keeps its middle tap alone
    assert blur(corner)[0, 1] == pytest.approx(0.5761**2, abs=1e-4)
    assert blur(corner)[1, 1] == pytest.approx(0.5761 * 0.2119, abs=1e-4)
    assert blur(corner)[0, 0] == pytest.approx(0.5761 * 2 * 0.2119, abs=1e-4)


def test_iou_by_hand():
    one, other = torch.tensor([[1.0, 0.5], [0.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert soft_iou(one, other) == pytest.approx((1 + 1) / (1.5 + 2 - 1 + 1))
    assert soft_iou(torch.zeros(2, 2), torch.zeros(2, 2)) == 1


def test_iou_of_a_soft_map_with_itself_is_less_than_one_and_rises_as_it_gets_binary():
    soft = blob(8, 8)
    hard = (soft > 0.5).float()
    assert soft_iou(soft, soft) < 0.6 < 0.99 < soft_iou(hard, hard)


def test_the_losses_by_hand():
    """Without a blur and on maps that run from 0 to 1 already, so that min-max leaves them as they are."""
    word = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    noun = torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    other_word, other_noun = noun, torch.tensor([[0.0, 0.0], [0.5, 1.0]])
    read = Calibration(bind=2.0, separate=3.0, smooth=False).read(
        torch.stack([word, other_word])[None], torch.stack([noun, other_noun])[None]
    )
    c, d = noun**2, other_noun**2  # 1, 0, .25, 0 and 0, 0, .25, 1
    bind = [1 - (1 + 1) / (1.25 + 1.5 - 1 + 1), 1 - (0.125 + 1) / (1.25 + 1.5 - 0.125 + 1)]
    apart = (0.0625 + 1) / (1.25 + 1.25 - 0.0625 + 1)
    assert torch.allclose(read.binding, torch.tensor([bind]), atol=1e-6)
    assert torch.allclose(read.apart, torch.tensor([[apart]]), atol=1e-6)
    assert read.total == pytest.approx(2 * sum(bind) + 3 * apart, abs=1e-5)
    assert soft_iou(c, d) == pytest.approx(apart)
    assert torch.allclose(read.coverage, torch.tensor([0.375, 0.375]))


@pytest.mark.parametrize("power, value", [(1, 0.5), (2, 0.25), (4, 0.0625)])
def test_suppression_is_a_power_of_the_noun_alone(power, value):
    word = noun = torch.tensor([[1.0, 0.5], [0.0, 0.0]])[None, None]
    read = Calibration(1, 0, power=power, smooth=False).read(word, noun)
    both = 1 + 0.5 * value
    assert read.binding.item() == pytest.approx(1 - (both + 1) / (1 + value + 1.5 - both + 1), abs=1e-6)


def test_order_is_min_max_then_blur_then_square():
    noun = torch.rand(1, 1, 16, 16) + 3
    word = torch.rand(1, 1, 16, 16)
    read = Calibration(1, 0).read(word, noun)
    by_hand = 1 - soft_iou(blur(min_max(noun)) ** 2, blur(min_max(word)))
    assert torch.allclose(read.binding, by_hand)


def maps_of_two(rows=1):
    torch.manual_seed(0)
    words, nouns = (torch.rand(rows, 2, 16, 16, requires_grad=True) for _ in range(2))
    return words, nouns


def test_binding_moves_the_new_words_only():
    words, nouns = maps_of_two()
    Calibration(1, 0).read(words, nouns).total.backward()
    assert words.grad.abs().sum() > 0
    assert nouns.grad is None or not nouns.grad.any()


def test_binding_moves_both_where_nothing_is_detached():
    words, nouns = maps_of_two()
    Calibration(1, 0, detach=False).read(words, nouns).total.backward()
    assert words.grad.abs().sum() > 0 and nouns.grad.abs().sum() > 0


def test_separating_moves_the_nouns_only():
    words, nouns = maps_of_two()
    Calibration(0, 1).read(words, nouns).total.backward()
    assert nouns.grad.abs().sum() > 0
    assert words.grad is None or not words.grad.any()


@pytest.mark.parametrize("moved, settings", [("words", (1, 0)), ("nouns", (0, 1))])
def test_descent_binds_words_and_parts_nouns(moved, settings):
    maps = {
        "words": torch.stack([blob(8, 10, 3), blob(8, 10, 3)])[None],
        "nouns": torch.stack([blob(8, 6, 3), blob(8, 9, 3)])[None],
    }
    maps[moved].requires_grad_()
    optimizer, losses = torch.optim.Adam([maps[moved]], 0.02), []
    for _ in range(40):
        total = Calibration(*settings).read(**maps).total
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0] - 0.1


def test_rows_without_a_concept_have_no_part_in_it():
    words, nouns = maps_of_two(3)
    alone = Calibration(1, 1).read(words[:1], nouns[:1])
    present = torch.tensor([[True, True], [False, False], [False, False]])
    read = Calibration(1, 1).read(words, nouns, present)
    assert torch.allclose(read.total, alone.total)
    read.total.backward()
    assert words.grad[0].any() and not words.grad[1:].any() and not nouns.grad[1:].any()


def test_a_row_with_one_concept_binds_it_and_separates_nothing():
    words, nouns = maps_of_two()
    read = Calibration(1, 1).read(words, nouns, torch.tensor([[True, False]]))
    assert read.binding[0, 0] > 0 and read.binding[0, 1] == 0 and read.apart[0, 0] == 0


def test_no_row_with_a_concept_is_a_loss_of_zero():
    words, nouns = maps_of_two()
    read = Calibration(1, 1).read(words, nouns, torch.zeros(1, 2, dtype=torch.bool))
    assert read.total == 0 and not math.isnan(read.coverage.sum())


def test_three_concepts_average_or_add_their_pairs():
    torch.manual_seed(1)
    words, nouns = (torch.rand(1, 3, 8, 8) for _ in range(2))
    mean, total = (Calibration(0, 1, pairs=pairs).read(words, nouns) for pairs in ("mean", "sum"))
    assert mean.apart.shape == (1, 3)
    assert total.total == pytest.approx(3 * mean.total.item(), rel=1e-5)


def test_half_precision_is_worked_out_in_single():
    flat = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float16)
    read = Calibration(1, 0).read(flat, flat)
    assert read.total.dtype == torch.float32 and torch.isfinite(read.total)


def test_only_overlap_is_the_mean_product():
    words, nouns = maps_of_two()
    calibration = Calibration(0, 1, only_overlap=True)
    classes = blur(min_max(nouns)) ** 2
    assert torch.allclose(calibration.read(words, nouns).apart[0, 0], (classes[0, 0] * classes[0, 1]).mean())


@pytest.mark.parametrize("settings", [{"bind": -1}, {"separate": math.inf}, {"power": 3}, {"pairs": "none"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ControlError, match=next(iter(settings))):
        Calibration(**settings)


# --- while drawing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_while_drawing_the_losses_go_down(family):
    """The gradient on the latents lowers both losses of the step that it is taken in."""
    pipe = tiny.FAMILIES[family]()
    control = Calibrate(("and", "dog"), ("red", "cat"), updates=4, relative=0.02, window=(0, 0.3))
    with attach(pipe, control) as run:
        tiny.draw(pipe, "a red cat and a dog", steps=4)
    losses = [float(one.losses[0]) for one in run.run.state(control).updates if one.step == 0]
    assert len(losses) == 4 and losses[-1] < losses[0]


def test_the_losses_while_drawing_are_those_of_training():
    """What is reported of the first evaluation is what `Calibration` makes of the same probabilities."""
    torch.manual_seed(0)
    tokens = torch.rand(1, 4, 6, 6)
    loss = Calibrates((("red", "cat"), ("big", "dog")), Calibration(0.5, 2.0))
    members = torch.eye(4)[None]
    found = PhraseTokens(torch.arange(4)[None], torch.ones(1, 4).bool(), members, members[:, :, None])
    assert loss.begin(None, ("red", "cat", "big", "dog"), [()], found).tolist() == [True]
    view = View(tokens, tokens, [0], "mean")
    wanted = Calibration(0.5, 2.0).read(tokens[:, [0, 2]], tokens[:, [1, 3]])
    assert torch.allclose(loss.read(view).total, wanted.total[None])
    values, counts = loss.parts(view)
    assert torch.allclose(values, torch.cat([wanted.binding, wanted.apart], 1)) and counts.all()
    assert loss.labels == ("red | cat", "big | dog", "cat | dog")


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: Calibrate(), "needs a word and its noun"),
        (lambda: Calibrate("cat"), "a bond is"),
        (lambda: Calibrate("red cat", power=3), "power is 1, 2 or 4"),
        (lambda: Calibrate("red cat", bind=0.0, separate=0.0), "nothing to do"),
    ],
)
def test_calibrate_refuses_what_makes_no_sense(make, told):
    with pytest.raises(ControlError, match=told):
        make()
