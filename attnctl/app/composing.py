"""Compositions as command line, batch and studio ask for them: one schema, checked without a model, and its recipe."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attnctl.errors import ControlError
from attnctl.sheets import grid

if TYPE_CHECKING:
    from PIL import Image
    from rich.progress import Progress

    from attnctl.app.recipe import Recipe
    from attnctl.engine.control import Control
    from attnctl.pipelines.compose_settings import Settings
    from attnctl.pipelines.compositions import Composed, Composition
    from attnctl.pipelines.inversion_cache import InversionCache

ALONE = ("object", "box", "mask", "words")
"""Fields of an object; where there is one object, they may stand beside the background."""
OF_ROW = ("steps", "guidance")
"""Settings of a composition that a row has fields for."""


class Object(BaseModel):
    """An object, and where it goes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: str = Field(description="File of the object's picture.")
    box: tuple[float, float, float, float] = Field(description="left, top, right, bottom: shares or pixels.")
    mask: str | None = Field(None, description="File of its mask; words: where the model sees it; none: its alpha.")
    words: tuple[str, ...] | None = Field(None, description="Phrases of the prompt that mean it.")

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One phrase is a list of one."""
        if isinstance(value, dict) and isinstance(value.get("words"), str):
            return value | {"words": (value["words"],)}
        return value


def _either(schema: dict[str, Any]) -> None:
    """In the JSON schema: objects, or the fields of a single one."""
    alone = Object.model_json_schema()["properties"]
    schema["properties"] |= {name: {"type": "array", "items": {"type": "string"}} for name in ("words",)} | alone
    schema["required"] = ["background"]
    schema["oneOf"] = [{"required": ["objects"]}, {"required": ["object", "box"]}]


class Compose(BaseModel):
    """What goes into which picture."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra=_either)

    background: str = Field(description="File of the picture.")
    objects: tuple[Object, ...] = Field(min_length=1, description="They go in one after the other.")
    others: tuple[str, ...] | None = Field(None, description="Phrases of the prompt that mean things of the picture.")
    preset: str = "ours"
    settings: dict[str, Any] = Field({}, description="Of the preset, but for those the row has fields for.")

    @model_validator(mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        """The fields of a single object may stand here."""
        if not isinstance(value, dict):
            raise ValueError("it takes background, object and box, each with its value")
        mine = {name: value[name] for name in ALONE if name in value}
        if mine and "objects" in value:
            raise ValueError(f"{next(iter(mine))} stands beside objects, which have their own")
        if mine:
            value = {name: it for name, it in value.items() if name not in ALONE} | {"objects": (mine,)}
        return value | {"others": (value["others"],)} if isinstance(value.get("others"), str) else value

    def placed(self, folder: Path) -> Compose:
        """The same, its files found from a folder."""

        def found(name: str) -> str:
            return str((folder / Path(name).expanduser()).resolve())

        objects = tuple(
            one.model_copy(
                update={
                    "object": found(one.object),
                    "mask": one.mask if one.mask in (None, "words") else found(str(one.mask)),
                }
            )
            for one in self.objects
        )
        return self.model_copy(update={"background": found(self.background), "objects": objects})

    @property
    def files(self) -> tuple[str, ...]:
        """Every file, each once."""
        masks = (one.mask for one in self.objects if one.mask not in (None, "words"))
        return tuple(dict.fromkeys([self.background, *(one.object for one in self.objects), *filter(None, masks)]))

    def by_content(self) -> dict[str, Any]:
        """Plain data in which the content of each file stands for its name."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        data["background"] = file_hash(self.background)
        for one in data["objects"]:
            one["object"] = file_hash(one["object"])
            if one.get("mask") not in (None, "words"):
                one["mask"] = file_hash(one["mask"])
        return data

    def with_settings(self, steps: int | None, guidance: float | None) -> Settings:
        """What the composer is set to.

        Raises:
            ControlError: there is no such preset or setting, or one is out of its range.
        """
        from attnctl.pipelines.compose_settings import settings_of

        if twice := next((name for name in OF_ROW if name in self.settings), None):
            raise ControlError(f"{twice} stands beside the composition, not among its settings")
        row = {"steps": steps, "guidance": guidance}
        return settings_of(self.preset, **self.settings | {name: it for name, it in row.items() if it is not None})

    def compositions(self, prompt: str, seed: int) -> list[Composition]:
        """One for each object."""
        from attnctl.pipelines.compositions import Composition

        return [
            Composition(
                background=self.background, thing=one.object, box=one.box, prompt=prompt, mask=one.mask,
                words=one.words, others=self.others, seed=seed,
            )
            for one in self.objects
        ]  # fmt: skip


def file_hash(name: str) -> str:
    """Of a file's content.

    Raises:
        ControlError: it cannot be read.
    """
    try:
        told = Path(name).stat()
        return _hash(name, told.st_mtime_ns, told.st_size)
    except OSError as error:
        raise ControlError(f"cannot read {name}: {error.strerror or error}") from None


@cache
def _hash(name: str, changed: int, size: int) -> str:
    return sha256(Path(name).read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Request:
    """A composition that was checked.

    Attributes:
        asked: what is asked for.
        several: its compositions, with opened pictures, one for each object.
        settings: of the composer.
        changes: of one that is made again, what of its files is not as it was, one line each.
    """

    asked: Compose
    several: list[Composition]
    settings: Settings
    changes: tuple[str, ...] = ()


def checked(
    asked: Compose, prompt: str, seed: int = 0, steps: int | None = None, guidance: float | None = None
) -> Request:
    """What is asked for, once all makes sense that can be told without a model.

    Raises:
        AttnctlError: something does not; which, in one line.
    """
    from attnctl.pipelines.compositions import checked

    return Request(asked, checked(asked.compositions(prompt, seed)), asked.with_settings(steps, guidance))


def composed(
    pipe: Any,
    request: Request,
    size: tuple[int, int] | None,
    negative: str | None,
    controls: Sequence[Control] = (),
    bar: Progress | None = None,
    measure: bool = False,
    kept: OrderedDict[str, Any] | None = None,
    cache: InversionCache | None = None,
) -> list[Composed]:
    """What is made in each turn; the last has all objects.

    Args:
        pipe: the pipeline.
        request: what to compose.
        size: (width, height) of the result; None: as fits the background and the model.
        negative: prompt.
        controls: further ones.
        bar: shows the steps.
        measure: also tell what inversion loses.
        kept: inversions in memory, from one composition to the next.
        cache: inversions on the disk.
    """
    from attnctl.app.drawing import steps_shown
    from attnctl.pipelines.compose import PrimeComposer

    composer = PrimeComposer(pipe, cache=cache, **asdict(request.settings))
    if kept is not None:
        composer.paths = kept
    more: dict[str, Any] = {} if negative is None else {"negative_prompt": negative}
    with steps_shown(pipe, bar, "composing"):
        return composer.in_turn(request.several, measure=measure, size=size, controls=controls, **more)


def sheet(turns: Sequence[Composed]) -> Image.Image:
    """A row for each turn: background, pasted pixels, what was made."""
    return grid([[("background", one.background), ("pasted", one.pasted), ("composed", one.picture)] for one in turns])


def recipe_for(recipe: Recipe, request: Request) -> Recipe:
    """The recipe of a composition, from that of a drawing of the same prompt."""
    asked = request.asked.placed(Path.cwd())
    told = asked.model_dump(mode="json", exclude_defaults=True)
    told["files"] = {name: file_hash(name) for name in asked.files}
    steps, guidance = request.settings.steps, request.settings.guidance
    return replace(recipe, steps=steps, guidance=guidance, sampler=None, compose=told, shows="composed")


def of_recipe(recipe: Recipe) -> Request:
    """What a recipe composes.

    Raises:
        AttnctlError: it cannot be composed again; why, in one line.
    """
    told = dict(recipe.compose or {})
    was = told.pop("files", {})
    try:
        asked = Compose(**told)
    except ValidationError as error:
        raise ControlError(f"the recipe cannot be read: {said_of(error)}") from None
    found = checked(asked, recipe.prompt, recipe.seed, recipe.steps, recipe.guidance)
    changes = (f"{name} is not the picture it was" for name in asked.files if file_hash(name) != was.get(name))
    return replace(found, changes=tuple(changes))


def said_of(error: ValidationError) -> str:
    """The first fault, in one line."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg'].removeprefix('Value error, ')}".removeprefix(": ")
