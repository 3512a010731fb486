"""Drawing for strangers: what is drawn is what the command line draws, within limits, and stopped without a trace."""

import shlex
import sys
import threading
import time
import zipfile

import pytest
from PIL import Image

from attnctl import batch
from attnctl.app import cli, recipe, service_batch
from attnctl.app.service import Asked, Limits, Result, Service, restored
from attnctl.app.watched import Step, TimeError, Turns
from attnctl.errors import AttnctlError

ASKED = Asked("a cat and a dog", "segregation(cat, dog)", "cat: 0,0,0.5,1", seed=1, steps=2, maps=True)


@pytest.fixture(scope="module")
def service():
    return Service()


def last(steps):
    return list(steps)[-1]


def pixels(path):
    with Image.open(path) as picture:
        return recipe.pixel_hash(picture)


def generated(words, folder, monkeypatch, capsys):
    """The pictures of `attnctl generate`, run in this process, by what they show."""
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(folder)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0, capsys.readouterr().err
    return {path.stem.rpartition("-")[2]: path for path in folder.glob("*.png")}


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_draws_what_its_command_draws(service, tmp_path, monkeypatch, capsys):
    *steps, result = service.run(ASKED)
    assert [(step.kind, step.done, step.total) for step in steps] == [
        (kind, done, 2) for kind in ("plain", "controlled") for done in (1, 2)
    ]
    by_hand = ["attnctl", "generate", "a cat and a dog", "--region", "cat: 0,0,0.5,1", "--compare", "--maps"]
    by_hand += ["--control", "segregation(cat, dog)", "--seed", "1", "--steps", "2"]
    for words in (by_hand, shlex.split(result.command)):
        files = generated(words, tmp_path / str(len(words)), monkeypatch, capsys)
        assert {name: pixels(path) for name, path in files.items()} == {
            name: pixels(path) for name, path in result.files.items()
        }
        _, known = recipe.read(files["comparison"])
        assert known == recipe.read(result.files["comparison"])[1]
    assert any("the judge sees" in line for line in result.told)


def test_a_run_draws_what_its_program_draws(service, tmp_path, monkeypatch):
    result = last(service.run(ASKED))
    monkeypatch.chdir(tmp_path)
    exec(result.python, {})
    assert pixels(tmp_path / "picture.png") == pixels(result.files["controlled"])


def test_a_run_shows_previews_heat_maps_and_what_the_control_did(service):
    *steps, result = service.run(ASKED)
    assert steps[0].preview.size == (128, 128) and steps[0].seconds >= 0
    assert [caption for _, caption in result.heat] == ["cat, plain", "dog, plain", "cat, controlled", "dog, controlled"]
    assert {caption for _, caption in result.curves} == {
        "how far from the aim, by step", "where each word is looked at, by step",
    }  # fmt: skip
    for path, _ in (*result.heat, *result.curves):
        with Image.open(path) as picture:
            assert min(picture.size) >= 96
    assert "Controlled: Segregation corrected the drawing once on its way." in result.told


def test_without_a_control_one_picture_is_drawn(service, tmp_path, monkeypatch, capsys):
    result = last(service.run(Asked("a cat", steps=2, maps=False)))
    assert list(result.files) == ["plain"] and result.final == result.files["plain"]
    files = generated(shlex.split(result.command), tmp_path, monkeypatch, capsys)
    assert pixels(files["plain"]) == pixels(result.files["plain"])


def test_words_alone_are_columns(service):
    by_words = last(service.run(Asked("a cat and a dog", regions="cat\ndog", steps=1, maps=False)))
    by_boxes = last(
        service.run(Asked("a cat and a dog", regions="cat: 0,0,0.5,1\ndog: 0.5,0,1,1", steps=1, maps=False))
    )
    assert by_words.recipe.controls == by_boxes.recipe.controls
    assert "--region 'cat: 0,0,0.5,1'" in by_words.command


def test_a_run_that_is_closed_stops_and_frees_the_model(service):
    before = last(service.run(ASKED))
    steps = service.run(Asked("a cat and a dog", "segregation(cat, dog)", steps=50))
    assert isinstance(next(steps), Step)
    steps.close()
    assert not service.turns.busy and "progress_bar" not in vars(service.pipe)
    again = last(service.run(ASKED))
    assert isinstance(again, Result) and pixels(again.files["controlled"]) == pixels(before.files["controlled"])


def test_one_who_waits_may_leave_and_the_next_has_their_turn():
    turns, inside, go = Turns(), threading.Event(), threading.Event()
    first = threading.Thread(target=lambda: list(turns.watch(lambda bar: (inside.set(), go.wait(30)), 60)))
    first.start()
    assert inside.wait(30)
    done = []
    waiting = turns.watch(lambda bar: done.append("waited"), 60)
    leaver = threading.Thread(target=lambda: next(waiting, None))
    leaver.start()
    go.set()
    first.join(30)
    leaver.join(30)
    assert done == ["waited"] and not turns.busy and not first.is_alive()


def test_a_run_that_takes_too_long_ends():
    def work(bar):
        bar.add_task("plain", 9)
        while True:
            time.sleep(0.01)
            bar.advance(0, 1)

    turns = Turns()
    with pytest.raises(TimeError, match="more than 0.05 s"):
        list(turns.watch(work, 0.05))
    assert not turns.busy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"controls": "segregatoin(cat, dog)"}, "did you mean segregation"),
        ({"controls": "segregation(cat, horse)"}, "horse"),
        ({"controls": "regions(masks=[[cat, mask.png]])"}, "no files"),
        ({"controls": "regions(masks=[[cat, /dev/zero]])"}, "no files"),
        ({"controls": "regions(masks=[[cat, 'data:image/png;base64,AAAA']])"}, "no files"),
        ({"controls": "perturb(heads=heads.json)"}, "no files"),
        ({"controls": "perturb(heads=../heads)"}, "no files"),
        ({"regions": "cat: mask"}, "no files"),
        ({"regions": "cat: 0,0,0.5"}, "left,top,right,bottom"),
        ({"prompt": " "}, "empty"),
        ({"steps": Limits().steps + 1}, str(Limits().steps)),
        ({"size": f"{Limits().side + 8}x64"}, str(Limits().side)),
        ({"size": "63x64"}, "multiples"),
        ({"seed": -1}, "seed"),
        ({"prompt": "a" * 5000}, "too long"),
        ({"model": "../../etc"}, "there are glyph-sd"),
        ({"model": "org/name"}, "there are glyph-sd"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(service, settings, said):
    with pytest.raises(AttnctlError) as error:
        last(service.run(Asked(**{"prompt": "a cat and a dog", "steps": 2} | settings)))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not service.turns.busy


def test_models_are_loaded_as_they_are_asked_for(tmp_path):
    service = Service(["glyph-sd"])
    service.pipe.save_pretrained(tmp_path / "mine")
    mine = str(tmp_path / "mine")
    several = Service(["glyph-sd", mine])
    one, two = (
        last(several.run(Asked("a cat", steps=1, guidance=3.0, maps=False, model=model))) for model in ("", mine)
    )
    assert pixels(one.final) == pixels(two.final) and two.recipe.model == mine
    with pytest.raises(AttnctlError, match="no model"):
        several.permitted("other")
    assert Service(any_model=True).permitted("other") == "other"


def test_old_results_go(service):
    few = Service(limits=Limits(kept=2))
    results = [last(few.run(Asked("a cat", steps=1, seed=seed, maps=False))) for seed in (1, 2, 1, 3)]
    assert [result.final.exists() for result in results] == [True, False, True, True]


def test_a_picture_of_ours_tells_how_it_was_drawn_and_another_is_refused_by_its_name(service, tmp_path):
    result = last(service.run(ASKED))
    known = restored(result.files["controlled"])
    assert (known.prompt, known.seed, known.controls) == ("a cat and a dog", 1, result.recipe.controls)
    again = last(service.run(Asked(known.prompt, "\n".join(known.controls), "", known.seed, known.steps)))
    assert pixels(again.files["controlled"]) == known.pixels
    (tmp_path / "recipe.json").write_text(result.recipe.to_json())
    assert restored(tmp_path / "recipe.json") == result.recipe
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(AttnctlError, match="^other.png carries no attnctl recipe"):
        restored(tmp_path / "other.png")


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_drawn_in_turns_and_taken_as_an_archive(service, tmp_path, monkeypatch):
    monkeypatch.setattr(service_batch, "TURN", 3)
    (tmp_path / "jobs.yaml").write_text(
        "prompt: a cat and a dog\nsteps: 1\nproduct: {seed: [1, 2, 3], controls: [none, 'segregation(cat, dog)']}\n"
    )
    *steps, end = service_batch.run(service, tmp_path / "jobs.yaml")
    assert [step.done for step in steps] == list(range(7)) and end.done == end.total == 6 and not end.faults
    with zipfile.ZipFile(end.archive) as archive:
        names = archive.namelist()
        assert sum(name.endswith(".png") and name.startswith("a-cat") for name in names) == 6
    by_hand = [result.path for result in batch.run(tmp_path / "jobs.yaml", tmp_path / "out", group=1)]
    assert {pixels(path) for path, _ in end.pictures} == {pixels(path) for path in by_hand}


def test_a_batch_that_is_closed_stops(service, tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a cat", "steps": 20, "product": {"seed": [1, 2, 3]}}\n')
    steps = service_batch.run(service, tmp_path / "jobs.jsonl")
    assert next(steps).done == 0 and next(steps).done == 1
    steps.close()
    assert not service.turns.busy


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("prompt: a cat\nmodel: /etc", "no model"),
        ("prompt: a cat\nsteps: 5000", "at most 100"),
        ("prompt: a cat\nsize: 4096x4096", "at most 1024"),
        ("prompt: a cat\ncontrols: 'perturb(heads=x.json)'", "no files"),
        ("prompt: a cat\nproduct: {seed: [%s]}" % ", ".join(map(str, range(200))), "at most 100"),  # noqa: UP031
        ("promt: a cat", "jobs.yaml"),
        ("prompt: a cat\ncompose: {background: b.png, object: o, box: [0, 0, 1, 1]}", "no files"),
        ("prompt: a cat\ncompose: {background: /etc/hosts, object: /etc/hosts, box: [0, 0, 1, 1]}", "no files"),
    ],
)
def test_a_batch_that_asks_for_too_much_is_one_line(service, tmp_path, row, said):
    (tmp_path / "jobs.yaml").write_text(row)
    with pytest.raises(AttnctlError, match=said) as error:
        list(service_batch.run(service, tmp_path / "jobs.yaml"))
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)
