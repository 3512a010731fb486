"""Job files: the formats, axes, overrides, pictures as jobs, wildcards; and what is wrong with a file, in one line."""

import json
import re
import sys
from pathlib import Path

import pytest
import tiny as pipelines

from attnctl.app import recipe
from attnctl.app.batch import job_files, jobs, running
from attnctl.app.batch.faults import JobError

ROOT = Path(__file__).parent.parent


def rows(file, *overrides):
    placed = job_files.read_jobs(file, job_files.read_overrides(overrides))
    return [(one.job.prompt, one.job.seed, one.job.controls) for one in placed]


SEGREGATION = "segregation(cat, dog)"


def test_the_three_formats_say_the_same(write):
    yaml = "- {prompt: a cat and a dog, seed: 3, controls: [segregation]}\n- {prompt: a dog, guidance: 2, size: 64x32}"
    lines = (
        '{"prompt": "a cat and a dog", "seed": 3, "controls": "segregation"}\n\n'
        '{"prompt": "a dog", "guidance": 2, "size": "64x32"}\n'
    )
    table = "prompt,seed,controls,guidance,size\na cat and a dog,3,segregation,,\na dog,,none,2,64x32\n"
    files = [write("a.yaml", yaml), write("a.jsonl", lines), write("a.csv", "\ufeff" + table)]
    read = [[one.job for one in job_files.read_jobs(file)] for file in files]
    assert read[0] == read[1] == read[2]
    assert read[0][0].controls == (SEGREGATION,) and read[0][1].shape == (64, 32)
    assert [job_files.read_jobs(file)[1].place.rpartition(", ")[2] for file in files] == ["row 2", "line 3", "line 3"]


def test_lists_in_a_table(write):
    table = f'prompt,controls,maps\na cat and a dog,"{SEGREGATION}; retention(cat, dog)",cat; dog\na dog,,true\n'
    first, second = (one.job for one in job_files.read_jobs(write("a.csv", table)))
    assert first.controls == (SEGREGATION, "retention(cat, dog)") and first.maps == ("cat", "dog")
    assert second.maps is True and second.controls == ()


def test_axes_make_many_jobs_of_a_row(write):
    text = """
    prompt: a cat and a dog
    product: {seed: [1, 2], controls: [none, segregation]}
    zip: {steps: [1, 2], guidance: [3, 4]}
    """
    file = write("a.yml", text)
    found = [one.job for one in job_files.read_jobs(file)]
    assert [(job.steps, job.guidance, job.seed, job.controls) for job in found] == [
        (steps, guidance, seed, controls)
        for steps, guidance in ((1, 3.0), (2, 4.0))
        for seed in (1, 2)
        for controls in ((), (SEGREGATION,))
    ]
    line = {"product": {"prompt": ["a cat", "a dog"], "seed": [0, 1]}}
    assert [row[:2] for row in rows(write("a.jsonl", json.dumps(line)))] == [
        ("a cat", 0),
        ("a cat", 1),
        ("a dog", 0),
        ("a dog", 1),
    ]


RECIPES = sorted((ROOT / "demos" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_job_files_of_the_demos(file):
    if file.stem == "wildcards":
        pytest.importorskip("dynamicprompts")
    count = len(job_files.read_jobs(file))
    assert count == 276 * 4 * 6 if file.stem == "benchmark" else 4 < count <= 40


def test_there_is_a_job_file_for_each_method():
    text = "".join(file.read_text() for file in RECIPES)
    pages = {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")}
    commands = {"calibration", "composition", "head-search"}  # commands of their own, no controls of a prompt
    methods = pages - commands - {"perturbation"} | {"perturb"}
    assert methods <= {file.stem for file in RECIPES} and "couple(" in text


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_job_files_of_the_demos_can_be_drawn(file, tmp_path):
    if file.stem == "wildcards":
        pytest.importorskip("dynamicprompts")
    placed = job_files.read_jobs(file, {"seed": 1, "steps": 1})[:8]
    results = list(running.run([one.job for one in placed], tmp_path))
    assert [result.error for result in results if result.error] == []


def test_the_page_about_batches(write):
    page = (ROOT / "docs" / "batch.md").read_text()
    (example,) = re.findall(r"    model: glyph-sd\n(?:    .*\n)+", page)
    assert len(job_files.read_jobs(write("a.yaml", example))) == 16
    table = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert re.findall(r"`(\w+)`", table) == list(jobs.FIELDS)


BAD = {
    "unknown field.yaml": ("- prompt: a cat\n- {prompt: a dog, sede: 1}", "row 2: unknown field 'sede'; did you mean"),
    "no prompt.yaml": ("- seed: 1", "row 1: prompt is missing"),
    "empty prompt.yaml": ("- prompt: ' '", "row 1: prompt ' ': it is empty"),
    "negative seed.jsonl": (
        '{"prompt": "a"}\n\n{"prompt": "a", "seed": -1}',
        "line 3: seed -1: it should be greater than or equal to 0",
    ),
    "seed as text.jsonl": ('{"prompt": "a", "seed": "one"}', "line 1: seed 'one': it should be a whole number"),
    "no number.jsonl": ('{"prompt": "a", "guidance": NaN}', "line 1: guidance nan: it should be a finite number"),
    "half steps.csv": ("prompt,steps\na,1\na,1.5\n", "line 3: steps '1.5': it should be a whole number"),
    "size.csv": ("prompt,size\na,512\n", "line 2: size '512': write it as WIDTHxHEIGHT"),
    "yes and no.yaml": ("prompt: a cat\nnegative: no", "row 1: negative False: it should be text"),
    "syntax.yaml": ("- prompt: a cat\n- prompt: [a dog\n", "line 3: "),
    "twice.yaml": ("- prompt: a\n  seed: 1\n  seed: 2", "line 1: seed is given twice"),
    "syntax.jsonl": ('{"prompt": "a"}\n{"prompt": }', "line 2: it is no JSON"),
    "no row.jsonl": ('{"prompt": "a"}\n7', "line 2: 7 is no row"),
    "cells.csv": ("prompt,seed\na,1,2\n", "line 2: 3 cells under 2 fields"),
    "head.csv": ("promt\na\n", "line 1: unknown field 'promt'; did you mean prompt?"),
    "quote.csv": ('prompt\n"a\n', "it is no CSV"),
    "not utf-8.csv": (b"prompt\na\n\xff\n", "line 3: it is not UTF-8 text"),
    "control.yaml": ("- {prompt: a cat, controls: [segregatio]}", "row 1: controls: unknown control 'segregatio'; did"),
    "setting.csv": ('prompt,controls\na,"segregation(a, b, strong=1)"\n', "line 2: controls: control 'segregation"),
    "missing file.yaml": ("- {prompt: a cat, controls: 'perturb(heads=none.json)'}", "row 1: controls: "),
    "lengths.yaml": ("prompt: a\nzip: {seed: [1, 2], steps: [1]}", "row 1: zip: its lists are as long as each other"),
    "no list.yaml": ("prompt: a\nproduct: {seed: 1}", "row 1: product.seed 1: it takes a list"),
    "axis.yaml": ("prompt: a\nproduct: {seeds: [1]}", "row 1: product: unknown field 'seeds'; did you mean seed?"),
    "axis and field.yaml": ("prompt: a\nseed: 1\nproduct: {seed: [1]}", "row 1: product.seed: the field is given"),
    "too many.yaml": (f"prompt: a\nproduct: {{seed: {[1] * 400}, steps: {[1] * 400}}}", "row 1: more than 100000 jobs"),
    "model.yaml": ("- {prompt: a, model: glyph-xd}", "row 1: model 'glyph-xd': unknown model"),
    "object.yaml": ("- !!python/object:os.system {}", "line 1: "),
    "loop.yaml": ("- prompt: a\n  controls: &a [*a]", "row 1: controls "),
    "half a character.jsonl": ('{"prompt": "\\ud800"}', "line 1: prompt '\\ud800': it holds half a character"),
    "one thing.jsonl": ('{"prompt": "a cat", "controls": "segregation"}', "line 1: controls: "),
    "trace.csv": ("prompt,trace\na,perhaps\n", "line 2: trace 'perhaps': it should be a boolean"),
    "steps.yaml": ("- {prompt: a, steps: 0}", "row 1: steps 0: it should be greater than or equal to 1"),
    "huge.yaml": ("- {prompt: a, size: 99999x64}", "row 1: size '99999x64': a side has 1 to 8192 pixels"),
    "maps.jsonl": ('{"prompt": "a", "maps": "cat"}', "line 1: maps 'cat': it takes a list of phrases, or true"),
    "brackets.yaml": ("- {prompt: a cat, controls: 'segregation(cat'}", "row 1: controls: cannot read the control"),
    "tab.yaml": ("- prompt: a\n\tseed: 1", "line 2: "),
    "two.yaml": ("prompt: a\n---\nprompt: b", "line 2: "),
    "nul.jsonl": (b'{"prompt": "a\0"}', "line 1: it is no JSON"),
    "wildcards.yaml": ("- {prompt: a, wildcards: some}", "row 1: wildcards 'some': write all, or how many"),
    "no template.yaml": ("- {wildcards: all}", "row 1: wildcards: there is no prompt for them"),
    "axis of axes.yaml": ("prompt: a\nproduct: [1]", "row 1: product [1]: it takes fields, each with the list"),
    "empty.csv": ("", "it holds no job"),
    "jobs.txt": ("a", "the name of a job file ends in one of .yaml"),
}


def test_there_are_enough_of_them():
    assert len(BAD) >= 40


@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_one_line_with_its_place(write, command, tmp_path, name):
    content, said = BAD[name]
    code, out, err = command("batch", write(name, content), "--out", tmp_path / "out")
    assert (code, out, len(err)) == (2, [], 1), err
    assert name in err[0] and said in err[0] and len(err[0]) < 400 + len(str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_all_faults_of_a_file_are_told(write, command):
    code, _, err = command("batch", write("a.csv", "prompt,seed\na,-1\nb,1\nc,x\n"))
    assert code == 2 and [line.rpartition("line ")[2][:7] for line in err] == ["2: seed", "4: seed"]


def test_schema_is_that_of_the_rows(command):
    code, out, _ = command("batch", "--schema")
    schema = json.loads("\n".join(out))
    assert code == 0 and set(schema["properties"]) == {*jobs.FIELDS, "product", "zip", "wildcards"}


# --- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_stand_for_what_the_rows_say(write):
    file = write("a.yaml", "prompt: a cat and a dog\nproduct: {seed: [1, 2], controls: [none, segregation]}")
    assert rows(file, "seed=7") == [("a cat and a dog", 7, ()), ("a cat and a dog", 7, (SEGREGATION,))]
    assert rows(file, "seed=[8, 9]", "controls=astar; excitation(cat)") == [
        ("a cat and a dog", seed, ("astar(cat, dog)", "excitation(cat)")) for seed in (8, 9)
    ]
    assert [row[2] for row in rows(file, "seed=0", "controls=[none, astar]")] == [(), ("astar(cat, dog)",)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "sede=1"], "--set sede=1: there is no field 'sede'; did you mean seed?"),
        (["--set", "seed"], "--set seed: write it as field=value"),
        (["--set", "seed=1", "--set", "seed=2"], "--set seed=2: seed is set twice"),
        (["--set", "seed=one"], "row 1: seed 'one': it should be a whole number"),
        (["--set", "seed=[1, [2]"], "--set seed=[1, [2]: "),
        (["--set", "seed=[]"], "row 1: product.seed []: it takes a list of values"),
    ],
    ids=str,
)
def test_an_override_that_is_none_is_one_line(write, command, tmp_path, words, said):
    code, out, err = command("batch", write("a.yaml", "prompt: a"), "--out", tmp_path / "out", *words)
    assert (code, out, len(err)) == (2, [], 1) and said in err[0] and not (tmp_path / "out").exists()


# --- pictures as jobs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def night(tmp_path_factory):
    """A folder of pictures of a tiny pipeline: plain with maps, controlled, of another size."""
    model, out = tmp_path_factory.mktemp("models") / "tiny", tmp_path_factory.mktemp("night")
    pipelines.sd1().save_pretrained(model)
    fixed = {"prompt": "a cat and a dog", "steps": 1, "model": str(model)}
    other = [{"maps": ["cat"]}, {"controls": SEGREGATION, "guidance": 2.0}, {"size": "64x32", "negative": "a bird"}]
    assert len(list(running.run([fixed | one for one in other], out))) == 3
    return out


def test_pictures_are_jobs(night, tmp_path):
    found = [one.job for one in job_files.read_jobs(night)]
    assert {(job.guidance, job.size, job.negative, job.maps, job.controls, job.steps) for job in found} == {
        (7.5, None, None, ("cat",), (), 1),
        (2.0, None, None, (), (SEGREGATION,), 1),
        (7.5, "64x32", "a bird", (), (), 1),
    }
    again = list(running.run(found, tmp_path / "again"))
    pixels = [
        {recipe.read(path)[1].pixels for path in one.glob("*-????????????.png")} for one in (night, tmp_path / "again")
    ]
    assert all(result.drawn for result in again) and pixels[0] == pixels[1]


def test_pictures_with_overrides(night, command, tmp_path):
    words = ["--set", "seed=[5, 6]", "--set", "controls=excitation(cat)", "--set", "size=32x32"]
    code, said, _ = command("batch", night, "--out", tmp_path / "again", *words)
    assert code == 0 and said[-1].startswith("6 pictures drawn")
    found = [recipe.read(path)[1] for path in (tmp_path / "again").glob("*-????????????.png")]
    assert {(one.seed, one.controls) for one in found} == {(seed, ("excitation(cat)",)) for seed in (5, 6)}


def test_a_folder_without_pictures_of_ours_is_one_line(command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "a.png").write_bytes(b"no picture")
    for folder, said in (("empty", "it holds no picture of ours"), ("cut", "it is not a whole picture")):
        code, out, err = command("batch", tmp_path / folder, "--out", tmp_path / "out")
        assert (code, out, len(err)) == (2, [], 1) and said in err[0] and not (tmp_path / "out").exists()


# --- wildcards --------------------------------------------------------------------------------------------------------


@pytest.fixture
def animals(tmp_path):
    pytest.importorskip("dynamicprompts")
    (tmp_path / "wildcards").mkdir()
    (tmp_path / "wildcards" / "animal.txt").write_text("cat\ndog\n# no animal\n\nlion\n")
    (tmp_path / "wildcards" / "pair.txt").write_text("__animal__ and a __plant__\n")


def test_wildcards_make_many_prompts_of_one(write, animals):
    row = {"prompt": "a {red|blue} car and a __animal__", "controls": "segregation"}
    found = rows(write("a.jsonl", json.dumps(row | {"wildcards": "all", "product": {"seed": [1, 2]}})))
    pairs = [(colour, animal) for colour in ("red", "blue") for animal in ("cat", "dog", "lion")]
    assert found == [
        (f"a {colour} car and a {animal}", seed, (f"segregation(car, {animal})",))
        for seed in (1, 2)
        for colour, animal in pairs
    ]
    some = [rows(write("a.jsonl", json.dumps(row | {"wildcards": 3}))) for _ in range(2)]
    assert some[0] == some[1] and len(some[0]) <= 3 and {one[0] for one in some[0]} <= {one[0] for one in found}


def test_without_the_field_a_prompt_is_what_it_is(write):
    assert rows(write("a.jsonl", '{"prompt": "a {red|blue} __car__"}')) == [("a {red|blue} __car__", 0, ())]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a __anmal__", "prompt 'a __anmal__': no wildcards/anmal.txt; did you mean animal?"),
        ("a __pair__", "prompt 'a __pair__': no wildcards/plant.txt"),
        ("a {red", "prompt 'a {red': the wildcards cannot be read: "),
        ("", "prompt '': it is empty"),
        ("{" * 500, "the wildcards cannot be read: "),
    ],
    ids=lambda text: text[:20],
)
def test_wildcards_that_cannot_be_read(write, animals, prompt, said):
    with pytest.raises(JobError) as error:
        rows(write("a.jsonl", json.dumps({"prompt": prompt, "wildcards": "all"})))
    assert said in str(error.value) and "line 1" in str(error.value) and len(str(error.value)) < 400


def test_wildcards_need_dynamicprompts(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "dynamicprompts.generators", None)
    with pytest.raises(JobError, match='wildcards need dynamicprompts: pip install "attnctl'):
        rows(write("a.yaml", "{prompt: 'a {b|c} of its own', wildcards: all}"))
