"""States of a denoiser during a pass of our own: parameters frozen, blocks checkpointed, modules as written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attnctl.errors import ControlError


def in_backward() -> bool:
    """True while autograd works out gradients, where checkpointed blocks run again."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; exactly those that did ask again after."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad_(False)
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def checkpointed(model: Any, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[None]:
    """Gradient checkpointing is on for every block that has it; after, each is exactly as it was.

    A block runs again in the backward, when the forward is over: then it must find what the forward set for its time,
    the scale of LoRA layers, modules as written, and what `within` opens.

    Raises:
        ControlError: the model has none.
    """
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise ControlError(f"{type(model).__name__} has no gradient checkpointing")
    switches = ("gradient_checkpointing", "_gradient_checkpointing_func")
    owned: list[dict[str, Any]] = [vars(module) for module in model.modules()]
    before = [(own, {name: own[name] for name in switches if name in own}) for own in owned]
    adapters = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)]

    def block(module: Callable[..., Any], *args: Any) -> Any:
        scales = [dict(adapter.scaling) for adapter in adapters]

        @contextmanager
        def again() -> Iterator[None]:
            now = [dict(adapter.scaling) for adapter in adapters]
            _scale(adapters, scales)
            try:
                with uncompiled(model), within():
                    yield
            finally:
                _scale(adapters, now)

        return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))

    try:
        model.enable_gradient_checkpointing(block)
        yield
    finally:
        for own, old in before:
            for name in switches:
                own.pop(name, None)
            own.update(old)


def _scale(adapters: list[Any], scales: list[dict[str, float]]) -> None:
    for adapter, own in zip(adapters, scales, strict=True):
        adapter.scaling.update(own)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Modules compiled in place run as written: a compiled graph can neither stop half-way nor record autograd."""
    found: list[tuple[dict[str, Any], str, Any, Any]] = []  # (attributes, name, as it is, as written)
    for attributes in map(vars, model.modules()):
        if (call := attributes.get("_compiled_call_impl")) is not None:  # module.compile()
            found.append((attributes, "_compiled_call_impl", call, None))
        if written := getattr(attributes.get("forward"), "_torchdynamo_orig_callable", None):
            found.append((attributes, "forward", attributes["forward"], written))  # forward = torch.compile(forward)
    try:
        for attributes, name, _, written in found:
            attributes[name] = written
        yield
    finally:
        for attributes, name, call, _ in found:
            attributes[name] = call
