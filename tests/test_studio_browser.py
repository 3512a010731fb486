"""The studio in a browser: what a visitor does with mouse and keyboard. Needs chromium; skips itself without one."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
from PIL import Image

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no chromium", allow_module_level=True)

from attnctl.app import recipe  # noqa: E402
from attnctl.app.service import Service  # noqa: E402
from attnctl.demos.api import opened  # noqa: E402
from attnctl.demos.cards import EXAMPLES  # noqa: E402
from attnctl.demos.studio import page as studio_page  # noqa: E402

pytestmark = pytest.mark.slow
expect = sync_api.expect
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def studio():
    return Service()


@pytest.fixture(scope="module")
def address(studio):
    demo = studio_page(studio)
    _, url, _ = opened(demo, studio, prevent_thread_lock=True)
    yield url
    demo.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, freshly opened; no script of it may fail."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, errors = context.new_page(), []
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(60_000)
    page.goto(address)
    expect(page.locator("#chips .word").first).to_be_visible()
    yield page
    context.close()
    assert errors == []


def generate(page, steps=2):
    page.get_by_label("Steps").fill(str(steps))
    before, picture = page.locator("#status").inner_text(), page.locator("#pictures img").last
    source = picture.get_attribute("src") if picture.count() else None
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).not_to_have_text(before)
    expect(page.locator("#status")).to_contain_text("Drawn in")
    expect(picture).to_be_visible()
    if source is not None:
        expect(picture).not_to_have_attribute("src", source)


def text(page, name):
    return page.locator(f"#{name} textarea")


def picture(page, folder, where="#pictures img", number=-1):
    """The pixels of a picture of the page."""
    source = page.locator(where).nth(number).get_attribute("src")
    path = folder / "shown"
    path.write_bytes(page.request.get(source).body())
    with Image.open(path) as shown:
        return recipe.pixel_hash(shown)


def drag(page, *path):
    """Pull the mouse over the canvas, from point to point in shares of it."""
    area = page.locator("#canvas .area")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in path]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()


def test_two_words_are_clicked_and_both_pictures_and_the_maps_are_seen(page):
    page.get_by_label("Prompt", exact=True).fill("a lion and a red car")
    expect(page.locator("#chips .word")).to_have_text(["lion", "red", "car"])
    text(page, "controls").fill("")
    page.locator("#chips .word", has_text="lion").click()
    expect(text(page, "controls")).to_have_value("excitation(lion)")
    page.locator("#chips .link").click()
    page.locator("#chips .word", has_text="car").click()
    expect(text(page, "controls")).to_have_value("segregation(lion, red car)\nbinding(red car)")
    expect(page.locator("#chips [aria-pressed=true]")).to_have_count(4)
    generate(page)
    expect(page.locator("#pictures img")).to_have_count(2)
    expect(page.locator("#heat img")).to_have_count(6)
    expect(page.locator("#status")).to_contain_text("Controlled: the judge sees")
    page.get_by_label("shows its heat map").check()
    page.locator("#chips .word", has_text="lion").click()
    expect(page.locator("#heat")).to_contain_text("lion, controlled")
    expect(text(page, "controls")).to_have_value("segregation(lion, red car)\nbinding(red car)")  # as it was


def test_words_are_reached_by_keyboard(page):
    text(page, "controls").fill("")
    word = page.locator("#chips .word", has_text="dog")
    word.focus()
    page.keyboard.press("Enter")
    expect(text(page, "controls")).to_have_value("excitation(dog)")
    expect(word).to_be_focused()


def test_two_regions_are_drawn_moved_and_outlined_on_the_sheet(page, studio):
    text(page, "controls").fill("")
    drag(page, (0.1, 0.1), (0.4, 0.9))
    expect(text(page, "regions")).to_have_value("cat: 0.1,0.1,0.4,0.9")
    drag(page, (0.6, 0.1), (0.9, 0.9))
    expect(text(page, "regions")).to_have_value("cat: 0.1,0.1,0.4,0.9\ndog: 0.6,0.1,0.9,0.9")
    drag(page, (0.2, 0.5), (0.1, 0.5))  # the first box, by its inside
    expect(text(page, "regions")).to_have_value(re.compile(r"cat: 0,0.1,0.3,0.9"))
    page.keyboard.press("Shift+ArrowRight")
    expect(text(page, "regions")).to_have_value(re.compile(r"cat: 0,0.1,0.35,0.9"))
    generate(page)
    page.get_by_role("tab", name="Sheet").click()
    sheet = page.locator("#sheet img")
    expect(sheet).to_be_visible()
    page.get_by_role("tab", name="Use it elsewhere").click()
    expect(page.locator("#command")).to_contain_text("--region 'cat: 0,0.1,0.35,0.9'")
    text(page, "regions").fill("cat\ndog")  # columns, and their preview
    expect(page.locator("#canvas .box")).to_have_count(2)
    expect(page.locator("#canvas .box").nth(1)).to_have_attribute("aria-label", re.compile("Box of dog: 0.5, 0, 1, 1"))
    page.get_by_role("button", name="Clear").click()
    expect(text(page, "regions")).to_have_value("")


def test_heads_are_chosen_and_settings_are_written(page):
    text(page, "controls").fill("")
    page.get_by_role("tab", name="What should change").click()
    page.locator("#cards [data-k=perturb]").click()
    page.locator(".heads [data-k='7:2']").click()
    expect(text(page, "controls")).to_have_value("perturb(heads=3 7:2)")
    page.locator(".heads [data-k='3']").click()
    expect(text(page, "controls")).to_have_value("perturb(heads=7:2)")
    expect(page.locator("#cards [data-k=perturb]")).to_contain_text("in use")
    page.get_by_role("spinbutton", name=re.compile("Scale")).fill("1.5")
    page.get_by_role("spinbutton", name=re.compile("Scale")).press("Tab")
    expect(text(page, "controls")).to_have_value("perturb(heads=7:2, scale=1.5)")
    page.locator("#cards [data-k=binding]").click()
    page.get_by_role("button", name="Use binding").click()
    expect(page.get_by_text("a bond is 'red car'")).to_be_visible()  # nothing is bound in "a cat and a dog"
    expect(text(page, "controls")).to_have_value("perturb(heads=7:2, scale=1.5)")


def test_a_run_is_cancelled(page, studio):
    page.get_by_label("Steps").fill("100")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text(re.compile(r"step \d+ of 100, \d+ s left"))
    expect(page.locator("#preview img")).to_be_visible()
    page.get_by_role("button", name="Cancel").first.click()
    expect(page.locator("#status")).to_contain_text("Stopped")
    page.get_by_label("Steps").fill("2")
    page.wait_for_timeout(1000)  # the page first hears that the run is over
    generate(page)
    assert not studio.turns.busy


def test_a_run_comes_back_from_history_and_from_its_picture(page, studio, tmp_path):
    page.get_by_label("Seed").fill("5")
    generate(page)
    first = picture(page, tmp_path)
    page.get_by_label("Prompt", exact=True).fill("a lion")
    text(page, "controls").fill("")
    generate(page)
    assert picture(page, tmp_path) != first
    page.locator("#history img").nth(1).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(EXAMPLES[0].prompt)
    expect(text(page, "controls")).to_have_value(EXAMPLES[0].controls)
    expect(page.get_by_label("Seed")).to_have_value("5")
    page.wait_for_timeout(500)
    assert picture(page, tmp_path) == first
    (drawn,) = studio.folder.glob("*-5-controlled.png")
    page.get_by_label("Prompt", exact=True).fill("a hat")
    page.get_by_role("tab", name="More").click()
    page.locator("#restore input[type=file]").set_input_files(drawn)
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(EXAMPLES[0].prompt)
    (tmp_path / "other.png").write_bytes(b"no picture")
    page.locator("#restore").get_by_label("Clear").click()
    page.locator("#restore input[type=file]").set_input_files(tmp_path / "other.png")
    expect(page.get_by_text("it is not a whole picture")).to_be_visible()


def test_the_command_that_is_copied_draws_the_same(page, tmp_path):
    page.get_by_role("button", name="Colours leak").click()
    expect(text(page, "controls")).to_have_value(EXAMPLES[1].controls)
    generate(page)
    shown = picture(page, tmp_path)
    page.get_by_role("tab", name="Use it elsewhere").click()
    page.locator("#command").get_by_label("Copy").click()
    page.wait_for_timeout(300)
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert words[0] == "attnctl"
    subprocess.run([sys.executable, "-m", *words, "--out", str(tmp_path)], check=True, timeout=300)
    (drawn,) = tmp_path.glob("*-controlled.png")
    with Image.open(drawn) as again:
        assert recipe.pixel_hash(again) == shown


def test_what_is_wrong_is_said_and_the_page_goes_on(page):
    text(page, "controls").fill("segregatoin(cat)")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("did you mean segregation")).to_be_visible()
    text(page, "controls").fill("")
    generate(page)
    expect(page.locator("#status")).to_contain_text("No control was given")


def test_a_batch_is_drawn_and_taken(page, tmp_path):
    (tmp_path / "jobs.yaml").write_text("prompt: a cat\nsteps: 1\nproduct: {seed: [1, 2, 3]}\n")
    page.get_by_role("tab", name="Batch").click()
    page.locator("#jobs input[type=file]").set_input_files(tmp_path / "jobs.yaml")
    page.get_by_role("button", name="Draw them").click()
    expect(page.locator("#batch-status")).to_contain_text("3 of 3 pictures")
    expect(page.locator("#zip")).to_be_enabled()
    with page.expect_download() as taken:
        page.locator("#zip").click()
    assert taken.value.suggested_filename.endswith(".zip")


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_is_cut_off_at_any_width(browser, address, width):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark")
    page.goto(address)
    expect(page.locator("#chips .word").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_an_object_goes_into_a_picture(page, tmp_path):
    """An example fills the tab; the box is dragged and written; work is cancelled; result, sheet and command come."""
    page.get_by_role("tab", name="Compose").click()
    page.get_by_role("button", name="Apple").click()
    box = page.locator("#place .box")
    expect(box).to_be_visible()
    expect(text(page, "box")).to_have_value("0.6,0.35,0.95,0.7")
    expect(page.locator("#place .area")).to_have_css("background-image", re.compile("data:image/jpeg"))
    text(page, "box").fill("0.5,0.3,0.9,0.7")
    expect(box).to_have_attribute("aria-label", re.compile("0.5, 0.3, 0.9, 0.7"))
    box.press("ArrowRight")
    expect(text(page, "box")).to_have_value("0.55,0.3,0.95,0.7")
    area = page.locator("#place .area").bounding_box()
    page.mouse.move(area["x"] + 0.5 * area["width"], area["y"] + 0.85 * area["height"])
    page.mouse.down()
    page.mouse.move(area["x"] + 0.9 * area["width"], area["y"] + 0.97 * area["height"], steps=4)
    page.mouse.up()
    expect(text(page, "box")).to_have_value(re.compile(r"^0\.5\d*,0\.8\d*,0\.\d+,0\.9\d*$"))
    text(page, "box").fill("0.6,0.35,0.95,0.7")
    page.locator("#compose").click()
    expect(page.locator("#compose-status")).to_contain_text(re.compile(r"step \d+ of \d+"))
    page.locator("#compose-stop").click()
    expect(page.locator("#compose-status")).to_contain_text("Stopped")
    page.wait_for_timeout(1000)  # the page first hears that the run is over
    page.locator("#compose").click()
    expect(page.locator("#compose-status")).to_contain_text("Made in")
    expect(page.locator("#composed img").last).to_be_visible()
    expect(page.locator("#compose-sheet img")).to_be_visible()
    expect(page.locator("#compose-command")).to_contain_text("attnctl compose --background background.png")
    text(page, "box").fill("0,0,400,20")
    page.locator("#compose").click()
    expect(page.get_by_text("ends beyond the picture")).to_be_visible()
