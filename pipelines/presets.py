"""Presets: settings by name, and a preset with some of them changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from attnctl.errors import ControlError, instead

S = TypeVar("S")


def preset_with(presets: Mapping[str, S], preset: str, changes: Mapping[str, Any]) -> S:
    """A preset, a dataclass, with some settings changed.

    Raises:
        ControlError: there is no such preset or setting, or one is out of its range.
    """
    if preset not in presets:
        raise ControlError(f"there is no preset {preset!r}; {instead(preset, presets)}")
    known = [one.name for one in fields(presets[preset])]  # type: ignore[arg-type]
    for name in changes:
        if name not in known:
            raise ControlError(f"there is no setting {name!r}; {instead(name, known)}")
    return replace(presets[preset], **changes)  # type: ignore[type-var]
