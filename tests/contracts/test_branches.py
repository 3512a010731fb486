"""Guidance in two calls: the negative prompt's call is told by what was encoded, also where nobody names it."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import torch
from contract_table import differs
from PIL import Image
from toys import Spy

from attnctl.engine.attachment import attach
from attnctl.processors import Perturb, TokenMaps

PICTURE = Image.new("RGB", (48, 32), "red")


def parts():
    return {k: v for k, v in tiny.flux().components.items() if k not in ("image_encoder", "feature_extractor")}


def image_to_image():
    return tiny.quiet(diffusers.FluxImg2ImgPipeline(**parts())), {"image": PICTURE, "strength": 0.5}


def inpainting():
    mask = Image.new("L", (48, 32))
    mask.paste(255, (0, 0, 24, 32))
    return tiny.quiet(diffusers.FluxInpaintPipeline(**parts())), {"image": PICTURE, "mask_image": mask, "strength": 0.5}


def kontext():
    return tiny.quiet(diffusers.FluxKontextPipeline(**parts())), {
        "image": PICTURE,
        "max_area": 32 * 48,
        "_auto_resize": False,
    }


def text_to_image():
    return tiny.flux(), {}


def draw(pipe, settings, **more):
    return pipe(
        prompt="a cat and a dog", num_inference_steps=4, height=32, width=48, max_sequence_length=16,
        output_type="latent", generator=torch.Generator().manual_seed(0), return_dict=False, **settings, **more,
    )[0]  # fmt: skip


@pytest.mark.parametrize("make", [text_to_image, image_to_image, inpainting, kontext])
def test_negative_call_is_not_the_prompts(make):
    pipe, settings = make()
    guided = {"negative_prompt": "blue", "true_cfg_scale": 2.0}
    spy = Spy(where="joint", look=lambda call: call.step.rows.cond is None)
    with attach(pipe, spy, TokenMaps("cat")) as run:
        draw(pipe, settings, **guided)
    calls = run.run.calls
    assert calls == run.run.steps and [step.index for step in spy.steps] == list(range(calls))
    assert spy.seen == [False, False, False, False, True, True, True, True] * calls
    records = sum(entry.count for entry in run.maps._sums.values())
    assert records == 4 * calls  # four blocks; the negative prompt has no cat


@pytest.mark.parametrize("make", [image_to_image, kontext])
def test_a_term_goes_into_both_calls(make):
    pipe, settings = make()
    guided = {"negative_prompt": "blue", "true_cfg_scale": 2.0}
    plain = draw(pipe, settings, **guided)
    with attach(pipe, Perturb("1", scale=6.0)) as run:
        drawn = draw(pipe, settings, **guided)
    assert differs(drawn, plain) and run.run.passes["perturb"] <= run.run.calls


def test_embeddings_of_the_users_own():
    pipe, settings = image_to_image()
    embeds, pooled, _ = pipe.encode_prompt("a cat and a dog", None, max_sequence_length=16)
    other, other_pooled, _ = pipe.encode_prompt("blue", None, max_sequence_length=16)
    spy = Spy(where="joint", look=lambda call: call.step.rows.cond is None)
    with attach(pipe, spy, prompt="a cat and a dog"):
        pipe(
            prompt_embeds=embeds, pooled_prompt_embeds=pooled, negative_prompt_embeds=other,
            negative_pooled_prompt_embeds=other_pooled, true_cfg_scale=2.0, num_inference_steps=2, height=32, width=48,
            max_sequence_length=16, output_type="latent", **settings,
        )  # fmt: skip
    assert spy.seen == [False] * 4 + [True] * 4
