"""The studio: cards, chips, canvas and head grid as views of one text, and the page asked as a program asks it."""

import re
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from PIL import Image

gradio = pytest.importorskip("gradio")

from attnctl import demos  # noqa: E402
from attnctl.app import asked, recipe  # noqa: E402
from attnctl.app.clicks import toggled  # noqa: E402
from attnctl.app.control_settings import cards  # noqa: E402
from attnctl.app.control_text import parse_control  # noqa: E402
from attnctl.app.region_text import redrawn  # noqa: E402
from attnctl.app.service import Asked, Limits, Service  # noqa: E402
from attnctl.demos import heads, regions  # noqa: E402
from attnctl.demos.api import opened, told  # noqa: E402
from attnctl.demos.cards import EXAMPLES, listed  # noqa: E402
from attnctl.demos.chips import chips  # noqa: E402
from attnctl.demos.studio import page  # noqa: E402
from attnctl.engine.control import Control, Lane  # noqa: E402
from attnctl.errors import AttnctlError  # noqa: E402


@pytest.fixture(scope="module")
def studio():
    return Service(limits=Limits(upload=1))


def last(steps):
    return list(steps)[-1]


def pixels(path):
    with Image.open(path) as picture:
        return recipe.pixel_hash(picture)


def pressed(html):
    """The keys of the buttons that are pressed."""
    return re.findall(r'data-k="([^"]*)" aria-pressed="true"', html)


def test_the_demo_is_small():
    files = [
        path for path in Path(demos.__file__).resolve().parent.glob("*.*") if path.suffix in (".py", ".js", ".css")
    ]
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert lines.pop("compose.py") < 160 and sum(lines.values()) < 900  # a tab of its own, and the page


# --- cards ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToyGlow(Control):
    """Glows: what a toy does.

    Settings:
        strength: how much it glows.
        warm: as the sun does.
    """

    strength: float = 0.25
    warm: bool = False
    lane = Lane.IDENTITY


def test_every_control_has_a_card_and_so_has_a_new_one(monkeypatch):
    known = asked.known_controls()
    assert len(cards()) == len(known) and all(card.says and card.settings for card in cards().values())
    monkeypatch.setattr(asked, "known_controls", lambda: known | {"ToyGlow": ToyGlow})
    card = cards()["toy_glow"]
    assert card.says == "Glows: what a toy does." and card.written == "toy_glow(strength=0.25, warm=False)"
    assert [(one.name, one.kind, one.says) for one in card.settings] == [
        ("strength", "number", "how much it glows."), ("warm", "switch", "as the sun does."),
    ]  # fmt: skip
    shown = listed(cards(), "toy_glow(strength=2)", "toy_glow")
    assert pressed(shown) == ["toy_glow"] and "in use" in shown and "<b>toy glow</b>" in shown


def test_the_form_of_a_new_control_has_its_settings(studio, monkeypatch):
    known = asked.known_controls()
    monkeypatch.setattr(asked, "known_controls", lambda: known | {"ToyGlow": ToyGlow})
    demo = page(studio)
    (render,) = demo.renderables
    with gradio.Blocks() as form:
        render.fn("toy_glow", "toy_glow(strength=0.5)", "a cat", "")
    fields = {block.label: block.value for block in form.blocks.values() if hasattr(block, "value")}
    assert fields["Strength"] == 0.5 and fields["Warm"] is False


# --- chips ------------------------------------------------------------------------------------------------------------


def test_chips_show_what_the_controls_say():
    html = chips("a blue car and a <red> crown", "segregation(blue car, crown)\nbinding(blue car)")
    assert pressed(html) == ["word blue", "link blue car", "word car", "word crown"]
    assert "<red>" not in html and "data-k" not in html.partition("</span>")[0]  # "a" is no button
    assert pressed(chips("a cat and a dog", "segregation(cat,")) == []  # while it is being written
    assert "appear here" in chips("", "")


def test_a_prompt_cannot_put_anything_into_the_page():
    html = chips('a cat" onclick="alert(1) and a\u2019"><img src=x onerror=alert(1)>', "")
    assert not re.search(r"<(?!/?(button|span)\b)", html) and 'onclick="' not in html


# --- regions ----------------------------------------------------------------------------------------------------------


def test_boxes_are_drawn_from_lines_and_lines_from_boxes():
    shown = regions.canvas("cat\nred car\ndog: 32,0,64,64", "a cat, a dog and a red car", (128, 64))
    assert shown["boxes"] == [["cat", 0, 0, 0.5, 1], ["red car", 0.5, 0, 1, 1], ["dog", 0.25, 0, 0.5, 1]]
    assert shown["ratio"] == 2 and {"cat", "dog", "red car"} <= set(shown["phrases"])
    text = redrawn([["cat", 0, 0, 0.5, 1.0]], ["cat", "dog: 0,0,"], (128, 64))
    assert text == ["dog: 0,0,", "cat: 0,0,0.5,1"]  # what is being written stays
    assert regions.canvas("cat: /etc/hostname", "", (64, 64))["boxes"] == []


# --- heads ------------------------------------------------------------------------------------------------------------


def test_the_head_grid_shows_heads_and_changes_them(studio):
    sites = studio.sites()
    html = heads.grid(sites, "6 7:2")
    assert pressed(html) == ["6", "6:0", "6:1", "6:2", "6:3", "7:2"]
    assert toggled(sites, "6 7:2", "7:2") == "6" and toggled(sites, "6", "6:1") == "6:0 6:2 6:3"
    assert toggled(sites, "6:0", "6") == "6" and toggled(sites, "6 7", "6") == "7"
    assert toggled(sites, "nonsense", "3:1") == "3:1" and heads.grid([], "mid") == heads.NO_GRID


def test_what_a_visitor_writes_names_no_file(studio, tmp_path):
    (tmp_path / "heads.json").write_text('{"heads": "3"}')
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    assert pressed(heads.grid(studio.sites(), str(tmp_path / "heads.json"))) == []
    read = told(lambda text: parse_control(text, asked.known_controls()))
    with pytest.raises(gradio.Error, match="no files are read here"):
        read(f"regions(masks=[[cat, {tmp_path / 'mask.png'}]])")
    assert read("regions(masks=[[cat, [0, 0, 1, 1]]])").phrases == ("cat",)


# --- complaints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.complaint)
def test_every_example_can_be_drawn(studio, example):
    asked = Asked(example.prompt, example.controls, example.regions, example.seed, 1, example.guidance, maps=False)
    assert "controlled" in last(studio.run(asked)).files


@pytest.mark.slow
def test_every_complaint_is_seen_in_the_plain_picture_and_mended_in_the_other(studio):
    from attnctl.glyph import judge

    def seen(reading, concept):
        return next(thing for thing in reading.things if thing.concept == concept)

    def centre(reading, concept):
        left, _, right, _ = seen(reading, concept).box
        return (left + right) / 2

    mended = {
        EXAMPLES[0]: lambda one: one.has("cat") and one.has("dog"),
        EXAMPLES[1]: lambda one: (one.colour_of("car"), one.colour_of("crown")) == ("blue", "red"),
        EXAMPLES[2]: lambda one: centre(one, "cat") < 0.5 < centre(one, "car"),
        EXAMPLES[3]: lambda one: min(seen(one, "cat").confidence, seen(one, "car").confidence) > 0.95,
    }
    assert set(mended) == set(EXAMPLES)
    for example, sound in mended.items():
        asked = Asked(
            example.prompt, example.controls, example.regions, example.seed, None, example.guidance, maps=False
        )
        files = last(studio.run(asked)).files
        plain, controlled = judge.load().read(
            [Image.open(files[kind]).convert("RGB") for kind in ("plain", "controlled")]
        )
        assert not sound(plain) and sound(controlled), example.complaint


# --- programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(studio):
    from gradio_client import Client

    demo = page(studio)
    _, url, _ = opened(demo, studio, prevent_thread_lock=True)
    yield Client(url, verbose=False)
    demo.close()


ASKED = {"prompt": "a cat and a dog", "controls": "segregation(cat, dog)", "regions": "cat: 0,0,0.5,1", "seed": 1}


def test_a_program_gets_the_same_pictures(client, studio):
    answer = client.predict(**ASKED, steps=2, maps=True, api_name="/generate")
    alone = last(studio.run(Asked(*ASKED.values(), steps=2)))
    assert {shows: pixels(answer[shows]) for shows in alone.files} == {
        shows: pixels(path) for shows, path in alone.files.items()
    }
    assert recipe.read(Path(answer["comparison"]))[1] == recipe.read(alone.files["comparison"])[1]
    assert answer["command"] == alone.command and answer["python"] == alone.python
    assert any("the judge sees" in line for line in answer["report"])


def test_a_program_sees_the_steps_and_the_maps(client):
    job = client.submit("a cat", steps=3, api_name="/generate")
    job.result()
    assert {"drawing": "plain", "step": 3, "of": 3} in job.outputs()
    maps = client.predict("a cat and a dog", seed=1, steps=2, api_name="/maps")
    assert [(one["word"], one["drawing"]) for one in maps] == [("cat", "plain"), ("dog", "plain")]
    assert pixels(maps[0]["picture"]) != pixels(maps[1]["picture"])


def test_a_program_is_told_what_is_wrong_and_what_there_is(client):
    for wrong, said in (
        ({"controls": "segregatoin(cat)"}, "did you mean segregation"),
        ({"model": "../../../etc"}, "there are glyph-sd"),
        ({"model": "org/name"}, "there are glyph-sd"),
        ({"size": "100000x100000"}, "a side has at most"),
        ({"size": "4096x4096"}, "a side has at most"),
        ({"steps": 100_000}, "at most 100"),
        ({"controls": "regions(masks=[[cat, /etc/passwd]])"}, "no files"),
        ({"regions": "cat: ../../secret.png"}, "no files"),
    ):
        with pytest.raises(Exception, match=said):
            client.predict("a cat", **{"steps": 2} | wrong, api_name="/generate")
    with pytest.raises(Exception, match="there are glyph-sd"):
        client.predict("/etc", api_name="/sites")
    assert {card["name"] for card in client.predict(api_name="/controls")} == set(cards())
    assert client.predict(api_name="/sites")[0]["kind"] == "self"


def test_the_endpoints_are_these_and_all_their_arguments_are_told(client):
    found = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(found) == {"/generate", "/maps", "/controls", "/sites"}
    for endpoint in found.values():
        assert endpoint["description"] and all(one.get("python_type") for one in endpoint["parameters"])


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "attnctl/app/service.py", "README.md",
     "\\..\\..\\etc\\passwd", "C:/Windows/win.ini", "/proc/self/environ"],
)  # fmt: skip
def test_no_file_of_the_machine_can_be_read(client, path):
    for name in ("file=", "file/"):
        assert httpx.get(f"{client.src}gradio_api/{name}{path}").status_code in (400, 403, 404)


def test_hostile_uploads_stay_where_uploads_lie(client, tmp_path):
    send = f"{client.src}gradio_api/upload"
    (name,) = httpx.post(send, files={"files": ("../../../../tmp/hostile;$(id).png", b"x")}).json()
    assert ".." not in name and Path(name).parent.parent == Path(name).parent.parent.resolve()
    assert not Path("/tmp/hostile;$(id).png").exists()
    assert httpx.post(send, files={"files": ("big.png", b"x" * 2**21)}).status_code == 413
    done = httpx.post(f"{client.src}gradio_api/run/dropped", json={"data": [{"path": "/etc/passwd"}, 0]})
    assert done.status_code >= 400


def test_a_killed_client_frees_the_model_for_the_next(client, studio):
    code = (
        "import sys; from gradio_client import Client\n"
        f"job = Client({client.src!r}, verbose=False).submit('a cat', seed=77, steps=100, api_name='/generate')\n"
        "next(iter(job)); print('drawing', flush=True); job.result()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as visitor:
        assert visitor.stdout.readline().strip() == "drawing"
        visitor.kill()
    answer = client.predict("a cat", seed=5, steps=2, api_name="/generate")
    assert pixels(answer["plain"]) == pixels(last(studio.run(Asked("a cat", seed=5, steps=2))).final)
    assert not list(studio.folder.glob("*-77-*"))  # what nobody waits for was not drawn to its end


@pytest.mark.slow
def test_twenty_visitors_at_once_each_get_their_own_picture(client, studio):
    from gradio_client import Client

    wanted = [
        Asked(
            "a cat and a dog" if number % 2 else "a red car and a lion",
            ("segregation(cat, dog)" if number % 2 else "binding(red car)") if number % 3 else "",
            seed=number, steps=2, maps=False,
        )
        for number in range(20)
    ]  # fmt: skip
    answers = {}

    def visit(number):
        one = wanted[number]
        mine = Client(client.src, verbose=False)
        answers[number] = mine.predict(one.prompt, one.controls, seed=one.seed, steps=one.steps, api_name="/generate")

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(20)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(600)
    assert len(answers) == 20
    for number, one in enumerate(wanted):
        alone = last(studio.run(one))
        for shows in alone.files:
            assert pixels(answers[number][shows]) == pixels(alone.files[shows])


def test_the_endpoints_are_tools_of_mcp(studio):
    pytest.importorskip("mcp")
    demo = page(studio)
    _, url, _ = opened(demo, studio, prevent_thread_lock=True, mcp_server=True)
    try:
        tools = {tool["name"]: tool["inputSchema"] for tool in httpx.get(f"{url}gradio_api/mcp/schema").json()}
    finally:
        demo.close()
    assert set(tools) == {"generate", "maps", "controls", "sites"}
    assert tools["generate"]["properties"]["prompt"]["description"] == "what to draw."


def test_a_password_keeps_others_out(studio):
    demo = page(studio)
    _, url, _ = opened(demo, studio, prevent_thread_lock=True, auth=("me", "secret"))
    try:
        asked = httpx.post(f"{url}gradio_api/call/generate", json={"data": ["a cat"]})
        assert asked.status_code == 401 and httpx.get(f"{url}gradio_api/info").status_code == 401
    finally:
        demo.close()


def test_without_gradio_the_command_says_what_to_install():
    code = "import sys; sys.modules['gradio'] = None; sys.argv[1:] = ['ui']; from attnctl.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and 'pip install "attnctl[ui]"' in done.stderr and done.stderr.count("\n") == 1


def test_a_wrong_text_on_the_page_is_one_line(studio):
    with pytest.raises(AttnctlError, match="no files"):
        last(studio.run(Asked("a cat", regions="cat: /etc/hostname")))
