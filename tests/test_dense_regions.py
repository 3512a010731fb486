"""Dense regions: the formula against a plain loop, and that phrases go where they should, on every family."""

from __future__ import annotations

import pytest
import tiny
import torch
from contract_table import close, differs

from attnctl import attach
from attnctl.errors import ControlError, PhraseError
from attnctl.processors import DenseRegions, Perturb, Segregation, TokenMaps
from attnctl.processors.dense_regions import areas, modulation, place_belongs, token_belongs

LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)


def test_modulation_is_the_papers():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    belongs, pull = torch.rand(5, 7) < 0.5, torch.rand(5)
    got = logits + modulation(logits, belongs, pull)
    for head in range(2):
        for i in range(5):
            row = logits[head, i]
            for j in range(7):
                s, c = float(row[j]), float(pull[i])
                want = s + c * (float(row.max()) - s) if belongs[i, j] else s - c * (s - float(row.min()))
                assert abs(float(got[head, i, j]) - want) < 1e-5


def test_who_belongs_to_whom():
    masks = torch.tensor([[True, True, False, False], [False, True, False, False]])
    assert token_belongs(masks, [[1], [2, 3]], 4).int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 1], [0] * 4, [0] * 4]
    assert place_belongs(masks).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert areas(masks).tolist() == [0.5, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("family", tuple(tiny.FAMILIES))
def test_phrases_are_drawn_into_their_regions(family):
    pipe, found = tiny.FAMILIES[family](), []
    for controls in ([], [DenseRegions({"cat": LEFT, "dog": RIGHT})]):
        with attach(pipe, *controls, TokenMaps("cat", "dog")) as run:
            drawn = tiny.draw(pipe, steps=1)
        middle = run.maps["cat"].shape[-1] // 2
        cat, dog = run.maps["cat"], run.maps["dog"]
        found.append((float(cat[..., :middle].sum() / cat.sum()), float(dog[..., :middle].sum() / dog.sum()), drawn))
    (cat, dog, plain), (cat_in, dog_in, drawn) = found
    assert cat_in > cat + 0.02 and dog_in < dog - 0.02 and not torch.equal(drawn, plain)


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_images_of_a_batch_are_as_if_alone(family):
    pipe = tiny.FAMILIES[family]()
    with attach(pipe, DenseRegions({"cat": LEFT, "dog": RIGHT}, window=(0, 1))):
        batch = tiny.draw(pipe, ["a cat", "a dog and a cat"])
        assert close(batch[1:], tiny.draw(pipe, "a dog and a cat", seed=1), 2e-3)
    with attach(pipe, DenseRegions({"cat": LEFT}, window=(0, 1))):
        assert close(batch[:1], tiny.draw(pipe, "a cat"), 2e-3)


def test_smaller_regions_pull_more_and_the_window_ends():
    pipe = tiny.sd1()
    plain, drawn = tiny.draw(pipe, steps=4), []
    for settings in ({}, {"self_strength": 0.0}, {"window": (0, 1)}, {"strength": 0.0}):
        with attach(pipe, DenseRegions({"cat": LEFT}, **settings)):
            drawn.append(tiny.draw(pipe, steps=4))
    for number, one in enumerate(drawn):
        assert differs(one, plain) and all(not torch.equal(one, other) for other in drawn[:number])
    with attach(pipe, DenseRegions({"cat": (0, 0, 1, 1)})):  # a region of all the picture has nothing to say
        assert torch.equal(tiny.draw(pipe, steps=4), plain)


def test_beside_a_gradient_and_a_perturbation():
    pipe = tiny.sd3()
    with attach(
        pipe, DenseRegions({"cat": LEFT}, window=(0, 1)), Perturb("1"), Segregation("cat", "dog", relative=0.1)
    ):
        assert tiny.draw(pipe).isfinite().all()


def test_refused():
    for make, said in (
        (lambda: DenseRegions({}), "at least one region"),
        (lambda: DenseRegions({"cat": LEFT}, strength=2), "from 0 to 1"),
        (lambda: DenseRegions({"cat": LEFT}, self_strength=-1), "from 0 to 1"),
        (lambda: DenseRegions({"cat": LEFT}, window=(1, 0)), "window is"),
    ):
        with pytest.raises(ControlError, match=said):
            make()
    pipe = tiny.sd1()
    with pytest.raises(PhraseError, match="bird"), attach(pipe, DenseRegions({"bird": LEFT})):
        tiny.draw(pipe)
