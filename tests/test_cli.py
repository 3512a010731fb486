"""The command line, run in this process on a tiny pipeline in a folder."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny as pipelines
from PIL import Image

import attnctl
from attnctl.app import asked, cli, recipe
from attnctl.engine.control import Control, Lane
from attnctl.engine.sites import select
from attnctl.words.phrases import tokens

WORDS = "a cat and a dog"
KNOWN = asked.known_controls
HERE = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}  # this checkout, also where another is installed


@dataclass(frozen=True)
class Damp(Control):
    """Damps cross-attention; checks its phrases as a real control does."""

    lane = Lane.OUTPUT
    phrases: tuple[str, ...]
    strength: float = 0.5

    def sites(self, available):
        return select(available, "cross")

    def begin(self, run):
        return [tokens(run, phrase, 0) for phrase in self.phrases]

    def attend(self, call, proceed):
        return proceed(call) * (1 - self.strength)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipelines.sd1().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """Each test in an empty folder, without a hub, with one control of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(asked, "known_controls", lambda: {"Damp": Damp})
    return tmp_path


@pytest.fixture
def run(monkeypatch, capfd):
    """run("generate", ...) -> (exit code, lines of stdout, lines of stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["attnctl", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return stop.value.code, out.splitlines(), err.splitlines()

    return run


@pytest.fixture
def generate(run, tiny):
    """Draw on the tiny pipeline in two steps; the test gives the rest."""

    def generate(*words, prompt=WORDS):
        return run("generate", prompt, "--model", tiny, "--steps", 2, *words)

    return generate


# --- generate ---------------------------------------------------------------------------------------------------------


def test_plain_picture_says_where_it_is_and_holds_its_recipe(generate, somewhere, tiny):
    code, out, err = generate("--seed", 3, "--size", "24x16", "--out", "deep/down")
    assert (code, err) == (0, [])
    (path,) = map(Path, out)
    assert path.parent == Path("deep/down") and [path.name] == [one.name for one in (somewhere / "deep/down").iterdir()]
    picture, known = recipe.read(path)
    assert picture.size == (24, 16)
    assert (known.prompt, known.seed, known.steps, known.width, known.height) == (WORDS, 3, 2, 24, 16)
    assert (known.model, known.controls, known.shows) == (str(tiny), (), "plain")
    told = f"{WORDS}\nSteps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 3, Size: 24x16, Model: tiny"
    assert picture.info["parameters"] == told
    assert known.guidance == 7.5 and known.device == "cpu" and known.versions["attnctl"] == attnctl.__version__


def test_count_draws_each_seed_as_if_alone(generate):
    _, both, _ = generate("--seed", 5, "--count", 2)
    _, (second,), _ = generate("--seed", 6, "--out", "alone")
    assert len(both) == 2 and Image.open(both[0]).tobytes() != Image.open(both[1]).tobytes()
    assert Path(both[1]).name == Path(second).name
    assert Image.open(both[1]).tobytes() == Image.open(second).tobytes()


def test_another_request_never_overwrites(generate):
    names = {generate(*more)[1][0] for more in ((), ("--guidance", 3), ("--negative", "x"), ("--control", "damp(cat)"))}
    assert len(names) == 4


def test_a_control_acts_and_zero_strength_does_not(generate):
    def pixels(*more):
        return recipe.read(Path(generate(*more)[1][-1]))[1].pixels

    plain = pixels()
    assert pixels("--control", "damp(cat, strength=0)") == plain
    assert pixels("--control", "damp(cat)") != plain


def test_compare_draws_both_and_puts_the_sheet_last(generate):
    code, out, err = generate("--compare", "--control", "damp(cat, dog)")
    assert (code, err) == (0, [])
    kinds = [recipe.read(Path(path))[1].shows for path in out]
    assert kinds == ["plain", "controlled", "comparison"]
    plain, controlled, sheet = (Image.open(path) for path in out)
    assert plain.tobytes() != controlled.tobytes()
    assert sheet.width > 2 * sheet.height / 1.3


def test_maps_show_every_word_and_change_no_pixel(generate):
    code, out, err = generate("--maps")
    assert (code, err) == (0, [])
    assert [recipe.read(Path(path))[1].shows for path in out] == ["plain", "maps"]
    assert recipe.read(Path(out[0]))[1].maps == ("cat", "dog")
    _, (bare,), _ = generate("--out", "bare")
    assert Image.open(out[0]).tobytes() == Image.open(bare).tobytes()
    assert Image.open(out[1]).getcolors(10_000) is None or len(Image.open(out[1]).getcolors(10_000)) > 50


@pytest.mark.parametrize(
    ("prompt", "words", "said"),
    [
        ("a cat " + "and a dog " * 40 + "lion", "cat", "lion"),
        ("İstanbul cat and dog", "dog", None),
        ("the cat’s hat", "hat", None),
        ("the a", None, "no word"),
    ],
)
def test_maps_never_fail_a_drawing(generate, prompt, words, said):
    code, out, err = generate("--maps", "--steps", 1, prompt=prompt)
    known = recipe.read(Path(out[-1]))[1]
    assert code == 0 and (words is None or words in known.maps)
    assert len(err) == (said is not None) and (said is None or said in err[0])


def test_maps_stand_under_both_pictures_of_a_comparison(generate):
    damped = ("--compare", "--control", "damp(cat, dog)")
    flat = Image.open(generate(*damped)[1][-1])
    tall = Image.open(generate(*damped, "--maps")[1][-1])
    assert tall.width == flat.width and tall.height > flat.height


def test_subjects_are_short_for_segregation(generate, run, monkeypatch):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    code, out, err = generate("--subjects", "cat, dog", "--compare")
    assert (code, err) == (0, [])
    plain, controlled = (recipe.read(Path(path))[1] for path in out[:2])
    assert plain.controls == controlled.controls == ("segregation(cat, dog)",)
    assert plain.pixels != controlled.pixels
    assert run("reproduce", out[1])[1] == ["bit-identical"]


def test_things_of_the_glyph_world_are_found_in_the_prompt():
    assert asked.glyph_things("a cat and a red car") == ["cat", "car"]
    assert asked.glyph_things("a cat, a cat and a painting") == ["cat#1", "cat#2"]


# --- reproduce --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
def test_reproduce_draws_the_same_bits(generate, run, which):
    _, drawn, _ = generate(
        "--compare", "--maps", "--control", "damp(cat)", "--negative", "dog", "--guidance", 2, "--seed", 9
    )
    code, out, err = run("reproduce", drawn[which], "--out", "again")
    assert (code, out[-1], err) == (0, "bit-identical", [])
    again, known = recipe.read(Path(out[0]))
    assert again.tobytes() == Image.open(drawn[which]).tobytes()
    assert known.shows == ("plain", "controlled", "comparison")[which]


def test_reproduce_tells_what_has_changed(generate, run, tmp_path, monkeypatch):
    _, (drawn,), _ = generate()
    other = pipelines.sd1()
    other.unet.conv_in.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(recipe, "installed_versions", lambda: {"attnctl": "9", "torch": "9"})
    code, out, err = run("reproduce", drawn, "--model", tmp_path / "other")
    assert code == 1 and out[-1].startswith("differs: ")
    assert any("redrawn with torch 9" in line for line in err)
    assert any("weights" in line for line in err)


def test_reproduce_overwrites_nothing_and_records_what_it_used(generate, run, tmp_path):
    _, (drawn,), _ = generate()
    before = Path(drawn).read_bytes()
    other = pipelines.sd1()
    other.unet.conv_in.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    for name in ("again", "again-2"):
        code, out, _ = run("reproduce", drawn, "--out", "out", "--model", tmp_path / "other", "--device", "cpu")
        assert code == 1 and Path(out[0]) == Path(drawn).with_name(f"{Path(drawn).stem}-{name}.png")
    known = recipe.read(Path(out[0]))[1]
    assert known.model == str(tmp_path / "other") and known.weights != recipe.read(Path(drawn))[1].weights
    assert Path(drawn).read_bytes() == before


# --- sites and judge --------------------------------------------------------------------------------------------------


def test_sites_lists_every_site(run, tiny):
    code, out, _ = run("sites", tiny)
    assert code == 0
    pipe = attnctl.load(tiny)
    for site in attnctl.sites(pipe):
        (line,) = [line for line in out if f" {site.name} " in line]
        assert f" {site.kind} " in line and ("0:77" in line) == (site.kind == "cross")


def test_sites_selects_and_gives_grids_for_a_size(run, tiny):
    _, out, _ = run("sites", tiny, "--select", "cross", "--size", "24x16")
    rows = [line for line in out if "attn" in line]
    assert rows and all("attn2" in row for row in rows)
    assert any("8x12" in row for row in rows)  # rows by columns; this autoencoder halves the size


class Reading:
    """Sees a cat in a picture of even width."""

    def __init__(self, picture):
        self.things = 1 - picture.width % 2

    def __str__(self):
        return "a cat" if self.things else "nothing"

    def to_dict(self):
        return {"things": self.things}


@pytest.fixture
def judge(monkeypatch):
    import attnctl.glyph

    double = ModuleType("attnctl.glyph.judge")
    double.asked = []
    double.load = lambda threshold=None: (
        double.asked.append(threshold) or SimpleNamespace(read=lambda pictures: [Reading(one) for one in pictures])
    )
    monkeypatch.setitem(sys.modules, "attnctl.glyph.judge", double)
    monkeypatch.setattr(attnctl.glyph, "judge", double, raising=False)
    return double


def test_judge_prints_json(run, judge):
    for width in (8, 9):
        Image.new("L", (width, 8)).save(f"{width}.png")
    code, out, _ = run("judge", "8.png", "9.png")
    assert code == 0
    assert json.loads("\n".join(out)) == [{"image": "8.png", "things": 1}, {"image": "9.png", "things": 0}]
    assert judge.asked == [0.5]


def test_a_judge_can_be_stricter(run, judge):
    Image.new("L", (8, 8)).save("8.png")
    assert run("judge", "8.png", "--threshold", 0.98)[0] == 0 and judge.asked == [0.98]
    for wrong in 0, 1, -1, "nan":
        code, _, err = run("judge", "8.png", "--threshold", wrong)
        assert code == 2 and err == [f"attnctl: --threshold {wrong}: a probability between 0 and 1"]


def test_an_embedded_model_is_judged_and_its_things_are_found(run, judge, tiny, monkeypatch):
    from attnctl import loading

    monkeypatch.setattr(loading, "MODELS", tiny.parent)
    monkeypatch.setattr(asked, "known_controls", lambda: {"Segregation": Damp})
    code, out, err = run("generate", WORDS, "--model", "tiny", "--steps", 1, "--compare")
    assert code == 0
    assert out[:2] == ["plain       the judge sees a cat", "controlled  the judge sees a cat"]
    assert err == ["attnctl: no control was given, so segregation(cat, dog) is compared with none"]
    assert recipe.read(Path(out[-1]))[1].model == "tiny"


# --- bad input: one clear line, exit code 2, nothing left behind ------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "nonesuch"], "unknown model 'nonesuch'"),
        (["--size", "25x16"], "size 25x16: both sides must be positive multiples of 2"),
        (["--size", "26x16"], "have to be divisible by 8"),  # the pipeline's own check
        (["--size", "16"], "--size 16: write it as WIDTHxHEIGHT"),
        (["--size", "0x16"], "size 0x16"),
        (["--size", "100000x100000"], "--size 100000x100000: a side has at most 8192 pixels"),
        (["--size", "8x8194"], "--size 8x8194: a side has at most 8192 pixels"),
        (["--size", "9" * 5000 + "x8"], "at most 8192 pixels"),
        (["--control", "nonesuch(cat)"], "unknown control 'nonesuch'; there are damp"),
        (["--control", "damp(cat, weight=1)"], "there is no setting 'weight'; there are strength"),
        (["--control", "damp(cat, strength=strong)"], "strength = strong does not fit"),
        (["--control", "damp(lion)"], "'lion'"),
        (["--compare"], "--compare has nothing to compare with"),
        (["--subjects", "cat"], "at least two phrases"),
        (["--subjects", "cat, dog", "--control", "damp(cat)"], "give one of the two"),
        (["--steps", "0"], "--steps 0: from 1 to 10000"),
        (["--threads", "0"], "--threads 0: from 1 to 1024"),
        (["--threads", "1000000"], "--threads 1000000: from 1 to 1024"),
        (["--count", "0"], "--count 0: at least 1"),
        (["--count", "many"], "valid integer"),
        (["--seed", "-1"], "--seed -1"),
        (["--guidance", "nan"], "--guidance nan"),
        (["--device", "quantum"], "device 'quantum' cannot be used here"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--nonesuch"], "No such option: --nonesuch"),
        (["--out", "file/below"], "--out file/below: "),
        (["--out", "/proc/foo"], "--out /proc/foo: /proc cannot be written"),
    ],
)
def test_bad_request(generate, somewhere, words, said):
    (somewhere / "file").write_text("in the way")
    code, out, err = generate(*words)
    assert (code, out, len(err)) == (2, [], 1), err
    assert err[0].startswith("attnctl: ") and said in err[0]
    assert [path.name for path in somewhere.iterdir()] == ["file"]


def test_latents_that_are_not_finite_are_an_error_that_names_the_control(generate, somewhere, monkeypatch):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    code, out, err = generate("--control", "segregation(cat, dog, strength=1e30, window=[0, 1])")
    assert (code, out, len(err)) == (2, [], 1) and list(somewhere.iterdir()) == []
    assert "Segregation" in err[0] and "not finite" in err[0] and "strength" in err[0]


def test_a_picture_that_is_not_finite_is_an_error(generate, somewhere):
    code, out, err = generate("--control", "damp(cat, strength=1e38)")
    assert (code, out, len(err)) == (2, [], 1) and list(somewhere.iterdir()) == []
    assert "the picture is not finite" in err[0] and "Damp" in err[0]


def test_a_trace_is_data_and_pictures(generate, monkeypatch):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    code, out, err = generate("--control", "astar(cat, dog, window=[0, 1])", "--trace", "--compare")
    assert (code, err) == (0, [])
    told, *shown = map(Path, out)
    assert [path.stem.rsplit("-", 1)[1] for path in shown] == ["losses", "steps", "plain", "controlled", "comparison"]
    report = json.loads(told.read_text())
    assert (report["prompt"], report["seed"], report["calls"]) == (WORDS, 0, 2)
    assert [one["control"] for one in report["sites"]] == ["AStar"]
    (trace,) = report["traces"]
    assert [step["step"] for step in trace["steps"]] == [0, 1] and trace["updates"] == 2
    assert set(trace["steps"][0]["evaluations"][0]["losses"]) == {"segregation", "retention"}
    for picture in shown[:2]:
        assert len(Image.open(picture).convert("RGB").getcolors(1 << 20)) > 20


def test_a_trace_of_a_control_without_losses_has_no_curves(generate):
    code, out, err = generate("--control", "damp(cat, dog)", "--trace")
    assert (code, err) == (0, [])
    assert [Path(line).stem.rsplit("-", 1)[1] for line in out] == ["trace", "steps", "controlled"]
    code, out, err = generate("--trace")
    assert (code, out, len(err)) == (2, [], 1) and "give --control" in err[0]


def test_subjects_are_read_from_the_prompt(generate, monkeypatch):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    code, out, err = generate("--subjects", "auto", "--steps", 1, prompt="a red cat and a dog")
    assert code == 0 and err == ["attnctl: the prompt names red cat, dog: segregation(red cat, dog)"]
    assert recipe.read(Path(out[-1]))[1].controls == ("segregation(red cat, dog)",)
    code, _, err = generate("--subjects", "auto", prompt="a cat")
    assert code == 2 and "names one thing, 'cat'" in err[0]


@pytest.mark.parametrize(
    ("control", "filled"),
    [
        ("segregation", "segregation(red cat, dog)"),
        ("AStar()", "AStar(red cat, dog)"),
        ("excitation(strength=0.5)", "excitation(red cat, dog, strength=0.5)"),
        ("retention", "retention(red cat, dog)"),
    ],
)
def test_a_control_without_phrases_reads_them_from_the_prompt(generate, monkeypatch, control, filled):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    code, out, err = generate("--control", control, "--steps", 1, prompt="a red cat and a dog")
    assert code == 0 and err == [f"attnctl: the prompt names red cat, dog: {filled}"]
    assert recipe.read(Path(out[-1]))[1].controls == (filled,)


def test_a_control_without_phrases_on_an_embedded_model_knows_its_things(run, judge, tiny, monkeypatch):
    from attnctl import loading
    from attnctl.words import subjects

    monkeypatch.setattr(loading, "MODELS", tiny.parent)
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    monkeypatch.setattr(subjects, "read_subjects", lambda _: pytest.fail("no tagger is needed here"))
    code, out, err = run("generate", WORDS, "--model", "tiny", "--steps", 1, "--control", "segregation(strength=0.5)")
    assert code == 0 and err == ["attnctl: the prompt names cat, dog: segregation(cat, dog, strength=0.5)"]


def test_a_control_without_phrases_says_what_it_lacks(generate, monkeypatch):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    code, out, err = generate("--control", "segregation", prompt="a cat")
    assert (code, out, len(err)) == (2, [], 1) and "the prompt names one thing, 'cat'; two are kept apart" in err[0]
    code, out, err = generate("--control", "retention", "--steps", 1, prompt="a cat")
    assert code == 0 and err == ["attnctl: the prompt names cat: retention(cat)"]
    code, out, err = generate("--control", "retention(masks={cat: [0, 0, 0.5, 1]})", "--steps", 1)
    assert (code, err) == (0, [])
    code, out, err = generate("--control", "binding", "--steps", 1)
    assert code == 2 and "a modifier and its noun" in err[0]


def test_a_picture_left_alone_says_so(generate, run, monkeypatch):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    words = ("--compare", "--trace", "--control", "segregation(cat, dog, look_ahead=1, peak_target={})")
    code, out, err = generate(*words[:-1], words[-1].format("1e-6"))
    assert (code, err) == (0, [])
    assert out[0] == "controlled  left alone by Segregation, which looked ahead and saw every phrase"
    trace = json.loads(next(Path(line) for line in out if line.endswith("trace.json")).read_text())
    assert trace["traces"][0]["look_ahead"]["left_alone"] == [0]
    sheet = Image.open(out[-1])
    assert run("reproduce", out[-1])[1][-1] == "bit-identical"
    with monkeypatch.context() as patch:
        from attnctl.app import drawing

        patch.setattr(drawing, "_left_alone", lambda *_: ())  # what the sheet says is in its caption
        _, silent, _ = generate(*words[:-1], words[-1].format("1e-6"), "--out", "silent")
        assert Image.open(silent[-1]).tobytes() != sheet.tobytes()
    code, out, err = generate(*words[:-1], words[-1].format("1"))
    assert not any("left alone" in line for line in out)
    trace = json.loads(next(Path(line) for line in out if line.endswith("trace.json")).read_text())
    assert trace["traces"][0]["look_ahead"]["left_alone"] == []


@pytest.mark.parametrize("masks", ["{cat: %s}", "{'cat': '%s'}", "[[cat, %s]]", '(("cat", "%s"),)'])
def test_a_mask_file_is_named_on_the_command_line(generate, run, somewhere, monkeypatch, masks):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    left = Image.new("L", (16, 16))
    left.paste(255, (0, 0, 8, 16))
    left.save("left half.png")

    def pixels(masks):
        code, out, err = generate("--control", f"retention(cat, dog, masks={masks})", "--compare")
        assert (code, err) == (0, [])
        return recipe.read(Path(out[1]))[1].pixels, out[-1]

    drawn, sheet = pixels(masks % "left half.png")
    assert drawn == pixels("{cat: [0, 0, 0.5, 1]}")[0]
    Path("left half.png").unlink()  # the recipe holds what was in it
    assert run("reproduce", sheet)[:2] == (0, ["bit-identical"])


def test_a_mask_file_that_is_not_there(generate, monkeypatch):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    code, out, err = generate("--control", "retention(cat, masks={cat: nowhere.png})")
    assert (code, out, len(err)) == (2, [], 1) and "cannot read the picture nowhere.png" in err[0]


@pytest.fixture
def threads():
    """As many of torch's threads as there were, whatever a test does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield torch.get_num_threads
    torch.set_num_threads(before)


def test_an_embedded_model_draws_with_one_thread_unless_told(run, judge, tiny, monkeypatch, threads):
    from attnctl import loading

    monkeypatch.setattr(loading, "MODELS", tiny.parent)

    def used(*words):
        code, out, err = run("generate", WORDS, "--steps", 1, *words)
        assert (code, err) == (0, [])
        assert run("reproduce", out[-1])[:2] == (0, ["bit-identical"])
        return recipe.read(Path(out[-1]))[1].threads, threads()

    assert used("--model", "tiny") == (1, 1)
    assert used("--model", "tiny", "--threads", 2) == (2, 2)
    assert used("--model", tiny) == (2, 2)
    assert used("--model", tiny, "--threads", 1) == (1, 1)


def test_controls_are_listed_and_explained(run, monkeypatch):
    monkeypatch.setattr(asked, "known_controls", KNOWN)
    code, out, err = run("controls")
    assert (code, err) == (0, []) and any(line.startswith("segregation(*phrases, strength=1.0") for line in out)
    code, whole, err = run("controls", "Segregation")
    assert (code, err) == (0, []) and any("window: part of the schedule" in line for line in whole)
    code, out, err = run("controls", "nope")
    assert (code, out, len(err)) == (2, [], 1) and "unknown control 'nope'; there are astar, " in err[0]


def test_a_negative_prompt_without_guidance_is_told(generate):
    code, _, err = generate("--negative", "a bird", "--guidance", 1)
    assert code == 0 and len(err) == 1 and "--negative does nothing" in err[0]
    assert generate("--negative", "a bird", "--guidance", 2)[2] == []


def test_out_that_is_a_link_to_nowhere(generate, somewhere):
    (somewhere / "link").symlink_to("nowhere")
    code, out, err = generate("--out", "link/below")
    assert (code, out, len(err)) == (2, [], 1) and "is a link to nowhere" in err[0]


def test_a_full_disk_leaves_no_picture_and_names_the_path(generate, somewhere, monkeypatch):
    def save(picture, path, recipe, whole=recipe.save):
        if recipe.shows == "comparison":
            raise OSError(28, "No space left on device")
        whole(picture, path, recipe)

    monkeypatch.setattr(recipe, "save", save)
    code, out, err = generate("--compare", "--control", "damp(cat)", "--steps", 1)
    assert (code, out, len(err)) == (2, [], 1)
    assert "comparison.png: No space left on device" in err[0]
    assert not list(somewhere.rglob("*.png"))


def test_empty_prompt(generate):
    assert generate(prompt=" ") == (2, [], ["attnctl: the prompt is empty"])


def test_half_written_model(generate, tiny, somewhere, tmp_path_factory):
    import shutil

    broken = shutil.copytree(tiny, tmp_path_factory.mktemp("broken") / "model")
    weights = broken / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, err = generate("--model", broken)
    assert (code, out, len(err)) == (2, [], 1)
    assert f"{weights} is cut short" in err[0]
    assert list(somewhere.iterdir()) == []


def test_sliced_pipeline(generate, somewhere, monkeypatch):
    from attnctl import loading

    def load_sliced(model, **options):
        pipe = load(model, **options)
        pipe.enable_attention_slicing(1)
        return pipe

    load = loading.load
    monkeypatch.setattr(loading, "load", load_sliced)
    code, out, err = generate("--control", "damp(cat)")
    assert (code, out, len(err)) == (2, [], 1)
    assert "Sliced" in err[0] or "sliced" in err[0]
    assert list(somewhere.iterdir()) == []


def test_a_picture_that_is_not_ours(run, somewhere):
    Image.new("RGB", (8, 8)).save("bare.png")
    assert run("reproduce", "bare.png")[0] == 2
    code, out, err = run("reproduce", "none.png", "--out", "again")
    assert (code, out, err) == (2, [], ["attnctl: cannot read none.png: there is no such file"])
    assert [path.name for path in somewhere.iterdir()] == ["bare.png"]


def rewritten(path, **changes):
    """The PNG at `path` with a recipe that somebody has changed; of the same pixels."""
    picture, known = recipe.read(Path(path))
    info = recipe.PngInfo()
    info.add_itxt(recipe.CHUNK, json.dumps(json.loads(known.to_json()) | changes))
    picture.save("changed.png", pnginfo=info)
    return "changed.png"


def test_a_recipe_with_a_million_threads_is_refused(generate, run):
    code, out, err = run("reproduce", rewritten(generate()[1][0], threads=1_000_000))
    assert (code, out, len(err)) == (2, [], 1) and "threads is 1000000, not a whole number from 1 to 1024" in err[0]


EVIL = "\x1b[2J\x1b]0;gone\x07\r\nattnctl: all is well\x9b31m\u202e"


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": {f"torch{EVIL}": EVIL}},
        {"weights": EVIL, "model": None},
        {"model": EVIL},
        {"device": f"cpu{EVIL}"},
        {"dtype": EVIL},
        {"controls": [EVIL], "shows": "controlled"},
        {"controls": [f"damp(cat, {EVIL})"], "shows": "controlled"},
        {"maps": [EVIL], "shows": "maps"},
        {"shows": EVIL},
        {EVIL: 1, "seed": EVIL},
    ],
)
def test_text_from_a_file_says_nothing_to_the_terminal(generate, run, tiny, monkeypatch, capfd, changes):
    drawn = generate()[1][0]
    more = []
    if "model" in changes and changes["model"] is None:
        changes = changes | {"model": f"{tiny}{EVIL}"}
        more = ["--model", tiny]
    monkeypatch.setattr(sys, "argv", ["attnctl", "reproduce", rewritten(drawn, **changes), *map(str, more)])
    with pytest.raises(SystemExit):
        cli.main()
    said = "".join(capfd.readouterr())
    assert said and all(char.isprintable() or char == "\n" for char in said), said
    assert all(line.startswith(("attnctl: ", "differs: ", "bit-identical")) for line in said.splitlines())
    assert not any(line.startswith("attnctl: all is well") for line in said.splitlines())


@pytest.mark.parametrize("module", ["typer", "torch", "diffusers"])
def test_an_interrupt_during_imports_is_one_line(somewhere, module):
    script = f"""
import sys, runpy
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Stop())
sys.argv = ["attnctl", "generate", "a cat"]
import attnctl.__main__
attnctl.__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=somewhere, env=HERE)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "attnctl: interrupted")


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(cli, "checked", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("generate", "a cat")


def test_help_and_version_import_nothing_heavy(somewhere):
    script = "import sys; from attnctl.app.cli import main\ntry: main()\nexcept SystemExit as stop: code = stop.code\n"
    script += "print(code, sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    for words in (["--help"], ["generate", "--help"], ["--version"], ["generate", "a cat", "--size", "1"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=somewhere, env=HERE
        )
        assert done.stdout.splitlines()[-1] == ("2 []" if words[-1] == "1" else "0 []"), done.stderr
