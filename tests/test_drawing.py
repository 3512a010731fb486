"""One drawing: the words it maps, the step bar it borrows and gives back, the pictures it gives."""

import pytest
import tiny
from PIL import Image

from attnctl.app.drawing import Drawing, DrawingError, check_size, content_words, draw, needed, pictures
from attnctl.app.recipe import Recipe


def recipe(**changes):
    settings = {
        "model": "tiny",
        "weights": "",
        "prompt": tiny.TEXT,
        "negative": None,
        "seed": 0,
        "steps": 2,
        "width": 32,
    }
    settings |= {"height": 16, "guidance": 5.0, "controls": (), "maps": (), "device": "cpu", "dtype": "float32"}
    settings |= {"threads": 1, "versions": {}}
    return Recipe(**settings | changes)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a cat and a dog", ("cat", "dog")),
        ("A red car, a blue bowl with a cat.", ("red", "car", "blue", "bowl", "cat")),
        ("a cat and a cat", ("cat#1", "cat#2")),
        ("the cat's well-worn hat", ("cat's", "well-worn", "hat")),
        ("the cat’s hat", ("cat’s", "hat")),
        ("İstanbul cat and Dog", ("İstanbul", "cat", "dog")),
        ("a", ()),
    ],
)
def test_content_words(prompt, words):
    assert content_words(prompt) == words


@pytest.mark.parametrize(("make", "factor"), [(tiny.sd1, 2), (tiny.sd3, 4), (tiny.flux, 4)], ids=["sd1", "sd3", "flux"])
def test_sizes_a_family_can_draw(make, factor):
    pipe = make()
    check_size(pipe, 8 * factor, 10 * factor)
    for width, height in ((8 * factor + factor // 2, 8 * factor), (8 * factor, factor // 2), (0, factor)):
        with pytest.raises(
            DrawingError, match=f"size {width}x{height}: both sides must be positive multiples of {factor}"
        ):
            check_size(pipe, width, height)


class Bar:
    """Counts what a rich Progress is told."""

    def __init__(self):
        self.total, self.done = None, 0

    def add_task(self, label, total):
        assert label == "plain"
        self.total = total
        return 7

    def advance(self, task, steps):
        assert task == 7
        self.done += steps

    def stop_task(self, task):
        pass


def test_steps_are_shown_and_the_bar_is_given_back():
    pipe, bar = tiny.sd1(), Bar()
    own = pipe.progress_bar
    draw(pipe, recipe(), [], "plain", bar)
    assert (bar.total, bar.done) == (2, 2)
    assert pipe.progress_bar == own and "progress_bar" not in vars(pipe)


def test_the_bar_is_given_back_when_drawing_fails():
    pipe = tiny.sd1()
    with pytest.raises(DrawingError, match="divisible by 8"):
        draw(pipe, recipe(width=34), [])
    assert "progress_bar" not in vars(pipe)


def test_an_argument_the_pipeline_lacks_is_named():
    pipe = tiny.sd1()
    narrow = type("Narrow", (type(pipe),), {"__call__": lambda self, prompt, num_inference_steps: None})
    pipe.__class__ = narrow
    with pytest.raises(DrawingError, match="Narrow takes no guidance_scale, height, width"):
        draw(pipe, recipe(), [])


@pytest.mark.parametrize(
    ("shows", "controls", "kinds"),
    [
        ("plain", (), ("plain",)),
        ("maps", (), ("plain",)),
        ("maps", ("x",), ("controlled",)),
        ("controlled", ("x",), ("controlled",)),
        ("comparison", ("x",), ("plain", "controlled")),
    ],
)
def test_every_picture_can_be_made_from_the_drawings_it_needs(shows, controls, kinds):
    asked = recipe(shows=shows, controls=controls, maps=("cat",))
    assert needed(asked) == kinds
    white = Image.new("RGB", (32, 16), "white")
    assert shows in pictures({kind: Drawing(white, {"cat": white}) for kind in kinds}, asked)


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()]
)
def test_a_processor_without_memory_says_so(error):
    pipe = tiny.sd1()

    def decode(*_, **__):
        raise error

    pipe.vae.decode = decode
    with pytest.raises(DrawingError, match="out of memory on cpu"):
        draw(pipe, recipe(steps=1), [])


def test_a_word_that_the_model_was_never_taught():
    pipe = tiny.sd1()
    with pytest.raises(DrawingError, match="learned no word '<v3>', nor any other; name a folder of concepts"):
        draw(pipe, recipe(prompt="a <v3> cat"), [])
    pipe.tokenizer.add_tokens(["<v1>"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    for changes in ({"prompt": "a <v1> cat and a <v3> dog"}, {"negative": "a <v3>"}):
        with pytest.raises(DrawingError, match=r"no word '<v3>', did you mean <v1>\?;") as error:
            draw(pipe, recipe(**changes), [])
        assert "\n" not in str(error.value)
    draw(pipe, recipe(prompt="a <v1> cat <3 -> <-> i", steps=1), [])
