"""glyph-sd3 as it ships: words lie on their things, controls act on it, and it draws what is asked for."""

from typing import Any

import pytest
import torch

import attnctl
from attnctl.glyph import judge
from attnctl.processors import Segregation, TokenMaps


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = attnctl.load("glyph-sd3")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw(pipe: Any, prompt: str, count: int = 1, steps: int = 3, kind: str = "np") -> Any:
    seeds = [torch.Generator().manual_seed(seed) for seed in range(count)]
    settings = {"num_inference_steps": steps, "guidance_scale": 4.0, "generator": seeds, "output_type": kind}
    return pipe([prompt] * count, **settings).images


def test_words_lie_on_their_things(pipe: Any) -> None:
    from attnctl.glyph.train.sd3 import map_scores

    for t, score in map_scores(pipe, scenes=12).items():
        assert score.pointing > 0.85, t
        assert score.share > 0.8, t


def test_controls_act_on_it_and_leave_no_trace(pipe: Any) -> None:
    plain = _draw(pipe, "a cat and a dog")
    with attnctl.attach(pipe, TokenMaps()) as run:
        assert (_draw(pipe, "a cat and a dog") == plain).all()
    assert run.maps["cat"].shape == run.maps["dog"].shape == (1, 8, 8)
    with attnctl.attach(pipe, Segregation("cat", "dog", look_ahead=0)):
        assert (_draw(pipe, "a cat and a dog") != plain).any()
    assert (_draw(pipe, "a cat and a dog") == plain).all()


@pytest.mark.slow
def test_it_draws_what_is_asked_for(pipe: Any) -> None:
    """Single seeds fail: one in six things is not there."""
    asked = ("lion", "bear", "cat", "elephant", "apple", "bench")
    found = [
        reading.has(concept)
        for concept in asked
        for reading in judge.load().read(_draw(pipe, f"a {concept}", 4, 20, "pil"))
    ]
    assert sum(found) >= 0.7 * len(found)
