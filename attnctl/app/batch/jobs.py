"""Jobs: what a row may hold, its axes, and the check of all rows before the first picture.

A row holds the fields of `Job`, and axes that make many jobs of it, see `axes`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from attnctl.app.asked import with_phrases, without_files
from attnctl.app.batch.axes import AXES, expanded, overridden
from attnctl.app.batch.faults import Fault, JobError
from attnctl.app.composing import Compose, checked, said_of
from attnctl.app.limits import JOBS, LARGEST, STEPS
from attnctl.errors import AttnctlError, short
from attnctl.loading import USUAL, check_name

_HALF = re.compile("[\ud800-\udfff]")  # of a pair that is no text alone


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
    compose: Compose | None = Field(None, description="An object goes into a picture, as attnctl compose does it.")

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

    @field_validator("compose", mode="before")
    @classmethod
    def _composed(cls, value: Any) -> Any:
        try:
            return value if value is None or isinstance(value, Compose) else Compose.model_validate(value)
        except ValidationError as error:
            raise ValueError(said_of(error)) from None

    @field_validator("model")
    @classmethod
    def _there(cls, value: str) -> str:
        if value not in USUAL:  # those that ship are there; the others are looked for
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
    for name in AXES:
        values = {field: {"type": "array", "minItems": 1, "items": it} for field, it in whole["properties"].items()}
        whole["properties"] = whole["properties"] | {
            name: {"type": "object", "properties": {k: v for k, v in values.items() if k not in AXES}}
        }
        whole["properties"][name]["additionalProperties"] = False
    whole["properties"]["wildcards"] = {"anyOf": [{"const": "all"}, {"type": "integer", "minimum": 1}]}
    del whole["required"]  # an axis may hold the prompt
    return whole


def check_jobs(
    rows: Iterable[tuple[str, Any]],
    where: str = "",
    empty: str = "there is no job",
    folder: Path | None = None,
    overrides: dict[str, Any] | None = None,
) -> list[Placed]:
    """The jobs of rows, each of which comes with its place.

    Args:
        rows: (place, row).
        where: stands before each place.
        empty: what is said if there is no job.
        folder: of the job file, where its wildcards lie.
        overrides: values that stand for whatever the rows say, see `axes.overridden`.

    Raises:
        JobError: something is wrong; all of it is told.
    """
    jobs, lines = list[Placed](), list[str]()
    control_text = cache(_control_text)  # of this file: what a control reads from files may change
    for place, row in rows:
        try:
            for one in expanded(overridden(row, overrides or {}), FIELDS, JOBS - len(jobs), folder):
                jobs.append(Placed(_job(one, control_text, folder or Path()), f"{where}{place}"))
        except Fault as fault:
            lines.append(f"{where}{place}{fault.place}: {fault.said}")
    if lines:
        raise JobError(lines)
    if not jobs:
        raise JobError([empty])
    return jobs


def _job(row: Mapping[str, Any], control_text: Callable[[str, str, str], str], folder: Path) -> Job:
    """A checked job; its controls have their phrases, and hold no file. Pictures are looked for in the folder."""
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
        for text in value if isinstance(value, tuple) else [value]:
            if isinstance(text, str) and _HALF.search(text):
                raise Fault(f"{field} {short(ascii(value), 60)}: it holds half a character")
    if job.compose is not None:
        job = job.model_copy(update={"compose": _composition(job, job.compose.placed(folder))})
    try:
        texts = tuple(control_text(text, job.prompt, job.model) for text in job.controls)
        return job.model_copy(update={"controls": texts})
    except (AttnctlError, OSError) as error:
        raise Fault(f"controls: {error}") from None


def _composition(job: Job, asked: Compose) -> Compose:
    for field in ("maps", "trace"):
        if getattr(job, field):
            raise Fault(f"{field}: a composition has none")
    try:
        checked(asked, job.prompt, job.seed, job.steps, job.guidance)
    except (AttnctlError, OSError) as error:
        raise Fault(f"compose: {error}") from None
    return asked


def _control_text(text: str, prompt: str, model: str) -> str:
    """The text of a control that can be made, with its phrases and without files."""
    return without_files(with_phrases(text, prompt, model, lambda _: None))
