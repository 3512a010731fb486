"""The folder of a batch: its lock, its files that are written whole, and the list of what failed."""

import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from PIL import Image

from attnctl.app.command import UsageError

FAILURES, LOCK = "failures.jsonl", ".batch.lock"
MANIFEST, SCORES, SUMMARY = "manifest.jsonl", "scores.jsonl", "summary.md"

PICTURE = re.compile(r".*-([0-9a-f]{12})\.png")
"""The name of a batch's picture; its key."""

_PART = re.compile(r"\.[0-9a-f]{16}\.part")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    part = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the content
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def png(picture: Image.Image) -> bytes:
    """A picture as the content of a PNG file."""
    page = BytesIO()
    picture.save(page, "PNG")
    return page.getvalue()


def append(path: Path, line: str) -> None:
    """Add a line in one write, so that those of several processes stay apart."""
    with path.open("ab", buffering=0) as file:
        file.write(f"{line}\n".encode())


def tidy(out: Path) -> None:
    """Remove what a process that was killed has left, and failures that are mended. Only while nobody draws."""
    for name in os.listdir(out):
        if _PART.fullmatch(name):
            (out / name).unlink(missing_ok=True)
    if (out / FAILURES).exists():
        if lines := failures(out).values():
            write_whole(out / FAILURES, "".join(f"{line}\n" for line in lines).encode())
        else:
            (out / FAILURES).unlink()


# --- failures ---------------------------------------------------------------------------------------------------------


def note_failure(out: Path, key: str, error: str, place: str, job: dict[str, Any]) -> None:
    """Note a failure at once: the process may not live to the end of the batch."""
    note = {"key": key, "error": error, "place": place} | job
    append(out / FAILURES, json.dumps(note, ensure_ascii=False))


def failures(out: Path) -> dict[str, str]:
    """The last line about each picture that failed and is not there, by key."""
    try:
        lines = (out / FAILURES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    there = {match[1] for name in os.listdir(out) if (match := PICTURE.fullmatch(name))}
    found: dict[str, str] = {}
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):  # a line that was cut off
            key = json.loads(line)["key"]
            if key not in there:
                found[key] = line
    return found


# --- the lock ---------------------------------------------------------------------------------------------------------


class Hold:
    """The lock of a folder while a batch draws into it; the system opens that of a process that is gone.

    The processes of one `torchrun` share it.
    """

    def __init__(self, file: IO[bytes] | None, first: bool):
        self._file, self.first = file, first

    def last(self) -> bool:
        """Whether nobody else draws into the folder any more. Asked at the end: the share is given up."""
        return self._file is None or _locked(self._file, shared=False)


@contextmanager
def held(out: Path, shared: bool = False, patience: float = 10.0) -> Iterator[Hold]:
    """Hold the lock of a folder; whoever is there first, has tidied it.

    Args:
        out: the folder.
        shared: let other processes in that share it as well.
        patience: seconds to wait, when sharing, for one that tidies.

    Raises:
        UsageError: another batch is drawing into it.
    """
    if os.name == "nt":  # files have no such locks
        tidy(out)
        yield Hold(None, True)
        return
    with (out / LOCK).open("wb") as file:
        first = _locked(file, shared=False)
        if first:
            tidy(out)
        until = time.monotonic() + patience
        while shared and not _locked(file, shared=True):
            if time.monotonic() > until:
                raise UsageError(f"another batch is drawing into {out}")
            time.sleep(0.05)
        if not first and not shared:
            raise UsageError(f"another batch is drawing into {out}")
        yield Hold(file, first)


def _locked(file: IO[bytes], shared: bool) -> bool:
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
