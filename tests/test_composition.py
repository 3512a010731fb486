"""Infusion and the words of an object: against materialised attention, and beside `Regions`."""

from __future__ import annotations

import pytest
import tiny
import torch
from contract_table import close, differs

from attnctl import attach
from attnctl.errors import ControlError, PhraseError
from attnctl.processors import Regions
from attnctl.processors.composition import (
    Infusion,
    ObjectWords,
    borrowing,
    factor_of,
    infused,
    object_cells,
    pasted,
    pooled,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def materialised(q, k, v, q2, k2, inside, image, scale, bias, rows):
    """The same by its definition: the whole table of logits, written into."""
    own, star = q @ k.mT * scale, q2 @ k2.mT * scale
    places = torch.arange(q.shape[2])[image]
    cells = places[inside]
    logits = own.clone()
    if rows == "all":
        logits[..., places[:, None], places] = star[..., places[:, None], places]
    else:
        logits[..., places[:, None], cells] = star[..., places[:, None], cells]
        turned = star.mT if rows == "columns" else star
        logits[..., cells[:, None], places] = turned[..., cells[:, None], places]
    return (logits + (0 if bias is None else bias)).softmax(-1) @ v


@pytest.mark.parametrize("rows", ["own", "columns", "all"])
@pytest.mark.parametrize("image", [slice(0, 12), slice(3, 15), slice(0, 15)])
@pytest.mark.parametrize("biased", [False, True])
def test_infusion_is_materialised_attention(rows, image, biased):
    q, k, v, q2, k2 = (random(1, 2, 15, 8, seed=number) for number in range(5))
    inside = torch.zeros(image.stop - image.start, dtype=torch.bool)
    inside[[1, 4, 5]] = True
    bias = random(1, 1, 15, 15, seed=9) if biased else None
    found = infused(q, k, v, q2, k2, inside, image, 0.7, bias, rows)
    assert torch.allclose(found, materialised(q, k, v, q2, k2, inside, image, 0.7, bias, rows), atol=1e-5)


def test_borrowed_keys_are_one_softmax():
    q, k, v, q2, k2 = (random(1, 1, 6, 4, seed=number) for number in range(5))
    borrowed = torch.tensor([True, False, False, True, True, False])
    logits = torch.where(borrowed, q2 @ k2.mT, q @ k.mT) * 0.5
    assert torch.allclose(borrowing(q, k, v, q2, k2, borrowed, 0.5), logits.softmax(-1) @ v, atol=1e-6)


def test_masks_are_wide_and_never_vanish():
    cover = torch.tensor([[0.05, 0.2], [0.0, 1.0]])
    assert object_cells(cover).tolist() == [[False, True], [False, True]]
    assert object_cells(torch.tensor([[0.01, 0.03]])).tolist() == [[False, True]]
    cells = torch.zeros(5, 7, dtype=torch.bool)
    cells[4, 6] = True
    for factor in (1, 2, 4, 8):
        small = pooled(cells, factor)
        assert small.shape == (-(-5 // factor), -(-7 // factor)) and int(small.sum()) == 1 and small[-1, -1]
        assert pooled(torch.ones(5, 7), factor).all() and factor_of((5, 7), tuple(small.shape)) == factor
    with pytest.raises(ControlError, match="no halving"):
        factor_of((8, 8), (3, 3))


def test_pasting_latents():
    one, other = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert pasted(one, other, mask).sum() == 2


LEFT = torch.zeros(1, 16, 24, dtype=torch.bool)
LEFT[..., :8] = True


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_words_of_an_object_are_constrained_as_regions_constrain_them(family):
    """Where both mean the same cells (the edge lies on a border of every grid), RCA is `Regions`."""
    pipe = tiny.FAMILIES[family]()
    plain = tiny.draw(pipe)
    left, right = (0, 0, 1 / 3, 1), (1 / 3, 0, 1, 1)
    for others, masks in (((), {"cat": left}), (("dog",), {"cat": left, "dog": right})):
        with attach(pipe, ObjectWords(objects=LEFT, words=(("cat",),), others=(others,))):
            found = tiny.draw(pipe)
        with attach(pipe, Regions(masks, inside=0.0)):
            assert torch.equal(found, tiny.draw(pipe))
        assert differs(found, plain)


def test_each_picture_has_words_and_cells_of_its_own():
    pipe = tiny.sd1()
    prompts, words, others = ["a cat and a dog", "a red dog"], (("cat",), ("red dog",)), (("dog",), ())
    cells = torch.cat([LEFT, ~LEFT])
    with attach(pipe, ObjectWords(objects=cells, words=words, others=others)):
        both = tiny.draw(pipe, prompts)
    for n, prompt in enumerate(prompts):
        with attach(pipe, ObjectWords(objects=cells[n : n + 1], words=words[n : n + 1], others=others[n : n + 1])):
            assert close(both[n : n + 1], tiny.draw(pipe, prompt, seed=n), 2e-3)


def test_words_cannot_mean_both():
    pipe = tiny.sd1()
    with attach(pipe, ObjectWords(objects=LEFT, words=(("cat",),), others=(("a cat",),))):
        with pytest.raises(PhraseError, match="share 1 token"):
            tiny.draw(pipe)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_infusion_of_the_picture_itself_changes_nothing(family):
    """Logits of a composite that is the picture are the picture's own; those of another picture are not."""
    pipe = tiny.FAMILIES[family]()
    if family == "sd1":  # untrained, its self-attention is nearly even; let it tell its cells apart
        for module in pipe.unet.modules():
            if hasattr(module, "to_q"):
                module.to_q.weight.data *= 8
    plain, guidance = tiny.draw(pipe, steps=1), {}
    if family == "flux":
        guidance = {"true_cfg_scale": 2.0, "negative_prompt": "dog"}
        plain = tiny.draw(pipe, steps=1, **guidance)
    seen = []

    class Same(Infusion):
        def before_denoise(self, step):
            seen.append(step.latents.clone())
            super().before_denoise(step)

    same = Same(LEFT, lambda index: seen[-1], until=1)
    with attach(pipe, same) as run:
        assert close(tiny.draw(pipe, steps=1, **guidance), plain, 2e-3)
    assert run.report.passes["composite"] == 1 and run.run.state(same).most > 0
    for rows in ("own", "columns", "all"):
        with attach(pipe, Infusion(LEFT, lambda index: seen[-1].flip(-1), until=1, rows=rows)):
            assert differs(tiny.draw(pipe, steps=1, **guidance), plain)
    with attach(pipe, Infusion(LEFT, lambda index: seen[-1].flip(-1), until=0)) as run:
        assert torch.equal(tiny.draw(pipe, steps=1, **guidance), plain) and "composite" not in run.report.passes
    assert torch.equal(tiny.draw(pipe, steps=1, **guidance), plain)


def test_extended_guidance_adds_what_infusion_changed():
    pipe = tiny.sd1()
    other = random(1, 4, 16, 24, seed=3)
    outputs = {}

    def predicted(**settings):
        control = Infusion(LEFT, lambda index: other, until=1, **settings)

        class Look(Infusion):
            def after_denoise(self, step, output):
                found = super().after_denoise(step, output)
                outputs["found"] = (output if found is None else found)[step.rows.cond]

        look = Look(control.objects, control.composite, control.until, control.rows, control.extended)
        with attach(pipe, look) as run:
            tiny.draw(pipe, steps=1)
        return outputs["found"], run.report.passes

    with_it, passes = predicted()
    none = Infusion(LEFT, lambda index: other, until=0)
    assert "without infusion" not in passes
    extended, passes = predicted(extended=True)
    assert passes["without infusion"] == 1
    plain = {}

    class Plain(Infusion):
        def after_denoise(self, step, output):
            plain["found"] = output[step.rows.cond]

    with attach(pipe, Plain(none.objects, none.composite, 0)):
        tiny.draw(pipe, steps=1)
    assert torch.allclose(extended, 2 * with_it - plain["found"], atol=1e-5)


def test_objects_must_fit_the_pictures():
    pipe = tiny.sd1()
    for control in (Infusion(LEFT, lambda index: None, 1), ObjectWords(objects=LEFT, words=(("cat",),), others=((),))):
        with attach(pipe, control), pytest.raises(ControlError, match="1 objects do not fit 2 pictures"):
            tiny.draw(pipe, ["a cat", "a cat"])
