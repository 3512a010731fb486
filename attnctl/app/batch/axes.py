"""Axes: what makes many jobs of one row, and what stands for a field of every row.

`product` makes one job of every combination of its lists, `zip` one of every position. `wildcards` makes many prompts
of one, see `wildcards`. Overrides come from the command line: a value for a field, or a list of them as an axis.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from attnctl.app.batch.faults import Fault
from attnctl.app.limits import JOBS
from attnctl.errors import instead, short

AXES = ("product", "zip")


def expanded(row: Any, fields: Sequence[str], most: int, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows that the axes of a row make of it; the last field of `product` changes fastest.

    Args:
        row: as it stands in the file.
        fields: that a row may hold.
        most: how many rows it may be.
        folder: of the job file, where its wildcards lie.

    Raises:
        Fault: the row is none.
    """
    if not isinstance(row, dict):
        raise Fault(f"{short(repr(row), 60)} is no row: a row is fields with their values")
    apart = (*AXES, "wildcards")
    fixed = {name: value for name, value in row.items() if name not in apart}
    axes = {name: _axis(name, row.get(name, {}), fields) for name in AXES}
    for name in fixed:
        if name not in fields:
            raise Fault(f"unknown field {short(str(name), 40)!r}; {instead(str(name), (*fields, *apart))}")
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
    made = (
        fixed | dict(zip(axes["zip"], together, strict=True)) | dict(zip(axes["product"], each, strict=True))
        for together in zipped
        for each in product(*axes["product"].values())
    )
    yield from made if "wildcards" not in row else _filled(made, row["wildcards"], most, folder)


def _filled(rows: Iterator[dict[str, Any]], how: Any, most: int, folder: Path | None) -> Iterator[dict[str, Any]]:
    from attnctl.app.batch.wildcards import prompts

    count = 0
    for row in rows:
        for prompt in prompts(row.get("prompt"), how, folder):
            count += 1
            if count > most:
                raise Fault(f"more than {JOBS} jobs")
            yield row | {"prompt": prompt}


def _axis(name: str, axis: Any, fields: Sequence[str]) -> dict[str, list[Any]]:
    if not isinstance(axis, dict):
        raise Fault(f"{name} {short(repr(axis), 60)}: it takes fields, each with the list of its values")
    for field, values in axis.items():
        if field not in fields:
            raise Fault(f"{name}: unknown field {short(str(field), 40)!r}; {instead(str(field), fields)}")
        if not isinstance(values, list) or not values:
            raise Fault(f"{name}.{field} {short(repr(values), 60)}: it takes a list of values")
    return axis


def overridden(row: Any, overrides: dict[str, Any]) -> Any:
    """A row in which these values stand for whatever it says of their fields; a list of them is an axis."""
    if not isinstance(row, dict) or not overrides:
        return row
    row = {name: value for name, value in row.items() if name not in overrides}
    for name in AXES:
        if isinstance(row.get(name), dict):
            row[name] = {field: values for field, values in row[name].items() if field not in overrides}
    axes = {name: value.values for name, value in overrides.items() if isinstance(value, Several)}
    row |= {name: value for name, value in overrides.items() if name not in axes}
    if axes:
        own = row.get("product", {})
        row["product"] = own | axes if isinstance(own, dict) else own
    return row


class Several:
    """Values of an axis that an override makes."""

    def __init__(self, values: list[Any]):
        self.values = values
