"""The pictures of an effect benchmark: which there are, which are done, and what they were drawn with."""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

import torch
from conditions import CONDITIONS

from attnctl.app.recipe import installed_versions, weights_hash
from attnctl.errors import AttnctlError
from attnctl.glyph import judge
from attnctl.glyph.words import Prompt

CATEGORIES = ("animals", "animal-object", "objects")


class Half(StrEnum):
    """Which prompts to draw."""

    all = "all"
    development = "development"
    report = "report"


@dataclass(frozen=True)
class Case:
    """One picture: prompt number, seed and condition."""

    prompt: int
    seed: int
    condition: str

    @property
    def name(self) -> str:
        return f"{self.condition}-{self.seed}-{self.prompt:03d}"


def half(prompts: Sequence[Prompt], name: Half) -> list[int]:
    """The prompts of a half: settings are chosen on "development" alone, figures are told of "report".

    A prompt's half hangs on its text alone, so it stays the same when prompts are added.
    """
    even = [sha256(prompt.text.encode()).digest()[0] % 2 == 0 for prompt in prompts]
    return [k for k, first in enumerate(even) if name is Half.all or first == (name is Half.development)]


def subset(prompts: Sequence[Prompt], among: Sequence[int] | None = None, each: int = 8) -> list[int]:
    """`each` prompts of every category, evenly spread, or all where there are fewer: of these prompts, or of all."""
    picked = []
    for category in CATEGORIES:
        own = [k for k in (range(len(prompts)) if among is None else among) if prompts[k].category == category]
        many = min(each, len(own))
        picked += [own[(2 * k + 1) * len(own) // (2 * many)] for k in range(many)]
    return picked


def batches(cases: Sequence[Case], size: int) -> Iterator[list[Case]]:
    """Cases of one condition and seed at a time; conditions take turns, so that a slow minute hits all of them."""
    groups: dict[int, dict[str, list[Case]]] = {}
    for case in cases:
        groups.setdefault(case.seed, {}).setdefault(case.condition, []).append(case)
    for conditions in groups.values():
        for first in range(0, max(map(len, conditions.values())), size):
            yield from (part for own in conditions.values() if (part := own[first : first + size]))


def unfinished(cases: Sequence[Case], done: dict[str, Any], size: int) -> list[list[Case]]:
    """The batches that lack a result. They stay whole: the size of its batch decides the last bits of a picture."""
    return [group for group in batches(cases, size) if any(case.name not in done for case in group)]


def read_done(file: Path, pictures: Path) -> dict[str, dict[str, Any]]:
    """Results by case; what a kill cut short, or whose picture is gone, is not done."""
    there, done = {path.stem for path in pictures.glob("*.png")}, {}
    for line in file.read_text().splitlines():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if result["case"] in there:
            done[result["case"]] = result
    return done


class FolderError(AttnctlError):
    """A folder whose results are not for this run to go on with."""


@contextmanager
def opened(log: Path) -> Iterator[TextIO]:
    """The results, to append to on a fresh line, for this process alone; the lock ends with the process.

    Raises:
        FolderError: another process has them.
    """
    with log.open("a") as results:
        try:
            fcntl.flock(results, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(f"another process is drawing into {log.parent}; wait, or choose another --out") from None
        if not (log.read_bytes() or b"\n").endswith(b"\n"):
            results.write("\n")
        yield results


def setting_of(
    pipe: Any, model: str, prompts: Sequence[Prompt], controls: Sequence[str], **numbers: float
) -> dict[str, Any]:
    """All that decides results. Batch and threads are in it because the last bits of pictures depend on them."""
    return {
        "model": model,
        "weights": weights_hash(pipe),
        "judge": sha256((judge.SHIPPED / "judge.safetensors").read_bytes()).hexdigest(),
        "prompts": sha256("\n".join(prompt.text for prompt in prompts).encode()).hexdigest(),
        **numbers,
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
        "conditions": {name: [repr(control) for control in CONDITIONS[name](prompts[:1])] for name in controls},
    }


def flat(setting: dict[str, Any]) -> dict[str, Any]:
    """{"versions": {"torch": ...}} as {"versions.torch": ...}."""
    parts = ((name, value if isinstance(value, dict) else {"": value}) for name, value in setting.items())
    return {f"{name}.{key}".rstrip("."): value for name, inside in parts for key, value in inside.items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Which settings differ, as "steps 20, now 30"; a condition that is new does not."""
    was, now = flat(old), flat(new)
    compared = [name for name in now if name in was or not name.startswith("conditions.")]
    return [
        f"{name} {was.get(name, 'not recorded')}, now {now[name]}" for name in compared if was.get(name) != now[name]
    ]


def agree(note: Path, log: Path, setting: dict[str, Any]) -> None:
    """Write the setting down, beside the conditions that were drawn before.

    Raises:
        FolderError: the results that are there were drawn under other settings.
    """
    try:
        old = json.loads(note.read_text()) if log.stat().st_size else setting
    except (FileNotFoundError, ValueError):
        old = {}
    if changed := differences(old, setting):
        raise FolderError(f"{note.parent} holds results of other settings ({'; '.join(changed)}); choose another --out")
    write(note, json.dumps(setting | {"conditions": old.get("conditions", {}) | setting["conditions"]}, indent=1))


def write(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".partial")
    beside.write_text(text)
    os.replace(beside, path)
