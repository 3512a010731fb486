"""Perturbation guidance on the command line: drawn, redrawn to the bit, heads from files, warnings told."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from attnctl.app import recipe

PROMPT = "a red car and a cat"


def test_compared_with_plain_and_redrawn(command):
    code, out, err = command("generate", PROMPT, "--control", "perturb(heads=mid, scale=3)", "--compare", "--steps", 4)
    assert code == 0
    *_, plain, controlled, sheet = out
    one, other = (np.asarray(Image.open(path).convert("RGB"), int) for path in (plain, controlled))
    assert (one != other).any()
    assert any("Perturb hardly does anything: breaking heads 3 moves the prediction by 0." in line for line in err)
    assert not any("UserWarning" in line for line in err)
    assert command("reproduce", sheet)[:2] == (0, ["bit-identical"])


def test_heads_of_a_file_stand_in_the_recipe(command, tmp_path):
    file = tmp_path / "chosen.json"
    file.write_text(json.dumps({"heads": ["8:2", "6:1"], "shape": "10 blocks of 4 heads"}))
    code, out, _ = command("generate", PROMPT, "--control", "perturb(heads=chosen.json, u=0.5)", "--steps", 3)
    assert code == 0
    assert recipe.read(tmp_path / out[-1])[1].controls == ("perturb(heads=8:2 6:1, u=0.5)",)
    file.unlink()
    assert command("reproduce", out[-1])[:2] == (0, ["bit-identical"])


@pytest.mark.parametrize(
    ("control", "said"),
    [
        ("perturb(heads=20:1)", "no such block; there are blocks 0 to 9 (10 blocks of 4 heads)"),
        ("perturb(heads=8:7)", "has heads 0 to 3"),
        ("perturb(heads=gone.json)", "cannot be read from gone.json: No such file"),
        ("slg(8:1)", "takes whole blocks; '8:1' names heads"),
        ("perturb(8, window=[0.01, 0.02])", "holds none of the 3 steps"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(command, tmp_path, control, said):
    code, out, err = command("generate", PROMPT, "--control", control, "--steps", 3)
    assert code == 2 and said in err[-1] and not out
    assert not list(tmp_path.rglob("*.png"))


def test_trace_tells_what_was_spent(command, tmp_path):
    code, out, _ = command("generate", PROMPT, "--control", "perturb(8, u=0.5)", "--trace", "--steps", 3)
    assert code == 0
    told = json.loads(next(tmp_path.rglob("*trace.json")).read_text())
    assert told["passes"]["main"] == 6.0 and 0 < told["passes"]["perturb"] < 3
    assert told["traces"][0]["heads"] == ["8"] and told["traces"][0]["effect"] > 0.01


def test_blocks_are_listed_and_controls_have_their_short_names(command):
    _, out, _ = command("sites", "glyph-sd", "--select", "self")
    assert "block" in out[1] and any("mid_block" in line and " 3 " in line for line in out)
    _, out, _ = command("controls")
    assert {line.partition("(")[0] for line in out if line[:1].isalpha()} >= {"perturb", "pag", "seg", "slg", "tpg"}
