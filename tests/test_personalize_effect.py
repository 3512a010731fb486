"""What `benchmarks/effect.py personalize` measures with, where the emoji font is installed."""

import numpy as np
import pytest
import torch
from PIL import Image

from attnctl.glyph import scenes

personalize_effect = pytest.importorskip("personalize_effect")
try:
    scenes.font_path()
except FileNotFoundError:
    pytest.skip("needs the emoji font", allow_module_level=True)


def on_grey(patch, x, y):
    canvas = np.full((128, 128, 3), 0.7, np.float32)
    window = slice(y, y + patch.shape[0]), slice(x, x + patch.shape[1])
    canvas[window] = patch[..., :3] + canvas[window] * (1 - patch[..., 3:])
    return Image.fromarray((canvas * 255).astype(np.uint8))


def test_likeness_tells_a_thing_from_another():
    fox, cat = (on_grey(personalize_effect.emoji(glyph, 57), 40, 32) for glyph in "🦊🐱")
    own, other = (personalize_effect.likeness([fox, cat], glyph) for glyph in "🦊🐱")
    assert own[0] > 0.8 and other[1] > 0.8
    assert own[0] > own[1] + 0.2 and other[1] > other[0] + 0.2


def test_an_empty_picture_is_like_nothing():
    assert personalize_effect.likeness([Image.new("RGB", (128, 128), (180, 180, 180))], "🦊") == torch.zeros(1)


def test_each_picture_has_two_things_apart_where_the_masks_say():
    for pair in personalize_effect.PAIRS[:2]:
        picture, masks = personalize_effect.reference(pair)
        assert picture.size == (128, 128) and not (masks[0] * masks[1]).any()
        for mask, (glyph, *_) in zip(masks, pair, strict=True):
            assert 500 < mask.sum() < 3200
            assert personalize_effect.likeness([picture], glyph) > 0.7, glyph


def test_new_things_are_no_part_of_the_glyph_world():
    assert not {glyph for pair in personalize_effect.PAIRS for glyph, *_ in pair} & set(scenes._GLYPHS.values())


def test_differences_are_those_of_the_same_picture_and_seed():
    from rich.console import Console

    keys = [("glyph-sd", arm, picture, 0, 200) for picture in range(2) for arm in ("plain", "both")]
    values = dict(zip(keys, (0.1, 0.3, 0.5, 0.9), strict=True))
    done = {key: dict.fromkeys(personalize_effect.MEASURES, value) for key, value in values.items()}
    console = Console(width=200)
    with console.capture() as shown:
        console.print(personalize_effect.differences(done, keys, ["plain", "both"]))
    assert shown.get().count("+0.30 ±0.10") == len(personalize_effect.MEASURES)
