"""The seam: what is put in place of a processor, and that nothing else notices."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref

import pytest
import tiny
import torch
from diffusers.models import attention_processor
from toys import Identity, Output, Spy

from attnctl.engine.attachment import attach
from attnctl.engine.control import Control
from attnctl.engine.seam import Seat, attentions, reachable
from attnctl.errors import UnsupportedProcessorError


def identity(q, k, v, bias, scale, index, kernel):
    return kernel(q, k, v, bias, scale)


def one_site(pipe):
    model = tiny.denoiser(pipe)
    return model, next(attn for _, attn in attentions(model))


def test_stand_in_passes_for_the_original():
    model, attn = one_site(tiny.sd1())
    original = attn.processor
    seat = Seat(model, attn, identity)
    assert attn.processor is not original and isinstance(attn.processor, type(original))
    assert vars(attn.processor) is vars(original)
    assert type(type(attn.processor)()) is type(original)  # diffusers rebuilds processors so
    assert inspect.signature(attn.processor.__call__) == inspect.signature(original.__call__)
    seat.restore()
    assert attn.processor is original
    assert vars(original) == {}


def test_deep_copy_of_a_controlled_model_is_plain():
    pipe = tiny.flux()
    with attach(pipe, Output()):
        twin = copy.deepcopy(pipe.transformer)
    for (_, attn), (_, other) in zip(attentions(twin), attentions(pipe.transformer), strict=True):
        assert type(attn.processor) is type(other.processor)
        assert vars(attn.processor) == {}


def test_foreign_processor_is_left_alone():
    model, attn = one_site(tiny.sd1())
    seat = Seat(model, attn, identity)
    foreign = attention_processor.AttnProcessor2_0()
    attn.set_processor(foreign)
    assert not seat.in_place()
    seat.restore()
    assert attn.processor is foreign


def test_processor_shared_by_two_sites_serves_each_under_its_own_name():
    pipe = tiny.sd35()
    block = pipe.transformer.transformer_blocks[0]
    assert block.attn.processor is block.attn2.processor  # the trap
    spy = Spy()
    with attach(pipe, spy):
        tiny.draw(pipe, steps=1)
    names = [name for name, *_ in spy.seen]
    assert names[:3] == ["transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_calls_are_canonical(family):
    pipe = tiny.FAMILIES[family]()
    spy = Spy(look=lambda call: (call.site, call.q, call.k, call.v))
    with attach(pipe, spy):
        tiny.draw(pipe, steps=1)
    assert spy.seen
    for site, q, k, v in spy.seen:
        assert q.shape[1] == k.shape[1] == v.shape[1] == site.heads
        assert q.shape[3] == k.shape[3] == v.shape[3] == site.head_dim


def test_call_reproduces_the_kernel():
    """q, k, v as handed over are all that attention depends on: the eager formula gives the same picture."""

    class Eager(Identity):
        def attend(self, call, proceed):
            logits = call.q @ call.k.transpose(-1, -2) * call.q.shape[-1] ** -0.5
            return logits.softmax(-1) @ call.v

    for make in tiny.FAMILIES.values():
        pipe = make()
        plain = tiny.draw(pipe)
        with attach(pipe, Eager()):
            eager = tiny.draw(pipe)
        torch.testing.assert_close(eager, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


def test_every_fused_processor_of_diffusers_is_reachable_and_no_eager_one_is():
    eager = {"AttnProcessor", "SlicedAttnProcessor", "AttnAddedKVProcessor", "SlicedAttnAddedKVProcessor"}
    for name, cls in vars(attention_processor).items():
        if not inspect.isclass(cls) or "__call__" not in vars(cls) or issubclass(cls, torch.nn.Module):
            continue
        holder = type("Holder", (), {"processor": object.__new__(cls)})()
        if name in eager or "XFormers" in name:
            assert not reachable(holder), name
        elif name.endswith("2_0") and "Linear" not in name and "Sana" not in name:
            assert reachable(holder), name


def test_bias_leaves_a_backend_that_refuses_masks(monkeypatch):
    """FLUX sites go through a backend; one that takes no mask must still serve calls to which a control adds a bias."""
    from diffusers.models import attention_dispatch

    pipe = tiny.flux()
    asked = []

    def maskless(query, key, value, attn_mask=None, **kwargs):
        asked.append(attn_mask)
        if attn_mask is not None:
            raise ValueError("no masks here")
        return attention_dispatch._native_attention(query, key, value)

    registry = attention_dispatch._AttentionBackendRegistry
    native = attention_dispatch.AttentionBackendName.NATIVE
    before = tiny.draw(pipe, steps=1)
    monkeypatch.setitem(registry._backends, native, maskless)
    monkeypatch.setitem(registry._supported_arg_names, native, {"query", "key", "value", "attn_mask"})

    class Zero(Identity):
        def attend(self, call, proceed):
            return proceed(call.add_bias(call.q.new_zeros(1, 1, 1, call.k.shape[2])))

    with attach(pipe, Zero("0")):
        after = tiny.draw(pipe, steps=1)
    assert len(asked) == 3  # the other three of four sites stayed on the backend
    torch.testing.assert_close(after, before)


def test_released_pipeline_is_freed():
    pipe = tiny.sd1()
    with attach(pipe, Identity()):
        tiny.draw(pipe, steps=1)
    gone = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None


def test_failure_in_a_control_keeps_nothing_alive():
    class Fails(Identity):
        def attend(self, call, proceed):
            raise RuntimeError

    pipe = tiny.sd1()
    with attach(pipe, Fails()):
        try:
            tiny.draw(pipe, steps=1)
        except RuntimeError:
            pass
    gone = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None


def test_forgotten_attachment_is_freed_with_its_pipeline():
    pipe = tiny.sd1()
    attachment = attach(pipe, Identity())
    tiny.draw(pipe, steps=1)
    gone = weakref.ref(pipe.unet)
    del pipe, attachment
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda pipe: pipe.unet.set_attn_processor(attention_processor.AttnProcessor()), "AttnProcessor2_0"),
        (lambda pipe: pipe.enable_attention_slicing(1), "disable_attention_slicing"),
        (
            lambda pipe: pipe.unet.set_attn_processor(attention_processor.XFormersAttnProcessor()),
            "disable_xformers_memory_efficient_attention",
        ),
    ],
    ids=["eager", "sliced", "xformers"],
)
def test_processors_without_fused_attention_are_refused(prepare, words):
    pipe = tiny.sd1()
    prepare(pipe)
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(UnsupportedProcessorError, match=words) as caught:
        attach(pipe, Identity())
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1 and 13 other sites" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert pipe.unet.attn_processors == before and "encode_prompt" not in vars(pipe)


def test_linear_attention_is_refused_only_where_it_is_selected():
    pipe = tiny.sd1()
    linear = attention_processor.SanaLinearAttnProcessor2_0()
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(linear)
    with pytest.raises(UnsupportedProcessorError, match="select other sites"):
        attach(pipe, Identity())
    attach(pipe, Identity("cross")).release()


def test_shape_of_the_answer_is_checked():
    from attnctl.errors import ControlError

    class Wrong(Identity):
        def attend(self, call, proceed):
            return proceed(call).transpose(1, 2)

    pipe = tiny.sd1()
    with attach(pipe, Wrong()), pytest.raises(ControlError, match="Wrong returned"):
        tiny.draw(pipe, steps=1)


def test_ip_adapter_calls_pass_by():
    pipe = tiny.sd1()
    load_ip_adapter(pipe)
    spy = Spy(where="cross")
    calls = []
    seats = []
    for _name, attn in attentions(pipe.unet):
        if type(attn.processor).__name__.startswith("IPAdapter"):

            def handler(q, k, v, bias, scale, index, kernel):
                calls.append((index, k.shape[2]))
                return kernel(q, k, v, bias, scale)

            seats.append(Seat(pipe.unet, attn, handler))
    embeds = [torch.randn(2, 1, 16)]
    tiny.draw(pipe, steps=1, ip_adapter_image_embeds=embeds)
    assert {index for index, _ in calls} == {0, 1}
    assert {keys for index, keys in calls if index == 0} == {77}
    assert {keys for index, keys in calls if index == 1} == {4}
    for seat in seats:
        seat.restore()
    with attach(pipe, spy):
        tiny.draw(pipe, steps=1, ip_adapter_image_embeds=embeds)
    assert {index for *_, index in spy.seen} == {0}


def load_ip_adapter(pipe):
    pipe.unet._load_ip_adapter_weights([tiny.ip_adapter(pipe.unet)])


def test_controls_need_not_attend():
    pipe = tiny.sd1()
    with attach(pipe, Control()):
        assert all("Controlled" not in type(p).__name__ for p in pipe.unet.attn_processors.values())
