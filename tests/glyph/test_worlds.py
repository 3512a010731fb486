"""Scenes composed from an atlas are the renderer's world; a timed run ends by the clock; what travels is whole."""

import shutil
import tarfile
from itertools import combinations
from pathlib import Path

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from attnctl.glyph.scenes import sprite_tones
from attnctl.glyph.train import atlas
from attnctl.glyph.train.__main__ import app
from attnctl.glyph.train.atlas import THINGS, Atlas, AtlasError
from attnctl.glyph.train.card import weak
from attnctl.glyph.train.composed import Composer
from attnctl.glyph.train.loop import Settings, warmth
from attnctl.glyph.train.sd import Denoising
from attnctl.glyph.train.sd3 import Flow
from attnctl.glyph.train.worlds import WEAK, settings_of
from attnctl.glyph.words import COLOURS, CONCEPTS, OBJECTS, is_held_out


@pytest.fixture(scope="module")
def sprites() -> Atlas:
    return atlas.build()


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _named(caption: str) -> list[str]:
    return [word for word in caption.replace(",", "").split() if word in CONCEPTS]


def test_an_atlas_is_read_as_it_was_written(sprites: Atlas, tmp_path: Path) -> None:
    sprites.save(tmp_path / "a.safetensors")
    again = atlas.read(tmp_path / "a.safetensors")
    assert all(torch.equal(getattr(again, name), getattr(sprites, name)) for name in ("pictures", "tones", "boxes"))
    assert len(THINGS) == len(sprites.pictures) == 12 + 12 * 12
    (tmp_path / "b").write_bytes(b"no atlas")
    with pytest.raises(AtlasError, match="b is no atlas of sprites"):
        atlas.read(tmp_path / "b")


def test_captions_name_what_is_there_and_masks_lie_on_it(sprites: Atlas) -> None:
    scenes = Composer(sprites, counts=(0, 1, 0), natural=0, named=1).draw(64, _rng())
    assert scenes.images.shape == (64, 3, 128, 128)
    assert scenes.images.min() >= -1
    assert scenes.images.max() <= 1
    near = 0
    for image, caption, masks in zip(scenes.images, scenes.captions, scenes.masks, strict=True):
        words = caption.split()
        named = _named(caption)
        assert len(named) == 2
        assert (masks.flatten(1).sum(1) > 2).tolist() == [True, True, False]
        for concept, mask in zip(named, masks, strict=False):
            before = words[words.index(concept) - 1]
            assert (before in COLOURS) == (concept in OBJECTS)
            inside = torch.nn.functional.interpolate(mask[None, None], 128)[0, 0] > 0.9
            tone = (image[:, inside].mean(1) + 1) / 2
            wanted = torch.from_numpy(sprite_tones(concept, before if before in COLOURS else None)[1][1]) / 255
            near += bool((tone - wanted).norm() < 0.25)
    assert near >= 122  # of 128: parts of a thing may be of another tone than the whole


def test_things_stay_inside_and_hardly_hide_each_other(sprites: Atlas) -> None:
    scenes = Composer(sprites).draw(200, _rng(1))
    for caption, masks in zip(scenes.captions, scenes.masks, strict=True):
        assert (masks.flatten(1).sum(1) > 1).sum() == len(_named(caption))
        assert masks.sum(0).max() <= 1 + 1e-5


def test_held_out_pairs_never_meet_and_weak_concepts_come_more_often(sprites: Atlas) -> None:
    composer = Composer(sprites, weights={"elephant": 8.0})
    captions = [caption for seed in range(4) for caption in composer.draw(150, _rng(seed)).captions]
    met = [pair for caption in captions for pair in combinations(_named(caption), 2)]
    assert not any(is_held_out(*pair) for pair in met)
    assert len(met) > 400
    counts = {concept: sum(concept in _named(caption) for caption in captions) for concept in CONCEPTS}
    assert counts["elephant"] > 3 * sorted(counts.values())[12]
    assert set(WEAK) <= set(CONCEPTS)


def test_scenes_are_a_function_of_the_generator(sprites: Atlas) -> None:
    one, same, other = (Composer(sprites).draw(4, _rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.images, same.images)
    assert one.captions == same.captions
    assert one.captions != other.captions


def test_a_timed_run_cools_by_the_clock(tmp_path: Path) -> None:
    settings = settings_of("sd", tmp_path, 10, 0, False, {})
    assert settings.minutes == pytest.approx(4.5)
    assert warmth(5000, settings, 1.0) == 1
    assert warmth(5000, settings, 4.5 * 0.85) == pytest.approx(0.5)
    assert warmth(5000, settings, 4.5) == pytest.approx(0.02)
    assert warmth(5000, Settings(tmp_path, 10_000, 1e-3), 99) == 1  # one that counts steps does not look at the clock


def _run(*words: str) -> Result:
    return CliRunner().invoke(app, words, catch_exceptions=False)


def test_what_travels_is_the_package_and_the_atlas(tmp_path: Path) -> None:
    assert _run("pack", "--out", str(tmp_path / "w.tar.gz")).exit_code == 0
    assert (tmp_path / "w.tar.gz").stat().st_size < 60e6
    assert list(tmp_path.iterdir()) == [tmp_path / "w.tar.gz"]
    with tarfile.open(tmp_path / "w.tar.gz") as tar:
        names = tar.getnames()
        needed = tar.extractfile("requirements.txt")
        assert needed is not None
        assert b"diffusers==" in needed.read()
    assert {"atlas.safetensors", "attnctl/__init__.py", "attnctl/processors/__init__.py"} <= set(names)
    assert "attnctl/glyph/train/worlds.py" in names


@pytest.mark.slow
def test_both_worlds_train_by_the_clock_and_go_on(
    sprites: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for task in Denoising, Flow:
        monkeypatch.setattr(task, "report", lambda *_: "no pictures")  # they take minutes
    sprites.save(tmp_path / "atlas.safetensors")
    words = ["all", "--atlas", str(tmp_path / "atlas.safetensors"), "--out", str(tmp_path), "--batch", "2"]
    assert _run(*words, "--minutes", "0.05").exit_code == 0
    for name in ("sd", "sd3"):
        assert (tmp_path / name / f"glyph-{name}" / "model_index.json").is_file()
        assert (tmp_path / name / f"glyph-{name}" / "training.json").is_file()
    shutil.rmtree(tmp_path / "sd3" / "glyph-sd3")
    assert _run(*words, "--minutes", "0.1", "--resume").exit_code == 0  # twice as long: the clock goes on
    assert (tmp_path / "sd3" / "glyph-sd3" / "model_index.json").is_file()


def test_a_card_names_the_weakest_concepts_first() -> None:
    assert weak({"weak": {"bow": 0.6, "glasses": 0.333, "car": 0.8}}) == "glasses (33%), bow (60%), car (80%)"
    assert weak({"weak": {}}) == weak({}) == "none"
