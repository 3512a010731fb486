"""May the text of a control name files? Not where strangers write it, as on the page of the studio."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from .errors import ControlError

_read: ContextVar[bool] = ContextVar("files_are_read", default=True)


@contextmanager
def no_files() -> Iterator[None]:
    """While it is open, in this thread, a mask or a list of heads that is read from a file is a `ControlError`."""
    token = _read.set(False)
    try:
        yield
    finally:
        _read.reset(token)


def check_file(name: object) -> None:
    """Raise unless files are read here."""
    if not _read.get():
        raise ControlError(f"{str(name)[:60]!r} would be read from a file, and no files are read here")
