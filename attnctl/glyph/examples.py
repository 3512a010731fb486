"""Examples of compositions on the embedded model: pictures that ship with the package, drawn by the renderer.

`python -m attnctl.glyph.examples FOLDER` draws them anew; that needs the world's font.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from attnctl.errors import ControlError, instead

PICTURES = Path(__file__).parent / "pictures"
Box = tuple[float, float, float, float]  # left, top, right, bottom in shares


@dataclass(frozen=True)
class Example:
    """What goes into which picture.

    Attributes:
        background, thing: names of pictures.
        box: where the object goes.
        prompt, words, others: what the picture shall show, the object's words in it, and the background's.
        mask: name of the object's mask, if its picture has no alpha channel.
    """

    background: str
    thing: str
    box: Box
    prompt: str
    words: str
    others: str
    mask: str | None = None


EXAMPLES = {
    "car": Example("cat.png", "car.png", (0.58, 0.35, 0.95, 0.68), "a cat and a red car", "red car", "cat"),
    "balloon": Example(
        "bench.png", "balloon.png", (0.58, 0.1, 0.95, 0.6), "a gray bench and a blue balloon", "blue balloon",
        "gray bench",
    ),
    "apple": Example("cat.png", "apple.png", (0.6, 0.35, 0.95, 0.7), "a cat and an apple", "apple", "cat", "mask.png"),
}  # fmt: skip


def path(name: str) -> Path:
    """Where a picture of the examples lies: cat.png, bench.png, car.png, balloon.png, apple.png and its mask.png."""
    return PICTURES / name


def example(name: str) -> Example:
    """An example by its name.

    Raises:
        ControlError: there is none of this name.
    """
    if name not in EXAMPLES:
        raise ControlError(f"there is no example {name!r}; {instead(name, EXAMPLES)}")
    return EXAMPLES[name]


def draw(folder: Path) -> None:
    """Draw all of the pictures into a folder."""
    import numpy as np
    from PIL import Image

    from attnctl.glyph import scenes

    folder.mkdir(parents=True, exist_ok=True)
    renderer = scenes.Renderer()
    for name, thing in (("cat", ("cat", None)), ("bench", ("bench", "gray"))):
        drawn = (renderer.render([thing], seed) for seed in range(5000))
        scene = next(one for one in drawn if one.things[0].box[2] < 0.55)  # room at its right
        Image.fromarray(scene.image).save(folder / f"{name}.png")
    scenes.sprite("car", "red").save(folder / "car.png")
    scenes.sprite("balloon", "blue").save(folder / "balloon.png")
    scene = renderer.render([("apple", None)], 3)
    Image.fromarray(scene.image).save(folder / "apple.png")
    Image.fromarray(scene.things[0].mask.astype(np.uint8) * 255).save(folder / "mask.png")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES)
