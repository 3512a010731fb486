"""One run of the studio: the recipe that `attnctl generate` would make, drawn plain and controlled. Knows no page."""

import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from PIL import Image

from attnctl.app import drawing, request
from attnctl.app.asked import known_controls, open_model, recipe_of
from attnctl.app.bars import bars
from attnctl.app.control_text import parse_control
from attnctl.app.loading import USUAL, embedded
from attnctl.app.recipe import Recipe, read, save, weights_hash
from attnctl.app.region_text import outlined, region_control
from attnctl.errors import AttnctlError
from attnctl.files import no_files
from attnctl.regions import Region
from attnctl.words.subjects import read_subjects

STEPS, SIDE, LETTERS = (
    100,
    1024,
    4000,
)  # the most to ask for: steps, pixels of a side, letters of a text
_FILES = re.compile(r"\.(json|png|jpe?g|gif|bmp|webp|tiff?)\b|\bdata:|~|\.\.", re.IGNORECASE)


class StudioError(AttnctlError):
    """A visitor asks for what the studio does not do."""


@dataclass(frozen=True)
class Asked:
    """What a visitor asks for; controls and regions are texts of one a line, None is what is usual for the model."""

    prompt: str
    controls: str = ""
    regions: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    maps: bool = True
    negative: str = ""
    size: str = ""

    def check(self) -> tuple[int, int] | None:
        """The size as numbers, once all of it makes sense."""
        if any(len(text) > LETTERS for text in (self.prompt, self.controls, self.regions, self.negative)):
            raise StudioError(f"a text is too long: at most {LETTERS} letters")
        if self.steps is not None and self.steps > STEPS:
            raise StudioError(f"{self.steps} steps: at most {STEPS} here")
        shape = request.checked(self.prompt, self.seed, 1, self.steps, self.guidance, self.size.strip() or None, None)
        if shape is not None and max(shape) > SIDE:
            raise StudioError(f"size {self.size}: a side has at most {SIDE} pixels here")
        for line in (*lines(self.controls), *lines(self.regions)):
            if found := _FILES.search(line):
                raise StudioError(f"{found[0]!r} in {line[:60]!r}: controls and regions name no files here; draw a box")
        return shape


@dataclass(frozen=True)
class Step:
    """How far a run is."""

    kind: str  # which drawing: plain | controlled
    done: int
    total: int
    seconds: float  # left, of this drawing


@dataclass(frozen=True)
class Result:
    """What a run made; the files are PNGs that hold their recipe."""

    recipe: Recipe
    files: dict[str, Path]  # by what they show: plain, controlled, maps, comparison
    told: tuple[str, ...]  # the report, in sentences
    command: str  # draws the same


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def things(prompt: str) -> list[str]:
    """What the prompt names, as far as it can be read; for a control to start from."""
    try:
        return [subject.whole for subject in read_subjects(prompt)]
    except AttnctlError:
        return list(drawing.content_words(prompt)[:2])


def restored(file: Path) -> Recipe:
    """The recipe in a PNG that a visitor brings."""
    try:
        return read(file)[1]
    except Image.DecompressionBombError:
        raise StudioError(f"{file.name} is too large a picture") from None
    except AttnctlError as error:  # without the folder that uploads lie in
        raise StudioError(str(error).replace(str(file), file.name)) from None


def region_preview(text: str | None, size: tuple[int, int] = (384, 384)) -> Image.Image:
    """The boxes of the region lines, outlined on a blank picture."""
    blank = Image.new("RGB", size, "#f4f4f5")
    if not (text and lines(text)):
        return blank
    with no_files():
        control = parse_control(region_control(lines(text)), known_controls())
        return outlined(blank, [(phrase, Region(where)) for phrase, where in control.masks])


class Studio:
    """A model, and the runs on it: one at a time."""

    def __init__(self, model: str = "glyph-sd", device: str | None = None, dtype: str = "float32") -> None:
        self.model, self.dtype = model, dtype
        self.threads = 1 if model in embedded() else None  # as the command line has it
        with bars() as bar:
            self.pipe = open_model(model, device, dtype, bar, self.threads)
        self.weights = weights_hash(self.pipe)
        self.usual = {"steps": 20, "guidance": 3.0} | {
            name: value
            for name, own in (("steps", "num_inference_steps"), ("guidance", "guidance_scale"))
            if (value := USUAL.get(model, {}).get(name, drawing.default_setting(self.pipe, own))) is not None
        }
        self._one = Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="attnctl-studio-")

    def run(self, asked: Asked) -> Iterator[Step | Result]:
        """The steps of a run and at last its result. Closing it, as a cancelled visit does, stops the drawing."""
        told: SimpleQueue[Step | Result | BaseException] = SimpleQueue()
        bar = _Bar(told)

        def work() -> None:
            try:
                with self._one, no_files():
                    told.put(self._drawn(asked, bar))
            except BaseException as error:  # for the visitor's thread
                told.put(error)

        shape = asked.check()
        if shape is not None:
            drawing.check_size(self.pipe, *shape)
        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while not isinstance(one := told.get(), Result):
                if isinstance(one, BaseException):
                    raise one
                yield one
            yield one
        finally:
            bar.stop.set()
            thread.join()

    def _drawn(self, asked: Asked, bar: "_Bar") -> Result:
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)  # each thread has its own number
        started = time.monotonic()
        texts = request.control_texts(asked.prompt, self.model, lines(asked.controls), None, False)
        if regions := lines(asked.regions):
            texts = [region_control(regions), *texts]
        controls = [parse_control(text, known_controls()) for text in texts]
        recipe = recipe_of(
            self.pipe,
            model=self.model,
            prompt=asked.prompt,
            negative=asked.negative.strip() or None,
            seed=asked.seed,
            steps=asked.steps,
            size=asked.check(),
            guidance=asked.guidance,
            controls=tuple(texts),
            maps=request.mapped_words(self.pipe, asked.prompt) if asked.maps else (),
            weights=self.weights,
        )
        drawings = {"plain": drawing.draw(self.pipe, recipe, [], "plain", bar.rich)}
        if controls:
            drawings["controlled"] = drawing.draw(self.pipe, recipe, controls, "controlled", bar.rich)
        files = {}
        for shows, picture in drawing.pictures(drawings, recipe).items():
            files[shows] = Path(self._folder.name) / f"{recipe.digest()}-{recipe.seed}-{shows}.png"
            save(picture, files[shows], replace(recipe, shows=shows))
        said = (
            line.split(maxsplit=1) for line in (*request.left_alone(drawings), *request.judged(self.model, drawings))
        )
        told = [f"{kind.capitalize()}: {rest}." for kind, rest in said]
        told.append(f"Drawn in {time.monotonic() - started:.1f} s, {recipe.steps} steps a picture.")
        return Result(recipe, files, tuple(told), self._command(asked, recipe))

    def _command(self, asked: Asked, recipe: Recipe) -> str:
        """The `attnctl generate` that draws the same."""
        words = ["attnctl", "generate", asked.prompt]
        regions = lines(asked.regions)
        options: dict[str, Any] = {
            "--model": self.model if self.model != "glyph-sd" else None,
            "--dtype": self.dtype if self.dtype != "float32" else None,
            "--negative": recipe.negative,
            "--seed": recipe.seed,
            "--steps": recipe.steps,
            "--guidance": None if recipe.guidance is None else f"{recipe.guidance:g}",
            "--size": asked.size.strip() or None,
        }
        for name, values in (("--region", regions), ("--control", recipe.controls[bool(regions) :])):
            words += [word for value in values for word in (name, value)]
        words += [str(word) for name, value in options.items() if value is not None for word in (name, value)]
        words += ["--compare"] * bool(recipe.controls) + ["--maps"] * asked.maps
        return shlex.join(words)


class _Stopped(Exception):
    """The visitor has gone, or has cancelled."""


class _Bar:
    """What drawing uses of a rich bar: it passes the steps on, and stops the drawing when it is told to."""

    def __init__(self, told: Any) -> None:
        self.rich: Any = self
        self.stop = Event()
        self._told = told

    def add_task(self, label: str, total: int | None) -> int:
        self._label, self._total, self._done, self._start = label, total or 0, 0, time.monotonic()
        return 0

    def stop_task(self, task: int) -> None:
        pass

    def advance(self, task: int, steps: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        self._done += steps
        left = (time.monotonic() - self._start) / self._done * max(0, self._total - self._done)
        self._told.put(Step(self._label, self._done, self._total, left))
