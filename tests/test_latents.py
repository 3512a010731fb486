"""Editing latents: as if the pipeline itself had held the edited sample, for every scheduler and every layout."""

from __future__ import annotations

from dataclasses import dataclass

import diffusers
import pytest
import tiny
import torch
from toys import Guide, Identity, Push, Spy, pattern

from attnctl.engine.attachment import attach
from attnctl.engine.control import Control
from attnctl.errors import ControlError

SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}


def scheduler(name, pipe):
    return SCHEDULERS[name].from_config(pipe.scheduler.config, **({"skip_prk_steps": True} if name == "pndm" else {}))


def edit(latents):
    return latents * 0.9 + 0.1 * pattern(latents)


@dataclass(frozen=True)
class Edit(Control):
    def before_denoise(self, step):
        step.latents = edit(step.latents)


def reference(pipe, start, **kwargs):
    """The same edits by the pipeline's own means: on the latents it starts from, and after all steps but the last."""
    sigma = getattr(pipe.scheduler, "init_noise_sigma", 1.0) if hasattr(pipe, "unet") else 1.0

    def after(pipe, index, timestep, tensors):
        last = index == pipe.num_timesteps - 1
        return tensors if last else tensors | {"latents": edit(tensors["latents"])}

    return tiny.draw(pipe, latents=edit(start * sigma) / sigma, callback_on_step_end=after, **kwargs)


def first_latents(family):
    shape = (1, 96, 16) if family == "flux" else (1, 4, 16, 24)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_edits_on_sd_equal_the_pipelines_own(name, guidance):
    pipe = tiny.sd1()
    pipe.scheduler = scheduler(name, pipe)
    pipe.scheduler.set_timesteps(3)
    start = first_latents("sd1")
    want = reference(pipe, start, steps=3, guidance_scale=guidance)
    with attach(pipe, Edit()):
        got = tiny.draw(pipe, latents=start, steps=3, guidance_scale=guidance)
    plain = tiny.draw(pipe, latents=start, steps=3, guidance_scale=guidance)
    assert not torch.allclose(want, plain, rtol=1e-2)
    if name in ("euler", "heun"):  # the unscaled latents are known to rounding only
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    else:
        assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "sd35", "flux"])
def test_edits_on_other_families_equal_the_pipelines_own(family):
    pipe = tiny.FAMILIES[family]()
    pipe.scheduler.set_timesteps(3)
    start = first_latents(family)
    want = reference(pipe, start, steps=3)
    with attach(pipe, Edit()):
        got = tiny.draw(pipe, latents=start, steps=3)
    if family == "sdxl":  # Euler
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    else:
        assert torch.equal(got, want)


def test_edits_reach_the_second_call_of_sequential_guidance():
    pipe = tiny.flux()
    start = first_latents("flux")
    guidance = {"true_cfg_scale": 3.0, "negative_prompt": "blue"}
    want = reference(pipe, start, steps=3, **guidance)
    with attach(pipe, Edit()):
        got = tiny.draw(pipe, latents=start, steps=3, **guidance)
    assert torch.equal(got, want)


def test_edits_add_up_over_controls():
    @dataclass(frozen=True)
    class Add(Control):
        amount: float

        def before_denoise(self, step):
            step.latents = step.latents + self.amount

    pipe = tiny.sd1()
    with attach(pipe, Add(0.1), Add(0.2)):
        both = tiny.draw(pipe)
    with attach(pipe, Add(0.3)):
        once = tiny.draw(pipe)
    torch.testing.assert_close(both, once, rtol=1e-4, atol=1e-4)


def test_mask_and_picture_channels_of_an_inpainting_model_are_not_latents():
    pipe = tiny.inpaint()
    shapes, inputs = [], []

    class Watch(Push):
        def before_denoise(self, step):
            super().before_denoise(step)
            shapes.append(step.latents.shape)

    def arguments():
        picture = torch.linspace(-1, 1, 3 * 32 * 48).reshape(1, 3, 32, 48)
        return {"image": picture, "mask_image": (picture[:, :1] > 0).float(), "strength": 1.0}

    handle = pipe.unet.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    plain = tiny.draw(pipe, **arguments())
    with attach(pipe, Watch()):
        moved = tiny.draw(pipe, **arguments())
    handle.remove()
    assert shapes == [(1, 4, 16, 24)] * 2
    assert not torch.equal(plain, moved)
    assert torch.equal(inputs[0][:, 4:], inputs[2][:, 4:]) and not torch.equal(inputs[0][:, :4], inputs[2][:, :4])


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_term_added_to_both_halves_passes_guidance_unchanged(family, guidance):
    pipe = tiny.FAMILIES[family]()
    seen = []
    step = pipe.scheduler.step

    def recording(model_output, timestep, sample, **kwargs):  # set by a user, before us: it must survive as well
        seen.append(model_output)
        return step(model_output, timestep, sample, **kwargs)

    pipe.scheduler.step = recording
    scale = {"guidance_scale": guidance}
    if family == "flux" and guidance > 1:
        scale = {"true_cfg_scale": guidance, "negative_prompt": "blue"}
    tiny.draw(pipe, steps=1, **scale)
    with attach(pipe, Guide(0.5)):
        tiny.draw(pipe, steps=1, **scale)
    assert pipe.scheduler.step is recording
    torch.testing.assert_close(seen[1], seen[0] + 0.5 * pattern(seen[0]), rtol=1e-4, atol=1e-4)


def test_wrong_shape_is_an_error():
    class Wrong(Control):
        def before_denoise(self, step):
            step.latents = step.latents[:, :2]

    pipe = tiny.sd1()
    with attach(pipe, Wrong()), pytest.raises(ControlError, match=r"\(1, 4, 16, 24\), not \(1, 2, 16, 24\)"):
        tiny.draw(pipe)


def test_scale_and_sigma_are_those_of_the_scheduler():
    pipe = tiny.sdxl()
    spy = Spy()
    with attach(pipe, spy):
        tiny.draw(pipe, steps=3)
    sigmas = pipe.scheduler.sigmas
    for step, sigma in zip(spy.steps, sigmas, strict=False):
        assert step.sigma == pytest.approx(float(sigma))
        assert step.scale == pytest.approx(float(1 / (sigma**2 + 1) ** 0.5))
    assert float(spy.steps[0].latents.std()) == pytest.approx(
        float(sigmas[0]), rel=0.2
    )  # unscaled: as noisy as it starts


@pytest.mark.parametrize(("name", "calls"), [("ddim", 3), ("heun", 5), ("pndm", 4)])
def test_denoiser_calls_are_counted_not_solver_steps(name, calls):
    pipe = tiny.sd1()
    pipe.scheduler = scheduler(name, pipe)
    spy = Spy()
    with attach(pipe, spy) as attachment:
        tiny.draw(pipe, steps=3)
    assert [step.index for step in spy.steps] == list(range(calls))
    assert attachment.run.steps == attachment.run.calls == calls
    assert spy.ended == spy.runs == [attachment.run]


def test_fraction_runs_through_the_schedule():
    pipe = tiny.sd1()
    spy = Spy()
    with attach(pipe, spy):
        tiny.draw(pipe, steps=4)
    assert [step.fraction for step in spy.steps] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_fraction_of_flow_models(family):
    pipe = tiny.FAMILIES[family]()
    spy = Spy()
    with attach(pipe, spy):
        tiny.draw(pipe, steps=4)
    assert [step.fraction for step in spy.steps] == [0.0, 0.25, 0.5, 0.75]


def test_image_to_image_starts_within_the_schedule():
    pipe = tiny.img2img()
    spy = Spy()
    with attach(pipe, spy, Identity()) as attachment:
        tiny.draw(pipe, size=None, steps=4, strength=0.5, image=torch.zeros(1, 3, 32, 48))
    assert [step.fraction for step in spy.steps] == [0.5, 0.75]
    assert attachment.run.steps == 2 and spy.ended


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_latents_can_be_a_leaf(mode):
    class Leaf(Control):
        def before_denoise(self, step):
            with torch.enable_grad():
                leaf = step.latents.detach().requires_grad_()
                (gradient,) = torch.autograd.grad((leaf**2).sum(), leaf)
            step.latents = leaf - 0.1 * gradient

    pipe = tiny.sd1()
    with attach(pipe, Leaf()), mode():
        tiny.draw(pipe)
