"""Every forward of the denoiser of our own: probes for gradients, weak passes, look-ahead.

What changes attention acts in all of them, so that a loss beside a region differentiates the model that is drawn; what
only records does not. They run on the conditional rows and are told apart by `step.pass_name`. The pipeline's own
forward is "main".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.engine import calls
from attnctl.engine.control import AttentionCall
from attnctl.engine.latents import written
from attnctl.engine.model_state import (
    checkpointed,
    frozen,
    in_backward,
    moved_in_groups,
    uncached,
    uncast,
    uncompiled,
    unswapped,
)
from attnctl.engine.patch import Patch
from attnctl.engine.prefix import Prefix
from attnctl.engine.run import Edit, Rows, Step, Watcher
from attnctl.engine.sites import Site
from attnctl.engine.target import Target
from attnctl.errors import ControlError


class Stop(BaseException):
    """All watched sites were seen. Raised in our own forward only; no `except Exception` in a model may catch it."""


@dataclass
class Watch:
    """What a running probe waits for."""

    step: Step
    waiting: dict[str, Watcher]  # by site name

    def see(self, call: AttentionCall) -> None:
        """Hand a call to whoever waits for its site, and stop the forward if that was the last one."""
        callback = self.waiting.pop(call.site.name, None)
        if callback is not None:
            callback(call)
            if not self.waiting:
                raise Stop


class Passes:
    """The pass that runs on one target, if any, and those of our own; the `Step.passes` of its steps.

    Attributes:
        acting: the step whose forward runs.
        watching: a probe that runs.
        branch: the `cache_context` the pipeline is in: its name, its arguments, what to leave.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.acting: Step | None = None
        self.watching: Watch | None = None
        self.branch: tuple[str, dict[str, Any], ExitStack] | None = None
        self.latest: Step | None = None  # whose blocks may run again in a backward, under gradient checkpointing
        self._resting: ExitStack | None = None  # while controls themselves run; a denoiser they call is a plain one
        self._frozen = False  # while a control may differentiate what a probe recorded

    @property
    def resting(self) -> bool:
        """Controls run; a denoiser that they call is a plain one."""
        return self._resting is not None

    @property
    def step(self) -> Step | None:
        """The step that an attention call made now belongs to; None: it is none of ours."""
        if self.watching is not None:
            return self.watching.step
        if self.acting is None and in_backward():  # a block of a probe runs again, under the user's own checkpointing
            return self.latest
        return self.acting

    # --- the passes ---------------------------------------------------------------------------------------------------

    def probe(
        self,
        step: Step,
        latents: Tensor,
        watch: Mapping[Site, Watcher],
        images: Sequence[int] | None = None,
        checkpoint: bool = False,
        bfloat16: bool = False,
    ) -> None:
        """See `Step.probe`."""
        target, rows = self.target, step.rows
        if strangers := [site.name for site in watch if site.name not in target.seats]:
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
        model, sample = target.model, target.family.sample
        self._freeze()
        with ExitStack() as stack:
            stack.enter_context(uncompiled(model))
            stack.enter_context(uncached(model))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if moved_in_groups(model):
                if checkpoint:  # part of a group would run again without what brings its weights back
                    raise ControlError("checkpoint=True does not go with group offloading; switch one of them off")
                stack.enter_context(unswapped())
            if bfloat16:
                stack.enter_context(torch.autocast(latents.device.type, torch.bfloat16))
            if checkpoint:
                stack.enter_context(checkpointed(model, lambda: self.again(own)))
            arguments = calls.rows_kept(step, chosen)
            arguments[sample] = step.sample.replaced(arguments[sample], latents * step.scale)
            stack.enter_context(self._watched(watching))
            try:
                args, kwargs = calls.spread(arguments, step.positional)
                model(*args, **kwargs)
            except Stop:
                pass
        if watching.waiting:
            raise ControlError(
                f"step.probe watched {next(iter(watching.waiting))}, which this denoiser call never reached"
            )

    def share(self, step: Step, site: str) -> None:
        """See `Step.share`."""
        step.prefix = step.prefix or Prefix(self.target, step)
        step.prefix.ask(site)

    def forward(
        self, step: Step, name: str, start: str | None = None, blocks: Mapping[str, Edit] | None = None
    ) -> Tensor:
        """See `Step.forward`."""
        target, rows = self.target, step.rows
        if rows.cond is None:
            raise ControlError("step.forward needs conditional rows, and this denoiser call has none")
        count = rows.cond.stop - rows.cond.start
        own = replace(step, rows=Rows(slice(0, count), None, count), pass_name=name, term=None)
        arguments = calls.rows_kept(step, rows.cond)
        if step.sample.edited is not None:
            sample = target.family.sample
            arguments[sample] = written(target.pipe, step.sample, arguments[sample], step.timestep)
        with torch.no_grad(), ExitStack() as stack:
            denoiser = target.denoiser
            if blocks:  # a compiled graph has no block that could be reached
                stack.enter_context(uncompiled(target.model))
                denoiser = target.model._call_impl
            share = step.prefix.resume(start, stack) if step.prefix is not None else 1.0
            for block, edit in (blocks or {}).items():
                _check_hooks(target.model.get_submodule(block), block)
                around = _edited(target.model.get_submodule(block), edit, target.family.hands_on, step.text_rows or 0)
                stack.callback(around.undo)
            stack.enter_context(self._acts(own))
            args, kwargs = calls.spread(arguments, step.positional)
            output = denoiser(*args, **kwargs)
        step.run.passes[name] = step.run.passes.get(name, 0.0) + share
        return calls.prediction(output)[0]

    def plain(self, step: Step, name: str, arguments: dict[str, Any]) -> Tensor:
        """What the denoiser, as written, predicts for all rows of a step with other arguments; no gradient."""
        model = self.target.model
        with torch.no_grad(), uncompiled(model), uncached(model), self._acts(replace(step, pass_name=name)):
            args, kwargs = calls.spread(arguments, step.positional)
            return calls.prediction(model(*args, **kwargs))[0]

    # --- the state around them ----------------------------------------------------------------------------------------

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Controls run: outside inference mode, so that a gradient may be taken, and without recording one."""
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
            before, self._resting = self._resting, stack
            try:
                yield
            finally:
                self._resting, self.latest = before, None

    def _freeze(self) -> None:
        """Parameters ask for no gradients until the controls are done; checkpointed blocks run again in a backward."""
        if self._resting is None:
            raise ControlError("step.probe is for before_denoise and after_denoise")
        if not self._frozen:
            self._resting.enter_context(frozen(self.target.model))
            self._resting.enter_context(uncast(self.target.model))
            self._resting.callback(setattr, self, "_frozen", False)
            self._frozen = True

    @contextmanager
    def _watched(self, watch: Watch) -> Iterator[None]:
        """A probe runs."""
        self.watching = watch
        try:
            with self._apart():
                yield
        finally:
            self.watching, self.latest = None, watch.step

    @contextmanager
    def _acts(self, step: Step) -> Iterator[None]:
        """A further forward runs in which controls act as in this step."""
        with self._apart(f"attnctl {step.pass_name}"), self.again(step):
            yield

    @contextmanager
    def again(self, step: Step) -> Iterator[None]:
        """A part of a forward runs, in which controls act as in this step."""
        before, self.acting = self.acting, step
        try:
            yield
        finally:
            self.acting = before

    @contextmanager
    def _apart(self, name: str = "attnctl") -> Iterator[None]:
        """A forward of our own runs; step caches of the model keep its states apart under a name of its own."""
        model = self.target.model
        context: Any = getattr(type(model), "cache_context", None)
        try:
            with context(model, name) if context else nullcontext():
                yield
        finally:
            if self.branch is not None:  # leaving any cache_context clears the one around it: enter that again
                branch, kwargs, stack = self.branch
                stack.enter_context(context(model, branch, **kwargs))


def _check_hooks(block: nn.Module, name: str) -> None:
    if hasattr(block, "_diffusers_hook"):  # it may have to run for the others, as the first block of a cache has
        raise ControlError(f"{name} is under a step cache or group offloading, so it cannot be edited; switch that off")


def _edited(block: nn.Module, edit: Edit, hands_on: tuple[str, ...], text_rows: int) -> Patch:
    """A block that gets edited tokens, or hands on what it got."""
    signature = inspect.signature(type(block).forward)

    def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(block, *args, **kwargs)
        given = tuple(bound.arguments[name] for name in hands_on if name in bound.arguments)
        tokens = bound.arguments["hidden_states"]
        joined = text_rows if len(given) < len(hands_on) else 0  # Chroma's single blocks get text and picture as one
        hidden = edit(tokens[:, joined:])
        if hidden is None:
            return given if len(given) > 1 else given[0]
        bound.arguments["hidden_states"] = torch.cat([tokens[:, :joined], hidden], 1) if joined else hidden
        return original(*bound.args[1:], **bound.kwargs)

    return Patch(block, "_compiled_call_impl", around, vars(block).get("_compiled_call_impl") or block._call_impl)
