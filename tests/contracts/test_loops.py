"""Runs that end in unusual ways, or were never a pipeline call: cancelled, shared, by hand, by solvers of two calls."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import diffusers
import pytest
import tiny
import torch
from PIL import Image
from toys import Identity, Spy, pattern, size

from attnctl.engine.attachment import attach
from attnctl.engine.control import Control
from attnctl.errors import ControlError, UnsupportedPipelineError
from attnctl.processors import DenseRegions, Perturb, Regions, Segregation, TokenMaps


def sibling(pipe):
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    return tiny.quiet(diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False))


def test_a_cancelled_run_does_not_leak_into_a_pipeline_that_shares_the_denoiser():
    pipe = tiny.sd1()
    other = sibling(pipe)
    picture = Image.new("RGB", (48, 32), "red")

    def cancel(*arguments):
        raise KeyError("cancelled")

    with attach(pipe, Identity()):
        with pytest.raises(KeyError):
            tiny.draw(pipe, steps=4, callback_on_step_end=cancel)
        with pytest.raises(ControlError, match="a StableDiffusionImg2ImgPipeline draws with it; attach to that one"):
            other("a red dog", image=picture, num_inference_steps=4)


def test_one_control_that_raises_in_its_end_does_not_keep_others_from_ending():
    class Bad(Control):
        def end(self, run):
            raise RuntimeError("no end")

    pipe, spy = tiny.sd1(), Spy()
    with pytest.raises(RuntimeError, match="no end"), attach(pipe, Bad(), spy):
        tiny.draw(pipe)
    assert len(spy.ended) == 1


@pytest.mark.parametrize("solver", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_gradients_are_not_spent_on_calls_whose_edits_are_lost(solver):
    """The second call of a solver step: the solver steps from the latents of the first."""
    pipe = tiny.sd1()
    pipe.scheduler = getattr(diffusers, solver).from_config(pipe.scheduler.config)

    @dataclass(frozen=True)
    class At(Control):
        which: int

        def before_denoise(self, step):
            if step.index == self.which:
                step.latents = step.latents + 0.5 * size(step.latents) * pattern(step.latents)

    plain = tiny.draw(pipe, steps=3)

    def moved(index):
        with attach(pipe, At(index)):
            return float((tiny.draw(pipe, steps=3) - plain).norm() / plain.norm())

    assert moved(1) < 0.3 * moved(0) and moved(3) < 0.1 * moved(2)
    spy, control = Spy(), Segregation("cat", "dog", look_ahead=0, window=(0, 1))
    with attach(pipe, spy, control) as run:
        tiny.draw(pipe, steps=3)
    assert [step.corrector for step in spy.steps] == [False, True, False, True, False]
    assert [update.step for update in run.run.state(control).updates] == [0, 2, 4]


def test_a_loop_by_hand_reads_each_prompt_afresh():
    pipe = tiny.sd1()
    with attach(pipe, TokenMaps()) as run:
        for prompt in ("a cat and a dog", "a red dog", "blue"):
            text, _ = pipe.encode_prompt([prompt] * 2, "cpu", 1, False)
            with torch.no_grad():
                pipe.unet(torch.randn(2, 4, 16, 24), torch.tensor(5), text)
            assert run.run.prompts == [prompt] * 2 and prompt.split()[-1] in run.maps.words


def test_a_loop_by_hand_may_change_size():
    pipe, spy = tiny.sd1(), Spy()
    text, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    with attach(pipe, spy), torch.no_grad():
        for side in (16, 24):
            pipe.unet(torch.randn(1, 4, side, side), torch.tensor(5), text)
    assert [run.latent_size for run in spy.runs] == [(16, 16), (24, 24)]


def test_a_loop_in_a_second_thread_after_the_first_has_ended():
    pipe, failed = tiny.sd1(), []
    text, _ = pipe.encode_prompt("a cat", "cpu", 1, False)

    def loop():
        try:
            with torch.no_grad():
                pipe.unet(torch.randn(1, 4, 16, 16), torch.tensor(5), text)
        except Exception as error:
            failed.append(error)

    with attach(pipe, Identity()):
        for _ in range(2):
            thread = threading.Thread(target=loop)
            thread.start()
            thread.join()
    assert failed == []


def test_guidance_switched_off_in_the_middle():
    pipe, spy = tiny.sd1(), Spy(look=lambda call: (call.step.index, call.step.rows.total, str(call.step.rows.cond)))

    def switch(pipe, index, timestep, tensors):
        if index == 0:
            pipe._guidance_scale = 1.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
        return {}

    with attach(pipe, spy):
        tiny.draw(pipe, steps=3, callback_on_step_end=switch, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert list(dict.fromkeys(spy.seen)) == [
        (0, 2, "slice(1, 2, None)"),
        (1, 1, "slice(0, 1, None)"),
        (2, 1, "slice(0, 1, None)"),
    ]


def test_a_pag_pipeline_is_refused_before_it_swaps_processors():
    pipe = tiny.quiet(diffusers.StableDiffusionPAGPipeline(**tiny._sd_parts(), pag_applied_layers=["mid"]))
    with attach(pipe, Identity("cross")):
        with pytest.raises(UnsupportedPipelineError, match="call it with pag_scale=0 and attach Pag"):
            tiny.draw(pipe, pag_scale=2.0)
        tiny.draw(pipe, pag_scale=0.0)
    assert {type(one).__name__ for one in pipe.unet.attn_processors.values()} == {"AttnProcessor2_0"}


@pytest.mark.parametrize("order", ["negative first", "prompt first"])
def test_flux_with_both_rows_in_one_batch(order):
    """As the community pipeline with classifier-free guidance: the text says which half is which."""
    pipe, spy = tiny.flux(), Spy(look=lambda call: (call.step.rows.cond, call.step.rows.uncond))
    with attach(pipe, spy, TokenMaps("cat")) as run:
        positive, pooled, ids = pipe.encode_prompt("a cat and a dog", None, max_sequence_length=16)
        negative, other, _ = pipe.encode_prompt("blue", None, max_sequence_length=16)
        texts, pools = [negative, positive], [other, pooled]
        if order == "prompt first":
            texts, pools = texts[::-1], pools[::-1]
        with torch.no_grad():
            pipe.transformer(
                hidden_states=torch.randn(2, 96, 16), encoder_hidden_states=torch.cat(texts),
                pooled_projections=torch.cat(pools), timestep=torch.tensor([0.5, 0.5]), txt_ids=ids,
                img_ids=pipe._prepare_latent_image_ids(1, 8, 12, "cpu", torch.float32),
            )  # fmt: skip
    cond, uncond = (slice(1, 2), slice(0, 1)) if order == "negative first" else (slice(0, 1), slice(1, 2))
    assert set(map(str, spy.seen)) == {str((cond, uncond))}
    assert run.maps["cat"].shape[0] == 1


@pytest.mark.parametrize(
    "control",
    [
        Segregation("cat", "dog", look_ahead=0, window=(0, 0.1)),
        Perturb("1", window=(0, 0.1)),
        Regions({"cat": (0, 0, 0.5, 1)}, window=(0, 0.1)),
        DenseRegions({"cat": (0, 0, 0.5, 1)}, window=(0, 0.1)),
    ],
    ids=lambda control: type(control).__name__,
)
def test_a_window_that_holds_no_step_of_the_run_is_an_error(control):
    pipe, picture = tiny.img2img(), Image.new("RGB", (48, 32), "red")
    with attach(pipe, control), pytest.raises(ControlError, match=r"window \(0, 0.1\) holds none of the 4 steps"):
        pipe("a cat and a dog", image=picture, strength=0.4, num_inference_steps=10, output_type="latent")
