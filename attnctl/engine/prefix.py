"""Prefix: what a further pass of a step need not compute again.

A weak pass sees what the pipeline's own forward saw: the same prompts, timestep and edited latents. So up to the first
place where it differs, it would compute the same again. A `Prefix` keeps what the stages before that place gave in the
pipeline's own forward, and the further pass hands it on instead of running them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from attnctl.engine.patch import Patch
from attnctl.engine.run import Rows, Step
from attnctl.engine.target import Target


class Prefix:
    """Which stages of a denoiser come before which, and what they gave for the conditional rows of one forward."""

    def __init__(self, target: Target, step: Step) -> None:
        self.step = step
        self.stages = stages(target)
        self.kept: dict[int, Any] = {}
        hooked = any(hasattr(module, "_diffusers_hook") for _, module in self.stages)  # step caches, group offload
        self.possible = not (hooked or target.compiled or getattr(target.model, "is_cache_enabled", False))
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


def stages(target: Target) -> list[tuple[str, nn.Module]]:
    """The trunk of the denoiser in execution order: its blocks, of a UNet its levels."""
    found: list[tuple[str, nn.Module]] = []
    for name in target.family.stages:
        module = getattr(target.model, name, None)
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
