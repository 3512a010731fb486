"""LoRA by region: its rows alone change, on every family; adapters side by side; nothing is left behind."""

from __future__ import annotations

import pytest
import tiny
import torch
from contract_table import close, differs
from peft import LoraConfig

from attnctl import attach
from attnctl.errors import ControlError
from attnctl.processors import LoraRegions, Perturb, Regions

LEFT, RIGHT, ALL = (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0, 1, 1)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "proj_in", "net.0.proj", "proj_mlp", "linear_1", "conv1"]


def adapted(family, *names, targets=TARGETS):
    pipe = tiny.FAMILIES[family]()
    model = tiny.denoiser(pipe)
    present = [one for one in targets if any(name.endswith(one) for name, _ in model.named_modules())]
    for name in names:
        torch.manual_seed(len(name))
        model.add_adapter(LoraConfig(r=2, target_modules=present, init_lora_weights=False), adapter_name=name)
    model.set_adapters(list(names))
    return pipe


def hooks(pipe):
    return sum(len(module._forward_hooks) for module in tiny.denoiser(pipe).modules())


@pytest.mark.parametrize("family", tuple(tiny.FAMILIES))
def test_a_region_of_all_is_the_lora_itself(family):
    pipe = adapted(family, "one")
    want, before = tiny.draw(pipe), hooks(pipe)
    with attach(pipe, LoraRegions({"one": ALL}, text=True)):
        assert close(tiny.draw(pipe), want, 1e-4)
    with attach(pipe, LoraRegions({"one": LEFT})):
        assert differs(tiny.draw(pipe), want)
    assert hooks(pipe) == before and torch.equal(tiny.draw(pipe), want)


@pytest.mark.parametrize("family", tuple(tiny.FAMILIES))
def test_only_the_rows_of_the_region_change(family):
    """At the first query layer of the denoiser, against the model without the adapter."""
    seen = []
    for masks in (None, {"one": LEFT}):
        pipe = adapted(family, "one", targets=["to_q"])
        model = tiny.denoiser(pipe)
        layer = next(m for name, m in model.named_modules() if name.endswith("to_q"))
        grid = next(iter(pipe_grid(pipe)))
        layer.register_forward_hook(lambda module, given, output: seen.append(output.detach().clone()))
        if masks is None:
            model.disable_adapters()
            tiny.draw(pipe, steps=1)
        else:
            with attach(pipe, LoraRegions(masks)):
                tiny.draw(pipe, steps=1)
    height, width = grid
    plain, placed = (one[-1].unflatten(0, (height, width)) for one in (seen[0], seen[-1]))
    changed = (plain - placed).abs().amax(-1) > 1e-6
    assert changed[:, : width // 2].all() and not changed[:, width - width // 2 :].any()


def pipe_grid(pipe):
    import attnctl

    yield attnctl.sites(pipe)[0].grid(tiny.SIZE[0] // 2, tiny.SIZE[1] // 2)


def test_two_adapters_beside_other_controls():
    pipe, drawn = adapted("sd1", "one", "other"), []
    for masks in ({"one": LEFT, "other": RIGHT}, {"one": RIGHT, "other": LEFT}, {"one": LEFT}):
        with attach(pipe, LoraRegions(masks), Regions({"cat": LEFT}), Perturb("1")):
            drawn.append(tiny.draw(pipe))
    assert differs(drawn[0], drawn[1]) and differs(drawn[0], drawn[2])


def test_nothing_is_left_after_an_error():
    pipe = adapted("sd1", "one")
    before = hooks(pipe)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), attach(pipe, LoraRegions({"one": LEFT})):
        tiny.draw(pipe, callback_on_step_end=fail)
    assert hooks(pipe) == before


def test_refused():
    with pytest.raises(ControlError, match="at least one region"):
        LoraRegions({})
    pipe = adapted("sd1", "one")
    with (
        pytest.raises(ControlError, match="no LoRA is named 'two'; there are one"),
        attach(pipe, LoraRegions({"two": ALL})),
    ):
        tiny.draw(pipe)
    pipe.fuse_lora()
    with pytest.raises(ControlError, match="fused"), attach(pipe, LoraRegions({"one": ALL})):
        tiny.draw(pipe)
    plain = tiny.sd1()
    with pytest.raises(ControlError, match="the model has none"), attach(plain, LoraRegions({"one": ALL})):
        tiny.draw(plain)
