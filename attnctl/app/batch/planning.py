"""Plans: the pictures of a batch, which of them are missing, and which are drawn together.

Groups are made of the whole file, in its order, whatever is there already. So they are the same after a stop, and with
them the bits of every picture: kernels round by the size of a batch. A group of which anything is missing is drawn as
a whole, and only what is missing is written.
"""

import hashlib
import json
import os
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attnctl.app.asked import control_of, slug
from attnctl.app.batch.folder import failures
from attnctl.app.batch.jobs import Job, Placed
from attnctl.loading import usual


@dataclass(frozen=True, slots=True)
class Task:
    """A job, where it stands, the key of its content, and the file of its picture."""

    job: Job
    place: str
    key: str
    path: Path


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks of one model that are drawn together, and the keys of those whose pictures are missing."""

    tasks: tuple[Task, ...]
    missing: frozenset[str]

    @property
    def model(self) -> str:
        return self.tasks[0].job.model

    @property
    def to_draw(self) -> list[Task]:
        """The tasks whose pictures are missing."""
        return [task for task in self.tasks if task.key in self.missing]


@dataclass(frozen=True)
class Plan:
    """The pictures of a batch, each once: those that are there already, those that are missing, and all groups.

    The groups are in the order of the file, but those of one model follow each other.
    """

    out: Path
    there: list[Task]
    missing: list[Task]
    groups: list[Group]

    @property
    def to_draw(self) -> list[Group]:
        """The groups of which something is missing."""
        return [group for group in self.groups if group.missing]


def key_of(job: Job, dtype: str = "float32") -> str:
    """Names a picture by what is asked for; not by time, device or versions, so that a batch may go on elsewhere."""
    asked = job.model_dump(mode="json", exclude_defaults=True) | ({"dtype": dtype} if dtype != "float32" else {})
    if job.compose is not None:
        asked["compose"] = job.compose.by_content()  # a picture that changes makes another one, wherever it lies
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def plan(
    jobs: Iterable[Placed],
    out: Path,
    dtype: str = "float32",
    retry_failed: bool = False,
    group: int | None = None,
) -> Plan:
    """What is there and what is missing in a folder.

    Args:
        jobs: of the batch.
        out: its folder, which need not be there.
        dtype: of the models.
        retry_failed: leave of the missing those that failed before.
        group: how many pictures are drawn together at most; default: what suits the model.
    """
    tasks: dict[str, Task] = {}
    for job, place in jobs:
        key = key_of(job, dtype)
        if key not in tasks:
            tasks[key] = Task(job, place, key, out / f"{slug(job.prompt)}-{job.seed}-{key}.png")
    names = set(os.listdir(out)) if out.is_dir() else set()
    there = [task for task in tasks.values() if task.path.name in names]
    missing = {key: task for key, task in tasks.items() if task.path.name not in names}
    if retry_failed:
        failed = failures(out)
        missing = {key: task for key, task in missing.items() if key in failed}
    groups = [
        Group(tuple(each), frozenset(task.key for task in each) & missing.keys()) for each in _grouped(tasks, group)
    ]
    return Plan(out, there, list(missing.values()), groups)


def _grouped(tasks: dict[str, Task], most: int | None) -> list[list[Task]]:
    speaking, usual_size = cache(_speaks), cache(usual_group)  # of this plan: files may change
    by_model: dict[str, list[list[Task]]] = {}
    filling: dict[Hashable, list[Task]] = {}
    for task in tasks.values():
        job, kind = task.job, _kind(task.job, speaking)
        size = usual_size(job.model) if most is None else most
        found = filling.get(kind)
        if found is None or len(found) >= size:
            found = filling[kind] = []
            by_model.setdefault(job.model, []).append(found)
        found.append(task)
    return [group for groups in by_model.values() for group in groups]


def usual_group(model: str) -> int:
    """How many pictures of a model are drawn together, unless somebody says it."""
    return int(usual(model).get("group", 1))


def _kind(job: Job, speaks: Any) -> Hashable:
    """Jobs of one kind can be drawn together: what they differ in is each picture's own."""
    if job.trace:
        return job  # a trace is of one picture
    if job.compose is not None:
        return id(job)  # so that what is kept of one composition serves the next, to the bit
    alike = job.model, job.steps, job.guidance, job.size, job.controls, job.maps, job.negative is None
    words = bool(job.maps) or any(map(speaks, job.controls))
    return (*alike, job.prompt if words else None)


def _speaks(text: str) -> bool:
    """Whether a control may speak of words, which are others in each prompt; those of attention heads never do."""
    return not hasattr(control_of(text), "heads")
