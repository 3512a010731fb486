"""Learning concepts: what is trained and what is not, files that stock diffusers loads, and clear refusals."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from attnctl.concepts import Concept, read_learnt
from attnctl.errors import AttnctlError, AttnctlWarning, ControlError, UnsupportedPipelineError
from attnctl.pipelines import Personalizer
from attnctl.pipelines.personalize.concepts import caption, read_concepts
from attnctl.pipelines.personalize.denoising import snr_weight
from attnctl.pipelines.personalize.files import factored
from attnctl.pipelines.personalize.settings import PRESETS, settings_of
from attnctl.pipelines.personalize.views import View, make_views, squared
from attnctl.pipelines.personalizer import seen

pytestmark = pytest.mark.filterwarnings("ignore::attnctl.errors.AttnctlWarning")  # random weights see no cat anywhere

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
FEW = {
    "steps": 3, "rows": 2, "regular_rows": 1, "regular": 2, "view_count": 3, "kv_rate": 0.05, "word_rate": 0.05,
    "masks": "none",
}  # fmt: skip
PROMPT = "a <v1> cat and a <v2> dog"


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 255, (40, 32, 3), np.uint8))


def learnt(pipe, picture, **settings):
    return Personalizer(pipe, "cat, dog", **FEW | settings).learn(picture)


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_only_words_keys_and_values_change(picture, trained):
    pipe = tiny.sd1()
    vocabulary = len(pipe.tokenizer)
    before = {name: p.detach().clone() for name, p in pipe.unet.named_parameters()}
    table = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    others = {n: p.detach().clone() for n, p in pipe.text_encoder.named_parameters() if "token_embedding" not in n}
    found = learnt(pipe, picture, trained=trained)
    after = dict(pipe.unet.named_parameters())
    for name, old in before.items():
        new = after.get(name, after.get(name.replace(".weight", ".base_layer.weight")))
        trained_here = trained == "full" and name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        assert torch.equal(old, new) != trained_here, name
    assert len(found.lora) == 2 * 7 and all(up.any() for _, up in found.lora.values())
    assert torch.equal(table[:vocabulary], pipe.text_encoder.get_input_embeddings().weight[:vocabulary])
    for name, old in others.items():
        assert torch.equal(old, dict(pipe.text_encoder.named_parameters())[name]), name
    assert not any(p.grad is not None for n, p in pipe.text_encoder.named_parameters())


def test_the_words_begin_as_their_nouns_and_leave_them(picture):
    pipe = tiny.sd1()
    cat = pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids("cat</w>")].clone()
    still = learnt(pipe, picture, steps=1, word_rate=0.0)
    assert torch.equal(still.words["<v1>"][0], cat)
    moved = learnt(tiny.sd1(), picture, steps=1)
    assert not torch.equal(moved.words["<v1>"][0], cat)


def test_nothing_is_learnt_through_the_start_token(picture):
    """Keys and values of the start token have no gradient, so a loss on it alone moves nothing."""
    from attnctl import attach
    from attnctl.pipelines.personalize.trainer import StartApart

    pipe = tiny.sd1()
    text = torch.randn(1, 77, 32, requires_grad=True)
    with attach(pipe, StartApart()) as attached, attached.batch(["a cat"]):
        pipe.unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), text).sample.sum().backward()
    assert not text.grad[:, 0].any() and text.grad[:, 1:].any()


def test_the_pipeline_asks_for_gradients_as_before_and_draws(picture):
    pipe = tiny.sd1()
    pipe.unet.conv_in.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in pipe.unet.named_parameters()}
    learnt(pipe, picture)
    assert {name: p.requires_grad for name, p in pipe.unet.named_parameters()} == asked
    assert not pipe.unet.training and not pipe.text_encoder.training
    assert torch.isfinite(tiny.draw(pipe, PROMPT)).all()


def test_the_same_seed_learns_the_same(picture):
    one, other = (learnt(tiny.sd1(), picture) for _ in range(2))
    third = learnt(tiny.sd1(), picture, seed=1)
    assert all(torch.equal(one.words[w][0], other.words[w][0]) for w in one.words)
    assert not torch.equal(one.words["<v1>"][0], third.words["<v1>"][0])


def test_gradient_checkpointing_learns_the_same(picture):
    plain, checkpointed = tiny.sd1(), tiny.sd1()
    checkpointed.unet.enable_gradient_checkpointing()
    one, other = learnt(plain, picture), learnt(checkpointed, picture)
    assert all(torch.allclose(one.words[w][0], other.words[w][0], atol=1e-5) for w in one.words)


def test_calibration_changes_what_is_learnt_and_is_told(picture):
    seen = []
    kept = Personalizer(tiny.sd1(), "cat, dog", **FEW, bind=0.1, separate=0.1).learn(picture, seen.append)
    plain = learnt(tiny.sd1(), picture, bind=0.0, separate=0.0)
    assert [one.step for one in seen] == [1, 2, 3] and seen[0].losses.keys() == {"denoise", "binding", "apart", "keep"}
    assert not torch.equal(kept.words["<v1>"][0], plain.words["<v1>"][0])


def test_one_and_three_concepts_are_learnt(picture):
    for nouns in ("cat", "cat, dog, red car"):
        seen = []
        found = Personalizer(tiny.sd1(), nouns, **FEW).learn(picture, seen.append)
        assert len(found.words) == len(nouns.split(",")) and ("apart" in seen[0].losses) == ("," in nouns)


def test_sdxl_learns_a_row_for_each_encoder(picture, tmp_path):
    pipe = tiny.sdxl()
    pipe.scheduler = tiny.ddim()
    found = learnt(pipe, picture)
    assert [row.shape for row in found.words["<v1>"]] == [(32,), (32,)]
    folder = found.save(tmp_path)
    assert read_learnt(folder).words["<v2>"][1].equal(found.words["<v2>"][1])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained, file", [("full", None), ("lora", None), ("full", "kohya_lora.safetensors")])
def test_stock_loaders_give_the_pictures_of_the_trained_pipeline(picture, tmp_path, trained, file):
    pipe = tiny.sd1()
    folder = learnt(pipe, picture, trained=trained).save(tmp_path)
    own = tiny.draw(pipe, PROMPT)
    other = tiny.sd1()
    other.load_lora_weights(folder, weight_name=file)
    for word in ("v1", "v2"):
        other.load_textual_inversion(folder / f"{word}.safetensors")
    loaded = tiny.draw(other, PROMPT)
    assert torch.allclose(own, loaded, atol=1e-4)
    assert not torch.allclose(own, tiny.draw(tiny.sd1(), PROMPT), atol=1e-2)


def test_learnt_concepts_are_added_to_a_pipeline_without_peft(picture, tmp_path):
    pipe = tiny.sd1()
    folder = learnt(pipe, picture).save(tmp_path)
    other = tiny.sd1()
    read_learnt(folder).add_to(other)
    assert torch.allclose(tiny.draw(pipe, PROMPT), tiny.draw(other, PROMPT), atol=1e-4)
    with pytest.raises(ControlError, match="has a word '<v1>' already"):
        read_learnt(folder).add_to(other)


def test_concepts_of_another_model_are_refused_before_anything_is_changed(picture, tmp_path):
    folder = learnt(tiny.sd1(), picture).save(tmp_path)
    other = tiny.sdxl()
    with pytest.raises(ControlError, match="of another model"):
        read_learnt(folder).add_to(other)
    assert "<v1>" not in other.tokenizer.get_vocab()


def test_the_files_of_a_word_hold_one_key_and_no_angle_brackets(picture, tmp_path):
    from safetensors.torch import load_file

    folder = learnt(tiny.sd1(), picture).save(tmp_path)
    assert {path.name for path in folder.iterdir()} == {
        "concepts.json", "kohya_lora.safetensors", "pytorch_lora_weights.safetensors",
        "v1.safetensors", "v2.safetensors",
    }  # fmt: skip
    ((key, row),) = load_file(folder / "v1.safetensors").items()
    assert key == "<v1>" and row.shape == (1, 32) and row.dtype == torch.float32
    assert json.loads((folder / "concepts.json").read_text())["concepts"][1]["noun"] == "dog"


def test_damaged_and_missing_folders_are_told(picture, tmp_path):
    with pytest.raises(ControlError, match="holds no concepts"):
        read_learnt(tmp_path)
    folder = learnt(tiny.sd1(), picture).save(tmp_path)
    (folder / "v1.safetensors").write_bytes(b"short")
    with pytest.raises(ControlError, match="are damaged"):
        read_learnt(folder)


def test_kohya_keys_are_those_that_comfyui_knows(picture):
    found = learnt(tiny.sd1(), picture, trained="lora", rank=3).kohya_keys()
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    assert found[f"{name}.lora_down.weight"].shape == (3, 32) and found[f"{name}.lora_up.weight"].shape == (16, 3)
    assert found[f"{name}.alpha"] == 3 and len(found) == 3 * 14


def test_changes_are_factored_exactly_and_to_one_rank():
    torch.manual_seed(0)
    changes = {"small.weight": torch.randn(3, 8), "large.weight": torch.randn(10, 8)}
    found = factored(changes, None)
    assert {name: (down.shape, up.shape) for name, (down, up) in found.items()} == {
        "small": ((8, 8), (3, 8)), "large": ((8, 8), (10, 8)),
    }  # fmt: skip
    for name, (down, up) in found.items():
        assert torch.allclose(up @ down, changes[f"{name}.weight"], atol=1e-5)
    down, up = factored(changes, 2)["large"]
    best = torch.linalg.svdvals(changes["large.weight"])[2:].square().sum().sqrt()
    assert (up @ down - changes["large.weight"]).norm() == pytest.approx(best.item(), rel=1e-4)


# --- an interrupted training ------------------------------------------------------------------------------------------


def weights_of(folder):
    from safetensors.torch import load_file

    names = ("v1.safetensors", "v2.safetensors", "pytorch_lora_weights.safetensors")
    return {name: load_file(folder / name) for name in names}


def same(one, other):
    return all(torch.equal(one[file][name], other[file][name]) for file in one for name in one[file])


LONG = FEW | {"steps": 6}


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_a_training_goes_on_to_the_same_weights(picture, tmp_path, trained):
    whole = Personalizer(tiny.sd1(), "cat, dog", **LONG, trained=trained).learn(picture).save(tmp_path / "whole")

    def stop(progress):
        if progress.step == 5:
            raise KeyboardInterrupt

    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        Personalizer(tiny.sd1(), "cat, dog", **LONG, trained=trained).learn(picture, stop, folder=broken, every=2)
    steps = []
    again = Personalizer(tiny.sd1(), "cat, dog", **LONG, trained=trained)
    again.learn(picture, lambda one: steps.append(one.step), folder=broken, resume=True, every=2).save(broken)
    assert steps == [5, 6] and same(weights_of(whole), weights_of(broken))


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_the_command_ends_in_the_same_weights(command, picture, folder, tmp_path):
    picture.save(tmp_path / "mine.png")
    few = [word for name, value in (LONG | {"steps": 80}).items() for word in ("--set", f"{name}={value}")]
    words = ["personalize", "mine.png", "--concepts", "cat, dog", "--model", str(folder), "--threads", "1", *few]
    run = [sys.executable, "-m", "attnctl", *words, "--out", "broken"]
    process = subprocess.Popen(run, cwd=tmp_path, env=ENVIRONMENT)
    state = tmp_path / "broken" / "training" / "state.pt"
    while not state.exists():
        assert process.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "broken" / "concepts.json").exists()
    assert command(*words, "--out", "broken", "--resume")[0] == 0
    assert command(*words, "--out", "whole")[0] == 0
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "broken"))
    assert not state.exists()


def test_resuming_begins_where_there_is_nothing_and_refuses_what_is_another_training(picture, tmp_path):
    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # nothing there: it begins
        Personalizer(tiny.sd1(), "cat, dog", **FEW).learn(picture, stop, folder=tmp_path, resume=True)
    with pytest.raises(ControlError, match="was begun with bind=0.003, not 0.1"):
        Personalizer(tiny.sd1(), "cat, dog", **FEW, bind=0.1).learn(picture, folder=tmp_path, resume=True)
    with pytest.raises(ControlError, match="was begun with another concept"):
        Personalizer(tiny.sd1(), "cat, car", **FEW).learn(picture, folder=tmp_path, resume=True)
    with pytest.raises(ControlError, match="was begun with another picture"):
        Personalizer(tiny.sd1(), "cat, dog", **FEW).learn(picture.rotate(90), folder=tmp_path, resume=True)
    (tmp_path / "training" / "prepared.safetensors").write_bytes(b"short")
    with pytest.raises(ControlError, match="is damaged: begin again without --resume"):
        Personalizer(tiny.sd1(), "cat, dog", **FEW).learn(picture, folder=tmp_path, resume=True)


def test_previews_are_drawn_with_the_words_as_they_are_by_then(picture):
    pipe, pictures = tiny.sd1(), {}
    trainer = Personalizer(pipe, "cat, dog", **LONG)
    found = trainer.learn(picture, every=2, preview=lambda step: pictures.update({step: tiny.draw(pipe, PROMPT)}))
    assert sorted(pictures) == [2, 4] and not torch.equal(pictures[2], pictures[4])
    blind = learnt(tiny.sd1(), picture, steps=6)
    assert same({0: found.lora_keys()}, {0: blind.lora_keys()})  # looking changes nothing


def test_a_full_disk_is_told_and_leaves_no_half_file(picture, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    found = learnt(tiny.sd1(), picture)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ControlError, match="cannot write .*: No space left on device"):
        found.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- what the model sees in the picture -------------------------------------------------------------------------------


def test_nouns_the_model_does_not_find_or_finds_in_one_place_are_told():
    concepts = read_concepts("cat, car, dog")
    maps = torch.full((3, 4, 4), 0.01)
    maps[0, 0, 0], maps[1, 3, 3] = 0.4, 0.3
    assert ["hardly finds a 'dog'" in line for line in seen(concepts, maps, 0.05)] == [True]
    maps[2] = maps[0]
    (line,) = seen(concepts, maps, 0.05)
    assert line.startswith("'cat' and 'dog' look at the same place of the picture (100% of their maps)")


def test_the_trained_model_finds_what_is_in_a_picture():
    """glyph-sd, on a picture of a cat and a car: nothing is told."""
    picture = Image.open(Path(__file__).parent / "glyph" / "data" / "cat-car.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttnctlWarning)
        Personalizer(tiny.glyph(), "cat, car", **FEW | {"steps": 1, "kv_rate": 1e-3}).learn(picture)


# --- words, captions, settings ----------------------------------------------------------------------------------------


def test_concepts_are_read():
    assert read_concepts("cat,  red  car ") == (Concept("<v1>", "cat"), Concept("<v2>", "red car"))
    assert read_concepts("<Rex>=dog, <kit>=cat") == (Concept("<rex>", "dog"), Concept("<kit>", "cat"))


@pytest.mark.parametrize(
    "text, told",
    [
        ("cat, ", "concept 2 has no class noun"),
        ("", "concept 1 has no class noun"),
        ("<a>=", "concept 1 has no class noun"),
        ("rex=dog", "'rex' is no new word"),
        ("cat, cat", "class noun 'cat'"),
        ("<a>=cat, <a>=dog", "word '<a>'"),
    ],
)
def test_concepts_that_make_no_sense_are_told(text, told):
    with pytest.raises(ControlError, match=told):
        read_concepts(text)


def test_captions():
    one, two, three = (["<v1> cat"], ["<v1> cat", "<v2> car"], ["x", "y", "z"])
    ours, paper = PRESETS["ours"], PRESETS["paper"]
    assert caption(one, ours) == "a <v1> cat"
    assert caption(two, ours) == "a <v1> cat and a <v2> car"
    assert caption(three, ours) == "a x, a y and a z"
    assert caption(two, paper) == "photo of a <v1> cat and <v2> car"


def test_words_the_tokenizer_has_and_other_models_are_refused(picture):
    pipe = tiny.sd1()
    learnt(pipe, picture)
    with pytest.raises(ControlError, match="has a word '<v1>' already"):
        learnt(pipe, picture)
    with pytest.raises(UnsupportedPipelineError, match="SDXL, SD 3 and FLUX.1, not by PixArt"):
        Personalizer(tiny.pixart(), "cat")
    with pytest.raises(ControlError, match="load it in float32"):
        Personalizer(tiny.sd1().to(dtype=torch.bfloat16), "cat")


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"steps": 0}, "steps is a whole number from 1"),
        ({"trained": "all"}, "trained is one of full, lora"),
        ({"kv_rate": -1.0}, "kv_rate"),
        ({"power": 3}, "power is 1, 2 or 4"),
        ({"regular": 0, "regular_rows": 1}, "regular_rows needs regular pictures"),
        ({"step": 5}, "did you mean steps"),
    ],
)
def test_settings_that_make_no_sense_are_told(settings, told):
    with pytest.raises(AttnctlError, match=told):
        settings_of("ours", **settings)
    with pytest.raises(ControlError, match="there is no preset 'our'; did you mean ours"):
        settings_of("our")


def test_the_preset_of_the_paper():
    paper = PRESETS["paper"]
    assert (paper.steps, paper.kv_rate, paper.word_rate, paper.bind, paper.separate) == (250, 8e-5, 8e-5, 0.01, 0.01)
    assert (paper.rows, paper.regular_rows, paper.regular, paper.power, paper.snr) == (4, 4, 200, 2, None)


def test_a_factor_without_sites_is_told(picture):
    with pytest.raises(ControlError, match="no cross-attention site has factor 3; there are 1, 2"):
        learnt(tiny.sd1(), picture, factor=3)


def test_snr_weights():
    alphas = torch.tensor([0.5, 0.99])  # signal to noise 1 and 99
    assert torch.allclose(snr_weight(alphas, 5.0, "epsilon"), torch.tensor([1.0, 5 / 99]))
    assert torch.allclose(snr_weight(alphas, 5.0, "v_prediction"), torch.tensor([0.5, 5 / 100]))
    assert torch.equal(snr_weight(alphas, None, "epsilon"), torch.ones(2))


# --- views ------------------------------------------------------------------------------------------------------------


def test_a_picture_is_made_square_by_repeating_its_rim():
    picture = Image.new("RGB", (32, 16), (10, 20, 30))
    picture.paste((200, 0, 0), (0, 0, 32, 1))
    square = np.asarray(squared(picture, 32))
    assert square.shape == (32, 32, 3) and (square[0] == square[7]).all() and (square[-1] == (10, 20, 30)).all()


@pytest.mark.parametrize("kind", ["ours", "paper"])
def test_masks_follow_the_views_of_their_picture(kind):
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (8, 16, 24, 40))
    mask = picture.convert("L")
    for view in make_views(kind, 24, 64, np.random.default_rng(0)):
        shown, there = np.asarray(view.picture(picture, 64)), np.asarray(view.mask(mask, 64))
        valid = np.kron(view.valid(32).numpy(), np.ones((2, 2))) > 0
        assert np.abs(shown[..., 0].astype(int) - there)[valid].mean() < 4


def test_small_views_count_for_what_they_show_and_say_so():
    views = make_views("paper", 200, 512, np.random.default_rng(0))
    small = [view for view in views if view.place != (0, 0, 1, 1)]
    close = [view for view in views if view.box != (0, 0, 1, 1)]
    assert {view.prefix for view in small} == {"a far away ", "very small "}
    assert {view.prefix for view in close} == {"zoomed in ", "close up "}
    assert 0.2 < len(small) / 200 < 0.45 and 0.2 < len(close) / 200 < 0.45
    view = View(place=(0.25, 0.25, 0.75, 0.75))
    valid = view.valid(64)
    assert valid.sum() == 30 * 30 and valid[17:47, 17:47].all()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.sd1().save_pretrained(folder)
    return folder


def test_a_folder_of_concepts_is_a_model(command, picture, folder, tmp_path):
    """Learn, then draw with what was learnt, from the command line alone."""
    picture.save(tmp_path / "mine.png")
    few = [word for name, value in FEW.items() for word in ("--set", f"{name}={value}")]
    words = ["personalize", "mine.png", "--concepts", "cat, dog", "--model", folder, "--out", "mine", *few]
    code, out, err = command(*words, "--sample", "a <v1> cat and a red car")
    stages = [line for line in err if line.endswith("in all") or "drawing samples" in line]
    assert "attnctl: training, 3 in all" in stages and "attnctl: drawing samples of 4 prompts" in stages
    others = [line for line in err if line not in stages]
    assert code == 0 and all("another noun may do" in line or "other nouns may do" in line for line in others)
    assert not (tmp_path / "mine" / "training").exists() and out[0].startswith("3 steps; in the last one: denoise ")
    assert out[-1] == "mine/sample.png" and all((tmp_path / path).is_file() for path in out[1:])
    code, out, err = command("concepts", "list", ".")
    assert code == 0 and out == [f"mine  <v1> cat, <v2> dog  (of {folder})"]
    code, out, err = command("concepts", "info", "mine")
    assert code == 0 and out[:3] == [f"model: {folder}", "<v1> cat  (32 numbers)", "<v2> dog  (32 numbers)"]
    assert out[3].startswith("weights: 14 modules, rank 32") and out[-1].startswith("settings: steps=3, rows=2")
    code, out, err = command("generate", PROMPT, "--model", "mine", "--steps", "2", "--maps")
    assert code == 0 and len(out) == 2
    assert command("reproduce", out[0])[1] == ["bit-identical"]


@pytest.mark.parametrize(
    "words, told",
    [
        (["none.png", "--concepts", "cat, dog"], "cannot read none.png: there is no such file"),
        (["broken.png", "--concepts", "cat, dog"], "cannot read broken.png: it is not a whole picture"),
        (["mine.png", "--concepts", "cat,"], "concept 2 has no class noun"),
        (["mine.png", "--concepts", "cat", "--preset", "best"], "there is no preset 'best'"),
        (["mine.png", "--concepts", "cat", "--set", "stps=3"], "did you mean steps"),
        (["mine.png", "--concepts", "cat", "--set", "steps"], "write it as name=value"),
        (["mine.png", "--concepts", "cat", "--set", "steps=many"], "steps is a whole number"),
        (["mine.png", "--concepts", "cat", "--model", "nothing"], "unknown model 'nothing'"),
        (["mine.png", "--concepts", "cat", "--preview", "-1"], "--preview -1: from 0 up"),
        (["mine.png", "--concepts", "cat", "--mask", "cat"], "write it as noun=file"),
        (["mine.png", "--concepts", "cat", "--mask", "cat=none.png"], "cannot read none.png"),
        (["mine.png", "--concepts", "cat", "--mask", "dog=mine.png"], "there is a mask for 'dog'; concepts are cat"),
        (["mine.png", "--concepts", "cat, dog", "--mask", "cat=mine.png"], "'dog' has no mask"),
    ],
)
def test_the_command_refuses_in_one_line_before_it_trains(command, picture, tmp_path, words, told):
    picture.save(tmp_path / "mine.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    code, out, err = command("personalize", *words, "--out", "mine")
    assert code == 2 and out == [] and len(err) == 1 and told in err[0]
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("words", [("list", "nowhere"), ("list", "."), ("info", ".")])
def test_folders_without_concepts_are_told(command, words):
    code, out, err = command("concepts", *words)
    assert code == 2 and out == [] and len(err) == 1 and ("no folder" in err[0] or "holds no concepts" in err[0])


def test_resuming_where_there_is_nothing_is_told(command, picture, tmp_path):
    picture.save(tmp_path / "one.png")
    words = ["personalize", "one.png", "--concepts", "cat, dog", "--model", "./nowhere", "--out", "new", "--resume"]
    code, _, said = command(*words)
    assert code == 2  # the model is looked for afterwards
    assert said[0] == "attnctl: nothing to resume in new: a new training begins"
