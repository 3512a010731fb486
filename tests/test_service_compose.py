"""Compositions for visitors: the same as by the command line, and what is refused."""

import shlex

import pytest
from PIL import Image

from attnctl.app import recipe
from attnctl.app.composing import file_hash
from attnctl.app.service import Limits, Service, ServiceError, restored
from attnctl.app.service_compose import ComposeAsked, Composing, Made
from attnctl.app.watched import Step
from attnctl.errors import AttnctlError
from attnctl.glyph import examples


@pytest.fixture(scope="module")
def composing():
    return Composing(Service(limits=Limits(steps=30, side=512, kept=2)))


def asked(**changes):
    ground, thing, mask = (Image.open(examples.path(name)) for name in ("cat.png", "apple.png", "mask.png"))
    given = {"background": ground, "thing": thing, "mask": mask, "box": "0.6,0.35,0.95,0.7", "words": "apple"}
    given |= {"prompt": "a cat and an apple", "others": "cat", "settings": {"steps": 2}, "size": "64x64"}
    return ComposeAsked(**given | changes)


def test_a_visitor_gets_what_the_command_makes(composing, command, tmp_path):
    *steps, made = composing.run(asked())
    assert isinstance(made, Made) and all(isinstance(one, Step) for one in steps) and len(steps) >= 5
    assert "4 inversion" in " ".join(made.told) and "latents are off by" in " ".join(made.told)
    for name, file in (("background", "cat"), ("object", "apple"), ("mask", "mask")):
        Image.open(examples.path(f"{file}.png")).save(tmp_path / f"{name}.png")
    code, out, err = command(*shlex.split(made.command)[1:], "--no-cache", "--no-check")
    assert code == 0, err
    with Image.open(out[-1]) as by_hand, Image.open(made.picture) as ours:
        assert recipe.pixel_hash(by_hand) == recipe.pixel_hash(ours)
    *_, again = composing.run(asked(settings={"steps": 2, "start": 0.0}))
    assert "inversion," not in " ".join(again.told)  # both are in memory
    *_, third = composing.run(asked(box="0.5,0.35,0.85,0.7"))
    assert not made.picture.exists() and third.sheet.exists()  # old ones go
    assert file_hash(out[-1]) and isinstance(third, Made)
    with pytest.raises(ServiceError, match="is a composition: the tab Compose makes one"):
        from pathlib import Path

        restored(Path(out[-1]))


def test_a_run_that_is_closed_stops(composing):
    run = composing.run(asked(box="0.55,0.35,0.9,0.7", settings={"steps": 20}))
    next(run)
    run.close()
    assert not composing.service.turns.busy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"background": None}, "drop a background and an object first"),
        ({"box": "left"}, "the box 'left': draw one, or write it as left,top,right,bottom"),
        ({"box": "0,0,400,20"}, "ends beyond the picture"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"words": "pear"}, "'pear' is not in the prompt"),
        ({"mask": None}, "the object needs a mask"),
        ({"settings": {"steps": 31}}, "31 steps: at most 30 here"),
        ({"size": "1024x64"}, "at most 512 pixels here"),
        ({"preset": "papr"}, "there is no preset 'papr'"),
        ({"model": "/etc"}, "no model '/etc' here"),
        ({"prompt": "a cat " * 2000}, "a text is too long"),
    ],
)
def test_what_is_refused_is_one_line(composing, change, said):
    with pytest.raises(AttnctlError) as told:
        list(composing.run(asked(**change)))
    assert said in str(told.value) and "\n" not in str(told.value)
