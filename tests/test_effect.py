"""benchmarks/effect.py: what a folder of results may be gone on with, and how it is asked. Nothing is really drawn."""

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cases
import effect
import effect_report
import numpy as np
import pytest
from PIL import Image

from attnctl.glyph.judge import Reading, Seen
from attnctl.glyph.words import Prompt
from attnctl.processors import Segregation

BENCHMARKS = Path(effect.__file__).parent


class Drawn:
    """Stands for the pipeline: grey pictures, as many as asked for; each batch is noted.

    On its clock a picture takes a second, and two more for each control.
    """

    def __init__(self):
        self.batches, self.controls, self.now = [], [], 0.0

    def __call__(self, pipe, controls, texts, seeds, steps, guidance):
        self.batches.append(len(texts))
        self.controls.append(len(controls))
        self.now += len(texts) * (1 + 2 * len(controls))
        return [Image.new("RGB", (8, 8), (seed % 256,) * 3) for seed in seeds]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The drawing, in an empty folder, with all that is slow replaced."""
    drawing = Drawn()
    eye = SimpleNamespace(read=lambda images: [Reading(())] * len(images))
    pipe = SimpleNamespace(set_progress_bar_config=lambda disable: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(effect, "draw", drawing)
    monkeypatch.setattr(effect, "time", SimpleNamespace(perf_counter=lambda: drawing.now))
    monkeypatch.setattr(effect.attnctl, "load", lambda model: pipe)
    monkeypatch.setattr(effect.judge, "load", lambda: eye)
    monkeypatch.setattr(cases, "weights_hash", lambda pipe: "weights")
    return drawing


@pytest.fixture
def run(monkeypatch, capfd):
    """run("--seeds", 2, ...) -> (exit code, stdout, lines of stderr)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["effect.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            effect.run()
        out, err = capfd.readouterr()
        return stop.value.code, out, err.splitlines()

    return run


@pytest.fixture
def part(run, drawn):
    """24 pictures of each condition, in batches of 12, in the folder "o"; the test gives the rest."""
    return lambda *words: run("--subset", "--out", "o", *words)


def refusal(answer):
    code, _, lines = answer
    assert code == 2 and len(lines) == 1, lines
    return lines[0]


def test_all_is_drawn_once_and_summed_up(part, drawn):
    code, out, err = part()
    assert (code, err) == (0, []) and drawn.batches == [12] * 4
    results = Path("o/results.jsonl").read_text().splitlines()
    assert len({json.loads(line)["case"] for line in results}) == len(results) == 48
    assert len(list(Path("o/pictures").iterdir())) == 48 and Path("o/sheet.png").exists()
    assert list(json.loads(Path("o/effect.json").read_text())["rates"]["all"]["both present"]) == [
        "none",
        "segregation",
    ]
    assert part()[0] == 0 and len(drawn.batches) == 4


def test_conditions_take_turns_and_their_times_are_told(part, drawn):
    _, out, _ = part()
    assert drawn.controls == [0, 1, 0, 1] and "3.00 x" in out
    assert json.loads(Path("o/effect.json").read_text())["rates"]["all"]["time"] == {
        "none": {"value": 1.0},
        "segregation": {"value": 3.0},
    }
    log = Path("o/results.jsonl")
    untimed = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in log.open()]
    log.write_text("".join(json.dumps(line) + "\n" for line in untimed))
    _, out, _ = part()  # of a folder from before times were kept
    assert "time" not in json.loads(Path("o/effect.json").read_text())["rates"]["all"] and " x " not in out


@pytest.mark.parametrize("cut", [1, 40])
def test_after_a_line_cut_short_by_a_kill_results_start_on_a_fresh_one(part, drawn, cut):
    """Without its newline alone the line is whole, so it counts."""
    part("--controls", "none")
    log = Path("o/results.jsonl")
    log.write_bytes(log.read_bytes()[:-cut])
    for name in ("none", "segregation"):
        assert part("--controls", name)[0] == 0
    assert drawn.batches == [12] * (4 if cut == 1 else 5)  # a batch is drawn whole
    found = cases.read_done(log, Path("o/pictures"))
    assert len(found) == 48 and len(log.read_text().splitlines()) == (48 if cut == 1 else 49)


def test_a_result_without_its_picture_is_drawn_again(part, drawn):
    part("--controls", "none")
    gone = sorted(Path("o/pictures").iterdir())[5]
    gone.unlink()
    others = {path: path.stat().st_mtime_ns for path in Path("o/pictures").iterdir()}
    code, out, _ = part("--controls", "none")
    assert code == 0 and "23 of 24" in out and drawn.batches == [12] * 3 and gone.exists()
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_setting_holds_what_decides_results(part):
    part("--guidance", 2)
    setting = json.loads(Path("o/setting.json").read_text())
    assert (setting["batch"], setting["steps"], setting["guidance"]) == (12, 20, 2.0)
    assert setting["versions"].keys() == {"attnctl", "torch", "diffusers", "transformers"}
    assert setting["conditions"]["none"] == []
    (control,) = setting["conditions"]["segregation"]
    assert control.startswith("Segregation(phrases=(") and "window=None" in control


def test_further_conditions_and_seeds_join_a_folder(part, run, drawn):
    part("--controls", "none")
    assert part("--controls", "segregation")[0] == 0 and drawn.batches == [12] * 4
    assert json.loads(Path("o/setting.json").read_text())["conditions"].keys() == {"none", "segregation"}
    assert part()[0] == 0 and drawn.batches == [12] * 4
    assert run("--out", "o", "--seeds", 2, "--controls", "none")[0] == 0
    assert drawn.batches[4:] == [12] * 46
    assert len(cases.read_done(Path("o/results.jsonl"), Path("o/pictures"))) == 2 * 276 + 24


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--steps", 3), "steps 20, now 3"),
        (("--guidance", 7), "guidance 3.0, now 7.0"),
        (("--batch", 5), "batch 12, now 5"),
        (("--model", "other", "--guidance", 3), "model glyph-sd, now other"),
    ],
)
def test_other_settings_are_refused_by_name(part, drawn, more, said):
    part()
    before = Path("o/setting.json").read_text()
    assert f"other settings ({said})" in refusal(part(*more))
    assert len(drawn.batches) == 4 and Path("o/setting.json").read_text() == before


def test_another_version_and_other_controls_are_refused_by_name(part, monkeypatch):
    part()
    stronger = {"none": lambda prompts: [], "segregation": lambda prompts: [Segregation("cat", "dog", strength=3.0)]}
    monkeypatch.setattr(effect, "CONDITIONS", stronger)
    monkeypatch.setattr(cases, "CONDITIONS", stronger)
    assert part("--controls", "none")[0] == 0  # which did not change
    said = refusal(part())
    assert "(conditions.segregation [" in said and "('cat', 'dog'), strength=3.0" in said.partition("now")[2]
    versions = cases.installed_versions()
    monkeypatch.setattr(cases, "installed_versions", lambda: versions | {"torch": "9"})
    assert f"(versions.torch {versions['torch']}, now 9)" in refusal(part("--controls", "none"))


def test_a_folder_that_does_not_say_its_settings_is_refused(part):
    part()
    Path("o/setting.json").unlink()
    assert "batch not recorded, now 12" in refusal(part())
    Path("o/setting.json").write_text('{"mod')
    assert "batch not recorded, now 12" in refusal(part())


def test_a_folder_in_use_is_refused(part, drawn):
    Path("o").mkdir()
    with Path("o/results.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "another process is drawing into o;" in refusal(part())
    assert not drawn.batches and part()[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "file"), "file is a file, not a folder"),
        (("--out", "/proc/x"), "/proc cannot be written"),
        (("--controls", "none", "nope"), "no condition 'nope'; there are none, attend-and-excite,"),
        (("--steps", "0"), "--steps"),
        (("stray",), "stray"),
        (("--controls",), "requires an argument"),
    ],
)
def test_mistakes_are_told_in_one_line(run, drawn, words, said):
    Path("file").touch()
    assert said in refusal(run(*words))
    assert not Path("out").exists()


def test_an_unknown_model_is_told_in_one_line(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "unknown model 'nope'" in refusal(run("--model", "nope"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("--controls a b --seeds 2", "--controls a --controls b --seeds 2"),
        ("--controls=a b --subset", "--controls=a --controls b --subset"),
        ("--seeds 2 --controls a", "--seeds 2 --controls a"),
        ("--controls --seeds 2", "--controls --seeds 2"),
        ("a --controls b", "a --controls b"),
        ("", ""),
    ],
)
def test_controls_take_several_names(given, taken):
    assert effect.repeated(given.split()) == taken.split()


def test_help_shows_no_argument(run):
    code, out, _ = run("--help")
    assert code == 0 and "[OPTIONS]" in out and "[]" not in out


def test_as_a_program_it_is_silent_on_stderr(tmp_path):
    """The true model, its judge and the warnings of a fresh process; only the drawing is not."""
    code = (
        "import sys, effect; from PIL import Image\n"
        "effect.draw = lambda pipe, controls, texts, *more: [Image.new('RGB', (128, 128))] * len(texts)\n"
        "sys.argv[1:] = '--controls none segregation --subset --out o'.split(); effect.run()"
    )
    paths = {"PYTHONPATH": f"{BENCHMARKS}:{BENCHMARKS.parent}", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=paths, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "48/48" in done.stdout


# --- what is told -----------------------------------------------------------------------------------------------------


def reading(*things):
    """(concept, part of the width that it covers) each."""
    seen = []
    for concept, share in things:
        mask = np.zeros((32, 32), np.float32)
        mask[:, : round(32 * share)] = 1
        seen.append(Seen(concept, "red", (0, 0, share, 1), 0.9, mask))
    return Reading(tuple(seen))


def test_counts_stand_beside_rates_and_areas_beside_both(part, drawn, monkeypatch):
    pictures = {0: reading(("cat", 0.5), ("dog", 0.25)), 1: reading(("cat", 0.25))}
    eye = SimpleNamespace(read=lambda images: [pictures[image.getpixel((0, 0))[0]] for image in images])
    monkeypatch.setattr(effect.judge, "load", lambda: eye)
    asked = Prompt("a cat and a dog", "animals", (("cat", None), ("dog", None)))
    monkeypatch.setattr(effect, "benchmark", lambda: [asked] * 24)
    # of plain pictures the first 16 lack the dog; the control repairs 12 of those and breaks 2 of the others
    lacking = {"none": range(16), "segregation": [0, 1, 2, 3, 20, 21]}

    def draw(pipe, prompts, group, steps, guidance):
        drawn.now += len(group)
        return [Image.new("RGB", (8, 8), (int(case.prompt in lacking[case.condition]), 0, 0)) for case in group]

    monkeypatch.setattr(effect, "draw_batch", draw)
    monkeypatch.setattr(effect, "subset", lambda prompts, among=None, each=8: list(range(24)))
    monkeypatch.setattr(effect_report, "subset", lambda prompts, among=None, each=8: list(range(24)))
    code, out, err = part()
    assert (code, err) == (0, []), err
    told = json.loads(Path("o/effect.json").read_text())["rates"]["all"]
    change = told["both present"]["segregation"]["against none"]
    assert [change[kind][n] for kind in ("repaired", "broken") for n in ("hits", "n")] == [12, 16, 2, 8]
    assert "8 of 24, 33.3%" in out and "12 of 16" in out and "2 of 8" in out
    page = Path("o/table.md").read_text()
    assert "| segregation | 18 of 24, 75.0% (55-88) | +41.7" in page and "| 12 of 16 | 2 of 8 |" in page
    ratios = told["thing area"]["segregation"]
    assert ratios["n"] == 24 + 6 and ratios["value"] == 1.0


def test_the_area_of_a_thing_is_told_against_the_first_condition():
    before = effect.judged(effect.benchmark()[0], reading())
    assert before["areas"] == [0, 0]
    ratios = effect_report.area_ratios({"areas": [0.5, 0.25, 0, 0.1]}, {"areas": [0.25, 0.25, 0.3, 0]})
    assert ratios == [0.5, 1.0]  # only of what both pictures have
    assert reading(("cat", 0.25)).area_of("cat") == 0.25 and reading(("cat", 0.25)).area_of("dog") == 0
