"""Patch: one method replaced on one instance, and its exact inverse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class _Around:
    """What stands in the method's place. A copy of the owner, deep or pickled, gets its own plain method instead."""

    def __init__(self, patch: Patch, around: Callable[..., Any], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, call)  # pipelines look at the signature, e.g. of scheduler.step
        self.patch, self.around, self.call = patch, around, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.call, *args, **kwargs) if self.patch.live else self.call(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return getattr, (self.patch.owner, self.patch.name)


class Patch:
    """Replaces `owner.name` on the instance until `undo`.

    If somebody patches over us meanwhile, `undo` leaves their work in place and ours steps aside inside it.

    Args:
        owner: any object with a `__dict__`.
        name: the method.
        around: called as around(original, *args, **kwargs) in its place.
        original: what to call through to; the method itself if not given.
    """

    def __init__(
        self, owner: Any, name: str, around: Callable[..., Any], original: Callable[..., Any] | None = None
    ) -> None:
        self.owner, self.name = owner, name
        self.had = name in vars(owner)
        self.before = vars(owner).get(name)
        self.live = True
        self.ours = _Around(self, around, original if original is not None else getattr(owner, name))
        vars(owner)[name] = self.ours  # not setattr: pipelines and compiled modules do things of their own there

    def in_place(self) -> bool:
        """False once somebody else has patched over us."""
        return vars(self.owner).get(self.name) is self.ours

    def undo(self) -> None:
        """Put back what was there, unless somebody else's patch has taken our place."""
        if self.in_place():
            if self.had:
                vars(self.owner)[self.name] = self.before
            else:
                del vars(self.owner)[self.name]
        self.live = False
