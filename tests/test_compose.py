"""PrimeComposer: whole compositions, by Python and by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageDraw

from attnctl.app import cli
from attnctl.app.command import UsageError
from attnctl.app.compose_command import asked_for, numbers, settings, size_of
from attnctl.errors import ControlError, PhraseError
from attnctl.glyph.scenes import Renderer
from attnctl.pipelines import Composition, PrimeComposer, compose
from attnctl.pipelines.compose_settings import PRESETS, Settings, settings_of
from attnctl.pipelines.inversion import decode, encode
from attnctl.pipelines.object_masks import mask_from_words
from attnctl.pipelines.pasting import box_in, object_mask, opened, paste
from attnctl.processors import Excitation, Pag, Regions, TokenMaps

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


@pytest.mark.slow
def test_each_setting_does_something():
    pipe = tiny.sd1()
    base = {"steps": 3, "start": 0.0, "infuse": 0.5}
    plain = PrimeComposer(pipe, **base)(**vars(asked()), size=(48, 32)).picture.tobytes()
    for change in (
        {"start": 0.5}, {"guidance": 4.0}, {"invert": "alone"}, {"rim": "noise"}, {"infuse": 0.0}, {"rows": "columns"},
        {"rows": "all"}, {"words": "object"}, {"words": "none"}, {"blend": 0.5}, {"paste": 0.6}, {"extended": True},
        {"margin": 3}, {"solver": "ddim"}, {"fit": "stretch"}, {"steps": 4},
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
    with pytest.raises(ControlError, match="multiples of 8"):
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
    assert "an object is 'apple'" in said.err and "latents are off by" in said.out and "MiB" in said.out
    (made,) = (tmp_path / "made").glob("a-cat-and-an-apple-0-*-composed.png")
    assert Image.open(made).size == (64, 64)
    (report,) = (tmp_path / "made").glob("*-report.json")
    told = json.loads(report.read_text())
    (only,) = told["objects"]
    assert only["words"] == ["apple"] and only["others"] == ["cat"] and told["steps"] == 2


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


def test_photographs_are_seen_as_they_are_meant(tmp_path):
    """EXIF rotation is applied, to a mask's file, too; alpha of WebP and PNG cuts out; boxes may be in pixels."""
    ground, disk = scene((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    ground.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "ground.jpg", exif=exif, quality=95)
    turned = opened(tmp_path / "ground.jpg", "background")
    assert turned.size == (60, 40)
    assert np.abs(np.asarray(turned, int) - np.asarray(ground)).mean() < 3
    for name in ("disk.png", "disk.webp"):
        disk.save(tmp_path / name)
        mask = object_mask(opened(tmp_path / name, "object"), None)
        assert mask.shape == (40, 40) and 700 < mask.sum() < 900
    upper = np.zeros((40, 40), bool)
    upper[:10] = True
    Image.fromarray(upper).transpose(Image.Transpose.ROTATE_90).convert("L").save(tmp_path / "mask.jpg", exif=exif)
    assert object_mask(disk, tmp_path / "mask.jpg")[:8].mean() > 0.9
    assert box_in((0.5, 0.25, 0.9, 0.9), (60, 40)) == pytest.approx(box_in((30, 10, 54, 36), (60, 40)))
    with pytest.raises(ControlError, match="the mask is 40 x 20, and the object's picture 40 x 40: another shape"):
        object_mask(disk, upper[:20])
    (tmp_path / "broken.png").write_bytes((tmp_path / "disk.png").read_bytes()[:60])
    with pytest.raises(ControlError, match="broken.png: it is not a whole picture"):
        opened(tmp_path / "broken.png", "object")


def test_an_object_keeps_its_shape_in_its_box():
    ground, _ = scene((60, 40))
    wide = Image.new("RGBA", (50, 50))
    ImageDraw.Draw(wide).rectangle((5, 20, 44, 29), fill=(220, 30, 40, 255))
    for fit, (width, height) in (("inside", (20, 5)), ("stretch", (20, 16))):
        made = paste(ground, wide, object_mask(wide, None), (0.5, 0.3, 5 / 6, 0.7), (60, 40), fit)
        rows, columns = np.flatnonzero((made.mask > 0.5).any(1)), np.flatnonzero((made.mask > 0.5).any(0))
        assert (len(columns), len(rows)) == (width, height) and made.box == (30, 12, 50, 28)
        assert abs((rows[0] + rows[-1]) / 2 - 19.5) <= 1 and columns[0] == 30  # in the middle
        inside = made.mask > 0.99
        assert np.abs(made.picture[inside].astype(int) - (220, 30, 40)).max() <= 2
        assert (made.picture[made.mask == 0] == made.background[made.mask == 0]).all()


def test_sizes_fit_the_model():
    composer = PrimeComposer(tiny.sd3())  # 16 cells of 2 pixels a side; tokens of 4 pixels
    assert composer.fitting((4000, 3000)) == (36, 28) and composer.fitting((100, 100)) == (32, 32)
    made = composer(**vars(asked(background=scene((400, 300))[0])), **LONG["sd3"])
    assert made.picture.size == (36, 28)
    whole = made.onto(scene((400, 300))[0])
    assert whole.size == (400, 300)
    changed = np.flatnonzero((np.asarray(whole) != np.asarray(scene((400, 300))[0])).any((0, 2)))
    left, right = (round(side * 400 / 36) for side in made.box[::2])
    assert left <= changed[0] and changed[-1] < right


def test_a_mask_from_words_lies_on_the_object():
    made = Renderer().render([("car", "red")], 1)
    found = mask_from_words(tiny.glyph(), Image.fromarray(made.image), (128, 128), ("red car",), tries=2)
    there, inside = found > 0.5, made.things[0].mask
    assert found.shape == (128, 128) and (there & inside).sum() / (there | inside).sum() > 0.7


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_masks_from_words_on_every_family(family):
    pipe = tiny.FAMILIES[family]()
    made = PrimeComposer(pipe, steps=2)(
        **vars(asked(thing=scene()[0], mask="words")), size=(48, 32), **LONG.get(family, {})
    )
    assert made.mask.any() and made.passes["main"] > 0


def test_other_controls_act_beside_it():
    pipe = tiny.sd1()
    plain = PrimeComposer(pipe, steps=3)(**vars(asked()), size=(48, 32))
    maps = TokenMaps("dog")
    made = PrimeComposer(pipe, steps=3)(**vars(asked()), size=(48, 32), controls=[maps])
    assert made.picture.tobytes() == plain.picture.tobytes()
    made = PrimeComposer(pipe, steps=3)(**vars(asked()), size=(48, 32), controls=[Pag()])
    assert made.picture.tobytes() != plain.picture.tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipe = tiny.sd1().to(dtype)
    composer = PrimeComposer(pipe, steps=3)
    made = composer(**vars(asked()), size=(48, 32), measure=True)
    whole = PrimeComposer(tiny.sd1(), steps=3)(**vars(asked()), size=(48, 32))
    gap = np.abs(np.asarray(made.picture, int) - np.asarray(whole.picture)).mean()
    assert gap < 4 and made.lost is not None and pipe.vae.dtype == dtype


def test_an_ip_adapter_acts_in_inversion_and_drawing():
    pipe = tiny.sd1()
    pipe.image_encoder, pipe.feature_extractor = tiny.vision()
    pipe.unet._load_ip_adapter_weights([tiny.ip_adapter(pipe.unet)])
    pipe.set_ip_adapter_scale(0.7)
    composer = PrimeComposer(pipe, steps=2)
    made = composer(**vars(asked()), size=(48, 32), ip_adapter_image=scene()[0])
    other = composer(**vars(asked()), size=(48, 32), ip_adapter_image=scene()[0].rotate(90))
    assert made.passes["inversion"] == 4 == other.passes["inversion"]  # another picture, another inversion
    assert made.picture.tobytes() != other.picture.tobytes()
    again = composer(**vars(asked()), size=(48, 32), ip_adapter_image=scene()[0])
    assert again.passes["inversion"] == 0 and again.picture.tobytes() == made.picture.tobytes()


def test_objects_go_in_one_after_the_other():
    """The second is put into the picture of the first, and boxes in pixels stay those of the first background."""
    pipe = tiny.sd1()
    ground = scene((96, 64))[0]
    left = asked(background=ground, box=(4, 8, 40, 56), words=None, others=None)
    right = asked(background=ground, box=(52, 8, 92, 56), words=None, others=None)
    one, two = PrimeComposer(pipe, steps=2).in_turn([left, right], size=(48, 32))
    assert one.words == ("cat",) and two.words == ("red dog",) and one.others == ("red dog",)
    assert one.box[2] <= 22 and two.box[0] == 24 and two.background.tobytes() == one.picture.tobytes()
    with pytest.raises(PhraseError, match="3 objects, but the prompt names 2 things: cat, red dog"):
        PrimeComposer(pipe, steps=2).in_turn([left, right, left], size=(48, 32))


def test_each_object_has_its_box():
    with pytest.raises(UsageError, match="--box is given 1 times for 2 objects"):
        asked_for(Path("b.png"), [Path("o.png")] * 2, ["0,0,1,1"], [], [], None)
    with pytest.raises(UsageError, match="--mask is given 1 times for 2 objects"):
        asked_for(Path("b.png"), [Path("o.png")] * 2, ["0,0,1,1"] * 2, ["m.png"], [], None)
    made = asked_for(Path("b.png"), [Path("o.png")] * 2, ["0,0,1,1"] * 2, ["alpha", "m.png"], ["a, b", "c"], ("d",))
    one, two = made.compositions("a cat", 3)
    assert (one.mask, Path(two.mask).name, one.words, two.words, two.seed) == (None, "m.png", ("a", "b"), ("c",), 3)
    assert Path(made.placed(Path("/x")).background) == Path("/x/b.png") and one.others == ("d",)


def test_a_lora_acts_in_inversion_and_drawing(tmp_path):
    """Other LoRAs are other inversions; without it, all is as before."""
    peft = pytest.importorskip("peft")
    donor = tiny.sd1()
    settings = {"r": 4, "target_modules": ["to_q", "to_k", "to_v"], "init_lora_weights": False}
    donor.unet.add_adapter(peft.LoraConfig(**settings))
    layers = peft.utils.get_peft_model_state_dict(donor.unet)
    type(donor).save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipe = tiny.sd1()
    composer = PrimeComposer(pipe, steps=2)

    def made():
        return composer(**vars(asked()), size=(48, 32))

    plain = made()
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    with_it = made()
    assert with_it.passes["inversion"] == 4 and with_it.picture.tobytes() != plain.picture.tobytes()
    pipe.delete_adapters("one")
    again = made()
    assert again.passes["inversion"] == 0 and again.picture.tobytes() == plain.picture.tobytes()


@pytest.mark.parametrize("family", ["sd1", "sd3", "flux"])
def test_regions_and_segregation_act_beside_it(family):
    """What other controls say holds, too: the picture is another one, and outside of the box it is the background."""
    pipe = tiny.FAMILIES[family]()
    composer = PrimeComposer(pipe, steps=2, start=0.0)
    plain = composer(**vars(asked()), size=(48, 32), **LONG.get(family, {}))
    seen = {plain.picture.tobytes()}
    for control in (Regions({"cat": (0, 0, 0.5, 1)}, inside=0.0), Excitation("cat", look_ahead=0, window=(0, 1))):
        made = composer(**vars(asked()), size=(48, 32), controls=[control], **LONG.get(family, {}))
        seen.add(made.picture.tobytes())
        left, top, right, bottom = made.box
        outside = np.asarray(made.picture, int) - np.asarray(plain.picture)
        outside[max(0, top - 8) : bottom + 8, max(0, left - 8) : right + 8] = 0  # the decoder sees a little around
        assert np.abs(outside).max() <= 1
    assert len(seen) == 3
