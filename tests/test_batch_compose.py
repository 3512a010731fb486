"""Compositions in a batch: a `compose:` job is checked with the file, drawn, resumed and reported like any other."""

import json

import pytest
import tiny as pipelines
from PIL import Image, ImageDraw

from attnctl.app import recipe
from attnctl.app.batch import job_files, jobs, planning, pngs
from attnctl.app.batch.faults import JobError

PROMPT = "a cat and a red dog"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipelines.sd1().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    """A ground, and a disk that is cut out, in the folder of the job file."""
    Image.new("RGB", (48, 32), (90, 140, 200)).save(tmp_path / "ground.png")
    disk = Image.new("RGBA", (40, 40))
    ImageDraw.Draw(disk).ellipse((4, 4, 35, 35), fill=(220, 30, 40, 255))
    disk.save(tmp_path / "disk.png")
    disk.convert("RGB").save(tmp_path / "plain.png")
    return tmp_path


COMPOSE = {"background": "ground.png", "object": "disk.png", "box": [0.5, 0.25, 0.9, 0.9]}
COMPOSE |= {"words": "red dog", "others": "cat"}


def row(**changes):
    return {"prompt": PROMPT, "steps": 2, "size": "48x32", "compose": COMPOSE} | changes


@pytest.fixture
def some(write, pictures, tiny):
    """A job file of three compositions and a plain picture; `box` is of the last composition."""

    def some(box=(0.1, 0.25, 0.5, 0.9)):
        rows = [row(model=tiny, product={"seed": [1, 2]}), row(model=tiny, compose=COMPOSE | {"box": box})]
        rows.append({"prompt": PROMPT, "steps": 1, "model": tiny})
        return write("jobs.jsonl", "".join(json.dumps(one) + "\n" for one in rows))

    return some


def hashes(folder):
    return {path.name: recipe.pixel_hash(recipe.read(path)[0]) for path in folder.glob("*-????????????.png")}


def test_compositions_are_drawn_resumed_and_reported(some, command, tmp_path):
    out = tmp_path / "out"
    code, said, err = command("batch", some(), "--out", out, "--group", 4)
    assert code == 0 and said[-1].startswith("4 pictures drawn, 0 there already, 0 failed"), err
    before = hashes(out)
    sheets = sorted(out.glob("*-????????????-sheet.png"))
    assert len(before) == 4 and len(sheets) == 3
    made = [recipe.read(path)[1] for path in out.glob("*-????????????.png")]
    assert sorted(one.shows for one in made) == ["composed"] * 3 + ["plain"]
    assert "| compose | 3 |" in (out / "summary.md").read_text() and (out / "sheet.png").exists()
    lost = next(out.glob("*-2-????????????.png"))
    lost.unlink()
    code, said, _ = command("batch", some(), "--out", out, "--group", 4)
    assert said[-1].startswith("1 picture drawn, 3 there already")
    assert hashes(out) == before  # nothing of what was kept of other compositions shows in the bits
    command("batch", some(box=(0.2, 0.25, 0.6, 0.9)), "--out", out)
    assert len(hashes(out)) == 5
    assert command("reproduce", lost)[1] == ["bit-identical"]


def test_a_picture_that_changes_makes_another(some, pictures):
    file = some()

    def keys():
        return [planning.key_of(job) for job, _ in job_files.read_jobs(file)]

    before = keys()
    moved = pictures / "moved"
    moved.mkdir()
    for name in ("ground.png", "disk.png", "jobs.jsonl"):
        (moved / name).write_bytes((pictures / name).read_bytes())
    assert [planning.key_of(job) for job, _ in job_files.read_jobs(moved / "jobs.jsonl")] == before
    Image.new("RGB", (48, 32), (0, 140, 200)).save(pictures / "ground.png")
    assert [one == other for one, other in zip(keys(), before, strict=True)] == [False, False, False, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"compose": COMPOSE | {"background": "no.png"}}, "no.png: there is no such file"),
        ({"compose": COMPOSE | {"object": "plain.png"}}, "compose: the object needs a mask"),
        ({"compose": COMPOSE | {"box": [0, 0, 400, 1]}}, "ends beyond the picture"),
        ({"compose": COMPOSE | {"box": [0, 0, 1]}}, "objects.0.box"),
        ({"compose": COMPOSE | {"words": "pear"}}, "'pear' is not in the prompt"),
        ({"compose": COMPOSE | {"colour": "red"}}, "colour: Extra inputs are not permitted"),
        ({"compose": {"background": "ground.png"}}, "objects: Field required"),
        ({"compose": COMPOSE | {"preset": "papr"}}, "there is no preset 'papr'; did you mean paper"),
        ({"compose": COMPOSE | {"settings": {"strat": 0}}}, "there is no setting 'strat'; did you mean start"),
        ({"compose": COMPOSE | {"settings": {"start": "half"}}}, "start is a share, from 0 to 1; not 'half'"),
        ({"compose": COMPOSE | {"settings": {"steps": 3}}}, "steps stands beside the composition"),
        ({"compose": "car.png"}, "it takes background, object and box"),
        ({"maps": True}, "maps: a composition has none"),
        ({"trace": True}, "trace: a composition has none"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_place(write, pictures, change, said):
    with pytest.raises(JobError) as told:
        job_files.read_jobs(write("jobs.jsonl", json.dumps(row(**change)) + "\n"))
    (line,) = told.value.lines
    assert "jobs.jsonl, line 1: " in line and said in line and "\n" not in line


def test_other_ways_to_write_them(write, pictures):
    yaml = "prompt: a cat and a red dog\ncompose:\n  background: ground.png\n  others: [cat]\n  objects:\n"
    yaml += "  - {object: disk.png, box: [0, 0, 0.4, 1], words: red}\n"
    yaml += "  - {object: disk.png, box: [24, 0, 48, 32], words: dog}\n"
    ((job, _),) = job_files.read_jobs(write("jobs.yaml", yaml))
    assert [one.words for one in job.compose.objects] == [("red",), ("dog",)]
    cell = json.dumps(COMPOSE).replace('"', '""')
    ((job, _),) = job_files.read_jobs(write("jobs.csv", f'prompt,compose\n{PROMPT},"{cell}"\n'))
    assert job.compose.others == ("cat",) and job.compose.background == str((pictures / "ground.png").resolve())
    whole = jobs.schema()["$defs"]["Compose"]
    assert {"background", "object", "box", "objects"} <= set(whole["properties"])


def test_a_folder_of_compositions_is_a_job_file(some, command, tmp_path):
    out = tmp_path / "out"
    assert command("batch", some(), "--out", out)[0] == 0
    rows = [one for _, one in pngs.rows(out)]
    assert sum("compose" in one for one in rows) == 3
    again = job_files.read_jobs(out, {"seed": 9})
    assert {job.compose.objects[0].words for job, _ in again if job.compose} == {("red dog",)}
