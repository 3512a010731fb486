"""Regions on the command line: how they are written, what is drawn of them, and that their pictures are drawn again."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from attnctl.app import cli, recipe
from attnctl.app.control_text import parse_control
from attnctl.app.region_text import RegionTextError, outlined, region_control
from attnctl.processors import Regions
from attnctl.regions import Region


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("cat: 0,0,0.5,1", ("cat", (0, 0, 0.5, 1))),
        ("red car : 0.5, 0, 1, 1", ("red car", (0.5, 0, 1, 1))),
        ("cat#2: (0 0 64 128)", ("cat#2", (0, 0, 64, 128))),
        ("the cat's hat:[0,0,.5,1]", ("the cat's hat", (0, 0, 0.5, 1))),
    ],
)
def test_boxes(text, want):
    assert parse_control(region_control([text]), cli.known_controls()) == Regions([want])


@pytest.mark.parametrize("text", ["cat", "cat:", ": 0,0,1,1", ""])
def test_not_a_region(text):
    with pytest.raises(RegionTextError, match="write it as 'cat: 0,0,0.5,1'"):
        region_control([text])


@pytest.mark.parametrize("text", ["cat: 0,0,1", "cat: 0,0,1,1,1", "cat: -1,0,1,1"])
def test_not_a_box(text):
    with pytest.raises(RegionTextError, match="a box is left,top,right,bottom"):
        region_control([text])


def test_outline_is_the_edge_of_the_region():
    page = np.asarray(outlined(Image.new("RGB", (128, 64)), [("cat", Region((0, 0, 0.5, 1)))]))
    red = (page == (228, 26, 28)).all(-1)
    assert red[:, 62:64].all() and red[0, :64].all() and red[-1, :64].all() and not red[:, 66:].any()
    assert not red[40:60, 10:60].any()


def test_drawn_compared_and_drawn_again(command, tmp_path):
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "right.png")
    words = ("--region", "cat: 0,0,0.5,1", "--region", "red car: right.png", "--compare", "--steps", 4)
    code, out, err = command("generate", "a red car and a cat", *words)
    assert code == 0, err
    (tmp_path / "right.png").unlink()
    assert command("reproduce", out[-1])[:2] == (0, ["bit-identical"])
    (control,) = recipe.read(tmp_path / out[-1])[1].controls
    assert control.startswith("regions(masks=[['cat', [0, 0, 0.5, 1]]")


def test_beside_other_controls_and_refused(command):
    words = ("--region", "cat: 0,0,0.5,1", "--control", "perturb(8)", "--steps", 2)
    assert command("generate", "a red car and a cat", *words)[0] == 0
    for region, said in (("dog: 0,0,0.5,1", "dog"), ("cat: gone.png", "gone.png"), ("cat 0,0,1,1", "write it as")):
        code, _, err = command("generate", "a cat", "--region", region, "--steps", 2)
        assert code == 2 and said in err[-1] and len(err[-1]) < 320
