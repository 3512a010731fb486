"""Batches: the folder that goes on where it was."""

import json
import signal
from pathlib import Path

import pytest
import tiny as pipelines
from PIL import Image

from attnctl.app import recipe
from attnctl.app.batch import jobs, running, worker

PROMPT = "a cat and a dog"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipelines.sd1().save_pretrained(folder)
    return str(folder)


def pictures(folder):
    return {path.name: recipe.pixel_hash(recipe.read(path)[0]) for path in folder.glob("*-????????????.png")}


SEGREGATION = "segregation(cat, dog)"


@pytest.fixture
def some(write, tiny):
    """A job file of four pictures; `seed` is of the last."""

    def some(seed=7):
        lines = [{"product": {"seed": [1, 2]}, "controls": SEGREGATION}, {"maps": ["cat"]}, {"seed": seed}]
        fixed = {"prompt": PROMPT, "steps": 2, "model": tiny}
        return write("jobs.jsonl", "".join(json.dumps(fixed | line) + "\n" for line in lines))

    return some


def test_a_second_start_draws_what_is_missing_and_no_more(some, command, tmp_path):
    out = tmp_path / "out"
    code, said, err = command("batch", some(), "--out", out, "--dry-run")
    assert (code, said[:2], err) == (0, ["4 pictures, 0 there already, 4 to draw", "8 steps"], []) and not out.exists()
    assert command("batch", some(), "--out", out)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert len(pictures(out)) == 4 and len(list(out.glob("*-maps.png"))) == 1
    code, said, _ = command("batch", some(), "--out", out)
    assert code == 0 and said[-1].startswith("0 pictures drawn, 4 there already, 0 failed")
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.png")} == before
    assert "4 there already, 0 to draw" in command("batch", some(), "--out", out, "--dry-run")[1][0]
    lost = next(out.glob("*-1-????????????.png"))
    lost.unlink()
    (out / ".0123456789abcdef.part").write_bytes(b"cut off")
    code, said, _ = command("batch", some(seed=8), "--out", out)
    assert code == 0 and said[-1].startswith("2 pictures drawn, 2 there already") and lost.exists()
    assert len(pictures(out)) == 5 and not list(out.glob("*.part"))


def test_a_picture_of_a_batch_is_that_of_generate(some, command, tiny, tmp_path):
    results = list(running.run(some(), tmp_path / "out"))
    assert [result.drawn for result in results] == [True] * 4
    for result in results:
        words = ["--control", SEGREGATION] if result.job.controls else []
        single = tmp_path / f"single-{result.path.stem}"
        command("generate", PROMPT, "-m", tiny, "--steps", 2, "--seed", result.job.seed, "-o", single, *words)
        (picture,) = single.glob("*.png")
        (mine, kept), (alone, its) = recipe.read(result.path), recipe.read(picture)
        assert recipe.pixel_hash(mine) == recipe.pixel_hash(alone)
        assert kept.to_json() == its.to_json() or result.job.maps
    for path in (results[0].path, next((tmp_path / "out").glob("*-maps.png"))):
        assert command("reproduce", path)[1] == ["bit-identical"]


def test_a_job_that_fails_is_noted_and_the_rest_is_drawn(write, command, tiny, tmp_path):
    out, fixed = tmp_path / "out", {"prompt": PROMPT, "steps": 1, "model": tiny}

    def lines(phrase):
        controls = [f"segregation(cat, {phrase})", "none", "none"]
        return "\n".join(json.dumps(fixed | {"controls": one, "seed": n}) for n, one in enumerate(controls))

    code, said, err = command("batch", write("a.jsonl", lines("lion")), "--out", out)
    assert code == 1 and said[-1].startswith("2 pictures drawn, 0 there already, 1 failed")
    assert "line 1, seed 0: 'lion' is not in the prompt" in err[0]
    (note,) = map(json.loads, (out / "failures.jsonl").read_text().splitlines())
    assert note["seed"] == 0 and "'lion'" in note["error"]
    next(out.glob("*-1-????????????.png")).unlink()
    code, said, _ = command("batch", tmp_path / "a.jsonl", "--out", out, "--retry-failed")
    assert code == 1 and said[-1].startswith("0 pictures drawn, 1 there already, 1 failed")
    assert len((out / "failures.jsonl").read_text().splitlines()) == 1
    code, said, _ = command("batch", write("a.jsonl", lines("dog")), "--out", out)
    assert code == 0 and said[-1].startswith("2 pictures drawn, 1 there already, 0 failed")


def test_a_failure_that_is_mended_is_forgotten(some, tmp_path, monkeypatch):
    from attnctl.app import drawing

    own, out = drawing.draw_together, tmp_path / "out"

    def broken(pipe, recipes, *rest, **settings):
        if recipes[0].seed == 2:
            raise RuntimeError("a fault\nof a library")
        return own(pipe, recipes, *rest, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(drawing, "draw_together", broken)
        results = list(running.run(some(), out))
    assert [result.error for result in results if result.error] == ["RuntimeError: a fault of a library"]
    results = list(running.run(some(), out, retry_failed=True))
    assert [result.job.seed for result in results if result.drawn] == [2]
    assert not (out / "failures.jsonl").exists() and len(pictures(out)) == 4


def test_a_model_that_does_not_load_fails_its_own_jobs(tiny, tmp_path):
    (tmp_path / "broken").mkdir()
    rows = [{"prompt": PROMPT, "steps": 1, "model": str(model)} for model in (tmp_path / "broken", tiny)]
    broken, whole = running.run(rows, tmp_path / "out")
    assert "model_index.json is missing" in broken.error and whole.drawn


def test_a_model_is_loaded_once(tiny, tmp_path, monkeypatch):
    second = tmp_path / "second"
    second.symlink_to(tiny)
    loaded, own = [], worker.open_model
    monkeypatch.setattr(worker, "open_model", lambda model, *rest: loaded.append(model) or own(model, *rest))
    rows = [{"prompt": PROMPT, "steps": 1, "seed": n, "model": (tiny, str(second))[n % 2]} for n in range(4)]
    assert all(result.drawn for result in running.run(rows, tmp_path / "out"))
    assert loaded == [tiny, str(second)]


def test_manifest_and_sheet_are_made_again(some, command, tmp_path):
    out = tmp_path / "out"
    list(running.run(some(), out))
    files = {name: (out / name).read_bytes() for name in ("manifest.jsonl", "sheet.png", "summary.md")}
    assert len(files["manifest.jsonl"].splitlines()) == 4
    assert {json.loads(line)["file"] for line in files["manifest.jsonl"].splitlines()} == set(pictures(out))
    for name in files:
        (out / name).unlink()
    code, said, _ = command("batch", "--report", out)
    assert code == 0 and [Path(line).name for line in said] == list(files)
    assert files == {name: (out / name).read_bytes() for name in files}
    Image.open(out / "sheet.png").verify()


def test_one_picture_for_the_same_job_twice(tiny, tmp_path):
    row = {"prompt": PROMPT, "steps": 1, "model": tiny}
    assert len(list(running.run([row, jobs.Job(**row), row | {"seed": 0}], tmp_path / "out"))) == 1


def test_two_batches_in_one_folder_are_refused(some, command, tmp_path):
    first = running.run(some(), tmp_path / "out")
    next(first)
    code, _, err = command("batch", some(), "--out", tmp_path / "out")
    assert code == 2 and "another batch is drawing into" in err[0]
    first.close()


def test_ctrl_c_says_how_to_go_on(some, command, tmp_path, monkeypatch):
    from attnctl.app import drawing

    own, out = drawing.draw_together, tmp_path / "out"

    def stopped(pipe, recipes, *rest, **settings):
        if recipes[0].seed == 2:
            raise KeyboardInterrupt
        return own(pipe, recipes, *rest, **settings)

    monkeypatch.setattr(drawing, "draw_together", stopped)
    code, _, err = command("batch", some(), "--out", out)
    assert code == 130 and err[0] == "attnctl: 1 of 4 pictures drawn; the same command goes on from here"
    assert len(pictures(out)) == 1 and not list(out.glob("*.part")) and not (out / "failures.jsonl").exists()


def test_the_first_ctrl_c_lets_the_pictures_under_way_be_finished(some, command, tmp_path, monkeypatch):
    from attnctl.app import drawing

    own, out = drawing.draw_together, tmp_path / "out"

    def pressed(pipe, recipes, *rest, **settings):
        signal.raise_signal(signal.SIGINT)
        return own(pipe, recipes, *rest, **settings)

    monkeypatch.setattr(drawing, "draw_together", pressed)
    before = signal.getsignal(signal.SIGINT)
    code, said, err = command("batch", some(), "--out", out, "--group", 2)
    assert code == 130 and len(said) == len(pictures(out)) == 2
    assert err[0] == "attnctl: stops after the pictures under way; once more: at once"
    assert err[1] == "attnctl: 2 of 4 pictures drawn; the same command goes on from here"
    assert signal.getsignal(signal.SIGINT) is before and not (out / "manifest.jsonl").exists()


def test_a_full_disk_stops_in_one_line(some, command, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recipe.os, "replace", full)
    code, _, err = command("batch", some(), "--out", tmp_path / "out")
    assert code == 2 and len(err) == 1 and "No space left on device; the same command goes on" in err[0]
    assert not list((tmp_path / "out").glob("*.p*"))
