"""`attnctl compose`: what it refuses before the model is loaded, its examples, recipes, and inversions on the disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageDraw

from attnctl.app import composing, recipe
from attnctl.errors import ControlError
from attnctl.glyph import examples
from attnctl.pipelines import Composition, PrimeComposer
from attnctl.pipelines.inversion_cache import InversionCache

QUICK = ("--set", "steps=2", "--no-check", "--size", "64x64")


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder with a ground, a disk that is cut out, and one that is not, with its mask."""
    monkeypatch.chdir(tmp_path)
    ground = Image.new("RGB", (64, 48), (90, 140, 200))
    ImageDraw.Draw(ground).rectangle((0, 0, 30, 47), fill=(200, 160, 90))
    ground.save("ground.png")
    disk = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(disk).ellipse((4, 4, 35, 35), fill=(220, 30, 40, 255))
    disk.save("disk.webp", lossless=True)
    disk.convert("RGB").save("plain.jpg")
    disk.getchannel("A").save("mask.png")
    disk.getchannel("A").resize((40, 20)).save("flat.png")
    Image.new("L", (40, 40)).save("empty.png")
    Path("broken.png").write_bytes(Path("ground.png").read_bytes()[:50])
    return tmp_path


ASKED = {
    "--background": "ground.png", "--object": "disk.webp", "--box": "0.5,0.2,0.9,0.8", "--prompt": "a cat and an apple",
    "--words": "apple", "--others": "cat",
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--background": "nowhere.png"}, "cannot read the background nowhere.png: there is no such file"),
        ({"--background": "broken.png"}, "broken.png: it is not a whole picture"),
        ({"--object": "nowhere.png"}, "cannot read the object nowhere.png: there is no such file"),
        ({"--object": "plain.jpg"}, "the object needs a mask, or a picture with an alpha channel"),
        ({"--mask": "flat.png"}, "the mask is 40 x 20, and the object's picture 40 x 40: another shape"),
        ({"--mask": "empty.png"}, "an empty region"),
        ({"--mask": "nowhere.png"}, "cannot read the mask nowhere.png"),
        ({"--box": "0,0,300,40"}, "ends beyond the picture, which is 64 x 48 pixels"),
        ({"--box": "0.5,0.5,0.2,0.9"}, "a box is (left, top, right, bottom)"),
        ({"--box": "left"}, "--box left: write it as left,top,right,bottom"),
        ({"--words": "pear"}, "'pear' is not in the prompt; its words are: a, cat, and, an, apple"),
        ({"--others": "dog"}, "'dog' is not in the prompt"),
        ({"--preset": "papr"}, "there is no preset 'papr'; did you mean paper?"),
        ({"--set": "start=2"}, "start is a share, from 0 to 1; not 2.0"),
        ({"--model": "nowhere"}, "unknown model 'nowhere'"),
        ({"--size": "64"}, "--size 64: write it as WIDTHxHEIGHT"),
        ({"--example": "car"}, "--example brings background, object, box and prompt of its own"),
        ({"--box": None}, "--box missing; or --example car shows how it works"),
    ],
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(pictures, command, monkeypatch, change, said):
    monkeypatch.setattr("attnctl.app.compose_command.open_model", lambda *which: pytest.fail("the model was loaded"))
    words = [part for name, value in (ASKED | change).items() if value is not None for part in (name, value)]
    code, out, err = command("compose", *words)
    assert code == 2 and not out and len(err) == 1 and said in err[0], err


def test_an_example_is_composed_and_drawn_again(command, tmp_path):
    code, out, err = command("compose", "--example", "apple", *QUICK, "--out", "made")
    assert code == 0 and "the same as: attnctl compose --background" in err[0], err
    made = Path(out[-1])
    known = recipe.read(made)[1]
    assert known.shows == "composed" and known.steps == 2 and known.compose["objects"][0]["words"] == ["apple"]
    assert "4 inversion" in out[0]
    code, out, _ = command("compose", "--example", "apple", *QUICK, "--out", "again")
    assert code == 0 and "inversion" not in out[0]  # it was on the disk
    assert Path(out[-1]).name == made.name and recipe.read(Path(out[-1]))[1].pixels == known.pixels
    code, out, _ = command("compose", "--example", "apple", *QUICK, "--out", "again", "--no-cache")
    assert "4 inversion" in out[0] and recipe.read(Path(out[-1]))[1].pixels == known.pixels
    code, out, err = command("reproduce", str(made))
    assert code == 0 and out == ["bit-identical"] and not err
    report = json.loads(next(Path("made").glob("*-report.json")).read_text())
    assert report["compose"] == known.compose and report["objects"][0]["passes"]["inversion"] == 4


def test_several_objects_go_in_by_one_command(pictures, command):
    """Boxes in pixels are of the background; the picture is drawn again with all of them."""
    words = ["--background", "ground.png", "--prompt", "a cat and an apple and a clock", *QUICK, "--full"]
    for name, box, mask in (("disk.webp", "36,8,60,40", "alpha"), ("plain.jpg", "2,8,26,40", "mask.png")):
        words += ["--object", name, "--box", box, "--mask", mask]
    code, out, err = command("compose", *words, "--out", "made")
    assert code == 0 and err == [
        f"attnctl: an object is '{name}', as the prompt names things last" for name in ("apple", "clock")
    ]
    made, full = Path(out[-2]), Path(out[-1])
    told = recipe.read(made)[1].compose
    assert [Path(one["object"]).name for one in told["objects"]] == ["disk.webp", "plain.jpg"]
    assert len(told["files"]) == 4 and Image.open(full).size == (64, 48)
    assert command("reproduce", str(made))[1] == ["bit-identical"]


def test_a_picture_that_changed_is_told(pictures, command):
    words = [part for pair in ASKED.items() for part in pair]
    code, out, _ = command("compose", *words, *QUICK, "--out", "made")
    assert code == 0
    made = out[-1]
    Image.open("ground.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("ground.png")
    code, out, err = command("reproduce", made)
    assert code == 1 and out[0].startswith("differs") and "ground.png is not the picture it was" in err[0]
    Path("ground.png").unlink()
    code, out, err = command("reproduce", made)
    assert code == 2 and "there is no such file" in err[0]


def test_shipped_pictures_are_the_renderers(tmp_path):
    from attnctl.glyph import scenes

    try:
        scenes.font_path()
    except FileNotFoundError:
        pytest.skip("the world's font is not installed")
    examples.draw(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in examples.PICTURES.iterdir())
    for name in names:
        ours, drawn = (np.asarray(Image.open(folder / name), int) for folder in (examples.PICTURES, tmp_path))
        assert ours.shape == drawn.shape and np.abs(ours - drawn).max() <= 2
    with pytest.raises(ControlError, match="there is no example 'cart'; did you mean car"):
        examples.example("cart")


def test_what_a_job_may_hold():
    one = composing.Compose(background="b.png", object="o.png", box=(0, 0, 1, 1), words="red car", others="cat")
    (only,) = one.objects
    assert only.words == ("red car",) and one.others == ("cat",) and one.files == ("b.png", "o.png")
    with pytest.raises(ValueError, match="box stands beside objects"):
        composing.Compose(background="b.png", box=(0, 0, 1, 1), objects=[{"object": "o.png", "box": (0, 0, 1, 1)}])
    with pytest.raises(ControlError, match="steps stands beside the composition"):
        one.model_copy(update={"settings": {"steps": 3}}).with_settings(None, None)
    assert one.with_settings(7, 2.0).steps == 7 and one.with_settings(None, None).steps == 20


# --- inversions on the disk -------------------------------------------------------------------------------------------


def asked(**changes):
    ground = Image.new("RGB", (48, 32), (90, 140, 200))
    disk = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(disk).ellipse((4, 4, 35, 35), fill=(220, 30, 40, 255))
    given = {"background": ground, "thing": disk, "box": (0.5, 0.25, 0.9, 0.9), "prompt": "a cat and a red dog"}
    return Composition(**given | {"words": "red dog", "others": ("cat",)} | changes)


def test_inversions_come_from_the_disk(tmp_path):
    """To the bit, for the same picture, settings and weights only."""
    pipe = tiny.sd1()

    def made(weights="a", **settings):
        cache = InversionCache(tmp_path, weights)
        return PrimeComposer(pipe, cache=cache, **{"steps": 3} | settings)(**vars(asked()), size=(48, 32))

    first, again = made(), made()
    assert first.passes["inversion"] == 6 and again.passes["inversion"] == 0
    assert first.picture.tobytes() == again.picture.tobytes()
    assert made(weights="b").passes["inversion"] == 6 == made(solver="ddim", rounds=0).passes["inversion"]
    assert made(start=0.0).passes["inversion"] == 0  # another way to draw, the same inversions
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"cut off")
    assert [made().passes["inversion"] for _ in range(2)] == [6, 0]


def test_the_cache_has_a_limit(tmp_path):
    path = [torch.zeros(1, 4, 8, 8)] * 3  # 3 KiB and a header
    cache = InversionCache(tmp_path, "a", most=10_000)
    for name in "abc":
        cache.put(name, path)
    assert len(list(tmp_path.iterdir())) == 3
    assert all(map(torch.equal, cache.get("a"), path))  # so it is the one that was used last
    cache.put("d", path)
    assert cache.get("b") is None and cache.get("a") and cache.get("c") and cache.get("d")
    InversionCache(tmp_path / "other", "a", most=100).put("a", path)
    assert not (tmp_path / "other").exists()
    (tmp_path / "file").write_text("")
    blocked = InversionCache(tmp_path / "file", "a")
    blocked.put("a", path)
    assert blocked.get("a") is None
