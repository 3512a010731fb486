"""Rule 3: rows are independent. A batch gives what single runs give, with guidance in one call, in two, or without."""

from __future__ import annotations

import pytest
import tiny
import torch
from contract_table import close, fewer_pairs
from toys import Bias, Spy

from attnctl.engine.attachment import attach

PROMPTS = ["a cat and a dog", "a red cat and a dog", "a blue dog and a cat", "a cat and a cat and a dog"]
GUIDANCE = {
    "flux": {"distilled": {}, "sequential": {"true_cfg_scale": 2.0, "negative_prompt": "blue"}},
}
BATCHED = {"guided": {"guidance_scale": 5.0}, "unguided": {"guidance_scale": 1.0}}


def settings_of(family, count):
    for settings in GUIDANCE.get(family, BATCHED).values():
        many = {**settings, "negative_prompt": ["blue"] * count} if "negative_prompt" in settings else settings
        yield settings, many


@fewer_pairs
def test_rows_of_a_batch_of_four_equal_singles(case, family):
    """Each row is compared in one of the settings, the outer ones in one and the inner ones in the other."""
    pipe = tiny.MODELS[family]()
    for (settings, many), rows in zip(settings_of(family, 4), ((0, 3), (1, 2)), strict=True):
        with attach(pipe, case.acting()):
            batch = tiny.draw(pipe, PROMPTS, **many)
            for i in rows:
                single = tiny.draw(pipe, PROMPTS[i], seed=i, **settings)
                assert close(batch[i : i + 1], single, 2e-3), f"image {i} with {settings}"


@pytest.mark.parametrize("family", tiny.MODELS)
def test_several_pictures_per_prompt(family):
    pipe = tiny.MODELS[family]()
    with attach(pipe, Bias()) as attachment:
        batch = tiny.draw(pipe, PROMPTS[:2], num_images_per_prompt=2)
        assert attachment.run.prompts == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
        assert attachment.run.images == 4
        for i, prompt in enumerate([PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]):
            assert close(batch[i : i + 1], tiny.draw(pipe, prompt, seed=i), 2e-3)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "sd35"])
def test_conditional_rows_come_second_in_one_call(family):
    pipe = tiny.MODELS[family]()
    spy = Spy(look=lambda call: (call.step.rows, call.q.shape[0]))
    with attach(pipe, spy):
        tiny.draw(pipe, PROMPTS[:3], steps=1)
    for rows, batch in spy.seen:
        assert (rows.cond, rows.uncond, rows.total, batch) == (slice(3, 6), slice(0, 3), 6, 6)


def test_flux_rows_follow_the_branch():
    pipe = tiny.flux()
    spy = Spy(look=lambda call: (call.step.index, call.step.rows.cond, call.step.rows.uncond))
    with attach(pipe, spy) as attachment:
        tiny.draw(pipe, PROMPTS[:2], steps=2, true_cfg_scale=2.0, negative_prompt=["blue"] * 2)
    one, other = slice(0, 2), None
    want = [(step, *rows) for step in (0, 1) for rows in ((one, other), (other, one)) for _ in range(4)]
    assert spy.seen == want
    assert attachment.run.calls == 2 and [step.index for step in spy.steps] == [0, 1]


def test_distilled_flux_is_conditional_only():
    pipe = tiny.flux(guidance_embeds=True)
    spy = Spy(look=lambda call: call.step.rows)
    with attach(pipe, spy):
        tiny.draw(pipe, steps=1, guidance_scale=3.5)
    assert {(rows.cond.stop, rows.uncond) for rows in spy.seen} == {(1, None)}


def test_unconditional_rows_are_left_alone():
    """An acting control on the conditional rows changes nothing of what the unconditional ones predict."""
    pipe = tiny.sd1()
    outputs = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    tiny.draw(pipe, steps=1)
    with attach(pipe, Bias()):
        tiny.draw(pipe, steps=1)
    handle.remove()
    assert torch.equal(outputs[0][:1], outputs[1][:1]) and not torch.equal(outputs[0][1:], outputs[1][1:])
