"""ThreadGuard: one pipeline draws in one thread at a time, since its scheduler and denoiser have one state."""

from __future__ import annotations

import threading
from collections.abc import Callable

from attnctl.errors import BusyError


class ThreadGuard:
    """Which thread draws with one pipeline.

    A call that was given up half-way, by an exception or a cancelled generator, ends without telling us. So another
    thread may take over, unless it can be seen that the first is at work; and if that one goes on after all, it is told
    before it spoils anything.
    """

    def __init__(self, who: str, calling: Callable[[], bool]) -> None:
        self.who = who  # for messages
        self.calling = calling  # whether this thread is inside the pipeline's `__call__`
        self.owner: int | None = None  # the thread of the pipeline call under way
        self.calls = 0
        # thread -> number of the pipeline call it is in, as far as we know; whether `calling` when that began
        self.latest: dict[int, tuple[int, bool]] = {}

    def begin(self, at_work: bool) -> None:
        """A pipeline call begins in this thread.

        Raises:
            BusyError: another thread is in the middle of a forward.
        """
        me = threading.get_ident()
        if at_work and self.owner not in (None, me):
            self._busy()
        self.owner = me
        self.calls += 1
        self.latest[me] = self.calls, self.calling()

    def go_on(self) -> None:
        """The pipeline call in this thread goes on; one that never began, such as a loop by hand, begins.

        Raises:
            BusyError: another thread has begun a call since.
        """
        me = threading.get_ident()
        number, called = self.latest.get(me, (self.calls, False))
        if number != self.calls:
            del self.latest[me]
            # A call that has left this thread's stack ended half-way, so this is something new. Whether a loop by hand
            # goes on cannot be seen; it is told, for its scheduler has been the other's meanwhile.
            if self.calling() or not called:
                self._busy()
        alive = any(thread.ident == self.owner for thread in threading.enumerate())
        if self.owner not in (None, me) and alive:
            self._busy()
        self.owner = me

    def done(self) -> None:
        """The pipeline call in this thread came to its end."""
        self.latest.pop(threading.get_ident(), None)
        self.owner = None

    def _busy(self) -> None:
        raise BusyError(f"this {self.who} was called in two threads at once; use one pipeline per thread")
