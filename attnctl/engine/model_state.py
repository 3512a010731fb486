"""States of a denoiser during a pass of our own: parameters frozen, blocks checkpointed, modules as written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
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


CACHES = (
    "faster_cache",
    "fbc_",
    "mag_cache",
    "pyramid_attention_broadcast",
    "sea_cache",
    "taylorseer_cache",
    "text_kv_",
)
"""How diffusers' names of the hooks of step caches begin."""


@contextmanager
def uncast(model: nn.Module) -> Iterator[None]:
    """Weights that are stored in another precision (layerwise casting) stay in that of the computation inside.

    A backward reads the weights of its forward, and they would have been cast back by then.
    """
    found: list[tuple[nn.Module, Any, Any, dict[str, Any]]] = []
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.hooks.get("layerwise_casting")
        if hook is not None:
            found.append((module, hook, hook.fn_ref, dict(vars(hook.fn_ref))))
    try:
        for module, hook, reference, _ in found:
            hook.pre_forward(module)
            reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
            reference.post_forward = lambda module, output: output
        yield
    finally:
        for module, hook, reference, before in found:
            vars(reference).update(before)
            hook.post_forward(module, None)


def moved_in_groups(model: nn.Module) -> bool:
    """Whether diffusers' group offloading moves the model's weights before and after their forward."""
    registries: list[Any] = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return any("group_offloading" in registry.hooks for registry in registries if registry is not None)


def unswapped() -> AbstractContextManager[None]:
    """What a backward needs of a forward inside is kept as it is now.

    Group offloading puts other memory behind a weight after its forward, and a backward that kept the weight itself
    would read that. So it keeps an alias of the memory there was.
    """
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept)


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Step caches do nothing inside: a pass that stops half-way, or is made once, would leave half an entry in them."""
    found: list[tuple[Any, dict[str, Any]]] = []
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name, reference in (
            zip(registry._hook_order, registry._fn_refs, strict=True) if registry is not None else ()
        ):
            if name.startswith(CACHES):
                found.append((reference, dict(vars(reference))))
    try:
        for reference, _ in found:
            reference.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
            reference.post_forward = lambda module, output: output
            reference.forward = getattr(reference, "original_forward", None) or reference.forward
        yield
    finally:
        for reference, before in found:
            vars(reference).update(before)
