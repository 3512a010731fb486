"""Scenes composed from an atlas are the renderer's world; a timed run ends by the clock; what travels is whole."""

import json
import shutil
import tarfile
from itertools import combinations
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import attnctl
from attnctl.glyph.scenes import Renderer, sprite_tones
from attnctl.glyph.train import atlas
from attnctl.glyph.train.__main__ import app
from attnctl.glyph.train.atlas import THINGS, Atlas, AtlasError
from attnctl.glyph.train.card import history, weak
from attnctl.glyph.train.composed import Composer
from attnctl.glyph.train.encoded import Stored, encode, scene_weights
from attnctl.glyph.train.loop import Settings, warmth
from attnctl.glyph.train.sd import Denoising
from attnctl.glyph.train.sd3 import Flow
from attnctl.glyph.train.worlds import WEAK, settings_of
from attnctl.glyph.words import COLOURS, CONCEPTS, OBJECTS, is_held_out
from attnctl.loading import MODELS, ModelError

VAE = MODELS / "glyph-sd" / "vae"


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


def test_a_card_tells_every_run_of_a_training() -> None:
    first = {"steps": 4300, "batch": 32, "scenes": 12000, "seed": 0, "grounding": 0.05}
    once = "4,300 steps of 32 on 12,000 scenes, seed 0, grounding loss 0.05"
    assert history(first) == once
    second = first | {"steps": 700, "weights": {"mouse": 3.0}, "after": first}
    again = "700 steps of 32 on 12,000 scenes, seed 0, grounding loss 0.05,\n  more often: mouse (3 times)"
    assert history(second) == f"{once};\n  then {again}"


def test_stored_scenes_of_weak_concepts_are_taken_more_often() -> None:
    captions = ["a cat and a mouse", "a red car", "a dog"]
    weights = scene_weights(captions, {"mouse": 6.0, "car": 0.5})
    assert weights.tolist() == [6.0, 0.5, 1.0]
    stored = Stored({"ids": torch.arange(3)}, captions, "cpu", weights)
    rows, said = stored.rows(4000, _rng())
    counts = rows["ids"].bincount() / 4000
    assert counts.tolist() == pytest.approx([0.8, 0.067, 0.133], abs=0.03)
    assert said[:3] == [captions[k] for k in rows["ids"][:3]]


@pytest.fixture
def scenes_drawn_before(tmp_path: Path) -> Path:
    """A folder with two scenes, so that none has to be drawn."""
    pipe = attnctl.load("glyph-sd")
    drawn = [Renderer(stream=3).scene(k) for k in range(2)]
    save_file(encode(pipe.vae, pipe.tokenizer, drawn), tmp_path / "scenes-2-0.safetensors")
    return tmp_path


def test_a_training_begins_with_the_weights_of_a_pipeline(scenes_drawn_before: Path) -> None:
    task = Denoising(VAE, 2, 0, "cpu", scenes_drawn_before, weights={"mouse": 2.0}, start=VAE.parent)
    shipped = attnctl.load("glyph-sd").components
    for name, module in task.pipeline(task.network).components.items():
        if name in ("unet", "text_encoder"):
            mine, theirs = module.state_dict(), shipped[name].state_dict()
            assert all(torch.equal(mine[key], theirs[key].float()) for key in theirs), name
    assert task.made_by["after"] == json.loads((VAE.parent / "training.json").read_text())
    task.map_scores = lambda pipe: {}  # type: ignore[method-assign]
    task.report(task.network, scenes_drawn_before, 7)  # as for a run that was at its end when it was resumed
    assert task.made_by["steps"] == 7
    assert task.made_by["weights"] == {"mouse": 2.0} and task.source.weights is not None


def test_a_training_begins_with_its_own_kind_of_pipeline_alone(scenes_drawn_before: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="glyph-sd3 is a StableDiffusion3Pipeline; glyph-sd is a StableDiffusion"):
        Denoising(VAE, 20_000, 0, "cpu", tmp_path, start=VAE.parents[1] / "glyph-sd3")
    other = shutil.copytree(VAE.parent, tmp_path / "other")
    weights = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, other / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match="other has another autoencoder than --vae"):
        Denoising(VAE, 2, 0, "cpu", scenes_drawn_before, start=other)
