"""The grid of captioned pictures that every sheet is."""

import numpy as np
import pytest
from PIL import Image

from attnctl.sheets import GAP, PAPER, grid


def square(colour, size=(20, 10)):
    return Image.new("RGB", size, colour)


def test_columns_are_as_wide_and_rows_as_high_as_their_pictures():
    page = grid([[("", square("red")), ("", square("blue", (5, 30)))], [("", square("lime"))]])
    assert page.size == (GAP + 20 + GAP + 5 + GAP, GAP + 30 + GAP + 10 + GAP)
    assert page.getpixel((GAP, GAP)) == (255, 0, 0) and page.getpixel((GAP + 20 + GAP, GAP + 29)) == (0, 0, 255)
    assert page.getpixel((GAP, GAP + 30 + GAP)) == (0, 255, 0) and page.getpixel((GAP, GAP + 11)) == PAPER
    assert grid([[("", square("red"))]], border=False).tobytes() == square("red").tobytes()


@pytest.mark.parametrize("caption", ["cat", "a caption that is much too long for so small a picture" * 40])
def test_a_caption_stands_over_its_picture_and_no_wider(caption):
    page = np.asarray(grid([[(caption, square("red", (60, 10))), ("", square("red", (60, 10)))]]).convert("L"))
    line = page.shape[0] - 10 - 2 * GAP
    assert line > 14
    own, other = page[GAP : GAP + line, GAP : GAP + 60], page[GAP : GAP + line, GAP + 60 + GAP :]
    assert own.min() < 100 and (other == 255).all() and (page[GAP : GAP + line, GAP + 60 : GAP + 60 + GAP] > 200).all()


def test_a_caption_without_a_picture_is_a_heading():
    page = grid([[("step 0", None), ("step 1", None)], [("", square("red", (60, 10)))] * 2])
    assert page.width == 3 * GAP + 120 and page.getpixel((GAP, page.height - GAP - 1)) == (255, 0, 0)


def test_loss_curves_have_plain_labels(monkeypatch):
    from matplotlib import figure

    from attnctl.app.trace_pictures import loss_curves

    made = []

    class Figure(figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figure, "Figure", Figure)
    steps = [
        {"step": k, "evaluations": [{"images": [0], "losses": {"segregation": {"cat | dog": [0.5]}}}]} for k in (0, 1)
    ]
    loss_curves([{"control": "AStar", "steps": steps}])
    (axes,) = made[0].axes
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == ("AStar: segregation", "step", "loss")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cat and dog"]
