"""PrimeComposer: whole compositions, by Python and by the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageDraw

from attnctl.app import cli
from attnctl.app.command import UsageError
from attnctl.app.compose_command import numbers, settings, size_of
from attnctl.errors import ControlError, PhraseError
from attnctl.pipelines import Composition, PrimeComposer, compose
from attnctl.pipelines.compose_settings import PRESETS, Settings, settings_of
from attnctl.pipelines.inversion import decode, encode

PROMPT = "a cat and a red dog"
LONG = dict.fromkeys(("sd3", "sd35", "flux"), {"max_sequence_length": 16})


def scene(size=(48, 32)):
    """A background of two halves, and a disk that is cut out by its alpha channel."""
    ground = Image.new("RGB", size, (90, 140, 200))
    ImageDraw.Draw(ground).rectangle((0, 0, size[0] // 2, size[1]), fill=(200, 160, 90))
    disk = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(disk).ellipse((4, 4, 35, 35), fill=(220, 30, 40, 255))
    return ground, disk


def asked(**changes):
    ground, disk = scene()
    given = {"background": ground, "thing": disk, "box": (0.5, 0.25, 0.9, 0.9), "prompt": PROMPT}
    return Composition(**given | {"words": "red dog", "others": ("cat",)} | changes)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("preset", ["ours", "paper"])
def test_every_family_composes(family, preset, monkeypatch):
    """Outside of the box the latents are the background's own, and inside all of them are drawn."""
    pipe, kept = tiny.FAMILIES[family](), []
    own, plain = pipe.scheduler, tiny.draw(pipe)
    monkeypatch.setattr(compose, "decode", lambda pipe, z, size: kept.append(z) or decode(pipe, z, size))
    composer = PrimeComposer(pipe, preset, steps=4, blend=1.0, margin=0)
    (made,) = composer.batch([asked()], size=(48, 32), measure=True, **LONG.get(family, {}))
    left, top, right, bottom = (side // 2 for side in made.box)
    assert made.picture.size == (48, 32) and (left, right) == (12, 22) and made.lost is not None
    drawn, ground = kept[-1], encode(pipe, [made.background])
    if family == "flux":
        drawn, ground = (pipe._unpack_latents(one, 32, 48, 2) for one in (drawn, ground))
    gap = (drawn - ground).abs().amax((0, 1))  # (height, width)
    assert gap[top:bottom, left:right].min() > 0
    gap[top:bottom, left:right] = 0
    assert gap.max() < 1e-6
    assert made.passes["composite"] > 0 and made.passes["main"] > 0 and made.kept > 0
    assert pipe.scheduler is own and torch.equal(tiny.draw(pipe), plain)


def test_a_batch_is_its_single_compositions():
    pipe = tiny.sd1()
    several = [asked(), asked(prompt="a red cat", words="red cat", others=(), box=(0.1, 0.1, 0.5, 0.6), seed=3)]
    for preset in ("ours", "paper"):
        both = PrimeComposer(pipe, preset, steps=3).batch(several, size=(48, 32))
        for one, made in zip(several, both, strict=True):
            (alone,) = PrimeComposer(pipe, preset, steps=3).batch([one], size=(48, 32))
            assert np.abs(np.asarray(alone.picture, int) - np.asarray(made.picture)).max() <= 3


def test_inversions_are_kept_and_told_apart():
    pipe = tiny.sd1()
    composer = PrimeComposer(pipe, steps=3)
    first = composer(**vars(asked()), size=(48, 32))
    again = composer(**vars(asked()), size=(48, 32))
    assert first.passes["inversion"] == 6 and again.passes["inversion"] == 0
    assert first.picture.tobytes() == again.picture.tobytes()
    moved = composer(**vars(asked(box=(0.1, 0.1, 0.5, 0.6))), size=(48, 32))
    assert moved.passes["inversion"] == 3  # the background's is there
    other = PrimeComposer(pipe, steps=3, invert="alone")(**vars(asked()), size=(48, 32))
    assert other.picture.tobytes() != first.picture.tobytes()


def test_each_setting_does_something():
    pipe = tiny.sd1()
    base = {"steps": 4, "start": 0.0, "infuse": 0.5}
    plain = PrimeComposer(pipe, **base)(**vars(asked()), size=(48, 32)).picture.tobytes()
    for change in (
        {"start": 0.5}, {"guidance": 4.0}, {"invert": "alone"}, {"rim": "noise"}, {"infuse": 0.0}, {"rows": "columns"},
        {"rows": "all"}, {"words": "object"}, {"words": "none"}, {"blend": 0.5}, {"paste": 0.6}, {"extended": True},
        {"margin": 3}, {"solver": "ddim"}, {"fit": "stretch"}, {"steps": 5},
    ):  # fmt: skip
        made = PrimeComposer(pipe, **base | change)(**vars(asked(thing=scene()[1].resize((40, 30)))), size=(48, 32))
        assert made.picture.tobytes() != plain, change


def test_things_are_read_from_the_prompt():
    made = PrimeComposer(tiny.sd1(), steps=2)(**vars(asked(words=None, others=None)), size=(48, 32))
    assert made.words == ("red dog",) and made.others == ("cat",)


def test_what_cannot_be_composed_is_named():
    pipe = tiny.sd1()
    composer = PrimeComposer(pipe, steps=2)
    ground, disk = scene()
    for change, error, text in (
        ({"thing": disk.convert("RGB")}, ControlError, "needs a mask, or a picture with an alpha"),
        ({"mask": np.zeros((40, 40), bool)}, ControlError, "empty region"),
        ({"background": "nowhere.png"}, ControlError, "cannot read the background nowhere.png: there is no such file"),
        ({"box": (0, 0, 300, 20)}, ControlError, "ends beyond the picture"),
        ({"box": (0.5, 0.5, 0.505, 0.6)}, ControlError, "too small"),
        ({"box": ground}, ControlError, "not a mask"),
        ({"words": "bird"}, PhraseError, "'bird' is not in the prompt"),
        ({"words": "a cat"}, PhraseError, "share 1 token"),
    ):
        with pytest.raises(error, match=text):
            composer(**vars(asked(**change)), size=(48, 32))
    with pytest.raises(ControlError, match="multiples of 2"):
        composer(**vars(asked()), size=(47, 32))
    with pytest.raises(ControlError, match="there is no setting 'infusion'; did you mean infuse"):
        PrimeComposer(pipe, infusion=1)
    with pytest.raises(ControlError, match="there is no preset 'papr'; did you mean paper"):
        settings_of("papr")
    for wrong in ({"rows": "both"}, {"blend": 1.5}, {"steps": 0}, {"start": 1.0}, {"guidance": -1.0}):
        with pytest.raises(ControlError):
            Settings(**wrong)


def test_presets_are_settings():
    assert PRESETS["ours"] == Settings() and PRESETS["paper"].rows == "columns"
    assert PRESETS["paper-cartoon"].guidance == 3
    assert settings(["start=0", "extended=true", "rows=all", "steps=7"]) == {
        "start": 0.0, "extended": True, "rows": "all", "steps": 7,
    }  # fmt: skip


def test_the_command_line_composes(tmp_path, capsys, monkeypatch):
    ground, disk = scene((128, 128))
    ground.save(tmp_path / "ground.jpg")
    disk.convert("RGB").save(tmp_path / "disk.webp")
    disk.getchannel("A").save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    words = "compose --background ground.jpg --object disk.webp --mask mask.png --box 64,40,112,88 --set steps=2"
    more = ["--prompt", "a cat and an apple", "--out", "made", "--size", "64x64"]
    with pytest.raises(SystemExit) as end:
        cli.run(cli.app, "attnctl", [*words.split(), *more])
    assert end.value.code == 0
    said = capsys.readouterr()
    assert "the object is 'apple'" in said.err and "latents are off by" in said.out and "MiB" in said.out
    assert Image.open("made/a-cat-and-an-apple-0-composed.png").size == (64, 64)
    report = json.loads((tmp_path / "made/a-cat-and-an-apple-0-report.json").read_text())
    assert report["words"] == ["apple"] and report["others"] == ["cat"] and report["settings"] == {"steps": 2}


@pytest.mark.parametrize(
    ("what", "text"),
    [
        (lambda: settings(["begin=1"]), "there is no setting 'begin'"),
        (lambda: settings(["start"]), "write it as start=0.5"),
        (lambda: settings(["steps=many"]), "steps is a number, such as 20"),
        (lambda: settings(["extended=1"]), "true or false"),
        (lambda: numbers("1,2,3", 4, "--box", "left,top,right,bottom"), "--box 1,2,3: write it as left,top"),
        (lambda: size_of("64"), "WIDTHxHEIGHT"),
    ],
)
def test_options_that_make_no_sense(what, text):
    with pytest.raises(UsageError, match=text):
        what()
