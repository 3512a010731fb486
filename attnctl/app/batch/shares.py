"""The share of this process where a launcher started several: `torchrun`, `accelerate launch`.

They tell each process its number by the environment. Groups are shared out by their place in the file, whatever is
there already, so no process needs to ask another.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from attnctl.app.batch.planning import Plan
from attnctl.app.command import UsageError


@dataclass(frozen=True)
class Share:
    """Process `rank` of `world`, the `local`-th of its machine; counted from 0."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "Share":
        """What a launcher has told this process.

        Raises:
            UsageError: it makes no sense.
        """
        names = "RANK", "WORLD_SIZE", "LOCAL_RANK"
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        told = {name: environment.get(name, "0") for name in names}
        if not all(value.isdecimal() for value in told.values()) or not int(told["RANK"]) < int(told["WORLD_SIZE"]):
            said = ", ".join(f"{name}={value}" for name, value in told.items())
            raise UsageError(f"the environment says {said}: no launcher would")
        return cls(*(int(told[name]) for name in names))

    def device(self) -> str | None:
        """The one of this process, where it is told none."""
        import torch

        if self.world == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{self.local % torch.cuda.device_count()}"

    def part_of(self, what: Plan) -> Plan:
        """The part of a plan that is this process's."""
        if self.world == 1:
            return what
        groups = what.groups[self.rank :: self.world]
        own = {task.key for group in groups for task in group.tasks}
        there = [task for task in what.there if task.key in own]
        return replace(what, there=there, missing=[one for one in what.missing if one.key in own], groups=groups)
