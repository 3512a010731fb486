"""Settings of controls as a form shows them; texts of controls as clicks change them; recipes for use elsewhere."""

from dataclasses import replace

import pytest

from attnctl import processors
from attnctl.app import asked, elsewhere
from attnctl.app.clicks import clicked, meant
from attnctl.app.control_settings import changed, find, sample_of, settings_of, started, switched, written_value
from attnctl.app.control_text import parse_control, parts_of, python_call
from attnctl.app.recipe import Recipe
from attnctl.app.region_text import columns, region_control, region_lines
from attnctl.errors import AttnctlError

KNOWN = asked.known_controls()


def settings(name):
    cls = getattr(processors, name)
    return {one.name: one for one in settings_of(cls, sample_of(cls, "red car", "blue chair"))}


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_those_of_the_signature_and_say_what_the_docstring_says():
    found = settings("Perturb")
    assert list(found)[:4] == ["scale", "u", "heads", "window"]  # what people ask for first
    assert (found["u"].kind, found["u"].default, found["u"].most) == ("number", 1.0, 1.0)  # it takes no more
    assert found["scale"].most == 12 and found["scale"].says.startswith("weight w of the difference")
    assert found["kind"].choices[:2] == ("identity", "uniform") and found["window"].kind == "window"
    assert found["heads"].kind == "heads" and found["sigma"].kind == "text" and found["seed"].kind == "whole"
    assert found["sigma"].says.endswith("In scope whole, inf is the mean of text and picture.")  # all of its lines
    assert settings("Segregation")["bfloat16"].kind == "switch"
    assert "phrases" not in settings("Segregation") and "masks" not in settings("Regions")


@pytest.mark.parametrize("cls", KNOWN.values(), ids=KNOWN)
def test_every_slider_ends_at_what_the_control_takes(cls):
    sample = sample_of(cls, "red car", "blue chair")
    for one in settings_of(cls, sample):
        assert written_value(one.default, one.default) is None
        if one.most is not None and one.most != one.default:  # the end of its slider
            text = changed(cls, one, one.most, [sample], "a red car and a blue chair")[0]
            assert isinstance(parse_control(text, KNOWN), cls) and f"{one.name}=" in text


def test_values_are_written_as_the_text_of_a_control_has_them():
    assert written_value((0.0, 0.5), (0.0, 1.0)) == "[0.0, 0.5]"
    assert written_value("6 7:2", "mid") == "6 7:2" and written_value("", "mid") is None
    assert written_value("a, b", "") == "'a, b'" and written_value("[a, b]", ()) == "[a, b]"
    assert written_value(True, False) == "True" and written_value(None, 1.0) is None


def test_a_control_starts_from_what_it_takes_and_says_what_it_needs():
    assert started(processors.Binding, ["red car", "cat"]) == "binding(red car)"
    assert started(processors.Segregation, ["red car", "cat"]) == "segregation(red car, cat)"
    assert started(processors.Perturb, ["cat"]) == "perturb"
    with pytest.raises(AttnctlError, match="a bond is 'red car'"):
        started(processors.Binding, ["cat", "dog"])
    with pytest.raises(AttnctlError, match="two phrases"):
        started(processors.Segregation, ["cat"])


def test_a_control_is_switched_on_and_off_and_changed():
    lines = switched(processors.Segregation, ["binding(red car)"], "a red car and a cat")
    assert lines == ["binding(red car)", "segregation(red car, cat)"]
    strength = settings("Segregation")["strength"]
    lines = changed(processors.Segregation, strength, 0.5, lines, "")
    assert lines[1] == "segregation(red car, cat, strength=0.5)"
    assert changed(processors.Segregation, strength, 1.0, lines, "")[1] == "segregation(red car, cat)"
    assert changed(processors.Segregation, strength, 1.0, [], "a cat") == []  # the default needs no control
    assert switched(processors.Segregation, lines, "") == ["binding(red car)"]
    with pytest.raises(AttnctlError, match="strength"):
        changed(processors.Segregation, strength, -1.0, lines, "")
    assert find(["a_star(cat, dog)"], "astar") and find(["astar"], "star") is None


# --- clicks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "click", "after"),
    [
        ("", "word cat", "excitation(cat)"),
        ("excitation(cat)", "word dog", "segregation(cat, dog)"),
        ("segregation(cat, dog)", "word dog", "excitation(cat)"),
        ("excitation(cat)", "word cat", ""),
        ("astar(cat, dog, strength=2)", "word lion", "astar(cat, dog, lion, strength=2)"),
        ("perturb", "word cat", "perturb\nexcitation(cat)"),
        ("segregation(car, cat)", "link red car", "segregation(red car, cat)\nbinding(red car)"),
        ("binding(red car)", "word car", "binding(red car)\nexcitation(red car)"),
        ("binding(red car)", "link blue hat", "binding(red car, blue hat)"),
        ("binding(red car, blue hat)", "link red car", "binding(blue hat)"),
        ("binding(red car)\nperturb", "link red car", "perturb"),
    ],
)
def test_a_click_on_a_word_changes_the_controls(before, click, after):
    assert clicked(click, before) == after
    for line in after.splitlines():
        parse_control(line, KNOWN)


def test_a_word_means_the_phrase_it_is_bound_in():
    assert meant("car", ["red car"]) == "red car" and meant("scar", ["red car"]) == "scar"


# --- regions as lines -------------------------------------------------------------------------------------------------


def test_regions_and_their_lines_are_inverse():
    lines = ['cat\'s "hat": 0,0,0.5,1', "dog, old: 0.5,0,1,1"]
    assert region_lines(region_control(lines)) == lines
    for other in ("regions(masks=[[cat, mask.png]])", "isolation(masks=[['a', [0, 0, 1, 1]]])",
                  "regions(masks=[['cat', [0,0,0.5,1]]], inside=3)", "segregation(cat, dog)"):  # fmt: skip
        assert region_lines(other) is None


def test_words_alone_are_columns_between_boxes():
    assert columns(["cat", "dog: 0,0,1,1", "red car"]) == ["cat: 0,0,0.5,1", "dog: 0,0,1,1", "red car: 0.5,0,1,1"]


# --- elsewhere --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["segregation(cat, 'red, car', strength=0.5)", "perturb(heads=6 7, sigma=inf, window=[0, 0.5])", "pag",
     "binding((red, car))", "regions(masks=[['cat', [0, 0, 0.5, 1]]], inside=1)", "astar(cat, dog, bonds=red dog)",
     "excitation(cat, images=0)"],
)  # fmt: skip
def test_a_control_in_python_is_the_control_in_text(text):
    assert eval(python_call(text, KNOWN), dict(vars(processors))) == parse_control(text, KNOWN)


def test_the_parts_of_a_control_are_as_they_are_written():
    name, phrases, rest = parts_of("segregation(cat, 'red, car', strength=0.5, refine={0: 1})")
    assert (name, phrases, rest) == ("segregation", ["cat", "'red, car'"], {"strength": "0.5", "refine": "{0: 1}"})


def test_what_a_recipe_does_not_have_is_in_neither_command_nor_program():
    recipe = Recipe(
        "org/name", "w", "a cat", None, 3, 9, None, None, None, (), (), "cuda", "float16", 4, {}, shows="plain"
    )  # fmt: skip
    assert elsewhere.command_of(recipe) == (
        "attnctl generate 'a cat' --model org/name --dtype float16 --seed 3 --steps 9"
    )  # fmt: skip
    program = elsewhere.python_of(recipe)
    compile(program, "program", "exec")
    assert "attach" not in program and "guidance" not in program and "set_num_threads" not in program
    full = replace(recipe, width=64, height=32, guidance=2.0, negative="x", controls=("pag",), maps=("cat",))
    assert elsewhere.command_of(full).endswith(
        "--control pag --model org/name --dtype float16 --negative x --seed 3 --steps 9 --guidance 2 --size 64x32 "
        "--compare --maps"
    )
    assert "width=64" in elsewhere.python_of(full) and "negative_prompt='x'" in elsewhere.python_of(full)
