"""Compositions: what is asked for, how it is planned, and what is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter
from torch import Tensor

from attnctl.engine.attachment import Report
from attnctl.errors import PhraseError
from attnctl.pipelines.pasting import Pasted, box_in, object_mask, opened
from attnctl.words.spelling import places
from attnctl.words.subjects import SubjectsError, read_subjects


@dataclass(frozen=True, eq=False)
class Composition:
    """What is to be composed.

    Attributes:
        background: a picture, or the path of one.
        thing: the object's picture, or the path of one.
        box: where it goes, (left, top, right, bottom): shares of the background, or its pixels.
        prompt: names the background's things and the object.
        mask: the object in its picture: anything a `Region` is made of. None: the picture's alpha channel. "words":
            where the model looks for the object's words, see `object_masks`; rough.
        words: phrases of the prompt that mean the object. None: the last thing that the prompt names.
        others: phrases of the prompt that mean things of the background. None: all other things that the prompt names.
        seed: of what noise is drawn, if any.
    """

    background: Any
    thing: Any
    box: Any
    prompt: str
    mask: Any = None
    words: Sequence[str] | str | None = None
    others: Sequence[str] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Composed:
    """What was made of a composition.

    Attributes:
        picture: the result.
        background, pasted: on the same pixels: the background, and it with the object's pixels pasted in.
        mask: of the object, (height, width) float32.
        box: (left, top, right, bottom) in pixels; outside of it the picture is the background's inversion.
        words, others: phrases that were taken for the object's and the background's.
        lost: how far the way back from its inversion is from the pasted picture's latents, relative to them, as a root
            mean square; None unless asked for.
        passes: forwards of the denoiser for this picture, by name; "inversion" are those of both pictures.
        seconds: for this picture, as a share of its group.
        kept: bytes that infusion kept at once, for the whole group.
    """

    picture: Image.Image
    background: Image.Image
    pasted: Image.Image
    mask: Any
    box: tuple[int, int, int, int]
    words: tuple[str, ...]
    others: tuple[str, ...]
    lost: float | None
    passes: dict[str, float]
    seconds: float
    kept: int = 0
    report: Report | None = None

    def onto(self, background: Any) -> Image.Image:
        """The drawn box on a background of any size, such as the photograph itself; all else are its own pixels.

        The border of the box is soft, over a hundredth of the picture.
        """
        ground = opened(background, "background").convert("RGB")
        drawn = self.picture.resize(ground.size, Image.Resampling.LANCZOS)
        scale = ground.width / self.picture.width, ground.height / self.picture.height
        left, top, right, bottom = (round(side * scale[n % 2]) for n, side in enumerate(self.box))
        soft = max(1, min(ground.size) // 100)
        window = Image.new("L", ground.size)
        window.paste(255, (left + soft, top + soft, right - soft, bottom - soft))
        return Image.composite(drawn, ground, window.filter(ImageFilter.BoxBlur(soft)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the pictures."""
        names = ("box", "words", "others", "lost", "passes", "seconds", "kept")
        return {name: getattr(self, name) for name in names}


@dataclass(eq=False)
class Plan:
    """A group of compositions on one grid.

    Attributes:
        size: (height, width) in pixels.
        cells: (images, height, width) bool, the object's latent cells.
        boxes: (images, height, width) bool, the cells that are drawn.
    """

    asked: Sequence[Composition]
    pasted: list[Pasted]
    words: list[tuple[str, ...]]
    others: list[tuple[str, ...]]
    size: tuple[int, int]
    cells: Tensor
    boxes: Tensor

    def drawn(self, number: int) -> tuple[int, int, int, int]:
        """The box of a composition that is drawn, (left, top, right, bottom) in pixels."""
        box = self.boxes[number]
        rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
        down, across = self.size[0] / box.shape[0], self.size[1] / box.shape[1]
        sides = columns[0] * across, rows[0] * down, (columns[-1] + 1) * across, (rows[-1] + 1) * down
        left, top, right, bottom = (round(float(side)) for side in sides)
        return left, top, right, bottom


def words_of(one: Composition) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the object's phrases, the background's)."""
    words = (one.words,) if isinstance(one.words, str) else one.words
    if words is not None and one.others is not None:
        return tuple(words), tuple(one.others)
    named = _named(one.prompt)
    words = tuple(words) if words is not None else tuple(named[-1:])
    mine = {word for phrase in words for word in phrase.lower().split()}
    rest = tuple(phrase for phrase in named if not mine & set(phrase.lower().split()))
    return words, rest if one.others is None else tuple(one.others)


def _named(prompt: str) -> list[str]:
    """The things that a prompt names."""
    try:
        return [subject.whole for subject in read_subjects(prompt)]
    except SubjectsError as error:
        raise SubjectsError(f"{error}; or name words of the object and others of the background") from None


def thing_of(prompt: str, number: int) -> str:
    """One of the things that a prompt names, counted from its end: -1 is the last.

    Raises:
        PhraseError: it names fewer.
    """
    named = _named(prompt)
    if len(named) < -number:
        raise PhraseError(f"{-number} objects, but the prompt names {len(named)} things: {', '.join(named)}")
    return named[number]


def checked(several: Sequence[Composition]) -> list[Composition]:
    """The same compositions, their pictures opened, once all makes sense that can be told without a model.

    Args:
        several: of one background in turn, or a single one.

    Raises:
        ControlError: a picture, mask or box is none.
        PhraseError: a phrase is not in its prompt.
        SubjectsError: a phrase is to be read from a prompt, and the tagger is not installed.
    """
    found = []
    for number, one in enumerate(several):
        background, thing = opened(one.background, "background"), opened(one.thing, "object")
        mask = opened(one.mask, "mask") if isinstance(one.mask, (str, Path)) and one.mask != "words" else one.mask
        box_in(one.box, background.size)
        if not (isinstance(mask, str) and mask == "words"):
            object_mask(thing, mask)
        words, others = words_of(one if one.words is not None else replace(one, words=_turn(several, number)))
        for phrase in (*words, *others):
            places(one.prompt, phrase)
        found.append(replace(one, background=background, thing=thing, mask=mask))
    return found


def _turn(several: Sequence[Composition], number: int) -> str:
    return thing_of(several[number].prompt, number - len(several))
