"""The settings of a control as a form shows them, read from signature and docstring; and a control's text, edited."""

import inspect
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin

from attnctl.app import asked
from attnctl.app.control_text import (
    ControlTextError,
    describe,
    hints_of,
    is_phrases,
    parse_control,
    parts_of,
    shown,
    snake,
    summary,
    write_control,
)
from attnctl.app.drawing import content_words
from attnctl.errors import AttnctlError

Kind = Literal["number", "whole", "switch", "choice", "window", "heads", "text"]
FIRST = ("strength", "scale", "u", "heads", "window")
"""Settings that people ask for first, where a control has them."""


@dataclass(frozen=True)
class Setting:
    """One setting: its default, how it is entered, and what its docstring says of it."""

    name: str
    default: Any
    kind: Kind
    says: str
    choices: tuple[str, ...] = ()
    most: float | None = None  # of a number: up to where a form may go

    @property
    def first(self) -> bool:
        return self.name in FIRST


def settings_of(cls: type, sample: str) -> tuple[Setting, ...]:
    """The settings of a control but its phrases and regions, those people ask for first in front.

    Args:
        cls: the control's class.
        sample: text of one such control, to try how large numbers may be.
    """
    hints, told = hints_of(cls), _told(summary(cls, whole=True))
    found = []
    for one in inspect.signature(cls).parameters.values():
        if is_phrases(one, hints) or one.default is one.empty:
            continue
        hint = hints.get(one.name, Any)
        choices = tuple(map(str, get_args(hint))) if get_origin(hint) is Literal else ()
        kind = _kind(one.name, one.default, hint)
        most = _most(cls, sample, one.name, one.default) if kind == "number" and one.default > 0 else None
        found.append(Setting(one.name, one.default, kind, told.get(one.name, ""), choices, most))
    return tuple(sorted(found, key=lambda it: FIRST.index(it.name) if it.first else len(FIRST)))


@dataclass(frozen=True)
class Card:
    """How one control is called, what it does, and how it is written with all its settings."""

    name: str
    says: str  # one sentence
    written: str  # with the default settings
    whole: str  # the whole docstring
    settings: tuple[Setting, ...]
    cls: type

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for programs."""
        settings = [asdict(one) | {"default": repr(one.default)} for one in self.settings]
        return {"name": self.name, "says": self.says, "written": self.written, "settings": settings}


def cards() -> dict[str, Card]:
    """A card for each control there is, by name."""
    found = {}
    for cls in asked.known_controls().values():
        name, says = snake(cls.__name__), " ".join(summary(cls).replace("`", "").split())
        whole, settings = summary(cls, whole=True), settings_of(cls, sample_of(cls, "red car", "blue chair"))
        found[name] = Card(name, says, describe(cls), whole, settings, cls)
    return found


def _kind(name: str, default: Any, hint: Any) -> Kind:
    if name == "heads":
        return "heads"
    if name == "window" and isinstance(default, tuple):
        return "window"
    if get_origin(hint) is Literal:
        return "choice"
    kinds: dict[type, Kind] = {bool: "switch", int: "whole", float: "number"}
    if default == float("inf"):
        return "text"
    return next((kinds[base] for base in type(default).__mro__ if base in kinds), "text")


def _most(cls: type, sample: str, name: str, default: float) -> float:
    """The largest of a few multiples of the default that the control itself takes."""
    for factor in (4, 2):
        try:
            parse_control(edited(sample, name, str(default * factor)), {cls.__name__: cls})
        except AttnctlError:
            continue
        return default * factor
    return default


def _told(docstring: str) -> dict[str, str]:
    """What a docstring says of settings, by name: "name: words" or "name, name: words", and the lines below it."""
    found: dict[str, str] = {}
    for entry in re.finditer(
        r"^( +)([a-z_][a-z_0-9]*(?:, [a-z_][a-z_0-9]*)*): (.*(?:\n\1 +\S.*)*)", docstring, re.MULTILINE
    ):
        for name in entry[2].split(", "):
            found.setdefault(name, " ".join(entry[3].split()))
    return found


# --- text, edited -----------------------------------------------------------------------------------------------------


def edited(text: str, name: str, value: str | None) -> str:
    """The control's text with one setting as it is written here; None: without it."""
    control, phrases, settings = parts_of(text)
    settings = {one: it for one, it in settings.items() if one != name} | ({} if value is None else {name: value})
    return _joined(control, phrases, settings)


def renamed(text: str, change: Callable[[list[str]], list[str]], name: str | None = None) -> str:
    """The control's text with its phrases, as they are written, changed; and, if need be, another control's name."""
    control, phrases, settings = parts_of(text)
    return _joined(name or control, change(phrases), settings if name in (None, control) else {})


def _joined(control: str, phrases: list[str], settings: dict[str, str]) -> str:
    words = [*phrases, *(f"{name}={value}" for name, value in settings.items())]
    return f"{control}({', '.join(words)})" if words else control


def written_value(value: Any, default: Any) -> str | None:
    """A value from a form as a control's text has it; None if it is the default."""
    if value is None or value == default or (isinstance(value, str) and value.strip() in ("", shown(default))):
        return None
    if isinstance(value, str):
        alone = re.fullmatch(r"[\w.:#/* -]+|[\[({'\"].*", value.strip(), re.DOTALL)
        return value.strip() if alone else repr(value.strip())
    return shown(list(value) if isinstance(value, tuple) else value)


def set_in(lines: list[str], name: str, setting: str, value: str | None, fresh: str) -> list[str]:
    """Lines of controls with a setting of one of them changed; where there is none of that name, `fresh` is added."""
    if not any(_named(line, name) for line in lines):
        lines = [*lines, fresh]
    return [edited(line, setting, value) if _named(line, name) else line for line in lines]


def without(lines: list[str], name: str) -> list[str]:
    return [line for line in lines if not _named(line, name)]


def find(lines: list[str], name: str) -> str | None:
    """The first line that is a control of this name."""
    return next((line for line in lines if _named(line, name)), None)


def _named(line: str, name: str) -> bool:
    return re.split(r"[(\s]", line.strip(), maxsplit=1)[0].replace("_", "").lower() == name.replace("_", "").lower()


def sample_of(cls: type, *things: str) -> str:
    """A control of this kind for these things: of its phrases, or with a column of the picture for each."""
    name, parameters = snake(cls.__name__), inspect.signature(cls).parameters
    first = next(iter(parameters.values()), None)
    if first is not None and is_phrases(first, hints_of(cls)):
        return write_control(name, *things)
    masks = parameters.get("masks")
    if masks is None or masks.default is not masks.empty:
        return name
    share = 1 / max(1, len(things))
    columns = (f"[{it!r}, [{n * share:.2g}, 0, {(n + 1) * share:.2g}, 1]]" for n, it in enumerate(things))
    return f"{name}(masks=[{', '.join(columns)}])"


def started(cls: type, things: list[str]) -> str:
    """A control of this kind to start from, for the things of a prompt that it takes.

    Raises:
        ControlTextError: it takes none of them; in the control's own words.
    """
    several = [it for it in things if " " in it.strip()]  # for a control of modifiers and their nouns
    for some in filter(None, (things, several)):
        try:
            parse_control(text := sample_of(cls, *some), {cls.__name__: cls})
        except AttnctlError as error:
            refused = error
        else:
            return text
    raise refused


def things(prompt: str) -> list[str]:
    """What the prompt names, as far as it can be read; for a control to start from."""
    try:
        return asked.read_things(prompt)
    except AttnctlError:
        return list(content_words(prompt)[:2])


def switched(cls: type, controls: list[str], prompt: str) -> list[str]:
    """Lines of controls with one of this kind, to start from; without it, where there was one."""
    name = snake(cls.__name__)
    if find(controls, name) is not None:
        return without(controls, name)
    if not prompt.strip():
        raise ControlTextError("write a prompt first: a control speaks of its words")
    return [*controls, started(cls, things(prompt))]


def changed(cls: type, setting: Setting, value: Any, controls: list[str], prompt: str) -> list[str]:
    """Lines of controls with one setting of this kind as a form has it; the control is added if need be.

    Raises:
        ControlTextError: the control refuses the value.
    """
    name, text = snake(cls.__name__), written_value(value, setting.default)
    there = find(controls, name)
    if there is None and text is None:
        return controls
    fresh = there or started(cls, things(prompt))
    parse_control(edited(fresh, setting.name, text), {cls.__name__: cls})
    return set_in(controls, name, setting.name, text, fresh)
