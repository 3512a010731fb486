"""Looking ahead: the steps are the schedulers' own, and nothing of them stays."""

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from attnctl import attach
from attnctl.engine.look_ahead import look_ahead
from attnctl.errors import ControlError
from attnctl.processors import AStar, Excitation, Segregation

STEPS = 6


class Ahead(Segregation):
    """Looks 3 timesteps ahead, one at a time, at its first step, and keeps what every step was given."""

    def begin(self, run):
        self._set(latents=[], timesteps=[], found=None)
        return super().begin(run)

    def before_denoise(self, step):
        self.latents.append(step.latents * step.scale)
        self.timesteps.append(torch.as_tensor(step.timestep, dtype=torch.float32).flatten()[0])
        if step.index == 0:
            self._set(found=look_ahead(step, 3, 3 / (step.run.schedule - step.run.start)))


def ahead_and_there(pipe, steps=STEPS, **changes):
    control = Ahead("cat", "dog")
    with attach(pipe, control):
        tiny.draw(pipe, ["a cat and a dog", "a dog and a cat"], steps=steps, **changes)
    return control.found, control


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_with_the_schedulers_timesteps_it_goes_where_the_scheduler_goes(family):
    found, control = ahead_and_there(tiny.FAMILIES[family]())
    there = control.latents[3]
    assert (found.latents - control.latents[0]).abs().max() > 0.1
    torch.testing.assert_close(found.latents, there, atol=1e-5 * float(there.abs().max()), rtol=1e-5)
    reached = torch.as_tensor(found.arguments["timestep"], dtype=torch.float32).flatten()[0]
    torch.testing.assert_close(reached, control.timesteps[3])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_models_of_noise_and_of_velocity(scheduler, kind):
    pipe = tiny.FAMILIES["sd1"]()
    settings = {"beta_schedule": "scaled_linear", "prediction_type": kind}
    own = {DDIMScheduler: {"clip_sample": False}, DPMSolverMultistepScheduler: {"solver_order": 1}}  # that is DDIM's
    pipe.scheduler = scheduler(**settings, **own.get(scheduler, {}))
    found, control = ahead_and_there(pipe)
    there = control.latents[3]
    torch.testing.assert_close(found.latents, there, atol=1e-5 * float(there.abs().max()), rtol=1e-4)


def test_guidance_is_the_pipelines():
    weak, strong = (ahead_and_there(tiny.FAMILIES["sd1"](), guidance_scale=g)[0].latents for g in (1.5, 9.0))
    assert (weak - strong).abs().max() > 0.01
    found, control = ahead_and_there(tiny.FAMILIES["sd1"](), guidance_scale=1.0)  # one row for each picture
    torch.testing.assert_close(found.latents, control.latents[3], atol=1e-5, rtol=1e-5)


def test_other_schedulers():
    pipe = tiny.FAMILIES["sd1"]()
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True)  # repeats a timestep
    found, _ = ahead_and_there(pipe)
    assert found.latents.isfinite().all()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ControlError, match="EDMEulerScheduler has no noise levels"):
        ahead_and_there(pipe)
    pipe.scheduler = DDIMScheduler(prediction_type="sample")
    with pytest.raises(ControlError, match="not 'sample'"):
        ahead_and_there(pipe)


def test_at_the_end_of_the_schedule_there_is_nothing_ahead():
    with (
        pytest.raises(ControlError, match="no timestep left"),
        attach(tiny_pipe := tiny.FAMILIES["sd1"](), Ahead("cat", "dog")),
    ):
        tiny.draw(tiny_pipe, ["a cat and a dog"], steps=1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_sound_is_left_alone_bit_for_bit_and_the_rest_gets_all_updates(family):
    pipe, texts = tiny.FAMILIES[family](), ["a cat and a dog", "a dog and a cat"]
    plain = tiny.draw(pipe, texts, steps=3)
    watch = Segregation("cat", "dog", look_ahead=2, peak_target=1.0, window=(0, 1))
    with attach(pipe, watch) as attachment:
        all_moved = tiny.draw(pipe, texts, steps=3)
    seen = attachment.run.state(watch).foreseen.peaks
    assert seen.shape == (2,) and ((0 < seen) & (seen < 1)).all() and seen[0] != seen[1]
    with attach(pipe, Segregation("cat", "dog", window=(0, 1))):
        always = tiny.draw(pipe, texts, steps=3)
    assert torch.equal(all_moved, always)

    worse = int(seen.argmin())
    control = Segregation("cat", "dog", look_ahead=2, peak_target=float(seen.mean()), window=(0, 1))
    with attach(pipe, control) as attachment:
        drawn = tiny.draw(pipe, texts, steps=3)
    trace = attachment.run.state(control)
    assert [update.images for update in trace.updates] == [(worse,)] * 3
    assert torch.equal(drawn[1 - worse], plain[1 - worse])
    assert trace.foreseen.alone == (1 - worse,) and f"image {1 - worse} left alone" in str(trace)
    close = 1e-5 * float(all_moved[worse].abs().max())
    torch.testing.assert_close(drawn[worse], all_moved[worse], atol=close, rtol=1e-3)

    control = AStar("cat", "dog", look_ahead=1, peak_target=1e-6)
    with attach(pipe, control) as attachment:
        untouched = tiny.draw(pipe, texts, steps=3)
    assert torch.equal(untouched, plain)
    told = attachment.report.to_dict()["traces"][0]
    assert told["forwards"] == 0 and told["look_ahead"]["step"] == 0 and len(told["look_ahead"]["peaks"]) == 2
    assert told["look_ahead"]["left_alone"] == [0, 1]
    assert "no update, since a look ahead finds all phrases" in str(attachment.report)


def test_it_is_asked_once_at_the_first_step_of_the_window():
    pipe = tiny.FAMILIES["sd1"]()
    control = Excitation("cat", "dog", look_ahead=1, peak_target=1.0, window=(0.3, 1.0))
    with attach(pipe, control) as attachment:
        tiny.draw(pipe, ["a cat and a dog"], steps=5)
    assert attachment.run.state(control).foreseen.step == 2


def test_mistakes():
    with pytest.raises(ControlError, match="needs to know what to look for"):
        Excitation("cat", look_ahead=2)
    for wrong in ({"look_ahead": -1}, {"reach": 0.0}, {"reach": 1.5}):
        with pytest.raises(ControlError, match="look_ahead is a number of steps"):
            Segregation("cat", "dog", peak_target=0.2, **wrong)


def test_by_default_it_looks_where_it_can():
    """Nobody asked: a run of one step, or a model that cannot be looked ahead with, is guided all the same."""
    pipe = tiny.FAMILIES["sd1"]()
    for steps, kind in ((1, "epsilon"), (20, "sample")):
        pipe.scheduler = DDIMScheduler(prediction_type=kind)
        for control in (Segregation("cat", "dog"), AStar("cat", "dog")):
            with attach(pipe, control) as attachment:
                tiny.draw(pipe, ["a cat and a dog"], steps=steps)
            told = attachment.report.to_dict()["traces"][0]
            assert told["updates"] == (1 if steps == 1 else 3)
            assert told["look_ahead"] == {"step": 0, "peaks": [None], "forwards": 0, "left_alone": []}
        asked = Segregation("cat", "dog", look_ahead=2, peak_target=0.3)
        with attach(pipe, asked), pytest.raises(ControlError, match="ahead"):
            tiny.draw(pipe, ["a cat and a dog"], steps=steps)


def test_by_default_a_picture_that_will_be_sound_is_left_alone(monkeypatch):
    pipe = tiny.FAMILIES["sd1"]()
    plain = tiny.draw(pipe, ["a cat and a dog"], steps=3)
    for kind in (Segregation, AStar):
        monkeypatch.setattr(kind, "usual_peak", 1e-6)
        with attach(pipe, kind("cat", "dog")):
            assert torch.equal(tiny.draw(pipe, ["a cat and a dog"], steps=3), plain)
        with attach(pipe, kind("cat", "dog", preset="always")):
            assert not torch.equal(tiny.draw(pipe, ["a cat and a dog"], steps=3), plain)


def test_guidance_of_a_pipeline_that_keeps_its_scale_to_itself():
    """PixArt's is an argument of the call alone."""
    weak, strong = (ahead_and_there(tiny.pixart(), guidance_scale=g) for g in (1.5, 9.0))
    assert (weak[0].latents - strong[0].latents).abs().max() > 0.01
    for found, control in (weak, strong):
        there = control.latents[3]
        torch.testing.assert_close(found.latents, there, atol=1e-5 * float(there.abs().max()), rtol=1e-4)
    pipe, spy = tiny.pixart(), Ahead("cat", "dog")
    with attach(pipe, spy) as run:
        tiny.draw(pipe, ["a cat and a dog", "a dog and a cat"], steps=STEPS, guidance_scale=3.5)
    assert run.run.guidance_scale == 3.5
