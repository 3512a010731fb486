"""Work that is watched: in a thread of its own, one at a time, step by step, and stopped as soon as nobody watches."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from PIL import Image

from attnctl.errors import AttnctlError
from attnctl.files import no_files


class TimeError(AttnctlError):
    """It took longer than it may."""


@dataclass(frozen=True)
class Step:
    """How far a drawing is."""

    kind: str  # which drawing: plain | controlled
    done: int
    total: int
    seconds: float  # left, of this drawing
    preview: Image.Image | None = None  # what it looks like so far, where there is a new one


class Turns:
    """Lets one piece of work in at a time."""

    def __init__(self) -> None:
        self._one = Lock()

    @property
    def busy(self) -> bool:
        return self._one.locked()

    def watch(self, work: Callable[["Bar"], Any], seconds: float) -> Iterator[Any]:
        """What `work` tells its bar and, at last, returns. Closing this iterator stops the work at its next step.

        Args:
            work: gets a bar that it shows its steps on; it may read no file whose name stands in a control.
            seconds: that it may take, its wait for its turn not counted.

        Raises:
            TimeError: at the step at which the time is up.
        """
        bar = Bar(seconds)

        def inside() -> None:
            try:
                while not self._one.acquire(timeout=0.1):
                    bar.check()
                try:
                    bar.ends = time.monotonic() + seconds
                    with no_files():
                        bar.told.put(_Last(work(bar)))
                finally:
                    self._one.release()
            except BaseException as error:  # for the thread that watches
                bar.told.put(error)

        thread = Thread(target=inside, daemon=True)
        thread.start()
        try:
            while not isinstance(one := bar.told.get(), _Last):
                if isinstance(one, BaseException):
                    raise one
                yield one
            yield one.value
        finally:
            bar.stop.set()
            thread.join()


@dataclass(frozen=True)
class _Last:
    value: Any


class _Stopped(BaseException):
    """Nobody watches any longer; nothing that catches a drawing's errors may take it for one."""


class Bar:
    """What drawing uses of a rich bar: it passes the steps on, and stops the drawing when it is told to."""

    def __init__(self, seconds: float) -> None:
        self.rich: Any = self
        self.stop, self.told = Event(), SimpleQueue[Any]()
        self.ends, self._most = float("inf"), seconds  # the clock starts with the turn
        self._preview: Image.Image | None = None

    def add_task(self, label: str, total: int | None) -> int:
        self._label, self._total, self._done, self._start = label, total or 0, 0, time.monotonic()
        return 0

    def stop_task(self, task: int) -> None:
        pass

    def preview(self, picture: Image.Image) -> None:
        """Goes out with the next step."""
        self._preview = picture

    def check(self) -> None:
        """Raise if nobody watches, or the time is up."""
        if self.stop.is_set():
            raise _Stopped
        if time.monotonic() > self.ends:
            raise TimeError(f"it took more than {self._most:g} s, the most there is for a run here")

    def advance(self, task: int, steps: int) -> None:
        self.check()
        self._done += steps
        left = (time.monotonic() - self._start) / self._done * max(0, self._total - self._done)
        picture, self._preview = self._preview, None
        self.told.put(Step(self._label, self._done, self._total, left, picture))
