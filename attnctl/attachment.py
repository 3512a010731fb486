"""attach(): controls on a pipeline, and off again."""

from __future__ import annotations

from typing import Any

from .control import Control


class Attachment:
    """What `attach` returns: a context manager; `release()` undoes everything."""

    def release(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.release()


def attach(pipe: Any, *controls: Control, prompt: str | list[str] | None = None) -> Attachment:
    """Put controls on a pipeline until the attachment is released."""
    raise NotImplementedError
