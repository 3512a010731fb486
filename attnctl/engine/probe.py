"""The extra forward behind `Step.probe`: conditional rows, frozen parameters, stopped after the last watched site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnctl.engine.calls import spread
from attnctl.engine.control import AttentionCall, Rows
from attnctl.engine.run import Step
from attnctl.engine.sites import Site
from attnctl.errors import ControlError


class Stop(BaseException):
    """All watched sites were seen. Raised in our own forward only; no `except Exception` in a model may catch it."""


@dataclass
class Watch:
    """What a running probe waits for."""

    step: Step
    waiting: dict[str, Callable[[AttentionCall], None]]  # by site name

    def see(self, call: AttentionCall) -> None:
        """Hand a call to whoever waits for its site, and stop the forward if that was the last one."""
        callback = self.waiting.pop(call.site.name, None)
        if callback is not None:
            callback(call)
            if not self.waiting:
                raise Stop


def probe(
    step: Step,
    latents: Tensor,
    watch: Mapping[Site, Callable[[AttentionCall], None]],
    images: Sequence[int] | None = None,
    checkpointing: bool = False,
    bfloat16: bool = False,
) -> None:
    """See `Step.probe`."""
    wiring, rows = step.wiring, step.rows
    if strangers := [site.name for site in watch if site.name not in wiring.seats]:
        raise ControlError(f"step.probe cannot watch {strangers[0]}: no attached control selects it")
    if rows.cond is None:
        raise ControlError("step.probe needs conditional rows, and this denoiser call has none")
    if not watch:
        return
    every = range(rows.cond.start, rows.cond.stop)
    chosen = rows.cond if images is None else [every[image] for image in images]
    count = len(every) if images is None else len(images)
    numbers = step.images if images is None else tuple(step.images[image] for image in images)
    own = replace(step, rows=Rows(slice(0, count), None, count), images=numbers, pass_name="probe")
    watching = Watch(own, {site.name: callback for site, callback in watch.items()})
    model, family = wiring.model, step.run.family
    wiring.flow.freeze()
    with ExitStack() as stack:
        stack.enter_context(uncompiled(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if bfloat16:
            stack.enter_context(torch.autocast(latents.device.type, torch.bfloat16))
        if checkpointing:
            stack.enter_context(checkpointed(model, lambda: wiring.flow.again(own)))
        arguments = rows_kept(step, chosen)
        arguments[family.sample] = step.sample.replaced(arguments[family.sample], latents * step.scale)
        stack.enter_context(wiring.flow.watched(watching))
        try:
            args, kwargs = spread(arguments, step.positional)
            model(*args, **kwargs)
        except Stop:
            pass
    if watching.waiting:
        raise ControlError(f"step.probe watched {next(iter(watching.waiting))}, which this denoiser call never reached")


def rows_kept(step: Step, keep: slice | list[int]) -> dict[str, Any]:
    """The call's arguments with only these rows of every batched tensor; containers are copied, not shared."""
    rows, shared = step.rows, step.run.family.shared

    def take(value: Any, batched: bool) -> Any:
        if isinstance(value, Tensor):
            if batched and value.ndim and value.shape[0] == rows.total:
                value = value[keep]
            return value.clone() if value.is_inference() else value  # an inference tensor cannot be saved for backward
        if isinstance(value, dict):
            return {k: take(v, batched) for k, v in value.items()}
        if type(value) in (list, tuple):
            return type(value)(take(v, batched) for v in value)
        return value

    return {name: take(value, name not in shared) for name, value in step.arguments.items()}


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
