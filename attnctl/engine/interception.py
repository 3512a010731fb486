"""Interception: what happens between a pipeline and its denoiser while controls are attached.

A pipeline call passes five patches, in this order: `check_inputs` (a call begins), `encode_prompt` (the words), and for
each step the denoiser's `cache_context` (which branch), the denoiser (a run or step opens, controls edit latents, act
inside attention, edit the prediction) and `scheduler.step` (which must see the edited latents, too).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from attnctl.engine import calls
from attnctl.engine.branches import Branches
from attnctl.engine.control import AttentionCall, Control, Lane, run_chain
from attnctl.engine.latents import Sample, stepped, written
from attnctl.engine.passes import Passes
from attnctl.engine.run import Run, Step
from attnctl.engine.seam import Kernel
from attnctl.engine.sites import Site
from attnctl.engine.target import Target
from attnctl.engine.thread_guard import ThreadGuard
from attnctl.errors import AttnctlError, ControlError, UnsupportedPipelineError


class Renewed(Protocol):
    """What is asked of whoever installed us, since pipelines change between calls."""

    def refresh(self) -> None:
        """Patch what the pipeline holds now."""

    def reseat(self) -> None:
        """Take the attention modules back whose processors were set since."""


class Interception:
    """The state of the pipeline call under way on one target."""

    def __init__(self, target: Target, installed: Renewed) -> None:
        self.target, self.installed = target, installed
        self.passes = Passes(target)
        self.words: list[dict[str, Any]] | None = None  # what encode_prompt was given since the pipeline was called
        self.branches = Branches()
        self.asked: dict[str, Any] = {}  # what check_inputs was given
        self.run: Run | None = None
        self.sample: Sample | None = None  # of the step under way, until scheduler.step has taken its edits
        self.solved = 0  # calls of scheduler.step in this run
        self.term: Tensor | None = None  # of guidance, of the step under way
        self.unguided = False  # the step under way has had its unconditional call, but no conditional one
        # (original call, arguments, arguments by name) -> output, while denoiser calls are a training loop's
        self.training: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any] | None = None
        self.guard = ThreadGuard(type(target.pipe).__name__, lambda: target.pipe in _calling())

    def on_check(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.training is not None:
            raise ControlError("a pipeline was called inside a training batch; leave its block first")
        self._arrive()  # every pipeline calls check_inputs first
        self.asked = inspect.signature(original).bind(*args, **kwargs).arguments
        return original(*args, **kwargs)

    def on_encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.training is not None:  # a loop that has its captions encoded
            return original(*args, **kwargs)
        by_hand = self.run is not None and not self.guard.calling()  # encoding for the next picture of a loop
        if self.words is None or by_hand:  # a pipeline without check_inputs, or somebody encoding by hand
            self._arrive()
        if getattr(self.target.pipe, "do_perturbed_attention_guidance", False):
            who = type(self.target.pipe).__name__
            raise UnsupportedPipelineError(
                f"{who} swaps attention processors for its own perturbed attention guidance; call it with pag_scale=0 "
                "and attach Pag()"
            )
        bound = inspect.signature(type(self.target.pipe).encode_prompt).bind(self.target.pipe, *args, **kwargs)
        bound.apply_defaults()
        self.words = [*(self.words or []), bound.arguments]
        returned = original(*args, **kwargs)
        self.branches.encoded(returned)
        return returned

    def _arrive(self) -> None:
        """A pipeline call begins."""
        self.guard.begin(at_work=self.passes.acting is not None or self.passes.resting)
        self.finish()
        self.words, self.asked = [], {}
        self.installed.refresh()

    def finish(self) -> None:
        """The run under way, if any, is over or was given up."""
        self.words = None
        self.branches.clear()
        self._end_run()

    def _end_run(self) -> None:
        run, self.run, self.sample = self.run, None, None
        self.term, self.unguided = None, False
        if run is not None:
            with self.passes.rest():
                run.end()

    def on_guider(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A Modular Diffusers pipeline has its guider prepare the batches of a step."""
        batches = original(*args, **kwargs)
        self.branches.prepared(batches)
        return batches

    def on_context(self, original: Callable[..., Any], name: str, **kwargs: Any) -> AbstractContextManager[None]:
        @contextmanager
        def recorded() -> Iterator[None]:
            outer = self.passes.branch
            with ExitStack() as stack:
                stack.enter_context(original(name, **kwargs))
                self.passes.branch = name, kwargs, stack
                try:
                    yield
                finally:
                    self.passes.branch = outer

        return recorded()

    def on_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise AttnctlError("the denoiser was compiled while controls were attached; attach again")
        if self.passes.resting:
            return original(*args, **kwargs)
        if self.training is not None:
            return self.training(original, args, kwargs)
        self.guard.go_on()
        target, name = self.target, self.target.family.sample
        if (other := _drawing(target.pipe)) is not None:
            raise ControlError(
                f"this {type(target.model).__name__} is under control through a {type(target.pipe).__name__}, but a "
                f"{type(other).__name__} draws with it; attach to that one"
            )
        step = self._open(calls.named(target.model, args, kwargs), len(args))
        if step.changed:
            args, kwargs = calls.spread(step.arguments, len(args))
        if step.sample.edited is not None:
            fresh = written(target.pipe, step.sample, step.arguments[name], step.timestep)
            args, kwargs = ((fresh, *args[1:]), kwargs) if args else ((), {**kwargs, name: fresh})
        with self.passes.again(step), step.prefix.recorded() if step.prefix is not None else nullcontext():
            output = original(*args, **kwargs)
        run = step.run
        run.passes["main"] = run.passes.get("main", 0.0) + step.rows.total / run.images
        return self._close(step, output)

    def _open(self, arguments: dict[str, Any], positional: int) -> Step:
        """The step a denoiser call is, after the controls have had their say before it."""
        target, family, pipe = self.target, self.target.family, self.target.pipe
        raw, timestep, text = (
            arguments[family.sample],
            arguments.get("timestep"),
            arguments.get(family.text),
        )
        if self.run is not None and family.latent_size(target.model, raw, arguments) != self.run.latent_size:
            self._end_run()  # a loop by hand goes on to pictures of another size
        run = self.run = self.run or self._start(arguments)
        for attachment in target.attachments:
            attachment.latest = run
        guider = self.branches.guider(text)
        extra = arguments.get("skip_layers") is not None or guider == "extra"
        self.branches.told = self.passes.branch[0] if self.passes.branch else None
        rows = self.branches.rows(run, raw.shape[0], text, extra, guider)
        first = rows.cond is not None and not extra
        if first or self.sample is None:
            own, scale = rows.cond or slice(0, rows.total), calls.scale_of(family, pipe, timestep)
            channels, tokens = family.latent_channels(target.model), calls.tokens_drawn(run, raw)
            self.sample = Sample(raw, own, channels, family.channel_dim, scale, tokens)
        index = run.calls if first else max(run.calls - 1, 0)
        position = run.start + index
        step = Step(
            run=run,
            index=index,
            timestep=timestep,
            rows=rows,
            scale=self.sample.scale,
            sigma=calls.sigma_of(pipe, position),
            fraction=min(position / run.schedule, 1.0) if run.schedule else 0.0,
            sample=self.sample,
            passes=self.passes,
            arguments=arguments,
            extra=extra,
            corrector=not getattr(getattr(pipe, "scheduler", None), "state_in_first_order", True),
            text_rows=text.shape[1] if isinstance(text, Tensor) else None,
            positional=positional,
            images=tuple(range(run.images)),
        )
        with self.passes.rest():
            for control in target.controls():
                run.begin(control)
            for control in target.controls():
                step.change(control.inputs(step))
            if first:
                for control in target.controls():
                    before = step.sample.edited
                    control.before_denoise(step)
                    if step.sample.edited is not before:
                        _check_finite(control, step)
        run.calls += first
        return step

    def _start(self, arguments: dict[str, Any]) -> Run:
        target = self.target
        if self.words == []:
            who = type(target.pipe).__name__
            raise UnsupportedPipelineError(
                f"{who} drew without calling encode_prompt, so its rows cannot be told apart"
            )
        given = next((a.prompt for a in target.attachments if a.prompt is not None), None)
        self.solved = 0
        self.installed.reseat()
        run = calls.start_run(target.family, target.pipe, target.model, arguments, self.words or [], given)
        told = _local(target.pipe, "guidance_scale")  # PixArt keeps it to itself
        guidance = float(told) if isinstance(told, int | float) else None
        return replace(run, told_guidance=guidance, **calls.cropped(target.pipe, self.asked, run.picture))

    def _close(self, step: Step, output: Any) -> Any:
        """The denoiser's output after the controls have had their say."""
        tensor, wrap = calls.prediction(output)
        edited = step.prediction = tensor
        if not step.extra:
            with self.passes.rest():
                for control in self.target.controls():
                    answer = control.after_denoise(step, edited)
                    edited = edited if answer is None else answer
            self._keep_term(step)
        if self.term is not None:
            blocks = edited.shape[0] // self.term.shape[0]
            edited = edited + torch.cat([self.term.to(edited)] * blocks)
        return output if edited is tensor else wrap(edited)

    def _keep_term(self, step: Step) -> None:
        """A term of guidance goes into every call of the step; so the call that makes it must be the first."""
        if step.rows.cond is None:
            self.unguided = self.term is None
            return
        self.term = step.term
        if self.term is not None and self.unguided:
            who = type(self.target.pipe).__name__
            raise ControlError(f"{who} makes its unconditional call first, so a term of guidance comes too late for it")

    def on_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.guard.go_on()
        sample, self.sample = self.sample, None
        self.term, self.unguided = None, False
        if sample is not None and sample.edited is not None:
            scheduler = self.target.patches["step"].owner
            bound = inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs)
            bound.arguments["sample"] = stepped(sample, bound.arguments["sample"])
            args, kwargs = bound.args[1:], bound.kwargs
        result = original(*args, **kwargs)
        self.solved += 1
        if self.run is not None and self.solved == self.run.steps:
            self.guard.done()
            self.finish()
        return result

    def attend(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, index: int,
        kernel: Kernel,
    ) -> Tensor:  # fmt: skip
        """One attention call of a controlled site, see `seam.Seat`."""
        step, watching = self.passes.step, self.passes.watching
        if index or step is None:
            return kernel(q, k, v, bias, scale)
        grid = site.grid(*step.run.latent_size) if site.factor is not None else (0, 0)
        text, image = site.layout(grid, q.shape[2], k.shape[2], step.text_rows)
        call = AttentionCall(q, k, v, bias, scale, site, step, index, grid, text, image)
        chain = self.target.chains[site.name]
        if step.extra or step.pass_name != "main":
            chain = tuple(control for control in chain if control.lane is not Lane.MAPS)
        if watching is None:
            return run_chain(chain, call, kernel)
        out = run_chain(chain, call, kernel, watching.see)
        watching.see(call)  # if a control has put something else in the place of attention
        return out


def _check_finite(control: Control, step: Step) -> None:
    """Raise if a control left latents that hold infinity or no number: what is drawn from them is no picture."""
    finite = step.latents.flatten(1).isfinite().all(dim=1).tolist()
    if not all(finite):
        who = step.run.describe(finite.index(False))
        raise ControlError(
            f"{type(control).__name__} made latents that are not finite at step {step.index}{who and f' of {who}'}; "
            "a setting such as strength is too large"
        )


def _drawing(own: Any) -> Any:
    """Another pipeline than `own` that is in the middle of a call in this thread, or None."""
    innermost = next(_calling(), None)
    return None if innermost is own else innermost


def _calling() -> Iterator[Any]:
    """The pipelines that are in the middle of a call in this thread, innermost first."""
    yield from (frame.f_locals["self"] for frame in _frames())


def _local(pipe: Any, name: str) -> Any:
    """What a local variable holds in the call of this pipeline in this thread; None if there is none."""
    return next((frame.f_locals.get(name) for frame in _frames() if frame.f_locals["self"] is pipe), None)


def _frames() -> Iterator[Any]:
    """The frames of pipeline calls in this thread, innermost first."""
    frame: Any = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, DiffusionPipeline) and frame.f_code is inspect.unwrap(type(caller).__call__).__code__:
            yield frame
        frame = frame.f_back
