"""Controls as text: `segregation(cat, red car, strength=0.5)` is `Segregation("cat", "red car", strength=0.5)`.

One syntax, that of a call whose strings need no quotes: phrases first, settings as name=value. Quotes are for a phrase
that holds a comma, a bracket or an equals sign; lists (of values, or of phrases) stand in square or round brackets, and
values by phrase in braces, as {cat: 1, dog: 2}. Names of controls ignore case and "_".
"""

import ast
import inspect
import math
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from attnctl.errors import AttnctlError, instead, short

_CALL = re.compile(r"\s*(?P<name>[A-Za-z_][\w-]*)\s*(?:\((?P<body>.*)\))?\s*", re.DOTALL)
_SETTING = re.compile(r"\s*(?P<name>[A-Za-z_]\w*)\s*=(?P<value>.*)", re.DOTALL)
_PAIR = re.compile(r"""(?P<key>'[^']*'|"[^"]*"|[^:]+?)\s*:\s*(?P<value>.*\S)""", re.DOTALL)
_OPEN, _CLOSE = "([{", ")]}"
_DEEPEST = 16  # brackets in brackets


class ControlTextError(AttnctlError):
    """A control that is unknown, or whose text or settings are wrong."""


def parse_control(text: str, available: Mapping[str, type]) -> Any:
    """The control that `text` names, with its settings; `available` is class name -> class."""
    match = _CALL.fullmatch(text)
    if not match:
        raise ControlTextError(
            f"cannot read the control {short(text)!r}: write it as name(phrase, phrase, setting=value)"
        )
    cls = named(match["name"], available)
    values, settings = _arguments(match["body"] or "", text)
    try:
        positional, by_name = _fitting(cls, values, settings)
        return cls(*positional, **by_name)
    except (TypeError, ValueError) as error:
        raise ControlTextError(f"control {short(text)!r}: {short(str(error), 200)}") from None


def named(name: str, available: Mapping[str, type]) -> type:
    """The class of that name.

    Raises:
        ControlTextError: there is none.
    """
    cls = {_plain(one): cls for one, cls in available.items()}.get(_plain(name))
    if cls is None:
        raise ControlTextError(f"unknown control {short(name)!r}; {instead(name, sorted(map(snake, available)))}")
    return cls


def summary(cls: type, whole: bool = False) -> str:
    """What a control does, indented: the first paragraph of its docstring, or all of it and of what it builds on."""
    said = [inspect.cleandoc(one.__doc__ or "") for one in cls.__mro__[:-2]]  # without Control and object
    return textwrap.indent("\n\n".join(filter(None, said)) if whole else said[0].partition("\n\n")[0], "    ")


def describe(cls: type) -> str:
    """`segregation(*phrases, strength=1.0)`: how a control is written, with its default settings."""
    words = []
    for parameter in inspect.signature(cls).parameters.values():
        star = "*" if is_phrases(parameter, hints_of(cls)) else ""
        default = "" if parameter.default is parameter.empty or star else f"={shown(parameter.default)}"
        words.append(f"{star}{parameter.name}{default}")
    return f"{snake(cls.__name__)}({', '.join(words)})"


def write_control(name: str, *phrases: str, settings: str = "") -> str:
    """The text of a control of these phrases; the settings stand behind them as they are written."""
    quoted = (repr(phrase) if re.search(r"[,()\[\]{}='\"]", phrase) else phrase for phrase in phrases)
    return f"{name}({', '.join((*quoted, *filter(None, [settings])))})"


def phraseless(text: str) -> tuple[str, str] | None:
    """(name, settings) of a control whose text has neither phrases nor masks; None for any other."""
    match = _CALL.fullmatch(text)
    body = (match["body"] or "").strip() if match else ""
    if match is None or any(
        not (one := _SETTING.fullmatch(part)) or one["name"] == "masks" for part in _split(body, text)
    ):
        return None
    return match["name"], body


def parts_of(text: str) -> tuple[str, list[str], dict[str, str]]:
    """Name, phrases and settings of a control, each as it is written.

    Raises:
        ControlTextError: the text cannot be read.
    """
    match = _CALL.fullmatch(text)
    if match is None:
        raise ControlTextError(f"cannot read the control {short(text)!r}")
    parts = [(part, _SETTING.fullmatch(part)) for part in _split(match["body"] or "", text)]
    settings = {setting["name"]: setting["value"].strip() for _, setting in parts if setting}
    return match["name"], [part for part, setting in parts if not setting], settings


def python_call(text: str, available: Mapping[str, type]) -> str:
    """The same control as a Python expression: `Segregation('cat', 'red car', strength=0.5)`."""
    parse_control(text, available)
    match = _CALL.fullmatch(text)
    assert match is not None
    cls = named(match["name"], available)
    positional, by_name = _fitting(cls, *_arguments(match["body"] or "", text))
    words = [*map(_literal, positional), *(f"{name}={_literal(value)}" for name, value in by_name.items())]
    return f"{cls.__name__}({', '.join(words)})"


def _literal(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return 'float("inf")'
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' * (len(value) == 1)})"
    return repr(value)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z][A-Z])(?=[A-Z][a-z])", "_", name).lower()


def shown(value: Any) -> str:
    return str(value) if isinstance(value, str) else repr(value)


# --- text -> values ---------------------------------------------------------------------------------------------------


def _split(body: str, text: str, pairs: bool = False) -> list[str]:
    """The parts between the commas that stand outside quotes and brackets; of `pairs`, a value begins at a colon."""
    parts, depth, quote, start = [], 0, "", 0
    for position, char in enumerate(body):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and body[start:position].rstrip()[-1:] in ("", "=", ",", *_OPEN, *":"[: pairs or depth > 0]):
            quote = char  # only where a value begins: "the cat's hat" is a phrase
        elif char in _OPEN:
            depth += 1
            if depth > _DEEPEST:
                raise ControlTextError(f"cannot read the control {text[:40]!r}...: more than {_DEEPEST} open brackets")
        elif char in _CLOSE:
            depth -= 1
            if depth < 0:
                break
        elif char == "," and depth == 0:
            parts.append(body[start:position])
            start = position + 1
    if quote or depth:
        raise ControlTextError(
            f"cannot read the control {short(text)!r}: a quote or bracket is not closed, or closed twice"
        )
    last = [body[start:]] if body[start:].strip() else []  # Python, too, allows a comma behind the last
    return [part.strip() for part in [*parts, *last]]


def _arguments(body: str, text: str) -> tuple[list[str], dict[str, Any]]:
    """The positional parts as they are written (a phrase may look like a number), and the values of the settings."""
    values: list[str] = []
    settings: dict[str, Any] = {}
    for part in _split(body, text):
        setting = _SETTING.fullmatch(part)
        if not part or (setting and not setting["value"].strip()):
            raise ControlTextError(f"cannot read the control {short(text)!r}: a value is empty")
        if setting is None:
            if settings:
                last = next(reversed(settings))
                raise ControlTextError(
                    f"cannot read the control {short(text)!r}: {short(part, 40)!r} stands after a setting; "
                    "phrases come before settings, and a value with a comma is quoted or in brackets, "
                    f"such as {last}='a, b'"
                )
            values.append(part)
        elif setting["name"] in settings:
            raise ControlTextError(f"cannot read the control {short(text)!r}: {setting['name']} is set twice")
        else:
            settings[setting["name"]] = _value(setting["value"].strip())
    return values, settings


def _unquoted(part: str) -> str:
    return part[1:-1] if len(part) > 1 and part[0] == part[-1] and part[0] in "'\"" else part


def _phrase(part: str) -> Any:
    """A phrase, however much it looks like a number, or a list of phrases."""
    listed = _listed(part)
    return _unquoted(part) if listed is None else tuple(_phrase(one) for one in listed)


def _listed(word: str) -> list[str] | None:
    """The parts of a list as they are written, or None if it is none."""
    if word[:1] not in ("[", "(") or word[-1] not in "])":
        return None
    parts = _split(word[1:-1], word)
    if not all(parts):
        raise ControlTextError(f"cannot read {short(word)!r}: a value is empty")
    return parts


def _pairs(word: str) -> dict[Any, Any] | None:
    """What stands in braces as {key: value, ...}, or None if nothing does."""
    if word[:1] != "{" or word[-1] != "}":
        return None
    pairs = [_PAIR.fullmatch(part) for part in _split(word[1:-1], word, pairs=True)]
    if not all(pairs):
        raise ControlTextError(f"cannot read {short(word)!r}: in braces stand pairs, as in {{cat: 1, dog: 2}}")
    return {_value(pair["key"].strip()): _value(pair["value"].strip()) for pair in pairs if pair}


def _value(word: str) -> Any:
    if (listed := _listed(word)) is not None:
        return tuple(_value(part) for part in listed)
    if (pairs := _pairs(word)) is not None:
        return pairs
    named = {"none": None, "true": True, "false": False, "inf": math.inf}
    if word.lower() in named:
        return named[word.lower()]
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return _unquoted(word)


# --- values -> control ------------------------------------------------------------------------------------------------


def hints_of(cls: type) -> dict[str, Any]:
    """The types of the settings, without those that cannot be resolved: there the control judges its values alone."""
    hints = {}
    for parameter in inspect.signature(cls).parameters.values():
        hint = parameter.annotation
        if isinstance(hint, str):
            owner = next((base for base in cls.__mro__ if parameter.name in vars(base).get("__annotations__", {})), cls)
            try:
                hint = get_type_hints(
                    types.SimpleNamespace(__annotations__={"it": hint}), vars(sys.modules[owner.__module__])
                )["it"]
            except (NameError, TypeError, AttributeError):
                continue  # a name imported for type checkers alone
        if hint is not parameter.empty:
            hints[parameter.name] = hint
    return hints


def is_phrases(parameter: inspect.Parameter, hints: dict[str, Any]) -> bool:
    """Whether all positional values belong to this parameter: `*phrases`, or a first field that holds strings."""
    if parameter.kind is parameter.VAR_POSITIONAL:
        return True
    return parameter.name in ("phrases", "words") and str in _flat(hints.get(parameter.name))


def _flat(hint: Any) -> set[Any]:
    found = {hint}
    for inner in get_args(hint):
        found |= _flat(inner)
    return found


def _fitting(cls: type, values: list[str], settings: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """What the class is called with: positional arguments, and those by name."""
    parameters = inspect.signature(cls).parameters
    hints = hints_of(cls)
    unknown = [
        name for name in settings if name not in parameters or parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
    ]
    if unknown:
        known = [name for name, one in parameters.items() if not is_phrases(one, hints)]
        raise TypeError(f"there is no setting {short(unknown[0])!r}; {instead(unknown[0], known)}")
    arguments = {name: _fit(name, value, hints.get(name, Any)) for name, value in settings.items()}
    first = next(iter(parameters.values()), None)
    if first is None or not is_phrases(first, hints):
        names = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(values) > len(names):
            raise TypeError(f"{len(values)} values for {len(names)} settings")
        pairs = zip(names, values, strict=False)  # a setting may keep its default
        return [_fit(name, _value(part), hints.get(name, Any)) for name, part in pairs], arguments
    each = hints.get(first.name, Any) if first.kind is first.VAR_POSITIONAL else Any
    phrases = tuple(_fit("a phrase", _phrase(value), each) for value in values)
    if first.kind is first.VAR_POSITIONAL:
        return list(phrases), arguments
    return [], ({first.name: _fit(first.name, phrases, hints[first.name])} if phrases else {}) | arguments


def _fit(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type of its setting, or a TypeError: a typing slip must not become a strange picture."""
    fitted = _fitted(value, hint)
    if fitted is _UNFIT:
        raise TypeError(f"{name} = {short(shown(value), 60)} does not fit: it takes {_type_name(hint)}")
    return fitted


_UNFIT = object()


def _fitted(value: Any, hint: Any) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return next((fit for fit in (_fitted(value, one) for one in inner) if fit is not _UNFIT), _UNFIT)
    if origin is Literal:
        return next((one for one in inner if one == value and type(one) is type(value)), _UNFIT)
    if hint is type(None):
        return None if value is None else _UNFIT
    if hint is float:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else _UNFIT
    if hint in (int, str, bool):
        return value if type(value) is hint else _UNFIT
    if isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping):
        return _fitted_many(value, origin, inner)
    return value  # a type that text cannot say, such as a predicate: the control judges


def _fitted_many(value: Any, origin: type, inner: tuple[Any, ...]) -> Any:
    if isinstance(value, dict):  # as its pairs
        value = tuple(value.items())
    items = value if isinstance(value, tuple) else (value,)
    if issubclass(origin, tuple) and inner and inner[-1] is not Ellipsis:
        kinds = inner if len(inner) == len(items) else None
    else:
        kinds = (inner[0] if inner else Any,) * len(items)
    fitted = (
        tuple(_fitted(item, kind) for item, kind in zip(items, kinds, strict=True)) if kinds is not None else (_UNFIT,)
    )
    return _UNFIT if _UNFIT in fitted else fitted


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(shown, get_args(hint)))}"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
