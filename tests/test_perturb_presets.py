"""Presets: heads and settings that were found for a model, read by Python, the command line, batches and the studio."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from attnctl import attach, sites
from attnctl.app.asked import control_of, without_files
from attnctl.engine.heads import shape_of
from attnctl.errors import AttnctlWarning, ControlError, NoSiteError
from attnctl.files import no_files
from attnctl.processors import Pag, Perturb, Slg
from attnctl.processors.perturb_presets import name_of, read_preset, same_weights, sample_of, shipped


@pytest.fixture
def preset(tmp_path):
    def write(name="found.json", **content):
        path = tmp_path / name
        path.write_text(json.dumps({"heads": "0:1 2:0"} | content))
        return str(path)

    return write


def draw(pipe, *controls):
    generator = torch.Generator().manual_seed(0)
    with attach(pipe, *controls):
        return pipe("cat", num_inference_steps=2, output_type="pt", guidance_scale=1.0, generator=generator).images


def test_a_preset_brings_heads_and_settings_and_what_is_said_comes_first(preset):
    path = preset(u=0.5, scale=2, kind="uniform", scope="image")
    known = Perturb(preset=path)
    assert (known.heads, known.u, known.scale, known.kind, known.scope) == ("0:1 2:0", 0.5, 2, "uniform", "image")
    said = Perturb(preset=path, u=1.0, scale=3.0, kind="identity", scope="whole")
    assert (said.u, said.scale, said.kind, said.scope) == (1.0, 3.0, "identity", "whole")
    assert replace(known, u=0.25).heads == "0:1 2:0" and replace(known, u=0.25).scale == 2
    assert (Pag(preset=preset("own.json")).heads, Pag(preset=preset("own.json")).scope) == ("0:1 2:0", "image-masked")
    assert Perturb().heads == "mid" and type(Perturb().u) is float and type(Perturb().kind) is str


def test_a_preset_draws_what_its_heads_draw(preset):
    pipe = tiny.sd1()
    path = preset(u=0.5, scale=2.0, shape=shape_of(sites(pipe)), sample=sample_of(pipe.unet))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = draw(pipe, Perturb(preset=path))
    assert torch.equal(found, draw(pipe, Perturb("0:1 2:0", u=0.5, scale=2.0)))
    assert not torch.equal(found, draw(pipe))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"u": 2.0}, "u is a number from 0 to 1"),
        ({"heads": "other.json"}, "lists heads only"),
        ({"sample": [1.0]}, "sample is weights by name"),
        ({"model": 3}, "model is text"),
    ],
)
def test_a_file_that_is_no_preset_says_what_is_wrong(preset, content, message):
    with pytest.raises(ControlError, match=message):
        Perturb(preset=preset(**content))


def test_a_preset_that_does_not_exist_names_those_that_do(tmp_path):
    with pytest.raises(ControlError, match="there is no preset 'glyph-s'"):
        Perturb(preset="glyph-s")
    with pytest.raises(ControlError, match="No such file"):
        Perturb(preset="nothing.json")
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ControlError, match="is no preset"):
        Perturb(preset=str(tmp_path / "a.json"))


def test_two_choices_of_heads_are_refused(preset):
    with pytest.raises(ControlError, match="both choose heads"):
        Perturb("1", preset=preset())
    with pytest.raises(ControlError, match="both choose heads"):
        Slg(preset=preset())


def test_a_denoiser_of_another_shape_is_refused(preset):
    with pytest.raises(NoSiteError, match="is for a denoiser with 24 blocks of 24 heads; this one has 7 blocks"):
        draw(tiny.sd1(), Perturb(preset=preset(shape="24 blocks of 24 heads")))


def test_other_weights_are_a_warning_and_rounded_ones_are_not(preset):
    pipe = tiny.sd1()
    path = preset(model="org/one", revision="0123456789abcdef", sample=sample_of(pipe.unet))
    assert same_weights(sample_of(pipe.unet), pipe.unet.to(torch.bfloat16)) is True
    pipe.unet.to(torch.float32)
    assert same_weights({"a": 1.0, "b": 1.0, "conv_in.weight": 1.0}, pipe.unet) is None
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.mul_(1.05)
    with pytest.warns(AttnctlWarning, match=r"was found on org/one \(0123456789ab\).*may do something else"):
        draw(pipe, Perturb(preset=path))


def test_where_weights_are_not_known_names_and_revisions_are_compared(preset):
    pipe = tiny.sd1()
    place = "/cache/models--org--one/snapshots/{}/unet"
    pipe.unet.register_to_config(_name_or_path=place.format("a" * 40))
    assert name_of(pipe) == ("org/one", "a" * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe, Perturb(preset=preset(model="org/one", revision="a" * 40)))
        draw(pipe, Perturb(preset=preset(model="org/one")))
    with pytest.warns(AttnctlWarning, match=r"found on org/one \(bbbbbbbbbbbb\), and org/one \(aaaaaaaaaaaa\) has"):
        draw(pipe, Perturb(preset=preset(model="org/one", revision="b" * 40)))
    with pytest.warns(AttnctlWarning, match="found on org/two, and org/one"):
        draw(pipe, Perturb(preset=preset(model="org/two")))


def test_a_recipe_holds_what_a_file_said_and_the_name_of_one_that_ships(preset, monkeypatch):
    path = preset(u=0.5)
    text = without_files(f"perturb(preset={path}, scale=2)")
    assert path not in text
    assert control_of(text) == replace(Perturb(preset=path, scale=2.0), preset=None)
    two = preset("two.json", heads=["0:1", "2:0"])
    assert control_of(without_files(f"pag(preset={two})")) == replace(Pag(preset=two), preset=None)
    with no_files(), pytest.raises(ControlError, match="no files are read here"):
        Perturb(preset=path)


def test_shipped_presets_fit_their_models():
    for name in shipped():
        found = read_preset(name)
        pipe = tiny.glyph()
        found.check_shape(sites(pipe))
        assert same_weights(found.sample, pipe.unet) is True
        assert without_files(f"perturb(preset={name})") == f"perturb(preset={name})"


def test_the_command_and_a_batch_read_a_preset(command, preset):
    tiny.sd1().save_pretrained("model")
    path = preset(u=0.5, shape=shape_of(sites(tiny.sd1())))
    words = ("generate", "cat", "--model", "model", "--steps", "1", "--out", "cat.png")
    code, _, err = command(*words, "--control", f"perturb(preset={path})")
    assert code == 0, err
    code, _, err = command(*words, "--control", "perturb(preset=none.json)")
    assert code == 2 and "cannot be read" in err[-1]
    Path("jobs.jsonl").write_text(json.dumps(
        {"prompt": "cat", "model": "model", "steps": 1, "controls": [f"perturb(preset={path})"]}
    ))  # fmt: skip
    code, _, err = command("batch", "jobs.jsonl", "--out", "drawn")
    assert code == 0, err
