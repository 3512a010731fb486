"""A cluster: Ray actors that hold the model draw groups, and send back their files, which are written here.

Whether an actor lives, on which machine it starts, and that another takes its place, is Ray's business. What a lost one
had is handed out again. Needs the extra `cluster` here and on every machine of the cluster.
"""

import json
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attnctl.app.batch.folder import SCORES, append, note_failure, write_whole
from attnctl.app.batch.planning import Group, Task
from attnctl.app.batch.results import How, Result, drawn, failed
from attnctl.app.command import UsageError
from attnctl.errors import short

_TRIES = 3  # an actor is handed the next group before it is done: one that waits may be lost twice without fault
_AHEAD = 2  # groups that an actor has: while one travels, the other is drawn
_PATIENCE = 600.0  # seconds without any actor


@dataclass(frozen=True)
class Sent:
    """What an actor made of a task: its files by name, the picture last, and its scores; or an error."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Drawer:
    """The actor."""

    def __init__(self, how: How):
        from rich.progress import Progress

        from attnctl.app.batch.worker import Worker

        self.how, self.worker = how, Worker(how.device, how.dtype, how.threads, Progress(disable=True))

    def ready(self) -> bool:
        return True

    def draw(self, group: Group) -> list[Sent]:
        from attnctl.app.batch.scores import score_of

        found = []
        for one in self.worker.draw(group):
            if one.picture is None or one.error is not None:
                found.append(Sent(one.task.key, error=one.error))
                continue
            with TemporaryDirectory() as folder:
                for path, write in one.files.items():
                    write(Path(folder) / path.name)
                files = {path.name: (Path(folder) / path.name).read_bytes() for path in one.files}
            scores = {name: score_of(name)(one.picture, one.task.job.prompt) for name in self.how.scores}
            found.append(Sent(one.task.key, files, scores))
        return found


def results(groups: Iterable[Group], how: How, address: str, stopped: Callable[[], bool]) -> Iterator[Result]:
    """The results of groups, drawn on the cluster at this address: one actor for each GPU, or each processor core.

    Raises:
        UsageError: Ray is not installed, or there is no cluster; or a picture cannot be written.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError('--ray needs Ray: pip install "attnctl[cluster]" (in a checkout: ".[cluster]")') from None
    _check_answer(address)
    root = str(Path(__file__).parents[3])  # the package that runs here, where actors find the same path
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(
                address, runtime_env={"env_vars": {"PYTHONPATH": root}}, log_to_driver=False, logging_level="error"
            )
        except Exception as error:  # what a client of a cluster raises is not a closed set
            raise UsageError(f"--ray {short(address)}: {short(' '.join(str(error).split()), 200)}") from error
    try:
        yield from _Cluster(ray, deque(groups), how, stopped).results()
    finally:
        if own:
            ray.shutdown()


def _check_answer(address: str) -> None:
    """Raise unless somebody answers there; Ray itself would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        with socket.create_connection((host, int(port)), 10):
            pass
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ray {short(address)}: nobody answers there: {error}") from None


class _Cluster:
    def __init__(self, ray: Any, groups: deque[Group], how: How, stopped: Callable[[], bool]):
        self.ray, self.groups, self.stopped = ray, groups, stopped
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        count = max(1, min(gpus or int(found.get("CPU", 1)), len(groups)))
        settings = {"num_gpus": 1} if gpus else {"num_cpus": 1}
        actor = ray.remote(Drawer).options(max_restarts=-1, scheduling_strategy="SPREAD", **settings)
        how = How(how.device or ("cuda" if gpus else "cpu"), how.dtype, how.threads, how.scores)
        self.busy: dict[Any, tuple[Any, Group]] = {}  # by what Ray promises, who draws what
        self.tries: dict[str, int] = {}
        self.coming: dict[Any, Any] = {}  # actors that have not said yet that they are there
        for one in [actor.remote(how) for _ in range(count)]:
            self.coming[one.ready.remote()] = one

    def results(self) -> Iterator[Result]:
        heard = time.monotonic()
        while self.busy or (self.groups and not self.stopped()):
            done, _ = self.ray.wait([*self.busy, *self.coming], timeout=1.0)
            if done:
                heard = time.monotonic()
            elif not self.busy and time.monotonic() - heard > _PATIENCE:
                raise UsageError("the cluster has had no room for a worker for ten minutes; the same command goes on")
            for promise in done:
                yield from self._heard(promise)

    def _heard(self, promise: Any) -> Iterator[Result]:
        actor, group = (self.coming.pop(promise), None) if promise in self.coming else self.busy.pop(promise)
        try:
            told = self.ray.get(promise)
        except self.ray.exceptions.RayActorError as error:
            if group is not None:
                yield from self._lost(group, error)
            if actor not in self.coming.values():
                self.coming[actor.ready.remote()] = actor  # Ray starts another in its place, where there is room
            return
        while self.groups and not self.stopped() and sum(one is actor for one, _ in self.busy.values()) < _AHEAD:
            following = self.groups.popleft()
            self.busy[actor.draw.remote(following)] = actor, following
        if group is not None:
            tasks = {task.key: task for task in group.to_draw}
            for sent in told:
                yield _written(tasks[sent.key], sent)

    def _lost(self, group: Group, error: Exception) -> Iterator[Result]:
        key = group.tasks[0].key
        self.tries[key] = self.tries.get(key, 0) + 1
        if self.tries[key] < _TRIES:
            self.groups.appendleft(group)
            return
        for task in group.to_draw:
            said = f"its worker was lost {_TRIES} times: {short(' '.join(str(error).split()), 200)}"
            yield _failed(task, said)


def _failed(task: Task, error: str) -> Result:
    note_failure(task.path.parent, task.key, error, task.place, task.job.model_dump(mode="json"))
    return failed(task, error)


def _written(task: Task, sent: Sent) -> Result:
    if sent.error is not None:
        return _failed(task, sent.error)
    try:
        for name, content in sent.files.items():
            write_whole(task.path.with_name(name), content)
        for name, value in sent.scores.items():
            append(task.path.parent / SCORES, json.dumps({"key": task.key, "name": name, **value}))
    except OSError as error:
        raise UsageError(f"cannot write {task.path}: {error.strerror or error}; the same command goes on") from error
    return drawn(task)
