"""Prompts of regions as users of other tools write them, read into prompts and a `Couple`."""

from __future__ import annotations

import pytest

from attnctl.app import cli, recipe
from attnctl.app.control_text import parse_control
from attnctl.app.layout_text import LayoutError, read_layout
from attnctl.app.region_text import RegionTextError, region_controls
from attnctl.processors import Couple, Regions

THIRDS = [(0, 0, 0.25, 1), (0.25, 0, 0.75, 1), (0.75, 0, 1, 1)]


def couple_of(text):
    return parse_control(text, cli.known_controls())


@pytest.mark.parametrize(
    "prompt", ["a cat BREAK a dog BREAK a car", "a cat\na dog\n\na car", "a cat ADDCOL a dog ADDCOL a car"]
)
def test_columns(prompt):
    found = read_layout(prompt, "1,2,1")
    assert found.prompt == "a cat, a dog, a car" and found.negative is None
    assert couple_of(found.control) == Couple(list(zip(("a cat", "a dog", "a car"), THIRDS, strict=True)))


def test_rows():
    found = read_layout("a cat BREAK a dog", "rows 3,1")
    assert couple_of(found.control) == Couple([("a cat", (0, 0, 1, 0.75)), ("a dog", (0, 0.75, 1, 1))])
    assert read_layout("a cat\na dog", "rows 3,1").control == found.control


def test_rows_of_columns_common_and_base():
    """The issue's own example: a row of height 1 with columns 2 and 1 wide, and one of height 3 and one column."""
    text = "a hill ADDCOMM sunset ADDBASE a cat ADDCOL a dog ADDROW a lake"
    found = read_layout(text, "1,2,1;3,1")
    assert found.prompt == "a hill, sunset"
    want = [
        ("a hill, a cat", (0, 0, 0.666667, 0.25)), ("a hill, a dog", (0.666667, 0, 1, 0.25)),
        ("a hill, a lake", (0, 0.25, 1, 1)),
    ]  # fmt: skip
    assert couple_of(found.control) == Couple(want, base=0.2)
    assert couple_of(read_layout(text, "base=0.5 1,2,1;3,1").control).base == 0.5
    assert couple_of(read_layout("a cat ADDCOL a dog ADDROW a lake", "columns").control).masks[2][1].box == (
        0,
        0.5,
        1,
        1,
    )


def test_negatives():
    assert read_layout("a\nb", "columns", "blurry").negative == "blurry"
    found = read_layout("a BREAK b", "columns", "blurry ADDCOMM red BREAK blue")
    assert found.negative == "blurry, red, blue"
    assert couple_of(found.control).negatives == (("a", "blurry, red"), ("b", "blurry, blue"))


def test_any_text_survives():
    odd = 'it\'s a "cat" \\ [1, 2], {x}= None'
    assert couple_of(read_layout(f"{odd} BREAK none", "columns").control).masks[0][0] == odd


@pytest.mark.parametrize(
    ("prompt", "layout", "negative", "said"),
    [
        ("a cat", "columns", None, "a region on each line"),
        ("a cat BREAK", "columns", None, "an empty region"),
        ("a BREAK b", "1,2,1", None, "do not fit the prompt, which has 2 columns"),
        ("a ADDCOL b ADDROW c", "1,1;1,1", None, "rows of 2, 1 regions"),
        ("a BREAK b", "1,,1", None, "numbers with commas"),
        ("a BREAK b", "1,0", None, "above 0"),
        ("a BREAK b", "diagonal", None, "say columns or rows"),
        ("a BREAK b", "base=2", None, "from 0 to 1"),
        ("a BREAK b", "columns", "x BREAK y BREAK z", "has 3 regions, and the prompt has 2"),
        ("a BREAK a", "columns", "x BREAK y", "that differ"),
    ],
)
def test_refused(prompt, layout, negative, said):
    with pytest.raises(LayoutError, match=said):
        read_layout(prompt, layout, negative)


def test_regions_with_prompts_of_their_own():
    found = region_controls(
        ["cat: 0,0,0.5,1 | a fluffy cat", "car: 0.5,0,1,1", ": 0,0,1,0.2 | a blue sky | clouds, sun"]
    )
    regions, couple = map(couple_of, found)
    assert regions == Regions([("cat", (0, 0, 0.5, 1)), ("car", (0.5, 0, 1, 1))])
    assert couple == Couple(
        [("a fluffy cat", (0, 0, 0.5, 1)), ("a blue sky", (0, 0, 1, 0.2))], negatives={"a blue sky": "clouds, sun"}
    )
    for text in (": 0,0,1,1", "cat: 0,0,1,1 |", "cat: 0,0,1,1 | a | b | c", "cat | a"):
        with pytest.raises(RegionTextError):
            region_controls([text])


def test_drawn_and_drawn_again(command, tmp_path):
    words = ("generate", "a cat and a cat BREAK a red car and a red car", "--layout", "1,1", "--compare", "--steps", 2)
    code, out, err = command(*words)
    assert code == 0, err
    assert command("reproduce", out[-1])[:2] == (0, ["bit-identical"])
    found = recipe.read(tmp_path / out[-1])[1]
    assert found.prompt == "a cat and a cat, a red car and a red car" and found.controls[0].startswith("couple(masks=")
    code, _, err = command("generate", "a cat", "--layout", "columns")
    assert code == 2 and "a region on each line" in err[-1]
