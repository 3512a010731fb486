"""`Attachment.batch` and `LiveMaps`: controls and differentiable maps in a training loop."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import tiny
import torch
from eager import written_out

from attnctl import attach
from attnctl.engine.control import Control
from attnctl.errors import ControlError, PhraseError
from attnctl.maps.live import LiveMaps
from attnctl.maps.recorder import TokenMaps
from attnctl.processors.couple import Couple
from attnctl.processors.lora_regions import LoraRegions
from attnctl.processors.regions import Regions
from attnctl.processors.segregation import Segregation


def inputs(pipe, prompts, size=(16, 24), seed=0):
    """(latents, a timestep for each row, embedded prompts)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        text = torch.cat([type(pipe).encode_prompt(pipe, prompt, "cpu", 1, False)[0] for prompt in prompts])
    times = torch.randint(0, 1000, (len(prompts),), generator=generator)
    return torch.randn(len(prompts), 4, *size, generator=generator), times, text


def key_gradients(unet):
    return {name: p.grad.clone() for name, p in unet.named_parameters() if "attn2.to_k" in name and p.grad is not None}


CHANGING = [
    (["a cat and a dog"] * 2, (16, 24)),
    (["a red dog and a cat", "a cat and a blue dog"], (24, 16)),
    (["blue cat and dog"], (32, 32)),
]


def test_maps_follow_captions_rows_and_sizes_from_batch_to_batch():
    pipe, live, found = tiny.sd1(), LiveMaps("cat", "dog", where="factor:2"), []
    with attach(pipe, live) as attached:
        for prompts, size in CHANGING:
            with attached.batch(prompts) as batch:
                pipe.unet(*inputs(pipe, prompts, size))
            found.append(batch.state(live).maps())
    for (prompts, size), maps in zip(CHANGING, found, strict=True):
        with written_out(pipe.unet) as forwards:
            pipe.unet(*inputs(pipe, prompts, size))
        cells = size[0] // 2 * (size[1] // 2)
        sites = [one for one in forwards[0] if one.shape[3] == 77 and one.shape[2] == cells]
        for row, prompt in enumerate(prompts):
            for column, phrase in enumerate(("cat", "dog")):
                token = 1 + prompt.split().index(phrase)
                by_hand = torch.stack([one[row, :, :, token].mean(0) for one in sites]).mean(0)
                assert torch.allclose(maps[row, column].flatten(), by_hand, atol=1e-6)


def attach_nothing(pipe, given):
    with torch.no_grad():
        return pipe.unet(*given).sample


def test_the_prediction_is_the_models_own():
    pipe, live = tiny.sd1(), LiveMaps("cat")
    given = inputs(pipe, ["a cat", "a cat and a dog"])
    before = attach_nothing(pipe, given)
    with attach(pipe, live) as attached, attached.batch(["a cat", "a cat and a dog"]):
        inside = attach_nothing(pipe, given)
    assert torch.equal(before, inside) and torch.equal(before, attach_nothing(pipe, given))


def test_gradients_of_maps_reach_the_keys_as_in_attention_written_out():
    pipe, live = tiny.sd1(), LiveMaps("cat", where="factor:2")
    given = inputs(pipe, ["a cat"], (16, 16))
    with attach(pipe, live) as attached:
        with attached.batch(["a cat"]) as batch:
            pipe.unet(*given)
        batch.state(live).maps().square().sum().backward()
    ours = key_gradients(pipe.unet)
    pipe.unet.zero_grad()
    with written_out(pipe.unet) as forwards:
        pipe.unet(*given)
    sites = [one[:, :, :, 2] for one in forwards[0] if one.shape[3] == 77 and one.shape[2] == 64]
    torch.stack(sites).mean((0, 2)).square().sum().backward()
    theirs = key_gradients(pipe.unet)
    assert ours.keys() == theirs.keys() and len(ours) > 2
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], atol=1e-6, rtol=1e-4), name


@pytest.mark.parametrize("prompts, size", CHANGING)
def test_gradient_checkpointing_gives_the_same_gradients(prompts, size):
    pipe, live = tiny.sd1(), LiveMaps("cat", "dog")
    given, found = inputs(pipe, prompts, size), []
    with attach(pipe, live) as attached:
        for on in (False, True):
            pipe.unet.train(on)
            pipe.unet.enable_gradient_checkpointing() if on else pipe.unet.disable_gradient_checkpointing()
            with attached.batch(prompts) as batch:
                output = pipe.unet(*given).sample
            maps = batch.state(live).maps()
            pipe.unet.zero_grad()
            (maps.square().sum() + output.square().mean()).backward()
            assert torch.equal(maps, batch.state(live).maps())  # blocks that ran again were not counted again
            found.append(key_gradients(pipe.unet))
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name


def test_reentrant_checkpointing_is_told():
    pipe, live = tiny.sd1(), LiveMaps("cat")
    given = inputs(pipe, ["a cat"])
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    pipe.unet.train()
    pipe.unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    with attach(pipe, live) as attached, attached.batch(["a cat"]) as batch:
        pipe.unet(*given)
        with pytest.raises(ControlError, match="reentrant"):
            batch.state(live).maps()


def test_rows_without_a_phrase_have_none_of_it():
    pipe, live = tiny.sd1(), LiveMaps("cat", "dog")
    with attach(pipe, live) as attached, attached.batch(["a cat", "a dog and a cat"]) as batch:
        pipe.unet(*inputs(pipe, ["a cat", "a dog and a cat"]))
        assert batch.state(live).present.tolist() == [[True, False], [True, True]]
        assert not batch.state(live).maps()[0, 1].any()


def test_a_phrase_that_no_caption_has_is_told():
    pipe = tiny.sd1()
    with attach(pipe, LiveMaps("bird")) as attached, attached.batch(["a cat"]):
        with pytest.raises(PhraseError, match="bird"):
            pipe.unet(*inputs(pipe, ["a cat"]))
    absent = LiveMaps("bird", absent=True)
    with attach(pipe, absent) as attached, attached.batch(["a cat"]) as batch:
        pipe.unet(*inputs(pipe, ["a cat"]))
        assert not batch.state(absent).present.any()


def test_a_drawn_picture_before_and_after_leaves_no_trace():
    """What a validation picture tells of guidance and steps must not reach the next batch, and the other way round."""
    pipe, live = tiny.sd1(), LiveMaps("cat")
    given = inputs(pipe, ["a cat"] * 4)
    with attach(pipe, live, TokenMaps()) as attached:
        picture = tiny.draw(pipe, "a cat")
        with attached.batch(["a cat"] * 4) as batch:
            pipe.unet(*given)
        assert batch.run.images == 4 and not batch.run.guided and batch.run.steps == 0
        assert batch.state(live).maps().shape[0] == 4
        assert torch.equal(picture, tiny.draw(pipe, "a cat"))


def test_controls_that_change_attention_act_in_a_batch():
    pipe = tiny.sd1()
    given = inputs(pipe, ["a cat and a dog"])
    before = attach_nothing(pipe, given)
    with attach(pipe, Regions({"cat": (0, 0, 0.5, 1)})) as attached, attached.batch(["a cat and a dog"]):
        assert not torch.equal(before, attach_nothing(pipe, given))


def test_regions_with_prompts_of_their_own_act_in_a_batch():
    pipe = tiny.sd1()
    given = inputs(pipe, ["a cat and a dog"])
    alone, other = attach_nothing(pipe, given), attach_nothing(pipe, inputs(pipe, ["a red dog"]))
    with attach(pipe, Couple({"a red dog": (0, 0, 1, 1)})) as attached, attached.batch(["a cat and a dog"]):
        assert torch.allclose(attach_nothing(pipe, given), other, atol=1e-4)
    assert torch.equal(attach_nothing(pipe, given), alone)


def test_what_leaves_hooks_is_refused():
    pipe = tiny.sd1()
    given = inputs(pipe, ["a cat and a dog"])
    with attach(pipe, LoraRegions({"one": (0, 0, 0.5, 1)})) as attached, attached.batch(["a cat and a dog"]):
        with pytest.raises(ControlError, match="not for a training batch"):
            attach_nothing(pipe, given)


def test_what_acts_on_sampler_steps_is_refused():
    pipe = tiny.sd1()
    with attach(pipe, Segregation("cat", "dog")) as attached:
        with pytest.raises(ControlError, match="Segregation acts on the steps"), attached.batch(["a cat and a dog"]):
            pass


def test_wrong_uses_are_told():
    pipe, live = tiny.sd1(), LiveMaps("cat")
    with attach(pipe, live) as attached:
        with attached.batch(["a cat"]) as batch:
            with pytest.raises(ControlError, match="nothing was read yet"):
                batch.state(live)
            with pytest.raises(ControlError, match="2 rows in a batch of 1"):
                pipe.unet(*inputs(pipe, ["a cat"] * 2))
            with pytest.raises(ControlError, match="inside a training batch"):
                tiny.draw(pipe, "a cat")
            with pytest.raises(ControlError, match="open already"), attached.batch(["a cat"]):
                pass
            pipe.unet(*inputs(pipe, ["a cat"]))
            with pytest.raises(ControlError, match="one size"):
                pipe.unet(*inputs(pipe, ["a cat"], (8, 8)))
        with pytest.raises(ControlError, match="one prompt for each row"), attached.batch("a cat"):
            pass
    with pytest.raises(ControlError, match="released"), attached.batch(["a cat"]):
        pass
    with pytest.raises(ControlError, match="LiveMaps takes phrases"):
        LiveMaps()


def test_a_script_without_a_pipeline_gives_the_denoiser_and_its_tokenizer():
    pipe, live = tiny.sd1(), LiveMaps("cat")
    parts = SimpleNamespace(unet=pipe.unet, tokenizer=pipe.tokenizer)
    given = inputs(pipe, ["a cat"])
    with attach(parts, live) as attached, attached.batch(["a cat"]) as batch:
        pipe.unet(*given)
    with attach(pipe, live) as attached, attached.batch(["a cat"]) as other:
        pipe.unet(*given)
    assert torch.equal(batch.state(live).maps(), other.state(live).maps())


@dataclass(frozen=True, eq=False)
class Seen(Control):
    rows: list = field(default_factory=list)

    def sites(self, available):
        return available[:1]

    def attend(self, call, proceed):
        self.rows.append((call.step.rows, call.step.images))
        return proceed(call)


def test_every_row_is_conditional():
    pipe, seen = tiny.sd1(), Seen()
    with attach(pipe, seen) as attached, attached.batch(["a cat"] * 3):
        pipe.unet(*inputs(pipe, ["a cat"] * 3))
    ((rows, images),) = seen.rows
    assert rows.cond == slice(0, 3) and rows.uncond is None and images == (0, 1, 2)
