"""Previews: what is drawn so far, in every family; and the picture stays as it is, to the bit."""

import pytest
import tiny
from PIL import Image

from attnctl.app import drawing, preview
from attnctl.app.asked import recipe_of
from attnctl.app.recipe import pixel_hash


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_previews_are_pictures_and_change_nothing(family, monkeypatch):
    monkeypatch.setattr(preview, "SHARE", 1e9)  # after every step, however slow
    pipe = tiny.quiet(getattr(tiny, family)())
    recipe = recipe_of(
        pipe, model="tiny", prompt="a cat and a dog", negative=None, seed=1, steps=3, size=(48, 32), guidance=2.0,
        controls=(), maps=(),
    )  # fmt: skip
    shown = []
    seen = drawing.draw(pipe, recipe, [], preview=shown.append).picture
    alone = drawing.draw(pipe, recipe, []).picture
    assert pixel_hash(seen) == pixel_hash(alone)
    assert [picture.size for picture in shown] == [(48, 32)] * 3
    assert all(isinstance(picture, Image.Image) for picture in shown)
    assert pixel_hash(shown[-1]) == pixel_hash(alone) and pixel_hash(shown[0]) != pixel_hash(alone)


def test_slow_previews_are_few(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(preview.time, "monotonic", lambda: clock[0])

    def decoded(*_):
        clock[0] += 3.0  # as long as three steps

    monkeypatch.setattr(preview, "decoded", decoded)
    shown = []
    pipe = tiny.sd1()
    after = preview.previewed(pipe, None, shown.append)["callback_on_step_end"]
    for step in range(40):
        clock[0] += 1.0
        after(pipe, step, 0, {"latents": None})
    assert 2 <= len(shown) <= 5 and 3.0 * (len(shown) - 1) <= preview.SHARE * clock[0]


def test_a_pipeline_without_callbacks_has_no_previews():
    class Old:
        def __call__(self, prompt):
            pass

    assert preview.previewed(Old(), None, lambda picture: None) == {}
