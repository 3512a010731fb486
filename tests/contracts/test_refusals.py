"""Rule 2: what cannot work is refused with one line that names what was asked and what exists; nothing is left behind.

Processors without fused attention are in tests/test_seam.py, selections in tests/test_sites.py, phrases in
tests/test_prompts.py.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace

import diffusers
import pytest
import tiny
import torch
from contract_table import trace
from toys import Identity, Output, Push

from attnctl import processors
from attnctl.engine.attachment import attach
from attnctl.engine.control import Control, Lane
from attnctl.errors import AttnctlError, ControlError, NoSiteError, PhraseError, UnsupportedPipelineError


class Owner(Identity):
    lane = Lane.PROBS


class OtherOwner(Owner):
    pass


def refused(pipe, error, match, *controls):
    before = trace(pipe)
    with pytest.raises(error, match=match) as caught:
        attach(pipe, *controls)
    assert trace(pipe) == before
    assert "\n" not in str(caught.value) and isinstance(caught.value, AttnctlError)


def test_two_owners_of_probabilities_at_one_site():
    refused(tiny.sd1(), ControlError, r"Owner and OtherOwner both own .* of down_blocks\.0", Owner(), OtherOwner())
    attach(tiny.sd1(), Owner("self"), OtherOwner("cross")).release()


def test_two_owners_in_nested_attachments():
    pipe = tiny.sd1()
    with attach(pipe, Owner()):
        refused(pipe, ControlError, "both own", OtherOwner())


def test_owner_sees_what_the_others_did_wherever_it_is_listed():
    class Half(Owner):
        def attend(self, call, proceed):
            logits = call.q @ call.k.transpose(-1, -2) * call.q.shape[-1] ** -0.5
            return (logits if call.bias is None else logits + call.bias).softmax(-1) @ call.v

    class Shift(Identity):
        def attend(self, call, proceed):
            bias = call.q.new_zeros(1, 1, 1, call.k.shape[2])
            bias[..., :3] = 3.0
            return proceed(call.add_bias(bias))

    pipe = tiny.sd1()
    results = []
    for controls in ([Shift()], [Shift(), Half()], [Half(), Shift()]):
        with attach(pipe, *controls):
            results.append(tiny.draw(pipe))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
    assert torch.equal(results[1], results[2])


def test_same_control_object_twice():
    control = Output()
    pipe = tiny.sd1()
    refused(pipe, ControlError, "this Output object is attached already", control, control)
    with attach(pipe, control):
        refused(pipe, ControlError, "attached already", control)
    with attach(pipe, control), attach(tiny.sd1(), control):  # on two pipelines it is fine
        pass


def test_no_site():
    refused(tiny.sd1(), NoSiteError, "no attention site matches 'joint'; there are 7 self, 7 cross", Identity("joint"))


def test_not_a_pipeline():
    with pytest.raises(ControlError, match="attach to the pipeline, not to its UNet2DConditionModel"):
        attach(tiny.sd1().unet, Identity())


def test_unknown_pipeline():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = diffusers.UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    pipe = diffusers.DDPMPipeline(model, tiny.ddim())
    with pytest.raises(UnsupportedPipelineError, match="DDPMPipeline is of no family attnctl knows; it knows UNet"):
        attach(pipe, Identity())


def test_denoiser_shared_by_two_pipelines():
    pipe = tiny.sd1()
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with attach(pipe, Identity()), pytest.raises(ControlError, match="through a StableDiffusionPipeline; release that"):
        attach(other, Identity())
    attach(other, Identity()).release()


def test_denoiser_replaced_meanwhile():
    pipe = tiny.sd1()
    with attach(pipe, Identity()):
        own, pipe.unet = pipe.unet, tiny.unet()
        with pytest.raises(ControlError, match=r"pipe\.unet was replaced"):
            tiny.draw(pipe)
    assert "_compiled_call_impl" not in vars(own)


def test_embeddings_without_words():
    class Words(Control):
        def begin(self, run):
            return run.prompts

    pipe = tiny.sd1()
    positive, negative = pipe.encode_prompt(tiny.TEXT, "cpu", 1, True)
    embeds = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    with attach(pipe, Words()), pytest.raises(PhraseError, match=r"given embeddings.*attach\(\.\.\., prompt=\.\.\.\)"):
        tiny.draw(pipe, **embeds)
    with attach(pipe, Words(), prompt=tiny.TEXT) as attachment:
        tiny.draw(pipe, **embeds)
        assert attachment.run.prompts == [tiny.TEXT]


def test_texts_that_do_not_fit_the_pictures():
    pipe = tiny.sd1()
    positive, negative = pipe.encode_prompt(["a cat"] * 3, "cpu", 1, True)
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative, "generator": None}
    with attach(pipe, Push(), prompt=["a", "b"]), pytest.raises(ControlError, match="2 texts for prompt do not fit 3"):
        tiny.draw(pipe, None, **embeds)


def test_batch_in_an_order_nobody_knows():
    """Three parts per picture, as InstructPix2Pix and PAG have; guessing would control the wrong rows in silence."""
    pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**tiny._sd_parts(in_channels=8))
    tiny.quiet(pipe)
    with attach(pipe, Identity()), pytest.raises(UnsupportedPipelineError, match="without calling encode_prompt"):
        tiny.draw(pipe, size=None, image=torch.zeros(1, 3, 32, 48), image_guidance_scale=1.5)


def test_probing_from_within_attention():
    class Probing(Identity):
        def attend(self, call, proceed):
            call.step.probe(call.step.latents, {call.site: print})
            return proceed(call)

    pipe = tiny.sd1()
    with attach(pipe, Probing()), pytest.raises(ControlError, match="before_denoise and after_denoise"):
        tiny.draw(pipe)


def test_results_before_there_are_any():
    with attach(tiny.sd1(), Identity()) as attachment:
        with pytest.raises(ControlError, match="nothing was drawn yet"):
            _ = attachment.run
        with pytest.raises(ControlError, match="attach a TokenMaps"):
            _ = attachment.maps


CONTROLS = [
    one
    for one in vars(processors).values()
    if isinstance(one, type) and issubclass(one, Control) and one is not Control
]


@pytest.mark.parametrize("cls", CONTROLS, ids=lambda cls: cls.__name__)
def test_a_setting_that_a_control_does_not_know(cls):
    with pytest.raises(ControlError, match=f"^{cls.__name__} has no setting 'insid'; (there are|did you mean) ") as it:
        cls(insid=2)
    assert "\n" not in str(it.value)


def test_what_else_is_wrong_with_the_settings_of_a_control():
    with pytest.raises(ControlError, match="Regions: missing a required argument: 'masks'; its settings are masks, "):
        processors.Regions()
    with pytest.raises(ControlError, match="Nag: multiple values for argument 'negative'"):
        processors.Nag("a cat", negative="a dog")
    with pytest.raises(ControlError, match="Identity: too many positional arguments"):
        Identity("cross", 3)


def test_checked_controls_are_ordinary_classes():
    one = processors.Regions({"cat": (0, 0, 0.5, 1)}, inside=1.5)
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == replace(one, strength=1.0) == one
    assert list(inspect.signature(processors.Regions).parameters)[:2] == ["masks", "inside"]
    assert [*inspect.signature(Control).parameters] == []
