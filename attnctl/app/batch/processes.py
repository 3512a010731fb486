"""Several devices of one machine: a process for each, that draws the groups it is handed and keeps its model.

Parent and workers talk in lines of JSON, through the worker's stdin and stdout. A worker says that it is ready, is sent
a group, and says what became of each task once it is written. Whatever a worker that died has not told of is handed out
again, once; then the tasks of that group have failed. A worker whose parent is gone ends at once.
"""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from queue import Empty, Queue
from threading import Lock, Thread
from typing import Any

from attnctl.app.batch.folder import note_failure
from attnctl.app.batch.jobs import Job
from attnctl.app.batch.planning import Group, Task
from attnctl.app.batch.results import How, Result, drawn, failed
from attnctl.app.command import UsageError

_TRIES = 2  # a group that kills two processes would kill more


class Halt(Exception):
    """The batch cannot go on; why, in one line."""


def results(groups: Iterable[Group], how: How, devices: list[str], stopped: Callable[[], bool]) -> Iterator[Result]:
    """The results of groups, drawn by a process on each device.

    Raises:
        UsageError: a device cannot be used, or a picture cannot be written.
    """
    shared = _Shared(deque(groups), stopped)
    threads = [Thread(target=shared.serve, args=(device, how, len(devices)), daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    try:
        yield from shared.told(threads)
    finally:
        shared.end()
        for thread in threads:
            thread.join(10)


class _Shared:
    """What the threads of the parent share, one for each worker."""

    def __init__(self, groups: deque[Group], stopped: Callable[[], bool]):
        self.groups, self.stopped = groups, stopped
        self.queue: Queue[Result | Halt] = Queue()
        self.lock, self.tries = Lock(), dict[str, int]()
        self.running: set[subprocess.Popen[str]] = set()
        self.over = False

    def told(self, threads: list[Thread]) -> Iterator[Result]:
        """Results as they come, until every thread is done."""
        while True:
            try:
                one = self.queue.get(timeout=0.1)
            except Empty:
                if not any(thread.is_alive() for thread in threads) and self.queue.empty():
                    return
                continue
            if isinstance(one, Halt):
                raise UsageError(str(one))
            yield one

    def end(self) -> None:
        """Stop every worker that is still there."""
        with self.lock:
            self.over = True
            for process in self.running:
                process.kill()

    def next(self) -> Group | None:
        with self.lock:
            return None if self.over or self.stopped() or not self.groups else self.groups.popleft()

    def serve(self, device: str, how: How, count: int) -> None:
        """Keep a worker on a device busy, and start another in the place of one that died."""
        try:
            while self._one_worker(device, how, count):
                pass
        except Halt as halt:
            self.queue.put(halt)
        except Exception as error:  # a bug must not look like a batch without end
            self.queue.put(Halt(f"{type(error).__name__}: {error}"))

    def _one_worker(self, device: str, how: How, count: int) -> bool:
        """Whether there is more to do for another one."""
        open_: dict[str, tuple[Group, Task]] = {}  # by key, what the worker has been sent and has not told of
        with self.lock:
            if self.over:
                return False
            process = _started(device, how, count)
            self.running.add(process)
        assert process.stdin is not None and process.stdout is not None
        with process:
            for line in process.stdout:
                told = json.loads(line)
                if "halt" in told:
                    raise Halt(told["halt"])
                if "ready" in told:
                    group = self.next()
                    if group is None:
                        process.stdin.close()
                        continue
                    open_ |= {task.key: (group, task) for task in group.to_draw}
                    with suppress(BrokenPipeError):
                        process.stdin.write(json.dumps(written(group)) + "\n")
                        process.stdin.flush()
                else:
                    _, task = open_.pop(told["key"])
                    self.queue.put(drawn(task) if told["error"] is None else failed(task, told["error"]))
            code = process.wait()
        with self.lock:
            self.running.discard(process)
        if self.over:
            return False
        self._hand_out_again(open_, device, code)
        return code != 0 and bool(self.groups)

    def _hand_out_again(self, open_: dict[str, tuple[Group, Task]], device: str, code: int) -> None:
        left: dict[str, tuple[Group, set[str]]] = {}
        for key, (group, _) in open_.items():
            left.setdefault(group.tasks[0].key, (group, set()))[1].add(key)
        for first, (group, keys) in left.items():
            self.tries[first] = self.tries.get(first, 1) + 1
            group = replace(group, missing=frozenset(keys))
            if self.tries[first] <= _TRIES:
                with self.lock:
                    self.groups.appendleft(group)
                continue
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            for task in group.to_draw:
                error = f"its process on {device} died, twice: {how}"
                note_failure(task.path.parent, task.key, error, task.place, task.job.model_dump(mode="json"))
                self.queue.put(failed(task, error))


def _started(device: str, how: How, count: int) -> "subprocess.Popen[str]":
    settings = asdict(replace(how, device=device))
    words = [sys.executable, "-m", "attnctl.app.batch.process_worker", json.dumps(settings)]
    root = str(Path(__file__).parents[3])  # the package that runs here, wherever it was found
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}  # of torch, unless somebody says it
    return subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=own | os.environ | {"PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is the parent's to hear
    )


# --- what is sent -----------------------------------------------------------------------------------------------------


def written(group: Group) -> dict[str, Any]:
    """A group as plain data."""
    tasks = [
        {"job": task.job.model_dump(mode="json"), "place": task.place, "key": task.key, "path": str(task.path)}
        for task in group.tasks
    ]
    return {"tasks": tasks, "missing": sorted(group.missing)}


def read(content: dict[str, Any]) -> Group:
    """What `written` wrote."""
    tasks = []
    for one in content["tasks"]:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in one["job"].items()
        }
        tasks.append(Task(Job(**fields), one["place"], one["key"], Path(one["path"])))
    return Group(tuple(tasks), frozenset(content["missing"]))
