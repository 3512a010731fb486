import copy

import diffusers
import pytest
import tiny
import torch

from attnctl import attach
from attnctl.errors import ControlError, PhraseError
from attnctl.pipelines import AStarPipeline
from attnctl.processors import AStar

TEXT = "a cat and a red dog"


def settings_of(family):
    more = {} if family in ("sd1", "sdxl") else {"max_sequence_length": 16}
    return {"num_inference_steps": 2, "height": 32, "width": 48, "output_type": "latent"} | more


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_draws_what_the_control_draws(family):
    pipe, settings = tiny.FAMILIES[family](), settings_of(family)
    plain = tiny.draw(pipe, TEXT)
    with attach(pipe, AStar("cat", "dog", bonds=(("red", "dog"),), relative=0.05, window=(0, 1))):
        want = tiny.draw(pipe, TEXT)
    astar = AStarPipeline.from_pipe(pipe, relative=0.05, window=(0, 1))
    assert astar.attachment is None
    generator = torch.Generator().manual_seed(0)
    output = astar(TEXT, ["cat", "dog"], {"dog": "red"}, maps=True, generator=[generator], **settings)
    assert torch.equal(output.images, want) and not torch.equal(want, plain)
    (trace,) = output.report.to_dict()["traces"]
    assert trace["updates"] == 2 and set(trace["steps"][1]["evaluations"][0]["losses"]) == {
        "segregation", "retention", "binding",
    }  # fmt: skip
    assert output.maps["dog"].shape[0] == 1 and torch.equal(tiny.draw(pipe, TEXT), plain)


def test_a_tuple_stays_a_tuple():
    astar = AStarPipeline(tiny.sd1())
    output = astar(TEXT, ["cat", "dog"], masks={"cat": (0, 0, 0.5, 1)}, return_dict=False, **settings_of("sd1"))
    assert isinstance(output, tuple) and astar.attachment.report.traces[0][0] == "AStar"


def test_errors_come_early_and_in_words():
    with pytest.raises(ControlError, match="no setting 'strenght'"):
        AStarPipeline(tiny.sd1(), strenght=1.0)
    astar = AStarPipeline.from_pipe(tiny.sd1())
    with pytest.raises(ControlError, match="AStar needs two phrases"):
        astar(TEXT, ["cat"], **settings_of("sd1"))
    with pytest.raises(PhraseError, match="'bird' is not in the prompt"):
        astar(TEXT, ["cat", "bird"], **settings_of("sd1"))


def test_from_pretrained_takes_an_embedded_name(monkeypatch):
    asked = {}
    monkeypatch.setattr("attnctl.pipelines.astar.load", lambda model, **options: asked.update(options, model=model))
    astar = AStarPipeline.from_pretrained("glyph-sd", device="cpu", look_ahead=2, peak_target=0.2)
    assert asked == {"model": "glyph-sd", "device": "cpu"} and astar.settings == {"look_ahead": 2, "peak_target": 0.2}
    asked.clear()
    with pytest.raises(ControlError, match="look_ahead is a number of steps"):
        AStarPipeline.from_pretrained("glyph-sd", look_ahead=-2)
    assert not asked


# --- a call, and the pipeline inside ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("plaicing", "placing"),
        ("lookahead", "look_ahead"),
        ("subject", "subjects"),
        ("inference_steps", "num_inference_steps"),
        ("xyzzy", "help"),
    ],
)
@pytest.mark.parametrize("family", ["sd1", "flux"])  # the call of the first takes any name, and drops it
def test_an_unknown_setting_in_a_call_is_an_error_with_the_nearest_name(family, slip, meant):
    astar = AStarPipeline.from_pipe(tiny.FAMILIES[family]())
    with pytest.raises(ControlError, match=f"{slip!r} is neither an argument of .* nor a setting of AStar; .*{meant}"):
        astar(TEXT, ["cat", "dog"], **{slip: 1}, **settings_of(family))
    assert astar.attachment is None


def test_settings_of_a_call_are_of_that_call_alone():
    pipe, masks = tiny.sd1(), {"cat": (0, 0, 0.5, 1)}
    astar = AStarPipeline.from_pipe(pipe, relative=0.05)

    def drawn(astar, **more):
        noise = torch.Generator().manual_seed(0)
        return astar(TEXT, ["cat", "dog"], masks=masks, generator=[noise], **more, **settings_of("sd1")).images

    before = drawn(astar)
    insisting = drawn(astar, placing=30, updates=2)
    assert torch.equal(insisting, drawn(AStarPipeline.from_pipe(pipe, relative=0.05, placing=30, updates=2)))
    assert not torch.equal(before, insisting) and torch.equal(before, drawn(astar))
    with pytest.raises(ControlError, match="updates must be at least 1"):
        drawn(astar, updates=0)
    with pytest.raises(ControlError, match="maps of a call is True, to record them, or False; not 'mean'"):
        drawn(astar, maps="mean")


def test_images_of_a_call_hold_where_prompts_differ():
    astar = AStarPipeline.from_pipe(tiny.sd1(), images=(1, 2), relative=0.1)
    prompts = ["a red cat and a dog", "a cat and a red dog", "a red cat and a dog"]
    noise = [torch.Generator().manual_seed(k) for k in range(3)]
    output = astar(prompts, ["cat", "dog"], {"cat": "red", "dog": "red"}, generator=noise, **settings_of("sd1"))
    moved = [trace["steps"][0]["updates"][0]["images"] for trace in output.report.to_dict()["traces"]]
    assert moved == [[2], [1]]


def test_it_has_what_a_pipeline_has():
    pipe = tiny.sd1()
    astar = AStarPipeline.from_pipe(pipe)
    astar.set_progress_bar_config(disable=True, desc="x")
    assert pipe._progress_bar_config == {"disable": True, "desc": "x"}
    assert astar.to(torch.float64) is astar and pipe.unet.dtype == torch.float64 and astar.dtype == torch.float64
    astar.to(torch.float32).enable_freeu(1.0, 1.0, 1.0, 1.0)
    assert pipe.unet.up_blocks[0].s1 == 1.0
    euler = diffusers.EulerDiscreteScheduler.from_config(astar.scheduler.config)
    astar.scheduler = euler
    assert pipe.scheduler is euler and astar.components["scheduler"] is euler and "unet" in dir(astar)
    assert copy.copy(astar).pipe is pipe
    with pytest.raises(AttributeError):
        astar.nonesuch  # noqa: B018
    calls = []

    def note(pipe, index, timestep, tensors):
        calls.append(index)
        return tensors

    astar(TEXT, ["cat", "dog"], callback_on_step_end=note, **settings_of("sd1"))
    assert calls == [0, 1]
