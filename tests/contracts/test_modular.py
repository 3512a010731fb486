"""Modular Diffusers: a guider prepares the batches of a step, and names them; each is a denoiser call of its own."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch
from contract_table import differs
from toys import Spy

from attnctl.engine.attachment import attach
from attnctl.engine.branches import Branches
from attnctl.processors import AStar, TokenMaps

TEXT = "a cat and a dog"


@pytest.fixture
def pipe():
    logging.disable(logging.CRITICAL)
    parts = {name: part for name, part in tiny.sdxl().components.items() if part is not None}
    modular = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    modular.update_components(**parts)
    modular.set_progress_bar_config(disable=True)
    yield modular
    logging.disable(logging.NOTSET)


def draw(pipe):
    return pipe(
        prompt=TEXT, negative_prompt="red", height=32, width=48, num_inference_steps=3, output="latents",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip


def test_only_the_prompts_call_is_conditional(pipe):
    plain = draw(pipe)
    spy = Spy(where="cross", look=lambda call: call.step.rows.cond is not None)
    with attach(pipe, spy, TokenMaps("cat"), prompt=TEXT) as run:
        drawn = draw(pipe)
    sites = len(spy.sites(tuple(attach(pipe, Spy(where="cross")).selected[0])))
    assert torch.equal(drawn, plain)
    assert spy.seen == ([True] * sites + [False] * sites) * 3
    assert run.run.calls == run.run.steps == 3
    assert sum(entry.count for entry in run.maps._sums.values()) == 3 * sites


def test_a_gradient_moves_what_is_drawn(pipe):
    plain = draw(pipe)
    with attach(pipe, AStar("cat", "dog", look_ahead=0, window=(0, 1)), prompt=TEXT) as run:
        assert differs(draw(pipe), plain)
    assert run.report.to_dict()["traces"][0]["updates"] == 3
    assert torch.equal(draw(pipe), plain)


def test_batches_of_a_guider_with_the_same_text_are_taken_in_order():
    """As skipped-layer guidance prepares them: the prompt, the negative prompt, and the prompt once more."""
    prompt, negative = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    names = {"pred_cond": prompt, "pred_uncond": negative, "pred_cond_skip": prompt}
    branches = Branches()
    for _ in range(2):
        branches.prepared([SimpleNamespace(__guidance_identifier__=name, text=text) for name, text in names.items()])
        assert [branches.guider(text) for text in names.values()] == ["cond", "uncond", "extra"]
    assert branches.guider(prompt) is None
