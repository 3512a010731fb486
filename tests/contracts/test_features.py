"""Rule 5: LoRA, IP-Adapter, ControlNet, image-to-image, inpainting, offloading, fused projections keep working."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import torch
from contract_table import differs, on_unet, trace
from diffusers.models.attention_processor import AttnProcessor2_0
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from toys import Bias, Identity, Output, Spy

from attnctl.engine.attachment import attach

PICTURE = torch.linspace(0, 1, 3 * 32 * 48).reshape(1, 3, 32, 48)
EMBEDS = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(5))]}


def neighbour_check(make, case, size=tiny.SIZE, **settings):
    """Still control: not a bit. Acting control: a change, unless it only watches. Nothing is left."""
    pipe = make()
    plain = tiny.draw(pipe, size=size, **settings)
    before = trace(pipe)
    with attach(pipe, case.still()):
        assert torch.equal(tiny.draw(pipe, size=size, **settings), plain)
    with attach(pipe, case.acting()):
        drawn = tiny.draw(pipe, size=size, **settings)
    assert differs(drawn, plain) if case.moves else torch.equal(drawn, plain)
    assert trace(pipe) == before
    return plain


@cache
def drawn_alone():
    return tiny.draw(tiny.sd1())


@on_unet
def test_image_to_image(case):
    neighbour_check(tiny.img2img, case, size=None, image=PICTURE, strength=0.6, steps=4)


@on_unet
def test_inpainting(case):
    mask = (PICTURE[:, :1] > 0.5).float()
    neighbour_check(tiny.inpaint, case, image=PICTURE, mask_image=mask, strength=1.0)


@on_unet
def test_controlnet(case):
    controlled = neighbour_check(tiny.controlnet, case, image=PICTURE)
    assert differs(controlled, drawn_alone())  # the ControlNet does something


def with_ip_adapter():
    pipe = tiny.sd1()
    pipe.load_ip_adapter(tiny.ip_adapter(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None)
    return pipe


@on_unet
def test_ip_adapter(case):
    prompted = neighbour_check(with_ip_adapter, case, **EMBEDS)
    assert differs(prompted, drawn_alone())


def test_ip_adapter_scale_is_honoured_while_attached():
    pipe = with_ip_adapter()
    results = {}
    for scale in (1.0, 0.3, 0.0):
        pipe.set_ip_adapter_scale(scale)
        results[scale] = tiny.draw(pipe, **EMBEDS)
    with attach(pipe, Identity()):
        for scale, want in results.items():
            pipe.set_ip_adapter_scale(scale)
            assert torch.equal(tiny.draw(pipe, **EMBEDS), want)
    assert differs(results[1.0], results[0.0])
    pipe.set_ip_adapter_scale(0.3)
    assert torch.equal(tiny.draw(pipe, **EMBEDS), results[0.3])


def test_ip_adapter_unloaded_while_attached():
    plain = tiny.draw(tiny.sd1())
    with attach(tiny.sd1(), Output()) as attachment:
        want = tiny.draw(attachment.pipe)
    pipe = with_ip_adapter()
    with attach(pipe, Output()):
        tiny.draw(pipe, **EMBEDS)
        pipe.unload_ip_adapter()
        assert torch.equal(tiny.draw(pipe), want)  # the control still acts
    assert torch.equal(tiny.draw(pipe), plain)
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


def test_ip_adapter_loaded_while_attached():
    with attach(with_ip_adapter(), Output()) as attachment:
        want = tiny.draw(attachment.pipe, **EMBEDS)
    pipe = tiny.sd1()
    with attach(pipe, Output()):
        tiny.draw(pipe)
        pipe.load_ip_adapter(tiny.ip_adapter(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None)
        assert torch.equal(tiny.draw(pipe, **EMBEDS), want)
    assert torch.equal(tiny.draw(pipe, **EMBEDS), tiny.draw(with_ip_adapter(), **EMBEDS))


def save_lora(family, folder):
    donor = tiny.MODELS[family]()
    model = tiny.denoiser(donor)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    part = "unet" if hasattr(donor, "unet") else "transformer"
    type(donor).save_lora_weights(folder, **{f"{part}_lora_layers": get_peft_model_state_dict(model)})


@pytest.mark.parametrize("family", tiny.MODELS)
def test_lora(family, tmp_path):
    save_lora(family, tmp_path)
    pipe = tiny.MODELS[family]()
    scale = {"cross_attention_kwargs" if hasattr(pipe, "unet") else "joint_attention_kwargs": {"scale": 0.5}}
    plain = tiny.draw(pipe)
    with attach(pipe, Output()):
        controlled = tiny.draw(pipe)
    pipe.load_lora_weights(tmp_path)
    adapted, half = tiny.draw(pipe), tiny.draw(pipe, **scale)
    assert differs(adapted, plain) and differs(half, adapted)
    with attach(pipe, Identity()):
        assert torch.equal(tiny.draw(pipe), adapted) and torch.equal(tiny.draw(pipe, **scale), half)
    with attach(pipe, Output()):
        want = tiny.draw(pipe, **scale)
        pipe.unload_lora_weights()
        assert torch.equal(tiny.draw(pipe), controlled)
        pipe.load_lora_weights(tmp_path)  # while attached
        assert torch.equal(tiny.draw(pipe, **scale), want)
    assert torch.equal(tiny.draw(pipe), adapted)


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_fused_projections(family):
    pipe = tiny.MODELS[family]()
    if family == "sd1":
        pipe.fuse_qkv_projections(vae=False)
    else:
        pipe.transformer.fuse_qkv_projections()
    plain = tiny.draw(pipe)
    before = trace(pipe)
    with attach(pipe, Identity()):
        assert torch.equal(tiny.draw(pipe), plain)
    with attach(pipe, Output()):
        assert differs(tiny.draw(pipe), plain)
    assert trace(pipe) == before


def test_fused_while_attached():
    pipe = tiny.sd1()
    with attach(pipe, Output()):
        want = tiny.draw(pipe)
        pipe.fuse_qkv_projections(vae=False)
        torch.testing.assert_close(tiny.draw(pipe), want, rtol=1e-4, atol=1e-4)
    assert all(type(p).__name__ == "FusedAttnProcessor2_0" for p in pipe.unet.attn_processors.values())


@pytest.mark.parametrize("family", tiny.MODELS)
def test_model_offloading_hooks(family):
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny.MODELS[family]()
    with attach(pipe, Bias()):
        want = tiny.draw(pipe)
        accelerate.cpu_offload_with_hook(tiny.denoiser(pipe), torch.device("cpu"))
        assert torch.equal(tiny.draw(pipe), want)
        pipe.remove_all_hooks()
        assert torch.equal(tiny.draw(pipe), want)
    accelerate.cpu_offload_with_hook(tiny.denoiser(pipe), torch.device("cpu"))
    forward = tiny.denoiser(pipe).forward
    with attach(pipe, Bias()):
        assert torch.equal(tiny.draw(pipe), want)
    assert tiny.denoiser(pipe).forward == forward and hasattr(tiny.denoiser(pipe), "_hf_hook")


def test_attention_backend_is_kept():
    """FLUX sites take their backend from the processor; ours shares its settings, set before or while attached."""
    pipe = tiny.flux()
    plain = tiny.draw(pipe)
    with attach(pipe, Identity()):
        pipe.transformer.set_attention_backend("_native_math")
        try:
            processors = list(pipe.transformer.attn_processors.values())
            assert all(p._attention_backend == "_native_math" for p in processors)
            torch.testing.assert_close(tiny.draw(pipe), plain, rtol=1e-4, atol=1e-4)
        finally:
            pipe.transformer.reset_attention_backend()


def test_skip_layer_guidance_is_a_pass_of_its_own():
    """SD 3.5 makes a third call on the conditional rows: controls act, but it is no step and its maps do not count."""
    from attnctl.engine.control import Lane

    class Maps(Spy):
        lane = Lane.MAPS

    pipe = tiny.sd35()
    settings = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_start": -0.1}
    plain = tiny.draw(pipe, **settings)
    assert differs(plain, tiny.draw(pipe))
    spy, maps = Spy(look=lambda call: (call.step.index, call.step.extra, call.q.shape[0])), Maps()
    with attach(pipe, spy, maps) as attachment:
        assert torch.equal(tiny.draw(pipe, **settings), plain)
    assert list(dict.fromkeys(spy.seen)) == [(0, False, 2), (0, True, 1), (1, False, 2), (1, True, 1)]
    assert len(maps.seen) == 10 and attachment.run.calls == 2


def test_callback_of_the_user_is_kept():
    pipe = tiny.sd1()
    seen = []

    def callback(pipe, index, timestep, tensors):
        seen.append(index)
        return {"latents": tensors["latents"] * 0.9}

    with attach(pipe, Identity()):
        got = tiny.draw(pipe, callback_on_step_end=callback)
    assert seen == [0, 1] and torch.equal(got, tiny.draw(pipe, callback_on_step_end=callback))


@pytest.mark.parametrize("family", tiny.MODELS)
def test_inference_mode(family):
    pipe = tiny.MODELS[family]()
    with attach(pipe, Bias()):
        want = tiny.draw(pipe)
        with torch.inference_mode():
            assert torch.equal(tiny.draw(pipe), want)
