"""attach(): what a run knows of the pipeline call, and what an attachment tells."""

from __future__ import annotations

import inspect
import json

import pytest
import tiny
import torch
from toys import Identity, Output, Push, Spy

from attnctl.engine.attachment import attach
from attnctl.engine.control import AttentionCall, Control
from attnctl.engine.patch import Patch
from attnctl.engine.run import Rows
from attnctl.errors import ControlError, PhraseError
from attnctl.maps.recorder import TokenMaps
from attnctl.words.phrases import tokens


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompt_is_taken_from_what_the_pipeline_encodes(family):
    pipe = tiny.FAMILIES[family]()
    with attach(pipe, Identity()) as attachment:
        tiny.draw(pipe, negative_prompt="blue", steps=1)
        assert attachment.run.prompts == [tiny.TEXT] and attachment.run.texts == {"prompt": [tiny.TEXT]}
        assert attachment.run.family.name == {"sd1": "UNet", "sdxl": "UNet", "flux": "FLUX"}.get(family, "SD3")


@pytest.mark.parametrize(
    ("family", "names"), [("sdxl", ["prompt_2"]), ("sd3", ["prompt_2", "prompt_3"]), ("flux", ["prompt_2"])]
)
def test_prompts_of_further_encoders_are_kept_apart(family, names):
    pipe = tiny.FAMILIES[family]()
    others = {name: f"a red {name[-1]}" for name in names}
    with attach(pipe, Identity()) as attachment:
        tiny.draw(pipe, steps=1, **others)
    assert attachment.run.texts == {"prompt": [tiny.TEXT]} | {name: [text] for name, text in others.items()}


def test_second_prompt_of_true_guidance_is_not_the_prompt():
    pipe = tiny.flux()
    with attach(pipe, Identity()) as attachment:
        tiny.draw(pipe, steps=1, true_cfg_scale=2.0, negative_prompt="blue")
    assert attachment.run.prompts == [tiny.TEXT]


def test_call_that_failed_early_leaves_no_prompt():
    pipe = tiny.sd3()
    with attach(pipe, Identity()) as attachment:
        with pytest.raises(Exception, match="."):
            tiny.draw(pipe, "a dog", latents="no tensor")
        tiny.draw(pipe, "a cat")
        assert attachment.run.prompts == ["a cat"]


@torch.no_grad()  # as pipelines encode
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_embeddings_with_words_given(family):
    pipe = tiny.FAMILIES[family]()
    length = {} if hasattr(pipe, "unet") else {"max_sequence_length": 16}
    others = {
        name: None for name in ("prompt_2", "prompt_3") if name in inspect.signature(pipe.encode_prompt).parameters
    }
    if family == "sd1":
        encoded = dict(
            zip(["prompt_embeds", "negative_prompt_embeds"], pipe.encode_prompt("a cat", "cpu", 1, True), strict=True)
        )
    elif family == "flux":
        positive, pooled, _ = pipe.encode_prompt("a cat", None, **length)
        encoded = {"prompt_embeds": positive, "pooled_prompt_embeds": pooled}
    else:
        names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
        encoded = dict(zip(names, pipe.encode_prompt("a cat", **others, **length), strict=True))
    with attach(pipe, Identity(), prompt="a cat") as attachment:
        given = tiny.draw(pipe, None, num_images_per_prompt=1, **encoded)
        assert attachment.run.prompts == ["a cat"] and attachment.run.images == 1
        assert torch.equal(given, tiny.draw(pipe, "a cat"))


def test_words_are_found_in_every_encoder():
    """Rows of CLIP count from the start token; T5 has none, and in SD 3 follows 77 rows of CLIP."""
    for family, rows in {"sd1": [2, 5], "sdxl": [2, 5], "sd3": [2, 5, 78, 81], "flux": [1, 4]}.items():
        pipe = tiny.FAMILIES[family]()
        with attach(pipe, Identity()) as attachment:
            tiny.draw(pipe, steps=1)
        run = attachment.run
        found = sorted(tokens(run, "cat", 0) + tokens(run, "dog", 0))
        assert found == rows, family
        with pytest.raises(PhraseError, match="bird"):
            tokens(run, "bird", 0)


def test_words_are_found_in_each_pictures_own_prompt():
    pipe = tiny.sd1()
    with attach(pipe, Identity()) as attachment:
        tiny.draw(pipe, ["a cat", "a red cat"], num_images_per_prompt=2, steps=1)
    assert [tokens(attachment.run, "cat", image) for image in range(4)] == [[2], [2], [3], [3]]


def test_each_call_is_a_run_of_its_own():
    pipe = tiny.sd1()
    spy = Spy()
    with attach(pipe, spy) as attachment:
        tiny.draw(pipe)
        first = attachment.run
        tiny.draw(pipe)
        assert attachment.run is not first
        assert [first.state(spy), attachment.run.state(spy)] == [1, 2]
    assert attachment.run.state(spy) == 2  # results outlive the attachment
    with pytest.raises(ControlError, match="Push has not begun"):
        attachment.run.state(Push())


def test_attaching_in_the_middle_of_a_call():
    pipe = tiny.sd1()
    late = Spy()
    attachments = []

    def callback(pipe, index, timestep, tensors):
        if index == 0:
            attachments.append(attach(pipe, late))
        return tensors

    with attach(pipe, Identity()):
        tiny.draw(pipe, steps=3, callback_on_step_end=callback)
    attachments[0].release()
    assert [step.index for step in late.steps] == [1, 2] and len(late.runs) == 1


def test_loop_written_by_hand():
    """No pipeline call, no encode_prompt: the denoiser and the scheduler alone."""
    pipe = tiny.sd1()
    positive, _ = pipe.encode_prompt(tiny.TEXT, "cpu", 1, False)
    start = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(0))

    def loop():
        latents = start
        pipe.scheduler.set_timesteps(3)
        with torch.no_grad():
            for timestep in pipe.scheduler.timesteps:
                noise = pipe.unet(latents, timestep, positive.repeat(2, 1, 1)).sample
                latents = pipe.scheduler.step(noise, timestep, latents).prev_sample
        return latents

    plain = loop()
    spy = Spy()
    with attach(pipe, spy, prompt=tiny.TEXT) as attachment:
        assert torch.equal(loop(), plain)
        assert attachment.run.prompts == [tiny.TEXT] * 2 and attachment.run.steps == 3
        loop()
    assert len(spy.runs) == 2 and [step.index for step in spy.steps] == [0, 1, 2] * 2
    assert [step.rows for step in spy.steps] == [Rows(slice(0, 2), None, 2)] * 6
    with attach(pipe, Output(), Push()):
        assert not torch.allclose(loop(), plain, rtol=1e-2)


def test_loop_written_by_hand_with_guidance():
    """Encoding by hand while attached tells the words and that there are two halves."""
    pipe = tiny.sd1()
    spy = Spy()
    with attach(pipe, spy) as attachment, torch.no_grad():
        positive, negative = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, True)
        pipe.scheduler.set_timesteps(2)
        for timestep in pipe.scheduler.timesteps:
            pipe.unet(torch.randn(4, 4, 16, 24), timestep, torch.cat([negative, positive]))
    assert [step.rows for step in spy.steps] == [Rows(slice(2, 4), slice(0, 2), 4)] * 2
    assert attachment.run.prompts == ["a cat", "a dog"]


def test_methods_of_the_pipeline_keep_their_signatures():
    """Pipelines look at them: eta is passed on only to a scheduler whose step takes it."""
    pipe = tiny.sd1()
    before = [inspect.signature(method) for method in (pipe.encode_prompt, pipe.check_inputs, pipe.scheduler.step)]
    plain = tiny.draw(pipe, eta=1.0)
    with attach(pipe, Identity()):
        after = [inspect.signature(method) for method in (pipe.encode_prompt, pipe.check_inputs, pipe.scheduler.step)]
        assert torch.equal(tiny.draw(pipe, eta=1.0), plain)
    assert before == after and not torch.equal(plain, tiny.draw(pipe))


def test_report_says_what_acts_where():
    pipe = tiny.sd1()
    with attach(pipe, Identity("mid_block*"), Push()) as attachment:
        tiny.draw(pipe, steps=3)
        report = attachment.report
    assert report.family == "UNet" and report.calls == 3
    names = [f"mid_block.attentions.0.transformer_blocks.0.attn{i}" for i in (1, 2)]
    assert report.sites == (("Identity", tuple(names)), ("Push", ()))
    assert str(report) == "UNet, 3 denoiser calls (forwards: 6.0 main)\nIdentity: 2 sites\nPush: 0 sites"


def test_control_without_anything_is_allowed():
    pipe = tiny.sd1()
    with attach(pipe, Control()):
        assert torch.equal(tiny.draw(pipe), tiny.draw(tiny.sd1()))


def call(bias):
    q = torch.randn(2, 3, 4, 8)
    return AttentionCall(q, q, q, bias, None, None, None, 0, (2, 2), slice(0, 0), slice(0, 4))  # type: ignore[arg-type]


def test_biases_add_up():
    extra = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    alone = call(None).add_bias(extra)
    assert alone.bias is not None and alone.bias.dtype == torch.float32
    torch.testing.assert_close(alone.bias, extra.float())
    there = torch.randn(2, 1, 1, 4)
    both = call(there).add_bias(extra)
    torch.testing.assert_close(both.bias, there + extra.float())
    allowed = torch.tensor([True, False, True, True]).reshape(1, 1, 1, 4)
    masked = call(allowed).add_bias(extra)
    assert masked.bias is not None and masked.bias[..., 1].isneginf().all()
    torch.testing.assert_close(masked.bias[..., 2], extra.float()[..., 2])
    original = call(there)
    original.add_bias(extra)
    assert original.bias is there


class Thing:
    def speak(self, word):
        return word


def loud(original, word):
    return original(word).upper()


def test_patch_is_undone_exactly():
    thing = Thing()
    patch = Patch(thing, "speak", loud)
    assert thing.speak("hi") == "HI"
    patch.undo()
    patch.undo()
    assert vars(thing) == {} and thing.speak("hi") == "hi"


def test_patch_gives_back_an_earlier_one():
    thing = Thing()
    thing.speak = mine = lambda word: word * 2
    patch = Patch(thing, "speak", loud)
    assert thing.speak("hi") == "HIHI"
    patch.undo()
    assert thing.speak is mine


def test_patch_steps_aside_inside_a_later_one():
    thing = Thing()
    patch = Patch(thing, "speak", loud)
    ours = thing.speak
    thing.speak = theirs = lambda word: ours(word) + "!"
    assert thing.speak("hi") == "HI!"
    patch.undo()
    assert thing.speak is theirs and thing.speak("hi") == "hi!"


@pytest.mark.parametrize("wrong", ["cat", Identity, [Identity()], None])
def test_what_is_no_control_is_refused(wrong):
    pipe = tiny.sd1()
    with pytest.raises(ControlError, match="attach takes controls"):
        attach(pipe, wrong)


def test_maps_of_a_subclass_are_found():
    class Mine(TokenMaps):
        pass

    pipe = tiny.sd1()
    with attach(pipe, Mine("cat")) as run:
        tiny.draw(pipe)
    assert run.maps["cat"].shape[0] == 1


def test_a_report_is_a_dict_and_json():
    from attnctl.processors import Segregation

    pipe = tiny.sd1()
    with attach(pipe, Segregation("cat", "dog")) as run:
        tiny.draw(pipe, ["a cat and a dog"], steps=2)
    told = run.report.to_dict()
    assert told["traces"][0]["control"] == "Segregation" and json.loads(run.report.to_json()) == told


def test_what_is_printed_of_an_attachment_is_short_and_tells_something():
    from attnctl.processors import Segregation

    pipe = tiny.sd1()
    with attach(pipe, Segregation("cat", "dog"), TokenMaps()) as run:
        assert repr(run) == "<Attachment of Segregation, TokenMaps on StableDiffusionPipeline, nothing drawn yet>"
        tiny.draw(pipe, ["a cat and a dog", "a dog and a cat"], steps=2)
        assert repr(run) == "<Attachment of Segregation, TokenMaps on StableDiffusionPipeline, 2 denoiser calls>"
    assert repr(run).startswith("<Attachment, released, of Segregation, TokenMaps")
    assert repr(run.run) == "<Run of StableDiffusionPipeline, 2 images, 2 of 2 denoiser calls, 'a cat and a dog' ...>"
    assert repr(run.maps) == "<Maps of 2 images, 7 sites, words: a#1, cat, and, a#2, dog>"
    with attach(pipe) as run:
        assert repr(run) == "<Attachment of no control on StableDiffusionPipeline, nothing drawn yet>"
    with attach(pipe, TokenMaps("cat")) as run:
        tiny.draw(pipe, ["a cat"], steps=1)
    assert repr(run.run) == "<Run of StableDiffusionPipeline, 1 image, 1 of 1 denoiser calls, 'a cat'>"
