"""Compositions for strangers: their pictures, within limits, step by step, as `attnctl compose` makes them."""

import hashlib
import shlex
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from attnctl.app import request
from attnctl.app.compose_command import phrases, told
from attnctl.app.composing import Compose, Object, Request, composed, sheet
from attnctl.app.service import Service, ServiceError
from attnctl.app.watched import Bar, Step
from attnctl.pipelines.compose_settings import settings_of
from attnctl.pipelines.compositions import Composition, checked
from attnctl.pipelines.pasting import box_in, opened

BOX = "left,top,right,bottom"


@dataclass(frozen=True)
class ComposeAsked:
    """What a visitor asks for; pictures are PIL's, phrases stand with commas between them, empty is what is usual.

    `mask` is a picture, or "words" for where the model sees the object; None is the object's alpha channel.
    """

    background: Image.Image | None
    thing: Image.Image | None
    box: str
    prompt: str
    mask: Image.Image | str | None = None
    words: str = ""
    others: str = ""
    seed: int = 0
    preset: str = "ours"
    settings: dict[str, Any] = field(default_factory=dict)
    size: str = ""
    model: str = ""


@dataclass(frozen=True)
class Made:
    """What was made, in files; what was done, in sentences; and the command that does the same with saved pictures."""

    picture: Path
    pasted: Path
    sheet: Path
    told: tuple[str, ...]
    command: str


def numbers(box: str) -> tuple[float, float, float, float]:
    """A box that is written as left,top,right,bottom.

    Raises:
        ServiceError: it is written otherwise.
    """
    try:
        left, top, right, bottom = (float(part) for part in box.split(","))
    except ValueError:
        raise ServiceError(f"the box {box[:40]!r}: draw one, or write it as {BOX}") from None
    return left, top, right, bottom


def shares(box: str, picture: Image.Image) -> tuple[float, float, float, float]:
    """A written box as shares of a picture.

    Raises:
        AttnctlError: it is none, or does not lie in the picture.
    """
    return box_in(numbers(box), opened(picture, "background").size)


class Composing:
    """Compositions on the models of a service; inversions of the model that was used last stay in memory."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._of = ""

    def run(self, asked: ComposeAsked) -> Iterator[Step | Made]:
        """The steps and at last what was made. Closing it stops the work at its next step."""
        model = self.service.permitted(asked.model)
        wanted, size = self._checked(asked)
        yield from self.service.turns.watch(
            lambda bar: self._made(asked, model, wanted, size, bar), self.service.limits.seconds
        )

    def _checked(self, asked: ComposeAsked) -> tuple[Request, tuple[int, int] | None]:
        """The composition, once all makes sense that can be told without a model."""
        most = self.service.limits
        if asked.background is None or asked.thing is None:
            raise ServiceError("drop a background and an object first")
        if any(len(text) > most.letters for text in (asked.prompt, asked.words, asked.others)):
            raise ServiceError(f"a text is too long: at most {most.letters} letters")
        size = request.checked(asked.prompt, asked.seed, 1, None, None, asked.size.strip() or None, None)
        if size is not None and max(size) > most.side:
            raise ServiceError(f"size {asked.size}: a side has at most {most.side} pixels here")
        settings = settings_of(asked.preset, **asked.settings)
        if settings.steps > most.steps:
            raise ServiceError(f"{settings.steps} steps: at most {most.steps} here")
        words, others = phrases(asked.words) or None, phrases(asked.others) or None
        box = numbers(asked.box)
        one = Composition(asked.background, asked.thing, box, asked.prompt, asked.mask, words, others, asked.seed)
        mask = asked.mask if isinstance(asked.mask, str) else None if asked.mask is None else "mask.png"
        thing = Object(object="object.png", box=box, mask=mask, words=words)
        shown = Compose(background="background.png", objects=(thing,), others=others, preset=asked.preset, settings={})
        return Request(shown, checked([one]), settings), size

    def _made(self, asked: ComposeAsked, model: str, wanted: Request, size: tuple[int, int] | None, bar: Bar) -> Made:
        began, service = time.monotonic(), self.service
        pipe = service.loaded(model)
        if self._of != model:
            self._kept.clear()
            self._of = model
        (made,) = composed(pipe, wanted, size, None, bar=bar.rich, measure=True, kept=self._kept)
        name = hashlib.sha256(made.picture.tobytes() + repr(asked.settings).encode()).hexdigest()[:12]
        files = [service.folder / f"{name}-{what}.png" for what in ("composed", "pasted", "sheet")]
        for path, image in zip(files, (made.picture, made.pasted, sheet([made])), strict=True):
            image.save(path)
        service.keep(files)
        said = [f"{line[0].upper()}{line[1:]}." for line in told(made)]
        meant = ", ".join(made.words), ", ".join(made.others) or "nothing"
        words = f"Taken for the object: {meant[0]}; for the background: {meant[1]}."
        picture, pasted, page = files
        said = [words, *said, f"Made in {time.monotonic() - began:.1f} s."]
        return Made(picture, pasted, page, tuple(said), command_of(asked, model))


def command_of(asked: ComposeAsked, model: str) -> str:
    """The `attnctl compose` that makes the same, of pictures that are saved under these names."""
    words = ["attnctl", "compose", "--background", "background.png", "--object", "object.png", "--box", asked.box]
    words += ["--prompt", asked.prompt]
    mask = asked.mask if isinstance(asked.mask, str) else None if asked.mask is None else "mask.png"
    options: dict[str, Any] = {
        "--mask": mask,
        "--words": asked.words,
        "--others": asked.others,
        "--preset": asked.preset if asked.preset != "ours" else None,
        "--seed": asked.seed or None,
        "--size": asked.size,
        "--model": model if model != "glyph-sd" else None,
    }
    words += [str(word) for name, value in options.items() if value for word in (name, value)]
    words += [word for name, value in asked.settings.items() for word in ("--set", f"{name}={value}")]
    return shlex.join(words)
