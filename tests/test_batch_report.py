"""What is derived from the folder of a batch: scores, summary, contact sheets with axes."""

import json

import pytest
import tiny as pipelines
from PIL import Image

from attnctl.app.batch import contact_sheets, report, running, scores

PROMPT = "a cat and a dog"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight pictures of two prompts, two seeds and two controls, judged."""
    model = tmp_path_factory.mktemp("models") / "tiny"
    pipelines.sd1().save_pretrained(model)
    axes = {"prompt": [PROMPT, "a dog and a cat"], "seed": [1, 2], "controls": ["none", "segregation(cat, dog)"]}
    out = tmp_path_factory.mktemp("out")
    rows = [{"steps": 1, "model": str(model), "product": axes}]
    assert len([result for result in running.run(rows, out, scores=["judge"]) if result.drawn]) == 8
    return out


def manifest(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def test_scores_are_those_of_the_pictures_and_can_be_made_again(folder, command):
    before = manifest(folder)
    for one in before:
        with Image.open(folder / one["file"]) as picture:
            assert one["scores"] == {"judge": scores.score_of("judge")(picture.convert("RGB"), one["prompt"])}
    (folder / "scores.jsonl").unlink()
    assert command("batch", "--report", folder)[0] == 0 and all(not one["scores"] for one in manifest(folder))
    assert command("batch", "--report", folder, "--score", "judge")[0] == 0 and manifest(folder) == before
    lines = (folder / "scores.jsonl").read_bytes()
    report.write_report(folder, ["judge"])
    assert (folder / "scores.jsonl").read_bytes() == lines  # nothing is scored twice


def test_the_judge_counts_what_the_prompt_names():
    picture = Image.new("RGB", (128, 128))
    assert scores.score_of("judge")(picture, PROMPT)["score"] == 0.0
    assert scores.score_of("judge")(picture, "a photo of nothing")["score"] is None


def test_summary_is_a_table_by_model_and_controls(folder):
    lines = (folder / "summary.md").read_text().splitlines()
    assert lines[0] == "8 pictures" and "judge" in lines[2]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][1:3] for line in lines[4:]]
    assert cells == [["none", "4"], ["segregation()", "4"]]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("segregation(cat, red car)", "segregation()"),
        ("segregation(cat, dog, strength=2, look_ahead=0)", "segregation(strength=2, look_ahead=0)"),
        ("perturb(heads=6 7, u=0.5)", "perturb(heads=6 7, u=0.5)"),
        ("pag", "pag"),
    ],
)
def test_a_control_is_told_without_its_phrases(text, named):
    assert report._named(text) == named


def test_axes_of_a_sheet(folder, command):
    code, said, _ = command("batch", "--report", folder, "--sheet", "x=seed, y=controls, z=prompt")
    pages = [line for line in said if line.endswith(".png")]
    assert code == 0 and len(pages) == 2
    with Image.open(next(folder.glob("*-1-????????????.png"))) as picture:
        side = picture.width
    with Image.open(pages[0]) as page:
        assert 2 * side < page.width < 3 * side + 50  # two seeds
    code, said, _ = command("batch", "--report", folder, "--sheet", "x=prompt")
    (page,) = [line for line in said if line.endswith(".png")]
    with Image.open(page) as whole:
        assert 8 * side < whole.width < 9 * side + 50  # four pictures in each of two cells
    command("batch", "--report", folder)


def test_axes_are_in_the_order_of_their_values():
    assert list(contact_sheets._by([], None)) == [""]
    recipes = [type("R", (), {"seed": seed})() for seed in (10, 9, 10, 2)]
    shown = [contact_sheets.Shown("", "", recipe, Image.new("RGB", (1, 1))) for recipe in recipes]
    assert {name: len(part) for name, part in contact_sheets._by(shown, "seed").items()} == {"2": 1, "9": 1, "10": 2}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sheet", "x=sede"], "'sede' is no field; did you mean seed?"),
        (["--sheet", "y=seed"], "x is missing"),
        (["--sheet", "x=seed,y=seed"], "'seed' stands twice"),
        (["--sheet", "w=seed"], "write it as x=seed"),
        (["--score", "beauty"], "choose judge, or clip:FOLDER"),
        (["--score", "clip:nowhere"], "nowhere holds no CLIP model"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_one_line(folder, command, words, said):
    code, out, err = command("batch", "--report", folder, *words)
    assert (code, out, len(err)) == (2, [], 1) and said in err[0]


def test_clip_is_that_of_the_model(tmp_path):
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = small | {"image_size": 32, "patch_size": 16}, small | {"vocab_size": 600, "eos_token_id": 1}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    pipelines.sd1().tokenizer.save_pretrained(tmp_path)
    kind = {"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor"}
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kind | size))
    name = f"clip:{tmp_path}"
    scores.check_scores([name])
    score = scores.score_of(name)
    red, blue = (score(Image.new("RGB", (64, 64), colour), PROMPT)["score"] for colour in ("red", "blue"))
    assert 0 <= red <= 100 and red != blue and red == score(Image.new("RGB", (64, 64), "red"), PROMPT)["score"]
    assert score(Image.new("RGB", (64, 64), "red"), f"{PROMPT} " * 99)["score"] >= 0  # longer than CLIP reads


def test_a_clip_model_that_does_not_load_is_one_line(folder, command, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    code, out, err = command("batch", "--report", folder, "--score", f"clip:{tmp_path}")
    assert (code, out) == (2, []) and err[-1].startswith(f"attnctl: --score clip:{tmp_path}: ")
