"""Rule 5, compiled: full graphs, exact results, no recompiling when controls change; whoever came first."""

from __future__ import annotations

import pytest
import tiny
import torch
from contract_table import CASES, differs, trace
from toys import Descend, Identity, Output, Spy

from attnctl.engine.attachment import attach

OPTIONS = {"fullgraph": True, "backend": "aot_eager"}


def wrap(pipe):
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, part, torch.compile(getattr(pipe, part), **OPTIONS))


def in_place(pipe):
    tiny.denoiser(pipe).compile(**OPTIONS)


def regional(pipe):
    tiny.denoiser(pipe).compile_repeated_blocks(**OPTIONS)


def method(pipe):
    model = tiny.denoiser(pipe)
    model.forward = torch.compile(model.forward, **OPTIONS)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


# Every family compiled as most people do; the other ways, and the other order, on one family of each kind.
# glyph-sd is built of the same classes as sd1.
WAYS = [(family, wrap, "compile") for family in tiny.FAMILIES]
WAYS += [(family, wrap, "attach") for family in ("sd1", "flux")]
WAYS += [("sd1", in_place, "compile"), ("flux", in_place, "attach"), ("flux", regional, "compile")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "way", "first"), WAYS)
def test_controls_act_exactly_and_nothing_recompiles(family, way, first):
    pipe = tiny.small(family)
    plain = tiny.draw(pipe)
    with attach(pipe, Output(strength=0.4)):
        want = tiny.draw(pipe)
    if first == "compile":
        way(pipe)
        assert torch.equal(tiny.draw(pipe), plain)
        before = trace(pipe)
    with attach(pipe, Output(strength=0.4)):
        if first == "attach":
            way(pipe)
        assert torch.equal(tiny.draw(pipe), want)
    if first == "compile":
        assert trace(pipe) == before
    assert torch.equal(tiny.draw(pipe), plain)
    compiled = graphs()
    for strength in (0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.15, 0.25):  # more than Dynamo's recompile limit
        with attach(pipe, Output(strength=strength)):
            assert differs(tiny.draw(pipe), want)
    with attach(pipe, Identity()):
        assert torch.equal(tiny.draw(pipe), plain)
    assert graphs() == compiled


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "flux"])
@torch._dynamo.config.patch(recompile_limit=32)  # controls that add text rows make calls of other shapes
def test_every_control_on_one_compiled_pipeline(family):
    cases = {label: case for label, case in CASES.items() if family in case.families}
    pipe = tiny.small(family)
    plain, wants = tiny.draw(pipe), {}
    for label, case in cases.items():
        with attach(pipe, case.acting()):
            wants[label] = tiny.draw(pipe)
    wrap(pipe)
    for label, case in cases.items():
        with attach(pipe, case.still()):
            assert torch.equal(tiny.draw(pipe), plain), label
        with attach(pipe, case.acting()):
            got = tiny.draw(pipe)
        torch.testing.assert_close(
            got,
            wants[label],
            rtol=1e-5,
            atol=1e-5 * float(wants[label].abs().max()),
            msg=lambda text, label=label: f"{label}: {text}",
        )


@pytest.mark.slow
@pytest.mark.parametrize("way", [wrap, in_place, regional, method], ids=["wrapped", "in place", "regional", "method"])
def test_probe_runs_uncompiled(way):
    pipe = tiny.small("flux")
    with attach(pipe, Descend()):
        want = tiny.draw(pipe)
    way(pipe)
    with attach(pipe, Descend()):
        got = tiny.draw(pipe)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_with_attention_arguments():
    """A pipeline that passes a dict of attention arguments makes Dynamo follow dicts; the processor must let it."""
    pipe = tiny.small("sd1")
    plain = tiny.draw(pipe, cross_attention_kwargs={})
    wrap(pipe)
    with attach(pipe, Identity()):
        assert torch.equal(tiny.draw(pipe, cross_attention_kwargs={}), plain)


@pytest.mark.slow
def test_controls_are_called_at_every_step_and_site():
    pipe = tiny.small("sd1")
    wrap(pipe)
    spy = Spy(look=lambda call: (call.step.index, call.site.layer))
    with attach(pipe, spy):
        tiny.draw(pipe, steps=3)
    assert spy.seen == [(step, layer) for step in range(3) for layer in range(8)]


@pytest.mark.slow
def test_two_controlled_models_of_one_class_do_not_share_a_graph():
    """Dynamo tells functions apart by their code object; a clone that kept its original's could run another control."""
    one, other = tiny.small("sd1"), tiny.small("sd1")
    wants = []
    for pipe, strength in ((one, 0.2), (other, 0.7)):
        with attach(pipe, Output(strength=strength)):
            wants.append(tiny.draw(pipe))
        wrap(pipe)
    with attach(one, Output(strength=0.2)), attach(other, Output(strength=0.7)):
        for pipe, want in ((one, wants[0]), (other, wants[1]), (one, wants[0])):
            assert torch.equal(tiny.draw(pipe), want)


@pytest.mark.slow
def test_returned_input_is_copied():
    """An operator may not hand its input back; a control may (perturbed attention returns v)."""

    class Values(Identity):
        def attend(self, call, proceed):
            return call.v if call.v.shape == call.q.shape else proceed(call)

    pipe = tiny.small("flux")
    with attach(pipe, Values()):
        want = tiny.draw(pipe)
    wrap(pipe)
    with attach(pipe, Values()):
        assert torch.equal(tiny.draw(pipe), want)
