"""Objectives of a search as the command line writes them."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.app.command import UsageError
from attnctl.errors import ControlError

if TYPE_CHECKING:
    from attnctl.pipelines.head_bench import Objective

KINDS = ("judge", "clip", "pick", "aesthetic")
HELP = (
    "judge (glyph-sd), clip:FOLDER, pick:FOLDER, aesthetic:WEIGHTS@CLIP-FOLDER, harmonic(one, two), or module:function "
    "of your own; FOLDER@PROCESSOR-FOLDER where the two are apart."
)


def objective_of(text: str, device: str = "cpu") -> Objective:
    """The objective that a text names.

    Raises:
        UsageError: it names none, or what it names cannot be loaded.
    """
    try:
        return _objective(text.strip(), device)
    except ControlError as error:
        raise UsageError(f"--objective {text}: {error}") from None


def _objective(text: str, device: str) -> Objective:
    if pair := re.fullmatch(r"harmonic\((.*),(.*)\)", text, re.DOTALL):
        from attnctl.pipelines.head_objectives import Harmonic

        return Harmonic(_objective(pair[1].strip(), device), _objective(pair[2].strip(), device))
    kind, _, rest = text.partition(":")
    place, _, other = rest.partition("@")
    if kind not in KINDS:
        return _named(text)
    if kind == "judge":
        from attnctl.glyph.objective import Shown

        return Shown()
    if not place or (kind == "aesthetic" and not other):
        raise UsageError(f"--objective {text}: {kind} needs weights of yours; write {HELP}")
    from attnctl.pipelines.head_objectives import Aesthetic, ClipScore, PickScore

    if kind == "aesthetic":
        return Aesthetic(place, other, device)
    return {"clip": ClipScore, "pick": PickScore}[kind](place, other or None, device=device)


def _named(text: str) -> Any:
    """The function of "module:function"; modules of the current folder are found."""
    module, colon, name = text.partition(":")
    if not colon:
        raise UsageError(f"--objective {text}: write {HELP}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UsageError(f"--objective {text}: {error}") from None
    if not callable(found):
        raise UsageError(f"--objective {text}: {module} has no function {name!r}")
    return found
