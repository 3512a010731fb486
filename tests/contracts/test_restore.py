"""Rule 1, second half: whatever way an attachment ends, the pipeline is exactly as it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny
import torch
from contract_table import differs, fewer_pairs, same_weights, trace, weights
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from toys import Identity, Output, Push, Spy

from attnctl.engine.attachment import attach
from attnctl.engine.control import Control
from attnctl.errors import ControlError, UnsupportedProcessorError


@fewer_pairs
def test_after_exit(case, family):
    pipe = tiny.MODELS[family]()
    plain = tiny.draw(pipe)
    before, values = trace(pipe), weights(pipe)
    with attach(pipe, case.acting()):
        tiny.draw(pipe)
        assert same_weights(weights(pipe), values)  # while attached, too: controls are no part of the model
    assert trace(pipe) == before
    assert same_weights(weights(pipe), values)
    assert torch.equal(tiny.draw(pipe), plain)


class Broken(Identity):
    """Fails where it is told to."""

    def __init__(self, place):
        object.__setattr__(self, "place", place)
        super().__init__()

    def begin(self, run):
        self._fail("begin")

    def attend(self, call, proceed):
        self._fail("attend")
        return proceed(call)

    def before_denoise(self, step):
        step.latents = step.latents * 2
        self._fail("before")

    def after_denoise(self, step, output):
        self._fail("after")

    def _fail(self, place):
        if place == self.place:
            raise RuntimeError(place)


@pytest.mark.parametrize("family", tiny.MODELS)
@pytest.mark.parametrize("place", ["begin", "attend", "before", "after"])
def test_after_an_exception_in_a_control(family, place):
    pipe = tiny.MODELS[family]()
    plain = tiny.draw(pipe)
    before = trace(pipe)
    with pytest.raises(RuntimeError, match=place), attach(pipe, Broken(place)):
        tiny.draw(pipe)
    assert trace(pipe) == before
    assert torch.equal(tiny.draw(pipe), plain)


def test_attachment_survives_a_failed_call():
    """An exception in the user's callback; the next call starts afresh, prompt, edits and all."""
    pipe = tiny.sd1()
    spy = Spy()

    def stop(*args):
        raise KeyboardInterrupt

    with attach(pipe, spy, Push()):
        want = tiny.draw(pipe, "a red dog")
        with pytest.raises(KeyboardInterrupt):
            tiny.draw(pipe, callback_on_step_end=stop)
        assert torch.equal(tiny.draw(pipe, "a red dog"), want)
    assert [run.prompts for run in spy.runs] == [["a red dog"], [tiny.TEXT], ["a red dog"]]
    assert spy.ended == spy.runs


def test_after_a_generator_is_closed():
    pipe = tiny.sd1()
    plain = tiny.draw(pipe)
    before = trace(pipe)

    def previews():
        with attach(pipe, Output()):
            while True:
                yield tiny.draw(pipe)

    stream = previews()
    next(stream)
    assert trace(pipe) != before
    stream.close()
    assert trace(pipe) == before and torch.equal(tiny.draw(pipe), plain)


@pytest.mark.parametrize("family", tiny.MODELS)
@pytest.mark.parametrize("first_out", [0, 1], ids=["fifo", "lifo"])
def test_nested_attachments_in_any_order(family, first_out):
    pipe = tiny.MODELS[family]()
    plain = tiny.draw(pipe)
    before = trace(pipe)
    attachments = [attach(pipe, Output(strength=0.3)), attach(pipe, Output(strength=0.6))]
    both = tiny.draw(pipe)
    attachments.pop(first_out).release()
    left = tiny.draw(pipe)
    attachments.pop().release()
    assert trace(pipe) == before and torch.equal(tiny.draw(pipe), plain)
    with attach(pipe, Output(strength=0.6 if first_out == 0 else 0.3)):
        assert torch.equal(tiny.draw(pipe), left)
    with attach(pipe, Output(strength=0.3), Output(strength=0.6)):
        assert torch.equal(tiny.draw(pipe), both)
    assert differs(both, left)


def test_release_again_is_nothing():
    pipe = tiny.sd1()
    attachment = attach(pipe, Output())
    attachment.release()
    other = attach(pipe, Output())
    attachment.release()
    assert differs(tiny.draw(pipe), plain_of(tiny.sd1()))
    other.release()


def plain_of(pipe):
    return tiny.draw(pipe)


def test_failed_attach_leaves_nothing():
    class Refuses(Control):
        def sites(self, available):
            raise RuntimeError("no")

    pipe = tiny.sd1()
    before = trace(pipe)
    with pytest.raises(RuntimeError):
        attach(pipe, Output(), Refuses())
    assert trace(pipe) == before
    with attach(pipe, Output()):
        within = trace(pipe)
        with pytest.raises(RuntimeError):
            attach(pipe, Identity(), Refuses())
        assert trace(pipe) == within
    assert trace(pipe) == before


def test_processor_set_meanwhile_stays():
    pipe = tiny.sd1()
    foreign = AttnProcessor2_0()
    site = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with attach(pipe, Output()) as attachment:
        want = tiny.draw(pipe)
        site.set_processor(foreign)
        assert attachment.report.foreign == ("mid_block.attentions.0.transformer_blocks.0.attn1",)
        assert torch.equal(tiny.draw(pipe), want)  # the control acts there nevertheless
        assert attachment.report.foreign == ()
    assert site.processor is foreign


def test_processor_set_meanwhile_that_cannot_be_controlled_is_refused():
    pipe = tiny.sd1()
    eager = AttnProcessor()
    site = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with attach(pipe, Output()) as attachment:
        site.set_processor(eager)
        assert "another processor was set: mid_block" in str(attachment.report)
        with pytest.raises(UnsupportedProcessorError, match="mid_block.*AttnProcessor, which never calls fused"):
            tiny.draw(pipe)
    assert site.processor is eager
    pipe = tiny.sd1()
    with attach(pipe, Output()):
        pipe.enable_attention_slicing(1)
        with pytest.raises(UnsupportedProcessorError, match="disable_attention_slicing"):
            tiny.draw(pipe)


def processors(pipe):
    return {type(p).__name__ for p in pipe.unet.attn_processors.values()}


def test_projections_fused_and_unfused_while_attached():
    """diffusers keeps the processors it finds when it fuses, which are ours, and puts them back."""
    pipe = tiny.sd1()
    plain = tiny.draw(pipe)
    with attach(pipe, Output()):
        want = tiny.draw(pipe)
        pipe.fuse_qkv_projections(vae=False)
        tiny.draw(pipe)
        pipe.unfuse_qkv_projections(vae=False)
        assert torch.equal(tiny.draw(pipe), want)
    assert processors(pipe) == {"AttnProcessor2_0"}
    assert torch.equal(tiny.draw(pipe), plain)


def test_our_processors_put_back_after_release_do_nothing_and_can_be_attached_again():
    pipe = tiny.sd1()
    plain = tiny.draw(pipe)
    with attach(pipe, Output()):
        want = tiny.draw(pipe)
        kept = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(kept)
    assert torch.equal(tiny.draw(pipe), plain)
    with attach(pipe, Output()):
        assert torch.equal(tiny.draw(pipe), want)
    assert processors(pipe) == {"AttnProcessor2_0"}


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_copies_of_an_attached_pipeline_are_plain(name):
    pipe = tiny.MODELS[name]()
    plain = tiny.draw(pipe)
    with attach(pipe, Output()):
        want = tiny.draw(pipe)
        copies = [copy.deepcopy(pipe), pickle.loads(pickle.dumps(tiny.denoiser(pipe)))]
        assert torch.equal(tiny.draw(copies[0], steps=3), tiny.draw(tiny.MODELS[name](), steps=3))
        assert torch.equal(tiny.draw(pipe), want)
        assert copies[0].scheduler.step.__self__ is copies[0].scheduler
    assert torch.equal(tiny.draw(copies[0]), plain)
    setattr(pipe, "unet" if name == "sd1" else "transformer", copies[1])
    assert torch.equal(tiny.draw(pipe), plain)


def test_another_pipeline_with_the_same_denoiser_is_refused():
    pipe = tiny.sd1()
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    picture = {"image": torch.rand(1, 3, 32, 48), "size": None, "strength": 0.9}
    plain = tiny.draw(other, **picture)
    with attach(pipe, Output()):
        with pytest.raises(ControlError, match="through a StableDiffusionPipeline, but a .*Img2Img.* draws with it"):
            tiny.draw(other, **picture)
        tiny.draw(pipe)
    assert torch.equal(tiny.draw(other, **picture), plain)


def test_patch_made_over_ours_meanwhile_stays_and_works():
    pipe = tiny.sd1()
    calls = []
    with attach(pipe, Push()):
        inner = pipe.scheduler.step

        def outer(*args, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        pipe.scheduler.step = outer
        tiny.draw(pipe)
    assert pipe.scheduler.step is outer
    assert torch.equal(tiny.draw(pipe), tiny.draw(tiny.sd1())) and calls


def test_scheduler_swapped_meanwhile():
    pipe = tiny.sd1()
    first = pipe.scheduler
    second = EulerDiscreteScheduler.from_config(first.config)
    with attach(pipe, Push()):
        tiny.draw(pipe)
        pipe.scheduler = second
        swapped = tiny.draw(pipe)
    assert "step" not in vars(first) and "step" not in vars(second)
    assert differs(swapped, tiny.draw(pipe))


@pytest.mark.parametrize("family", tiny.MODELS)
def test_saved_pipeline_is_the_plain_one(family, tmp_path):
    pipe = tiny.MODELS[family]()
    with attach(pipe, Output()):
        tiny.denoiser(pipe).save_pretrained(tmp_path)
    again = type(tiny.denoiser(pipe)).from_pretrained(tmp_path)
    assert same_weights(dict(again.state_dict()), weights(pipe))
