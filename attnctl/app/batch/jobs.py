"""Jobs: what a row may hold, its axes, and the check of all rows before the first picture.

A row holds the fields of `Job`, and two axes, each a list of values by field: `product` makes one job of every
combination, `zip` one of every position.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from itertools import product
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from attnctl.app.asked import control_of, with_phrases, without_files
from attnctl.app.limits import JOBS, LARGEST, STEPS
from attnctl.errors import AttnctlError, instead, short
from attnctl.loading import check_name

_AXES = ("product", "zip")


class JobError(AttnctlError):
    """What is wrong with a job file, one line for each fault, each with its place."""

    def __init__(self, lines: list[str]):
        self.lines = lines
        super().__init__(lines[0] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""))


class Job(BaseModel):
    """One picture to draw. What is not given is the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(description="What to draw.")
    negative: str | None = Field(None, description="What not to draw.")
    seed: int = Field(0, ge=0, le=2**63 - 1)
    steps: int | None = Field(None, ge=1, le=STEPS)
    guidance: float | None = Field(None, ge=0, allow_inf_nan=False)
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels.")
    controls: tuple[str, ...] = Field(
        (),
        description="As --control writes them, one or a list; none stands for no control.",
        json_schema_extra={"type": ["array", "string"]},
    )
    maps: bool | tuple[str, ...] = Field((), description="Phrases whose maps are drawn as well; true: each word.")
    trace: bool = Field(False, description="Also save what the controls did: as JSON, loss curves, maps by step.")
    model: str = Field("glyph-sd", description="An embedded model, a folder, or a hub id.")

    @field_validator("prompt")
    @classmethod
    def _said(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("it is empty")
        return value

    @field_validator("size")
    @classmethod
    def _sized(cls, value: str | None) -> str | None:
        if value is not None:
            match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", value.lower())
            if match is None:
                raise ValueError("write it as WIDTHxHEIGHT, such as 512x768")
            if not all(1 <= int(side) <= LARGEST for side in match.groups()):
                raise ValueError(f"a side has 1 to {LARGEST} pixels")
        return value

    @field_validator("controls", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """A text alone is a list of one; none, alone, is a list of nothing."""
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError("it takes a control as text, a list of them, or none")
        return tuple(part for part in parts if part.strip().lower() != "none")

    @field_validator("maps", mode="before")
    @classmethod
    def _mapped(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return value or ()
        if not isinstance(value, list | tuple) or not all(isinstance(part, str) and part.strip() for part in value):
            raise ValueError("it takes a list of phrases, or true for each word")
        return tuple(value)

    @field_validator("model")
    @classmethod
    def _there(cls, value: str) -> str:
        check_name(value)
        return value

    @property
    def shape(self) -> tuple[int, int] | None:
        """The size as numbers."""
        if self.size is None:
            return None
        width, height = self.size.lower().split("x")
        return int(width), int(height)


class Placed(NamedTuple):
    """A job and where it stands."""

    job: Job
    place: str


FIELDS = tuple(Job.model_fields)


def schema() -> dict[str, Any]:
    """The JSON schema of a row, axes included."""
    whole = Job.model_json_schema()
    for name in _AXES:
        values = {field: {"type": "array", "minItems": 1, "items": it} for field, it in whole["properties"].items()}
        whole["properties"] = whole["properties"] | {
            name: {"type": "object", "properties": {k: v for k, v in values.items() if k not in _AXES}}
        }
        whole["properties"][name]["additionalProperties"] = False
    del whole["required"]  # an axis may hold the prompt
    return whole


def check_jobs(rows: Iterable[tuple[str, Any]], where: str = "", empty: str = "there is no job") -> list[Placed]:
    """The jobs of rows, each of which comes with its place.

    Raises:
        JobError: something is wrong; all of it is told.
    """
    jobs, lines = list[Placed](), list[str]()
    control_text = cache(_control_text)  # of this file: what a control reads from files may change
    for place, row in rows:
        try:
            for one in _expanded(row, JOBS - len(jobs)):
                jobs.append(Placed(_job(one, control_text), f"{where}{place}"))
        except Fault as fault:
            lines.append(f"{where}{place}{fault.place}: {fault.said}")
    if lines:
        raise JobError(lines)
    if not jobs:
        raise JobError([empty])
    return jobs


class Fault(Exception):
    """What is wrong, and where below or beside the row."""

    def __init__(self, said: str, place: str = ""):
        self.said, self.place = said, place


def _job(row: Mapping[str, Any], control_text: Callable[[str, str, str], str]) -> Job:
    """A checked job; its controls have their phrases, and hold no file."""
    try:
        job = Job.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field, said = str(first["loc"][0]), first["msg"].removeprefix("Value error, ")
        if first["type"] == "missing":
            raise Fault(f"{field} is missing") from None
        said = said.replace("Input should", "it should")
        for theirs, ours in (("a valid integer", "a whole number"), ("a valid string", "text"), ("a valid ", "a ")):
            said = said.replace(theirs, ours)
        raise Fault(f"{field} {short(repr(first['input']), 60)}: {said}") from None
    for field, value in job:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise Fault(f"{field} {short(ascii(value), 60)}: it holds half a character") from None
    try:
        texts = tuple(control_text(text, job.prompt, job.model) for text in job.controls)
        return job.model_copy(update={"controls": texts})
    except (AttnctlError, OSError) as error:
        raise Fault(f"controls: {error}") from None


def _control_text(text: str, prompt: str, model: str) -> str:
    """The text of a control that can be made, with its phrases and without files."""
    text = with_phrases(text, prompt, model, lambda _: None)
    control_of(text)
    return without_files(text)


# --- axes -------------------------------------------------------------------------------------------------------------


def _expanded(row: Any, most: int) -> Iterator[dict[str, Any]]:
    """The rows that the axes of a row make of it; the last field of `product` changes fastest."""
    if not isinstance(row, dict):
        raise Fault(f"{short(repr(row), 60)} is no row: a row is fields with their values")
    fixed = {name: value for name, value in row.items() if name not in _AXES}
    axes = {name: _axis(name, row.get(name, {})) for name in _AXES}
    for name in fixed:
        if name not in FIELDS:
            raise Fault(f"unknown field {short(str(name), 40)!r}; {instead(str(name), (*FIELDS, *_AXES))}")
    taken = set(fixed)
    for name, axis in axes.items():
        if twice := sorted(taken & set(axis)):
            raise Fault(f"{name}.{twice[0]}: the field is given twice")
        taken |= set(axis)
    lengths = {field: len(values) for field, values in axes["zip"].items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{field} {length}" for field, length in lengths.items())
        raise Fault(f"zip: its lists are as long as each other; here {told}")
    if math.prod(map(len, axes["product"].values())) * max(lengths.values(), default=1) > most:
        raise Fault(f"more than {JOBS} jobs")
    zipped = list(zip(*axes["zip"].values(), strict=True)) if axes["zip"] else [()]
    for together in zipped:
        for each in product(*axes["product"].values()):
            yield (
                fixed | dict(zip(axes["zip"], together, strict=True)) | dict(zip(axes["product"], each, strict=True))
            )


def _axis(name: str, axis: Any) -> dict[str, list[Any]]:
    if not isinstance(axis, dict):
        raise Fault(f"{name} {short(repr(axis), 60)}: it takes fields, each with the list of its values")
    for field, values in axis.items():
        if field not in FIELDS:
            raise Fault(f"{name}: unknown field {short(str(field), 40)!r}; {instead(str(field), FIELDS)}")
        if not isinstance(values, list) or not values:
            raise Fault(f"{name}.{field} {short(repr(values), 60)}: it takes a list of values")
    return axis
