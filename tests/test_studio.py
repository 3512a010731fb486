"""The studio: its runs without a page, its cards, and its page asked as a program asks it."""

import shlex
import subprocess
import sys
from dataclasses import dataclass

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")

from attnctl.app import asked, cli, recipe  # noqa: E402
from attnctl.app.control_text import parse_control  # noqa: E402
from attnctl.demos.cards import EXAMPLES, cards  # noqa: E402
from attnctl.demos.runs import SIDE, STEPS, Asked, Result, Step, Studio, region_preview, restored  # noqa: E402
from attnctl.engine.control import Control, Lane  # noqa: E402
from attnctl.errors import AttnctlError  # noqa: E402

ASKED = Asked("a cat and a dog", "segregation(cat, dog)", "cat: 0,0,0.5,1", seed=1, steps=2, maps=True)


@pytest.fixture(scope="module")
def studio():
    return Studio()


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


def test_a_run_draws_what_its_command_draws(studio, tmp_path, monkeypatch, capsys):
    *steps, result = studio.run(ASKED)
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


def test_without_a_control_one_picture_is_drawn(studio, tmp_path, monkeypatch, capsys):
    result = last(studio.run(Asked("a cat", steps=2, maps=False)))
    assert list(result.files) == ["plain"]
    files = generated(shlex.split(result.command), tmp_path, monkeypatch, capsys)
    assert pixels(files["plain"]) == pixels(result.files["plain"])


def test_a_run_that_is_closed_stops_and_frees_the_model(studio):
    before = last(studio.run(ASKED))
    steps = studio.run(Asked("a cat and a dog", "segregation(cat, dog)", steps=50))
    assert isinstance(next(steps), Step)
    steps.close()
    assert not studio._one.locked() and "progress_bar" not in vars(studio.pipe)
    again = last(studio.run(ASKED))
    assert isinstance(again, Result) and pixels(again.files["controlled"]) == pixels(before.files["controlled"])


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
        ({"steps": STEPS + 1}, str(STEPS)),
        ({"size": f"{SIDE + 8}x64"}, str(SIDE)),
        ({"size": "63x64"}, "multiples"),
        ({"seed": -1}, "seed"),
        ({"prompt": "a" * 5000}, "too long"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(studio, settings, said):
    with pytest.raises(AttnctlError) as error:
        last(studio.run(Asked(**{"prompt": "a cat and a dog", "steps": 2} | settings)))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not studio._one.locked()


def test_a_picture_of_ours_tells_how_it_was_drawn_and_another_is_refused_by_its_name(studio, tmp_path):
    result = last(studio.run(ASKED))
    known = restored(result.files["controlled"])
    assert (known.prompt, known.seed, known.controls) == ("a cat and a dog", 1, result.recipe.controls)
    again = last(studio.run(Asked(known.prompt, "\n".join(known.controls), "", known.seed, known.steps)))
    assert pixels(again.files["controlled"]) == known.pixels
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(AttnctlError, match="^other.png carries no attnctl recipe"):
        restored(tmp_path / "other.png")


def test_boxes_are_previewed():
    blank, boxed = region_preview(""), region_preview("cat: 0,0,0.5,1\ndog: 0.5,0,1,1")
    assert recipe.pixel_hash(blank) != recipe.pixel_hash(boxed)
    with pytest.raises(AttnctlError, match="no files"):
        region_preview("cat: /etc/hostname")


# --- cards ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyGlow(Control):
    """Glows: what a toy does. More of it."""

    lane = Lane.IDENTITY
    strength: float = 0.25


def test_every_control_has_a_card_and_so_has_a_new_one(monkeypatch):
    known = asked.known_controls()
    assert len(cards()) == len(known)
    for card in cards().values():  # what the button writes is a control
        assert type(parse_control(card.text(["red car", "blue chair"]), known)) in known.values()
    monkeypatch.setattr(asked, "known_controls", lambda: known | {"ToyGlow": ToyGlow})
    card = cards()["toy_glow"]
    assert card.says == "Glows: what a toy does. More of it." and card.written == "toy_glow(strength=0.25)"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.complaint)
def test_every_example_can_be_drawn(studio, example):
    asked = Asked(example.prompt, example.controls, example.regions, example.seed, 1, example.guidance, maps=False)
    assert "controlled" in last(studio.run(asked)).files


# --- page -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(studio):
    from gradio_client import Client

    from attnctl.demos.studio import LAUNCH, page

    demo = page(studio)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **LAUNCH)
    yield Client(url, verbose=False)
    demo.close()


def test_a_program_gets_the_same_pictures(client, studio):
    words = ("a cat and a dog", "segregation(cat, dog)", "cat: 0,0,0.5,1", 1, 2, 3.0, True, "", "")
    said, shown, sheet, command, history = client.predict(*words, api_name="/generate")
    alone = last(studio.run(ASKED))
    assert [pixels(path) for path in shown] == [pixels(alone.files[name]) for name in ("plain", "controlled")]
    assert recipe.read(sheet)[1] == recipe.read(alone.files["comparison"])[1]  # our PNG, with its recipe
    assert command == alone.command and "the judge sees" in said and len(history) == 1


def test_a_program_is_told_what_is_wrong_and_what_there_is(client):
    with pytest.raises(Exception, match="did you mean segregation"):
        client.predict("a cat", "segregatoin(cat)", "", 1, 2, 3.0, True, "", "", api_name="/generate")
    assert {card["name"] for card in client.predict(api_name="/controls")} == set(cards())
    assert client.predict(api_name="/sites")[0]["kind"] == "self"


def test_without_gradio_the_command_says_what_to_install():
    code = "import sys; sys.modules['gradio'] = None; sys.argv[1:] = ['ui']; from attnctl.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and 'pip install "attnctl[ui]"' in done.stderr and done.stderr.count("\n") == 1
