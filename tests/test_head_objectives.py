"""Objectives of a search: CLIP and its kin on tiny random weights, styles, harmonic means, the command's syntax."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

from attnctl.app.command import UsageError
from attnctl.app.search_objectives import objective_of
from attnctl.errors import ControlError
from attnctl.glyph.objective import Shown
from attnctl.pipelines.head_objectives import Aesthetic, ClipScore, Harmonic, PickScore, styled

PICTURES = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue", "green")]
PROMPTS = ["cat", "dog", "cat and dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model of random weights, as `save_pretrained` writes it."""
    from transformers import CLIPConfig, CLIPModel

    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny.clip_tokenizer()
    text = small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = small | {"image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    kind = {"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor"}
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (path / "preprocessor_config.json").write_text(json.dumps(kind | size))
    return path


@pytest.fixture
def layers(tmp_path):
    """Two linear layers, 8 -> 4 -> 1, named as LAION's second predictor names its own; the second stands first."""
    torch.manual_seed(2)
    state = {"layers.10.weight": torch.randn(1, 4), "layers.10.bias": torch.randn(1)}
    state |= {"layers.2.weight": torch.randn(4, 8), "layers.2.bias": torch.randn(4)}
    torch.save(state, tmp_path / "layers.pth")
    return tmp_path / "layers.pth"


@torch.inference_mode()
def features(folder, pictures, prompts):
    """CLIP's embeddings by its parts."""
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True)
    pixels = model.vision_model(pixel_values=inputs.pixel_values).pooler_output @ model.visual_projection.weight.T
    mask = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    words = model.text_model(**mask).pooler_output @ model.text_projection.weight.T
    return pixels, words, float(model.logit_scale.exp())


def test_clip_and_pick_are_cosines_each_on_its_scale(folder):
    pixels, words, scale = features(folder, PICTURES, PROMPTS)
    cosines = torch.cosine_similarity(pixels, words).tolist()
    assert ClipScore(folder)(PICTURES, PROMPTS) == pytest.approx([max(0, 100 * one) for one in cosines], abs=1e-3)
    assert PickScore(folder)(PICTURES, PROMPTS) == pytest.approx([scale * one for one in cosines], abs=1e-4)
    assert len(set(PickScore(folder)(PICTURES, PROMPTS))) == 3


def test_a_template_stands_around_the_prompt(folder):
    plain, around = ClipScore(folder), ClipScore(folder, template="cat and {}")
    assert around.cosines(PICTURES[:1], ["dog"]) == plain.cosines(PICTURES[:1], ["cat and dog"])
    assert around.cosines(PICTURES[:1], ["dog"]) != plain.cosines(PICTURES[:1], ["dog"])
    with pytest.raises(ControlError, match="has no {}"):
        ClipScore(folder, template="dog")


def test_aesthetic_is_a_chain_of_layers_on_the_embedding_of_length_one(folder, layers, tmp_path):
    pixels, _, _ = features(folder, PICTURES, PROMPTS)
    state, unit = torch.load(layers), pixels / pixels.norm(dim=1, keepdim=True)
    hidden = unit @ state["layers.2.weight"].T + state["layers.2.bias"]
    wanted = (hidden @ state["layers.10.weight"].T + state["layers.10.bias"])[:, 0].tolist()
    assert Aesthetic(layers, folder)(PICTURES, PROMPTS) == pytest.approx(wanted, abs=1e-4)
    torch.save({"weight": torch.randn(1, 5), "bias": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ControlError, match=r"holds layers \(1, 5\); they should lead from 8"):
        Aesthetic(tmp_path / "other.pth", folder)
    with pytest.raises(ControlError, match="no layers can be read from"):
        Aesthetic(tmp_path / "none.pth", folder)


def test_a_harmonic_mean_is_high_only_if_both_are():
    both = Harmonic(lambda pictures, prompts: [1.0, 4.0, 0.0], lambda pictures, prompts: [1.0, 1.0, 0.0])
    assert both(PICTURES, PROMPTS) == pytest.approx([1.0, 1.6, 0.0])
    with pytest.raises(ControlError, match="of scores from 0, and one is -1"):
        Harmonic(lambda pictures, prompts: [-1.0], lambda pictures, prompts: [1.0])(PICTURES, PROMPTS)


def test_prompts_of_a_style():
    assert styled(" golden hour", ["a cat", "a dog"]) == ["golden hour, a cat", "golden hour, a dog"]
    with pytest.raises(ControlError, match="the style is empty"):
        styled(" ", ["a cat"])


def test_the_command_names_them(folder, layers):
    assert isinstance(objective_of("judge"), Shown)
    assert isinstance(objective_of(f"clip:{folder}"), ClipScore)
    assert isinstance(objective_of(f"pick:{folder}@{folder}"), PickScore)
    both = objective_of(f"harmonic(aesthetic:{layers}@{folder}, clip:{folder})")
    assert isinstance(both.parts[0], Aesthetic) and type(both.parts[1]) is ClipScore


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("clip:", "clip needs weights of yours"),
        ("aesthetic:a.pth", "aesthetic needs weights"),
        ("clip:nowhere/at-all", "no CLIPModel can be loaded from nowhere/at-all"),
        ("beauty", "write judge"),
        ("json:nothing", "json has no function 'nothing'"),
        ("no_such_module:it", "No module named"),
    ],
)
def test_what_names_none_is_said_in_one_line(text, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="--objective") as error:
        objective_of(text)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_command_searches_a_style_by_clip_and_writes_preset_and_picture(command, folder):
    tiny.sd1().save_pretrained("model")
    Path("prompts.txt").write_text("cat\ndog\n")
    words = ("search", "heads", "--model", "model", "--objective", f"clip:{folder}", "--prompts", "prompts.txt")
    words += ("--style", "red", "--heads", "0:0 0:1", "--steps", "1", "--batch", "64", "--out", "found.json")
    code, out, err = command(*words, "--budget", "400")
    assert code == 0, err
    written = json.loads(Path("found.json").read_text())
    assert written["settings"]["prompts"] == ["red, cat", "red, dog"]
    assert out[-2:] == ["found.json", "found.png"] and Image.open("found.png").width > 400
    assert any("of the time of full passes" in line for line in err)
    code, _, err = command(
        "generate", "cat", "--model", "model", "--steps", "1", "--control", "perturb(preset=found.json)"
    )
    assert code == 0, err
