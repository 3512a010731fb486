"""The process of one device: it draws the groups that come in as lines, and tells of each picture in a line."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from queue import Queue
from threading import Thread
from typing import IO, Any

from attnctl.app.batch import running
from attnctl.app.batch.planning import Group
from attnctl.app.batch.processes import read
from attnctl.app.batch.results import How
from attnctl.errors import AttnctlError


def work(settings: dict[str, Any], lines: IO[str], say: Callable[[dict[str, Any]], None]) -> None:
    """Draw the groups that come in as lines."""
    from rich.progress import Progress

    from attnctl.app.batch.worker import Worker
    from attnctl.loading import usable_device

    how = How(**settings | {"scores": tuple(settings["scores"])})
    waiting: Queue[str] = Queue()

    def listen() -> None:
        for line in lines:
            waiting.put(line)
        waiting.put("")
        if sys.stdin is lines and os.getppid() != parent:
            os._exit(1)  # the parent is gone; no picture is broken by this

    parent = os.getppid()
    Thread(target=listen, daemon=True).start()

    def groups() -> Iterator[Group]:
        say({"ready": True})
        while line := waiting.get():
            yield read(json.loads(line))
            say({"ready": True})

    try:
        usable_device(how.device or "cpu")
        worker = Worker(how.device, how.dtype, how.threads, Progress(disable=True))
        for result in running.results(groups(), worker, how.scores):
            say({"key": result.key, "error": result.error})
    except AttnctlError as error:
        say({"halt": str(error)})


def main() -> None:
    """The worker's process: what libraries print goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(told: dict[str, Any]) -> None:
        out.write(json.dumps(told) + "\n")
        out.flush()

    work(json.loads(sys.argv[1]), sys.stdin, say)


if __name__ == "__main__":
    main()
