"""Normalized attention guidance: the maths against a loop, on every family, and what is refused."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from contract_table import close, trace

from attnctl import attach
from attnctl.processors import Nag
from attnctl.processors.nag import extrapolated, limited, steered

FAMILIES = tuple(tiny.FAMILIES)
AWAY = "a red dog"
PLAIN = {"guidance_scale": 1.0}  # no classifier-free guidance; in FLUX it is distilled, and a setting of the model


# --- the maths --------------------------------------------------------------------------------------------------------


def by_hand(positive, negative, scale, tau, alpha):
    """The published formula, place by place and number by number."""
    out = torch.empty_like(positive)
    for image in range(positive.shape[0]):
        for cell in range(positive.shape[2]):
            plus, minus = positive[image, :, cell].flatten().tolist(), negative[image, :, cell].flatten().tolist()
            far = [scale * a - (scale - 1) * b for a, b in zip(plus, minus, strict=True)]
            r = sum(map(abs, far)) / sum(map(abs, plus))
            mixed = [alpha * z * min(r, tau) / r + (1 - alpha) * a for z, a in zip(far, plus, strict=True)]
            out[image, :, cell] = torch.tensor(mixed).reshape(positive.shape[1], -1)
    return out


@pytest.mark.parametrize("tau", [0.5, 2.5, math.inf])
def test_the_formula(tau):
    torch.manual_seed(0)
    positive, negative = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)
    negative[0, :, 0] = positive[0, :, 0]  # nothing to be led away from
    got = steered(positive, negative, 4.0, tau, 0.3)
    assert torch.allclose(got, by_hand(positive, negative, 4.0, tau, 0.3), rtol=1e-5, atol=1e-6)


def test_no_place_gets_larger_than_tau():
    torch.manual_seed(0)
    positive, negative = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)

    def size(z):
        return z.abs().sum((1, 3))

    far = extrapolated(positive, negative, 9.0)
    assert (size(far) > 2 * size(positive)).all()
    assert torch.allclose(size(limited(far, positive, 2.0)), 2 * size(positive), rtol=1e-5)
    assert torch.equal(limited(far, positive, 100.0), far)


def test_zeros_and_half_precision_stay_finite():
    zero = torch.zeros(1, 1, 2, 4)
    assert torch.equal(steered(zero, zero, 5.0, math.inf, 0.5), zero)
    assert steered(zero, zero + 1, 5.0, 2.5, 0.5).isfinite().all()
    many = torch.full((1, 24, 1, 128), 30.0, dtype=torch.float16)  # its L1 norm is no number of half precision
    got = steered(many, -many, 3.0, 2.5, 1.0)
    assert got.dtype == torch.float16 and torch.allclose(got.float(), 2.5 * many.float(), rtol=2e-3)


# --- on every family --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_it_acts_by_each_setting_and_leaves_nothing(family):
    pipe = tiny.FAMILIES[family]()
    plain = tiny.draw(pipe, steps=4, **PLAIN)
    before = trace(pipe)
    drawn = [plain]
    changes = ({}, {"scale": 9.0}, {"tau": 0.5}, {"alpha": 0.6}, {"window": (0, 0.5)}, {"where": [0]})
    for settings in changes:
        with attach(pipe, Nag(AWAY, **settings)) as run:
            drawn.append(tiny.draw(pipe, steps=4, **PLAIN))
        ((_, away),) = run.report.traces
        assert away.effect > 0 and len(away.effects) == (2 if "window" in settings else 4)
    for number, one in enumerate(drawn):
        assert all(not torch.equal(one, other) for other in drawn[:number])
    assert trace(pipe) == before and torch.equal(tiny.draw(pipe, steps=4, **PLAIN), plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"scale": 1.0}, {"alpha": 0.0}])
def test_no_strength_is_the_same_picture_to_the_bit(family, settings):
    pipe = tiny.FAMILIES[family]()
    plain = tiny.draw(pipe, **PLAIN)
    with attach(pipe, Nag(AWAY, **settings)):
        assert torch.equal(tiny.draw(pipe, **PLAIN), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_a_batch_are_drawn_as_alone(family):
    pipe = tiny.FAMILIES[family]()
    with attach(pipe, Nag(AWAY)):
        both = tiny.draw(pipe, [tiny.TEXT, "a blue cat"], **PLAIN)
        assert close(both[:1], tiny.draw(pipe, **PLAIN))
        assert close(both[1:], tiny.draw(pipe, "a blue cat", seed=1, **PLAIN))
