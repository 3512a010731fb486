"""What the README shows in Python works as it stands."""

import re
import shlex
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


def test_first_block_of_the_readme(monkeypatch):
    import diffusers

    pipe = tiny.sdxl()
    monkeypatch.setattr(pipe, "to", lambda device: pipe)
    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_pretrained", lambda *args, **settings: pipe)
    scope = {}
    exec(block('from_pretrained("org/model"'), scope)
    assert min(scope["picture"].size) > 0


def commands():
    text = README.read_text()
    shown = text[text.index("## On the command line") :]
    return re.search(r"```sh\n(.*?)```", shown, re.DOTALL)[1].splitlines()


@pytest.mark.slow
def test_commands_of_the_readme(tmp_path, monkeypatch, capfd):
    from attnctl.app import cli

    monkeypatch.chdir(tmp_path)
    attnctl.load("glyph-sd").save_pretrained(tmp_path / "my-model")
    for command in commands():
        last = next(iter(sorted((tmp_path / "out").glob("*comparison.png"))), None)
        monkeypatch.setattr(sys, "argv", shlex.split(command.replace("out/PICTURE.png", str(last))))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, (command, capfd.readouterr().err)


@pytest.mark.slow
def test_batch_of_the_readme(tmp_path, monkeypatch, capfd):
    from attnctl.app import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.yaml").write_text(
        re.search(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)[1] + "steps: 2\n"
    )
    for told in ("8 pictures drawn", "0 pictures drawn"):
        monkeypatch.setattr(sys, "argv", "attnctl batch jobs.yaml --out night".split())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capfd.readouterr().out
        assert not stop.value.code and told in out, out


def test_links_of_the_readme_and_docs_lead_somewhere():
    for page in (README, *README.parent.glob("docs/**/*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_is_short():
    assert len(README.read_text().splitlines()) < 200


def test_regions_of_the_readme():
    scope = {"attnctl": attnctl, "pipe": tiny.sd1()}
    exec(block("Regions("), scope)
    assert min(scope["picture"].size) > 0


def test_perturbation_of_the_readme(capsys):
    names = {"attnctl": attnctl, "pipe": tiny.sd3(num_layers=13, num_attention_heads=10, caption_projection_dim=80)}
    exec(block("soft_pag"), names)
    assert "heads 7:3 12:9, effect" in capsys.readouterr().out


@pytest.mark.slow
def test_the_pipeline_of_a_star():
    scope = {}
    exec(block("AStarPipeline"), scope)
    output = scope["output"]
    assert output.subjects == ("red car", "cat")
    assert len(output.report.traces) == 1


@pytest.mark.slow
def test_composition_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(block("PrimeComposer"), scope := {"attnctl": attnctl})
    assert scope["made"].words == ("red car",) and (tmp_path / "composed.png").exists()
