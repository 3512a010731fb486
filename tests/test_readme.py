"""What the README shows in Python works as it stands."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch

import attnctl

README = Path(__file__).parent.parent / "README.md"


def block(holding):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if holding in block]
    return found


@pytest.fixture
def emphasis(monkeypatch):
    module = ModuleType("emphasis")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("class Emphasis"), vars(module))
    return module.Emphasis


@pytest.mark.parametrize("family", tiny.MODELS)
def test_the_control_turns_a_word_up_and_down(emphasis, family):
    pipe = tiny.MODELS[family]()
    looked = []
    for gain in (0.5, 1.0, 2.0):
        with attnctl.attach(pipe, emphasis("dog", gain), attnctl.processors.TokenMaps("dog")) as run:
            tiny.draw(pipe, ["a cat and a dog", "a dog"])
        looked.append(run.maps["dog"].mean((1, 2)))
    assert (looked[0] < looked[1]).all() and (looked[1] < looked[2]).all()


def test_maps_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe, keep_apart = tiny.sd1(), attnctl.processors.Segregation("cat", "dog")
    names = {"attnctl": attnctl, "pipe": pipe, "keep_apart": keep_apart}
    exec(block("TokenMaps"), names)
    assert names["run"].maps["cat"].shape[0] == 1 and (tmp_path / "maps.png").exists()
    assert isinstance(names["run"].maps["cat"], torch.Tensor)


@pytest.mark.slow
def test_the_pipeline_of_a_star():
    scope = {}
    exec(block("AStarPipeline"), scope)
    output = scope["output"]
    assert output.subjects == ("red car", "cat")
    (told,) = output.report.to_dict()["traces"]
    assert len(told["look_ahead"]["seen"]) == 1
