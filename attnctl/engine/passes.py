"""A further forward of the denoiser within a step, on the conditional rows, with every control that changes attention.

The weak pass of perturbation guidance is one. It sees what the pipeline's own forward saw: the same prompts, timestep
and edited latents. So up to the first place where it differs, it would compute the same again. `Prefix` keeps what the
stages before that place gave in the pipeline's own forward, and the further pass hands it on instead of running them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.engine import calls as calls
from attnctl.engine.control import Rows
from attnctl.engine.patch import Patch
from attnctl.engine.probe import rows_kept, uncompiled
from attnctl.engine.run import Step
from attnctl.errors import ControlError

Edit = Callable[[Tensor], Tensor | None]  # of the picture's tokens that enter a block; None: the block is skipped


class Prefix:
    """Which stages of a denoiser come before which, and what they gave for the conditional rows of one forward."""

    def __init__(self, step: Step) -> None:
        self.step, self.model = step, step.wiring.model
        self.stages = stages(step)
        self.kept: dict[int, Any] = {}
        hooked = any(hasattr(module, "_diffusers_hook") for _, module in self.stages)  # step caches, group offload
        self.possible = not (hooked or step.wiring.compiled or getattr(self.model, "is_cache_enabled", False))
        self.starts: set[int] = set()

    def ask(self, site: str) -> None:
        """Before the forward: a further pass of this step is the same up to the stage that holds this module."""
        if self.possible:
            self.starts.add(self.stage_of(site))

    def stage_of(self, site: str) -> int:
        """The number of the stage that holds a module; 0, where nothing is shared, if none does."""
        return next((i for i, (name, _) in enumerate(self.stages) if site.startswith(f"{name}.")), 0)

    def _needed(self, start: int) -> list[int]:
        """Stages whose output a pass from `start` on reads: the one before it, and those the family names."""
        keep_output = self.step.run.family.keep_output
        return [i for i in range(start) if i == start - 1 or self.stages[i][0].startswith(keep_output)]

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The pipeline's own forward runs; what was asked for is kept."""
        rows = self.step.rows

        def keep(number: int, module: nn.Module, args: Any, output: Any) -> None:
            self.kept[number] = _copy(output, rows)

        wanted = {i for start in self.starts for i in self._needed(start)}
        handles = [self.stages[i][1].register_forward_hook(partial(keep, i)) for i in wanted]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def resume(self, site: str | None, stack: ExitStack) -> float:
        """Let the stages before a module hand on what was kept; returns the part of the stages that will run."""
        start = self.stage_of(site) if site is not None else 0
        if not all(i in self.kept for i in self._needed(start)):
            start = 0
        for i in range(start):
            give = self.kept.get(i, self.kept[start - 1])
            module = self.stages[i][1]
            patch = Patch(module, "_compiled_call_impl", partial(_hand_on, give), module._call_impl)
            stack.callback(patch.undo)
        return 1 - start / len(self.stages)


def stages(step: Step) -> list[tuple[str, nn.Module]]:
    """The trunk of the denoiser in execution order: its blocks, of a UNet its levels."""
    found: list[tuple[str, nn.Module]] = []
    for name in step.run.family.stages:
        module = getattr(step.wiring.model, name, None)
        if isinstance(module, nn.ModuleList):
            found += [(f"{name}.{i}", one) for i, one in enumerate(module)]
        elif module is not None:
            found.append((name, module))
    return found


def _copy(tree: Any, rows: Rows | None = None) -> Any:
    """A copy of tensors in tuples and lists, of the conditional rows alone if `rows` is given.

    What is one tensor in two places stays one: UNets hand on the same tensor twice, and may add to it in place.
    """
    done: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in done:
                done[id(value)] = (value if rows is None else value[rows.cond]).clone()
            return done[id(value)]
        return type(value)(map(copy, value)) if type(value) in (tuple, list) else value

    return copy(tree)


def _hand_on(give: Any, original: Any, *args: Any, **kwargs: Any) -> Any:
    return _copy(give)


def forward(step: Step, name: str, start: str | None = None, blocks: Mapping[str, Edit] | None = None) -> Tensor:
    """See `Step.forward`."""
    wiring, rows = step.wiring, step.rows
    if rows.cond is None:
        raise ControlError("step.forward needs conditional rows, and this denoiser call has none")
    count = rows.cond.stop - rows.cond.start
    own = replace(step, rows=Rows(slice(0, count), None, count), pass_name=name, term=None)
    arguments = rows_kept(step, rows.cond)
    if step.sample.edited is not None:
        sample = step.run.family.sample
        arguments[sample] = calls.written(wiring.pipe, step.sample, arguments[sample], step.timestep)
    with torch.no_grad(), ExitStack() as stack:
        denoiser = wiring.denoiser
        if blocks:  # a compiled graph has no block that could be reached
            stack.enter_context(uncompiled(wiring.model))
            denoiser = wiring.model._call_impl
        share = step.prefix.resume(start, stack) if step.prefix is not None else 1.0
        for block, edit in (blocks or {}).items():
            _check_hooks(wiring.model.get_submodule(block), block)
            stack.callback(_edited(wiring.model.get_submodule(block), edit, step.run.family.hands_on).undo)
        stack.enter_context(wiring.flow.acts(own))
        args, kwargs = calls.spread(arguments, step.positional)
        output = denoiser(*args, **kwargs)
    step.run.passes[name] = step.run.passes.get(name, 0.0) + share
    return calls.prediction(output)[0]


def _check_hooks(block: nn.Module, name: str) -> None:
    if hasattr(block, "_diffusers_hook"):  # it may have to run for the others, as the first block of a cache has
        raise ControlError(f"{name} is under a step cache or group offloading, so it cannot be edited; switch that off")


def _edited(block: nn.Module, edit: Edit, hands_on: tuple[str, ...]) -> Patch:
    """A block that gets edited tokens, or hands on what it got."""
    signature = inspect.signature(type(block).forward)

    def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(block, *args, **kwargs)
        hidden = edit(bound.arguments["hidden_states"])
        if hidden is None:
            given = tuple(bound.arguments[name] for name in hands_on)
            return given if len(given) > 1 else given[0]
        bound.arguments["hidden_states"] = hidden
        return original(*bound.args[1:], **bound.kwargs)

    return Patch(block, "_compiled_call_impl", around, vars(block).get("_compiled_call_impl") or block._call_impl)
