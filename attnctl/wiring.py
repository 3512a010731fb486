"""Wiring: everything attachments install on one pipeline, and what happens around each of its denoiser calls.

One Wiring serves all attachments of a pipeline, so they may go in any order. It patches methods on instances (the
pipeline's `encode_prompt` and `check_inputs`, its scheduler's `step`, its denoiser's call and `cache_context`) and
takes a seat at the attention modules that some control selects. When the last attachment goes, all of it is undone.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from . import denoiser as calls
from .control import AttentionCall, Control, Lane, nest
from .errors import (
    AttnctlError,
    BusyError,
    ControlError,
    UnsupportedPipelineError,
    UnsupportedProcessorError,
)
from .families import Family, family_of, unwrap
from .gradient import Watch, frozen
from .patch import Patch
from .run import Run, Sample, Step
from .seam import Kernel, Seat, attentions, reachable
from .sites import Site

if TYPE_CHECKING:
    from .attachment import Attachment

REMEDIES = (  # part of a processor's name -> what to do about it
    ("Sliced", "call pipe.disable_attention_slicing() first"),
    ("XFormers", "call pipe.disable_xformers_memory_efficient_attention() first"),
    ("Linear", "linear attention has no softmax to control; select other sites"),
    ("", "set a processor that uses torch's fused attention, such as AttnProcessor2_0()"),
)


class Wiring:
    """What is installed on one pipeline."""

    live: WeakValueDictionary[int, Wiring] = WeakValueDictionary()  # by id of the denoiser

    def __init__(self, pipe: Any, family: Family, model: nn.Module) -> None:
        self.pipe, self.family, self.model = pipe, family, model
        self.sites = {site.name: site for site in family.sites(model)}
        self.modules = dict(attentions(model))
        self.attachments: list[Attachment] = []
        self.seats: dict[str, Seat] = {}
        self.chains: dict[str, tuple[Control, ...]] = {}
        self.patches: dict[str, Patch] = {}
        self.heard: list[dict[str, Any]] | None = None  # what encode_prompt was given since the pipeline was called
        self.run: Run | None = None
        self.sample: Sample | None = None  # of the step under way, until scheduler.step has taken its edits
        self.solved = 0  # calls of scheduler.step in this run
        self.acting: Step | None = None  # while the pipeline's own denoiser forward runs
        self.watching: Watch | None = None  # while a probe runs
        self.resting: ExitStack | None = None  # while controls themselves run; a denoiser they call is a plain one
        self.frozen = False  # while a control may differentiate what a probe recorded
        self.owner: int | None = None  # the thread of the run under way
        self.serial = 0  # pipeline calls so far
        self.calling: dict[int, int] = {}  # thread -> the call it is in, as far as we know
        self.branch: tuple[str, dict[str, Any], ExitStack] | None = None  # the cache_context we are in

    @classmethod
    def of(cls, pipe: Any) -> Wiring:
        """The wiring of a pipeline; a new one if nothing is attached to it.

        Raises:
            UnsupportedPipelineError: no family record describes its denoiser.
            ControlError: it is no pipeline, or the denoiser is under control through another pipeline object.
        """
        family, model = family_of(pipe)
        if unwrap(getattr(pipe, family.denoiser, None)) is not model:
            raise ControlError(f"attach to the pipeline, not to its {type(model).__name__}")
        wiring = cls.live.get(id(model))
        if wiring is None:
            return cls(pipe, family, model)
        if wiring.pipe is not pipe:
            other = type(wiring.pipe).__name__
            raise ControlError(f"this {type(model).__name__} is under control through a {other}; release that first")
        return wiring

    # --- on and off ---------------------------------------------------------------------------------------------------

    def add(self, attachment: Attachment) -> None:
        """Install an attachment; nothing of it stays if that fails."""
        self.attachments.append(attachment)
        self.live[id(self.model)] = self
        try:
            self._arrange()
            self.refresh()
        except BaseException:
            self.remove(attachment)
            raise

    def remove(self, attachment: Attachment) -> None:
        """Take an attachment off. With the last one goes everything."""
        self.attachments.remove(attachment)
        self._arrange()
        if not self.attachments:
            self.finish()
            for patch in reversed(self.patches.values()):
                patch.undo()
            self.patches.clear()
            self.live.pop(id(self.model), None)

    def controls(self) -> list[Control]:
        """All controls in order of attachment."""
        return [control for attachment in self.attachments for control in attachment.controls]

    def _arrange(self) -> None:
        """Sit at exactly the sites that some control selects."""
        chosen: dict[str, list[Control]] = {}
        for attachment in self.attachments:
            for control, sites in zip(attachment.controls, attachment.selected, strict=True):
                for site in sites:
                    chosen.setdefault(site.name, []).append(control)
        chains = {name: nest(controls, self.sites[name]) for name, controls in chosen.items()}
        new = [name for name in chains if name not in self.seats]
        _check([(name, self.modules[name]) for name in new])
        for name in [name for name in self.seats if name not in chains]:
            self.seats.pop(name).restore()
        for name in new:
            self.seats[name] = Seat(self.model, self.modules[name], partial(self._attend, self.sites[name]))
        self.chains = chains

    def _reseat(self) -> None:
        """Sit down on processors that were set since, as loading an IP-Adapter does, where they can be controlled."""
        for name, seat in self.seats.items():
            if not seat.in_place() and reachable(self.modules[name]):
                seat.restore()
                self.seats[name] = Seat(self.model, self.modules[name], partial(self._attend, self.sites[name]))

    def refresh(self) -> None:
        """Patch what the pipeline holds now: between calls, schedulers get swapped and denoisers compiled."""
        outer = getattr(self.pipe, self.family.denoiser)
        if unwrap(outer) is not self.model:
            raise ControlError(f"pipe.{self.family.denoiser} was replaced while controls were attached; attach again")
        self._patch("check", self.pipe, "check_inputs", self._on_check)
        self._patch("encode", self.pipe, "encode_prompt", self._on_encode)
        self._patch("step", getattr(self.pipe, "scheduler", None), "step", self._on_step)
        self._patch("context", self.model, "cache_context", self._on_context)
        # nn.Module.__call__ looks here first, so this is outside of forward hooks, compiled graphs and offloading.
        compiled = vars(outer).get("_compiled_call_impl")
        self._patch("call", outer, "_compiled_call_impl", self._on_call, compiled or outer._call_impl)

    def _patch(self, key: str, owner: Any, name: str, around: Callable[..., Any], original: Any = None) -> None:
        old = self.patches.get(key)
        if old is not None and old.owner is owner and old.in_place():
            return
        if old is not None:
            self.patches.pop(key).undo()
        if hasattr(owner, name):
            self.patches[key] = Patch(owner, name, around, original)

    # --- what passes the patches --------------------------------------------------------------------------------------

    def _on_check(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._arrive()  # every pipeline calls check_inputs first
        return original(*args, **kwargs)

    def _on_encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.heard is None:  # a pipeline without check_inputs, or somebody encoding by hand
            self._arrive()
        bound = inspect.signature(type(self.pipe).encode_prompt).bind(self.pipe, *args, **kwargs)
        bound.apply_defaults()
        self.heard = [*(self.heard or []), bound.arguments]
        return original(*args, **kwargs)

    def _arrive(self) -> None:
        """A pipeline call begins."""
        if self.owner not in (None, threading.get_ident()) and (self.acting or self.resting):
            self._busy()
        self.finish()
        self.owner, self.heard = threading.get_ident(), []
        self.serial += 1
        self.calling[self.owner] = self.serial
        self.refresh()

    def _stay(self) -> None:
        """A pipeline call goes on, unless another thread has begun one meanwhile, which has spoilt the scheduler."""
        me = threading.get_ident()
        if self.calling.get(me, self.serial) != self.serial:
            del self.calling[me]
            self._busy()
        self.owner = me if self.owner is None else self.owner
        if self.owner != me:
            self._busy()

    def _busy(self) -> None:
        raise BusyError(
            f"this {type(self.pipe).__name__} was called in two threads at once; use one pipeline per thread"
        )

    def finish(self) -> None:
        """The run under way, if any, is over or was given up."""
        run, self.run, self.sample, self.owner, self.heard = self.run, None, None, None, None
        if run is not None:
            with self._rest():
                run.end()

    def _on_context(self, original: Callable[..., Any], name: str, **kwargs: Any) -> AbstractContextManager[None]:
        @contextmanager
        def recorded() -> Iterator[None]:
            outer = self.branch
            with ExitStack() as stack:
                stack.enter_context(original(name, **kwargs))
                self.branch = name, kwargs, stack
                try:
                    yield
                finally:
                    self.branch = outer

        return recorded()

    def _on_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise AttnctlError("the denoiser was compiled while controls were attached; attach again")
        if self.resting:
            return original(*args, **kwargs)
        self._stay()
        step = self._open(calls.named(self.model, args, kwargs))
        if step.sample.edited is not None:
            fresh = calls.written(
                self.family, self.pipe, step.sample, step.arguments[self.family.sample], step.timestep
            )
            if args:
                args = (fresh, *args[1:])
            else:
                kwargs = {**kwargs, self.family.sample: fresh}
        self.acting = step
        try:
            output = original(*args, **kwargs)
        finally:
            self.acting = None
        return self._close(step, output)

    def _open(self, arguments: dict[str, Any]) -> Step:
        family, raw, timestep = self.family, arguments[self.family.sample], arguments.get("timestep")
        run = self.run
        if run is None:
            if self.heard == []:
                raise UnsupportedPipelineError(
                    f"{type(self.pipe).__name__} drew without calling encode_prompt, so its rows cannot be told apart"
                )
            given = next((a.prompt for a in self.attachments if a.prompt is not None), None)
            heard = self.heard[0] if self.heard else None  # the second, if any, is FLUX's negative prompt
            run = self.run = calls.start_run(family, self.pipe, self.model, arguments, heard, given)
            self.solved = 0
            self._reseat()
        for attachment in self.attachments:
            attachment.latest = run
        extra = arguments.get("skip_layers") is not None
        rows = calls.rows_of(family, self.pipe, raw.shape[0], run.images, self.branch and self.branch[0], extra)
        first = rows.cond is not None and not extra
        if first or self.sample is None:
            scale = calls.scale_of(family, self.pipe, timestep)
            own = rows.cond or slice(0, rows.total)
            self.sample = Sample(raw, own, family.latent_channels(self.model), family.channels, scale)
        index = run.calls if first else max(run.calls - 1, 0)
        position = run.start + index
        text = arguments.get("encoder_hidden_states")
        step = Step(
            run, index, timestep, rows, self.sample.scale, calls.sigma_of(self.pipe, position),
            min(position / run.schedule, 1.0) if run.schedule else 0.0, self.sample, self, arguments, extra,
            text.shape[1] if isinstance(text, Tensor) else None,
        )  # fmt: skip
        with self._rest():
            for control in self.controls():
                run.begin(control)
            if first:
                for control in self.controls():
                    control.before_denoise(step)
        run.calls += first
        return step

    def _close(self, step: Step, output: Any) -> Any:
        tensor, wrap = calls.prediction(output)
        edited = tensor
        if not step.extra:
            with self._rest():
                for control in self.controls():
                    answer = control.after_denoise(step, edited)
                    edited = edited if answer is None else answer
        return output if edited is tensor else wrap(edited)

    def _on_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._stay()
        sample, self.sample = self.sample, None
        if sample is not None and sample.edited is not None:
            scheduler = self.patches["step"].owner
            bound = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs)
            bound.arguments["sample"] = calls.stepped(sample, bound.arguments["sample"])
            args, kwargs = bound.args[1:], bound.kwargs
        result = original(*args, **kwargs)
        self.solved += 1
        if self.run is not None and self.solved == self.run.steps:
            self.calling.pop(threading.get_ident(), None)
            self.finish()
        return result

    # --- attention ----------------------------------------------------------------------------------------------------

    def _attend(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, index: int,
        kernel: Kernel,
    ) -> Tensor:  # fmt: skip
        step = self.watching.step if self.watching else self.acting
        if index or step is None:
            return kernel(q, k, v, bias, scale)
        grid = site.grid(*step.run.latent_size) if site.factor is not None else (0, 0)
        text, image = site.layout(grid, q.shape[2], k.shape[2], step.text_rows)
        call = AttentionCall(q, k, v, bias, scale, site, step, index, grid, text, image)
        if self.watching:
            self.watching.see(call)
            return kernel(q, k, v, bias, scale)
        chain = self.chains[site.name]
        if step.extra:
            chain = tuple(control for control in chain if control.lane is not Lane.MAPS)

        def proceed(position: int, call: AttentionCall) -> Tensor:
            if position == len(chain):
                return kernel(call.q, call.k, call.v, call.bias, call.scale)
            return chain[position].attend(call, partial(proceed, position + 1))

        out = proceed(0, call)
        expected = (*q.shape[:-1], v.shape[-1])
        if out.shape != expected:
            names = ", ".join(type(control).__name__ for control in chain)
            raise ControlError(f"{names} returned {tuple(out.shape)} at {site.name}, which needs {tuple(expected)}")
        return out

    # --- states -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _rest(self) -> Iterator[None]:
        """Controls run: outside inference mode, so that a gradient may be taken, and without recording one."""
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
            before, self.resting = self.resting, stack
            try:
                yield
            finally:
                self.resting = before

    def freeze(self) -> None:
        """Parameters ask for no gradients until the controls are done; checkpointed blocks run again in a backward."""
        if self.resting is None:
            raise ControlError("step.probe is for before_denoise and after_denoise")
        if not self.frozen:
            self.resting.enter_context(frozen(self.model))
            self.resting.callback(setattr, self, "frozen", False)
            self.frozen = True

    @contextmanager
    def watched(self, watch: Watch) -> Iterator[None]:
        """A probe runs; step caches of the model keep its states apart under a name of its own."""
        context = getattr(type(self.model), "cache_context", None)
        self.watching = watch
        try:
            with context(self.model, "attnctl") if context else nullcontext():
                yield
        finally:
            self.watching = None
            if self.branch is not None:  # leaving any cache_context clears the one around it: enter that again
                name, kwargs, stack = self.branch
                stack.enter_context(type(self.model).cache_context(self.model, name, **kwargs))  # type: ignore[attr-defined]


def _check(modules: list[tuple[str, Any]]) -> None:
    bad = [(name, type(module.processor).__name__) for name, module in modules if not reachable(module)]
    if bad:
        name, processor = bad[0]
        more = f" and {len(bad) - 1} other sites" if len(bad) > 1 else ""
        remedy = next(text for part, text in REMEDIES if part in processor)
        raise UnsupportedProcessorError(f"{name}{more} run {processor}, which never calls fused attention; {remedy}")
