"""Controls as text: what is read, and what is refused with which words."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import pytest

from attnctl.app.control_text import ControlTextError, describe, parse_control, write_control
from attnctl.errors import ControlError

if TYPE_CHECKING:
    from attnctl.engine.sites import Selection


@dataclass(frozen=True, init=False)
class KeepApart:
    phrases: tuple[str, ...]
    strength: float = 1.0
    until: int | None = None
    norm: Literal["sum", "max"] = "sum"
    window: tuple[float, float] = (0.0, 1.0)
    where: Selection = None
    loud: bool = False

    def __init__(self, *phrases: str, strength: float = 1.0, until: int | None = None,
                 norm: Literal["sum", "max"] = "sum", window: tuple[float, float] = (0.0, 1.0),
                 where: Selection = None, loud: bool = False):  # fmt: skip
        if len(phrases) < 2:
            raise ValueError("at least two phrases")
        settings = locals()
        for field in fields(self):
            object.__setattr__(self, field.name, settings[field.name])


@dataclass(frozen=True)
class Boost:
    phrases: tuple[str, ...] | str
    weight: float = 2.0


@dataclass(frozen=True)
class Blur:
    sigma: float = 1.0


@dataclass(frozen=True, init=False)
class Pairs:
    pairs: tuple[str | tuple[str, str], ...]

    def __init__(self, *pairs: str | tuple[str, str]):
        object.__setattr__(self, "pairs", pairs)


KNOWN = {"Pairs": Pairs, "KeepApart": KeepApart, "Boost": Boost, "Blur": Blur}


def parse(text):
    return parse_control(text, KNOWN)


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("keep_apart(cat, red car)", KeepApart("cat", "red car")),
        (" KEEP-APART ( cat , dog#2 , strength = 0.5 ) ", KeepApart("cat", "dog#2", strength=0.5)),
        ("keepapart(cat, dog, strength=2, until=5)", KeepApart("cat", "dog", strength=2.0, until=5)),
        ("keepapart(cat, dog, until=none, loud=true)", KeepApart("cat", "dog", loud=True)),
        ("keepapart(cat, dog, norm=max, window=[0, 0.5])", KeepApart("cat", "dog", norm="max", window=(0.0, 0.5))),
        ("keepapart(cat, dog, where=[cross, factor:2])", KeepApart("cat", "dog", where=("cross", "factor:2"))),
        ("keepapart('one, two', \"a=b\")", KeepApart("one, two", "a=b")),
        ("keepapart(the cat's hat, the dog's hat)", KeepApart("the cat's hat", "the dog's hat")),
        ("keepapart(3, none)", KeepApart("3", "none")),
        ("pairs([cat, red car], [dog, 3])", Pairs(("cat", "red car"), ("dog", "3"))),
        ("pairs(cat, dog)", Pairs("cat", "dog")),
        ("boost(cat, dog)", Boost(("cat", "dog"))),
        ("boost(cat, dog,)", Boost(("cat", "dog"))),
        ('keepapart("cat", "dog", where=("cross",))', KeepApart("cat", "dog", where=("cross",))),
        ("keepapart(cat, dog, window=[0, 0.5,],)", KeepApart("cat", "dog", window=(0.0, 0.5))),
        (
            "keepapart(cat, dog, where={cross: 1, 'a b': [2, x]})",
            KeepApart("cat", "dog", where={"cross": 1, "a b": (2, "x")}),
        ),
        ("blur", Blur()),
        ("blur()", Blur()),
        ("blur(2)", Blur(2.0)),
    ],
)
def test_read(text, control):
    assert parse(text) == control


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("segregate(cat, dog)", r"unknown control 'segregate'; there are blur, boost, keep_apart, pairs"),
        ("keepapert(cat, dog)", r"unknown control 'keepapert'; did you mean keep_apart\?"),
        ("keepapart(cat, dog, strengh=1)", r"no setting 'strengh'; did you mean strength\?"),
        (
            "keepapart(cat, dog, colour=1)",
            r"no setting 'colour'; there are strength, until, norm, window, where, loud$",
        ),
        ("keepapart(cat, dog, strength=big)", r"strength = big does not fit: it takes float"),
        ("keepapart(cat, dog, strength=true)", r"does not fit"),
        ("keepapart(cat, dog, until=1.5)", r"until = 1.5 does not fit: it takes int | None"),
        ("keepapart(cat, dog, loud=1)", r"does not fit"),
        ("keepapart(cat, dog, norm=mean)", r"does not fit"),
        ("keepapart(cat, dog, window=[0, 1, 2])", r"does not fit"),
        ("keepapart(cat, dog, phrases=x)", r"no setting 'phrases'"),
        ("keepapart([cat, dog], bird)", r"a phrase = .* does not fit: it takes str"),
        ("boost([cat, dog])", r"phrases = .* does not fit"),
        ("pairs([cat, dog, bird])", r"a phrase = .* does not fit"),
        ("pairs([cat,, dog])", r"a value is empty"),
        ("keepapart(cat)", r"at least two phrases$"),
        (
            "keepapart(cat, strength=1, dog)",
            r"'dog' stands after a setting; .* quoted or in brackets, such as strength='a, b'",
        ),
        ("keepapart(cat, dog, strength=1, strength=2)", r"strength is set twice"),
        ("keepapart(cat,, dog)", r"a value is empty"),
        ("keepapart(cat, dog, strength=)", r"a value is empty"),
        ("keepapart(cat, dog", r"cannot read"),
        ("keepapart(cat, (dog)", r"a quote or bracket"),
        ("keepapart(cat, 'dog)", r"a quote or bracket"),
        ("keepapart: cat | dog", r"write it as name\(phrase, phrase, setting=value\)"),
        ("", r"cannot read the control ''"),
        ("blur(1, 2)", r"2 values for 1 settings"),
    ],
)
def test_refused(text, said):
    with pytest.raises(ControlTextError, match=said):
        parse(text)


@pytest.mark.parametrize(
    "phrases", [("cat", "red car"), ("one, two", "a=b"), ("the cat's hat", "(x)"), ('say "hi"', "b")]
)
def test_what_is_written_is_read_again(phrases):
    assert parse(write_control("keepapart", *phrases)) == KeepApart(*phrases)


def test_every_control_of_the_package_describes_itself():
    from attnctl.app.cli import known_controls

    for name, cls in known_controls().items():
        assert describe(cls).startswith(name[0].lower())


def test_text_that_is_nested_without_end_is_refused():
    for text in ("boost(" + "[" * 5000 + "]" * 5000 + ")", "boost(cat, weight=" + "-" * 100_000 + "1)"):
        with pytest.raises(ControlTextError):
            parse(text)


def test_errors_are_one_short_line_that_names_the_nearest():
    from attnctl.app.cli import known_controls

    known = known_controls()
    for text, said in [
        ("segregatoin(cat, dog)", "did you mean segregation?"),
        ("nonesuch(cat)", "there are astar, "),
        ("astar(cat, dog, segregaton=2)", "did you mean segregation?"),
        ("astar(cat, dog, colour=2)", "there are strength, "),
        ("astar(cat, dog, strength=strong)", "strength = strong does not fit"),
        ("perturb(heads=7, scal=2)", "did you mean scale?"),
        (f"astar({'cat, ' * 400}dog, colour=2)", "no setting 'colour'"),
        (f"astar(cat, dog, strength={'x' * 400})", "does not fit"),
        (f"astar({'(' * 10}{'cat, ' * 400})", "cannot read"),
        (f"{'x' * 500}(cat)", "unknown control"),
    ]:
        with pytest.raises(ControlTextError) as error:
            parse_control(text, known)
        assert said in str(error.value) and len(str(error.value)) < 300, str(error.value)
    from attnctl.processors import AStar

    with pytest.raises(ControlError, match="no setting 'segregaton'; did you mean segregation"):
        AStar("cat", "dog", segregaton=1)


def test_what_the_list_of_controls_prints_can_be_parsed():
    from attnctl.app.cli import known_controls
    from attnctl.app.control_text import summary

    known = known_controls()
    for cls in known.values():
        masks = "masks=[[black cat, [0, 0, 0.5, 1]], [brown dog, [0.5, 0, 1, 1]]]"
        text = describe(cls).replace("*phrases", "black cat, brown dog").replace("(masks,", f"({masks},")
        parse_control(text, known)
        whole = " ".join(summary(cls, whole=True).split())
        for call in re.findall(rf"(?:{'|'.join(known)})\([^)]*\)", whole):
            parse_control(call, known)
        for settings in re.findall(r"`(\w+=[^`]*)`", whole):
            parse_control(
                f"{cls.__name__}({'black cat, brown dog, ' * ('*phrases' in describe(cls))}{settings})", known
            )
        for name, example in re.findall(r"(\w+): [^:]*such as (\([^)]*\))", whole):
            parse_control(f"{cls.__name__}(black cat, brown dog, {name}={example})", known)
