import warnings

import diffusers
import pytest
import tiny
import torch

from attnctl import attach, sites
from attnctl.errors import ControlError, PhraseError
from attnctl.processors import Excitation

PROMPTS, INDICES = ["a cat and a dog", "a red dog, a cat"], [[2, 5], [6, 3]]
STEPS, ACTING = 6, 3


def pipes():
    """(ours, theirs) with the same weights, the attention to words sharper than random weights have it."""
    pipe = tiny.sd1()
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            module.to_q.weight.data *= 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
        other = diffusers.StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    return pipe, tiny.quiet(other)


def theirs(pipe, thresholds):
    """Latents after every step, and how often their UNet ran."""
    latents, runs = [], []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: runs.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe(
            PROMPTS, INDICES, height=32, width=48, num_inference_steps=STEPS, output_type="latent",
            generator=[torch.Generator().manual_seed(i) for i in range(2)], attn_res=(8, 12), max_iter_to_alter=ACTING,
            thresholds=thresholds, callback=lambda i, t, z: latents.append(z.clone()),
        )  # fmt: skip
    handle.remove()
    return latents, len(runs)


def ours(pipe, refine):
    """Latents after every step, how often our UNet ran, and the trace."""
    coarse = [site.name for site in sites(pipe) if site.kind == "cross" and site.factor == 2]
    control = Excitation(
        "cat", "dog", maps="attend-and-excite-padded", relative=None, window=(0, ACTING / STEPS), refine=refine,
        where=coarse,
    )  # fmt: skip
    latents, runs = [], []
    handle = pipe.unet.register_forward_pre_hook(lambda *_: runs.append(1))

    def keep(pipe, index, timestep, values):
        latents.append(values["latents"].clone())
        return {}

    with attach(pipe, control) as run:
        tiny.draw(pipe, PROMPTS, steps=STEPS, size=(32, 48), guidance_scale=7.5, callback_on_step_end=keep)
    handle.remove()
    return latents, len(runs), run.run.state(control)


REFINED = {
    "no refinement": ({}, [1, 1, 1]),
    "a target that one image has met and the other meets": ({0: 0.03, 2: 0.036}, [1, 1, None]),
    "a target that is never met": ({1: 0.5}, [1, 21, 1]),
}


@pytest.mark.parametrize("setting", REFINED)
def test_latents_are_those_of_diffusers_pipeline_after_every_step(setting):
    thresholds, updates = REFINED[setting]
    pipe, other = pipes()
    plain = tiny.draw(pipe, PROMPTS, steps=STEPS, size=(32, 48), guidance_scale=7.5)
    want, forwards = theirs(other, thresholds)
    got, fewer, trace = ours(pipe, {at: 1 - threshold for at, threshold in thresholds.items()})
    assert len(got) == len(want) == STEPS and (want[-1] - plain).abs().max() > 0.1
    for index, (one, two) in enumerate(zip(got, want, strict=True)):
        assert (one - two).abs().max() < 1e-4, f"step {index}"
    made = [[update.images for update in trace.updates if update.step == step] for step in range(STEPS)]
    for step, count in enumerate(updates):
        if count is None:  # only the second image needed it, some rounds but not all
            assert made[step][-1] == (0, 1) and set(made[step][:-1]) == {(1,)} and 2 < len(made[step]) < 21
        else:
            assert made[step] == [(0, 1)] * count
    assert made[ACTING:] == [[], [], []] and fewer < forwards  # they read the maps at every step, and images one by one


def test_phrases_are_checked():
    for phrases in ((), ("cat", "cat"), (("red", "car"),)):
        with pytest.raises(ControlError, match="Excitation needs a phrase"):
            Excitation(*phrases)
    pipe = tiny.sd1()
    for texts, missing in (("a cat", "bird"), (["a cat", "a dog"], "cat")):
        with attach(pipe, Excitation(missing)), pytest.raises(PhraseError, match=f"'{missing}' is not in the prompt"):
            tiny.draw(pipe, texts)
