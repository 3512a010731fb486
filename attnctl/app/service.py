"""Drawing for strangers: within limits, one at a time, each as `attnctl generate` would, plain and controlled."""

import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from attnctl.app import drawing, elsewhere, request
from attnctl.app.asked import known_controls, open_model, recipe_of
from attnctl.app.bars import bars
from attnctl.app.control_text import parse_control
from attnctl.app.recipe import Recipe, read, save, weights_hash
from attnctl.app.region_text import columns, region_control
from attnctl.app.site_table import default_size
from attnctl.app.watched import Bar, Step, Turns
from attnctl.engine.families.registry import discover, family_of
from attnctl.engine.sites import Site
from attnctl.errors import AttnctlError, UnsupportedPipelineError, short
from attnctl.loading import USUAL, embedded

_FILES = re.compile(r"\.(json|png|jpe?g|gif|bmp|webp|tiff?)\b|\bdata:|~|\.\.", re.IGNORECASE)


class ServiceError(AttnctlError):
    """A visitor asks for what is not done here."""


@dataclass(frozen=True)
class Limits:
    """The most that a visitor may ask for."""

    steps: int = 100
    side: int = 1024  # pixels
    letters: int = 4000  # of a text
    seconds: float = 600  # of a run
    jobs: int = 100  # of a batch
    upload: int = 20  # megabytes
    waiting: int = 64  # runs in the queue
    kept: int = 500  # results on the disk


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
    model: str = ""  # empty: the first there is

    def check(self, limits: Limits) -> tuple[int, int] | None:
        """The size as numbers, once all of it makes sense."""
        if any(len(text) > limits.letters for text in (self.prompt, self.controls, self.regions, self.negative)):
            raise ServiceError(f"a text is too long: at most {limits.letters} letters")
        if self.steps is not None and self.steps > limits.steps:
            raise ServiceError(f"{self.steps} steps: at most {limits.steps} here")
        shape = request.checked(self.prompt, self.seed, 1, self.steps, self.guidance, self.size.strip() or None, None)
        if shape is not None and max(shape) > limits.side:
            raise ServiceError(f"size {self.size}: a side has at most {limits.side} pixels here")
        check_files((*lines(self.controls), *lines(self.regions)))
        return shape


Shown = list[tuple[str, str]]  # file and caption


@dataclass(frozen=True)
class Result:
    """What a run made; the files are PNGs that hold their recipe, but for heat maps and curves."""

    recipe: Recipe
    files: dict[str, Path]  # by what they show: plain, controlled, maps, comparison
    told: tuple[str, ...]  # the report, in sentences
    command: str  # draws the same
    python: str  # draws the same
    heat: Shown = field(default_factory=list)
    curves: Shown = field(default_factory=list)

    @property
    def final(self) -> Path:
        return self.files.get("controlled", self.files["plain"])


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def check_files(texts: Sequence[str]) -> None:
    """Raise if a text of a stranger names a file."""
    for line in texts:
        if found := _FILES.search(line):
            raise ServiceError(
                f"{found[0]!r} in {short(line, 60)!r}: controls and regions name no files here; draw a box"
            )


def restored(file: Path) -> Recipe:
    """The recipe in a PNG that a visitor brings, or in a recipe that was saved."""
    try:
        if file.suffix == ".json" and file.stat().st_size < 2**20:
            return Recipe.from_json(file.read_text(encoding="utf-8", errors="replace"))
        found = read(file)[1]
        if found.compose is not None:
            raise ServiceError(f"{file.name} is a composition: the tab Compose makes one, of pictures that you bring")
        return found
    except Image.DecompressionBombError:
        raise ServiceError(f"{file.name} is too large a picture") from None
    except AttnctlError as error:  # without the folder that uploads lie in
        raise ServiceError(str(error).replace(str(file), file.name)) from None


class Service:
    """Models, of which one at a time is loaded, and the runs on it: one at a time, too.

    Args:
        models: their names; the first is loaded at once.
        any_model: any other name will do as well.
    """

    def __init__(
        self,
        models: Sequence[str] = ("glyph-sd",),
        device: str | None = None,
        dtype: str = "float32",
        any_model: bool = False,
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> None:
        self.models, self.any_model, self.limits = tuple(models), any_model, limits
        self.device, self.dtype, self._loaded = device, dtype, ""
        self.turns = Turns()
        self._folder = tempfile.TemporaryDirectory(prefix="attnctl-")
        self.folder = Path(self._folder.name)
        self._kept: deque[list[Path]] = deque()
        self._open(self.models[0])

    def permitted(self, model: str) -> str:
        """The name of a model that may be used here."""
        if (model := model.strip() or self.models[0]) not in self.models and not self.any_model:
            raise ServiceError(f"no model {short(model, 60)!r} here; there are {', '.join(self.models)}")
        return model

    def _open(self, model: str) -> None:
        """Make this the loaded model."""
        import torch

        if self._loaded != model:
            self.close()  # room for the next
            with bars() as bar:
                self.pipe = open_model(model, self.device, self.dtype, bar)
            self._weights, self._loaded = weights_hash(self.pipe), model
            self.usual = {"steps": 20, "guidance": 3.0} | {
                name: value
                for name, own in (("steps", "num_inference_steps"), ("guidance", "guidance_scale"))
                if (value := USUAL.get(model, {}).get(name, drawing.default_setting(self.pipe, own))) is not None
            }
        if model in embedded():
            torch.set_num_threads(1)  # as the command line has it; each thread has its own number

    def loaded(self, model: str) -> Any:
        """The pipeline of a permitted model, for work that has its turn."""
        self._open(model)
        return self.pipe

    def close(self) -> None:
        """Free the memory of the model; the next run loads it again."""
        self._loaded, self.pipe = "", None

    def size(self, text: str = "") -> tuple[int, int]:
        """Width and height of a picture: as this text says, or the model's own."""
        try:
            own = default_size(self.pipe, family_of(self.pipe)[1])
        except (UnsupportedPipelineError, AttributeError):  # none is loaded just now
            own = (512, 512)
        return request.size_of(text.strip() or None) or own

    def sites(self, model: str = "", load: bool = False) -> list[Site]:
        """Where a model attends; nothing of one that is not loaded, unless it is to be."""
        if (model := self.permitted(model)) != self._loaded:
            if not load:
                return []
            for _ in self.turns.watch(lambda bar: self._open(model), self.limits.seconds):
                pass
        return list(discover(self.pipe))

    def run(self, asked: Asked) -> Iterator[Step | Result]:
        """The steps of a run and at last its result. Closing it, as a cancelled visit does, stops the drawing."""
        asked = replace(asked, model=self.permitted(asked.model))
        asked.check(self.limits)
        yield from self.turns.watch(lambda bar: self._drawn(asked, bar), self.limits.seconds)

    def _drawn(self, asked: Asked, bar: Bar) -> Result:
        began = time.monotonic()
        self._open(asked.model)
        if (shape := asked.check(self.limits)) is not None:
            drawing.check_size(self.pipe, *shape)
        texts = request.control_texts(asked.prompt, asked.model, lines(asked.controls), None, False)
        if regions := columns(lines(asked.regions)):
            texts = [region_control(regions), *texts]
        controls = [parse_control(text, known_controls()) for text in texts]
        recipe = recipe_of(
            self.pipe,
            model=asked.model,
            prompt=asked.prompt,
            negative=asked.negative.strip() or None,
            seed=asked.seed,
            steps=asked.steps,
            size=shape,
            guidance=asked.guidance,
            controls=tuple(texts),
            maps=request.mapped_words(self.pipe, asked.prompt) if asked.maps else (),
            weights=self._weights,
        )
        drawings = {"plain": drawing.draw(self.pipe, recipe, [], "plain", bar.rich, preview=bar.preview)}
        if controls:
            drawings["controlled"] = drawing.draw(
                self.pipe, recipe, controls, "controlled", bar.rich, trace=True, preview=bar.preview
            )
        return self._saved(drawings, recipe, time.monotonic() - began)

    def _saved(self, drawings: dict[str, drawing.Drawing], recipe: Recipe, seconds: float) -> Result:
        """The result, its pictures in files; the oldest files go."""
        stem = f"{recipe.digest()}-{recipe.seed}"
        files = {}
        for shows, picture in drawing.pictures(drawings, recipe).items():
            files[shows] = self.folder / f"{stem}-{shows}.png"
            save(picture, files[shows], replace(recipe, shows=shows))
        found: list[Shown] = [[], []]
        for kind, drawn in drawings.items():
            heat = {f"{word}, {kind}": picture for word, picture in drawn.maps.items()}
            curves = drawn.trace.pictures if drawn.trace is not None else {}
            for shown, pictures in zip(found, (heat, curves), strict=True):
                for caption, picture in pictures.items():
                    path = self.folder / f"{stem}-{kind}-{re.sub('[^a-z0-9]+', '-', caption.lower())}.png"
                    picture.save(path)
                    shown.append((str(path), CAPTIONS.get(caption, caption)))
        self.keep([*files.values(), *(Path(path) for shown in found for path, _ in shown)])
        told = [*request.told(recipe.model, drawings), f"Drawn in {seconds:.1f} s, {recipe.steps} steps a picture."]
        final = replace(recipe, shows="controlled" if recipe.controls else "plain")
        return Result(recipe, files, tuple(told), elsewhere.command_of(recipe), elsewhere.python_of(final), *found)

    def keep(self, paths: list[Path]) -> None:
        """Note what was made; of all that was, the oldest goes."""
        self._kept.append(paths)
        while len(self._kept) > self.limits.kept:
            for path in set(self._kept.popleft()) - {path for kept in self._kept for path in kept}:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


CAPTIONS = {"losses": "how far from the aim, by step", "steps": "where each word is looked at, by step"}
