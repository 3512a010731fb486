"""Many prompts of one, in the language of dynamicprompts: "a {red|blue} __animal__".

`{a|b}` is one of what stands in it; `__animal__` is a line of animal.txt in the folder `wildcards` beside the job file.
`wildcards: all` in a row takes every combination, `wildcards: 10` ten of them by chance: the same ten each time.
"""

import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from attnctl.app.batch.faults import Fault
from attnctl.app.limits import JOBS
from attnctl.errors import instead, short

_NAMED = re.compile(r"__([\w/*-]+?)__")


def prompts(template: Any, how: Any, folder: Path | None) -> tuple[str, ...]:
    """The prompts that a template stands for, each once.

    Args:
        template: the prompt of a row.
        how: "all", or how many.
        folder: of the job file.

    Raises:
        Fault: the template cannot be read, or names a wildcard that is not there; or dynamicprompts is not installed.
    """
    if how != "all" and (type(how) is not int or not 1 <= how <= JOBS):
        raise Fault(f"wildcards {short(repr(how), 60)}: write all, or how many prompts, up to {JOBS}")
    if not isinstance(template, str):
        raise Fault("wildcards: there is no prompt for them")
    return _prompts(template, how, folder / "wildcards" if folder else None)


@lru_cache(4096)  # seeds and controls share the prompts of a row
def _prompts(template: str, how: str | int, folder: Path | None) -> tuple[str, ...]:
    try:
        from dynamicprompts.generators import CombinatorialPromptGenerator, RandomPromptGenerator
        from dynamicprompts.wildcards import WildcardManager
    except ModuleNotFoundError:
        raise Fault(
            'wildcards need dynamicprompts: pip install "attnctl[wildcards]" (in a checkout: ".[wildcards]")'
        ) from None
    manager = WildcardManager(folder if folder and folder.is_dir() else None)
    _check(template, template, folder)
    logging.getLogger("dynamicprompts").setLevel(logging.ERROR)  # a missing wildcard is our error below
    try:
        if how == "all":
            found = CombinatorialPromptGenerator(manager).generate(template, JOBS + 1)
        else:
            found = RandomPromptGenerator(manager, seed=0).generate(template, how)
    except Exception as error:  # what its parser raises is not a closed set
        said = short(" ".join(str(error).split()), 120)
        raise Fault(f"prompt {short(repr(template), 60)}: the wildcards cannot be read: {said}") from None
    return tuple(dict.fromkeys(" ".join(prompt.split()) for prompt in found)) or (template,)


def _check(text: str, template: str, folder: Path | None, seen: frozenset[str] = frozenset()) -> None:
    """Raise unless every wildcard of a text is there, and those of its lines."""
    known = sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.*")) if folder else []
    for name in _NAMED.findall(text):
        if "*" in name or name in seen:
            continue
        if folder is None or name not in known:
            where = f"prompt {short(repr(template), 60)}: no wildcards/{name}.txt"
            raise Fault(f"{where}; {instead(name, known)}")
        if (file := folder / f"{name}.txt").is_file():
            _check(file.read_text(encoding="utf-8", errors="replace"), template, folder, seen | {name})
