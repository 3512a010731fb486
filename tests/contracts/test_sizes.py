"""Rule 4: sizes that are not square, several in a row, and half precision."""

from __future__ import annotations

import pytest
import tiny
import torch
from contract_table import differs, fewer_pairs
from toys import Identity

from attnctl.engine.attachment import attach

SIZES = [(32, 64), (64, 32), (48, 48)]


@fewer_pairs
def test_one_attachment_serves_many_sizes(case, family):
    pipe = tiny.MODELS[family]()
    apart = []
    for size in SIZES:
        with attach(pipe, case.acting()):
            apart.append(tiny.draw(pipe, size=size))
    with attach(pipe, case.acting()):
        for size, alone in zip(SIZES, apart, strict=True):
            assert torch.equal(tiny.draw(pipe, size=size), alone)


@fewer_pairs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(case, family, dtype):
    pipe = tiny.MODELS[family]().to(dtype)
    plain = tiny.draw(pipe)
    with attach(pipe, case.still()):
        assert torch.equal(tiny.draw(pipe), plain)
    with attach(pipe, case.acting()):
        drawn = tiny.draw(pipe)
    assert drawn.dtype == plain.dtype and drawn.isfinite().all()
    assert not case.moves or differs(drawn, plain)


def test_moving_the_pipeline_while_attached():
    pipe = tiny.sd1()
    with attach(pipe, Identity()):
        tiny.draw(pipe)
        pipe.to(torch.bfloat16)
        half = tiny.draw(pipe)
    assert half.dtype == torch.bfloat16 and torch.equal(tiny.draw(pipe), half)


@pytest.mark.parametrize("family", tiny.MODELS)
def test_steps_and_prompts_may_change_between_calls(family):
    pipe = tiny.MODELS[family]()
    with attach(pipe, Identity()) as attachment:
        for steps, prompt in ((1, "a cat"), (3, ["a dog", "red dog"]), (2, "blue")):
            tiny.draw(pipe, prompt, steps=steps)
            assert attachment.run.steps == attachment.run.calls == steps
            assert attachment.run.prompts == ([prompt] if isinstance(prompt, str) else prompt)
