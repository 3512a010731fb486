"""Job files: YAML, JSONL and CSV as rows with their places. In CSV, ";" stands between the parts of a list.

A folder of our own pictures is a job file, too: see `pngs`.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from attnctl.app.batch import pngs
from attnctl.app.batch.axes import Several
from attnctl.app.batch.faults import Fault, JobError
from attnctl.app.batch.jobs import FIELDS, Placed, check_jobs
from attnctl.errors import instead, short


def read_jobs(file: Path, overrides: dict[str, Any] | None = None) -> list[Placed]:
    """All jobs of a file, or of the pictures in a folder.

    Args:
        file: its ending says what it is.
        overrides: values that stand for whatever it says, see `read_overrides`.

    Raises:
        JobError: something in it is wrong; all of it is told.
    """
    try:
        if file.is_dir():
            empty = f"{file}: it holds no picture of ours"
            return check_jobs(list(pngs.rows(file)), f"{file}, ", empty, overrides=overrides)
        return check_jobs(_rows(file), f"{file}, ", f"{file}: it holds no job", file.parent, overrides)
    except Fault as fault:
        raise JobError([f"{file}{fault.place}: {fault.said}"]) from None


def _rows(file: Path) -> list[tuple[str, Any]]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise Fault(f"the name of a job file ends in one of {', '.join(_READERS)}")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise Fault(f"cannot be read: {error.strerror or error}") from None
    try:
        return list(reader(content.decode("utf-8-sig")))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise Fault("it is not UTF-8 text", f", line {line}") from None


def read_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """What "seed=5" and "controls=segregation; binding" say, as in a table; a list in square brackets is an axis.

    Raises:
        JobError: one of them is no override.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise JobError([f"--set {short(text)}: write it as field=value; {instead(name, FIELDS)}"])
        if name not in FIELDS:
            raise JobError([f"--set {short(text)}: there is no field {name!r}; {instead(name, FIELDS)}"])
        if name in found:
            raise JobError([f"--set {short(text)}: {name} is set twice"])
        found[name] = _cell(name, value)
        if value.startswith("[") and value.endswith("]"):
            try:
                ((_, listed),) = _yaml(f"[{value}]")
            except Fault as fault:
                raise JobError([f"--set {short(text)}: {fault.said}"]) from None
            found[name] = Several(listed)
    return found


def _pairs(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Fault(f"{short(str(name), 40)} is given twice")
        found[name] = value
    return found


def _yaml(text: str) -> Iterator[tuple[str, Any]]:
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key.value, str)]
            for key in {name for name in names if names.count(name) > 1} - {"<<"}:
                raise Fault(f"{short(key, 40)} is given twice", f", line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:
        content = yaml.load(text, Loader)  # noqa: S506 - a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Fault(f"{error.problem or error.context}", f", line {mark.line + 1}" if mark else "") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = "too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise Fault(f"it is no YAML: {short(said, 120)}") from None
    rows = content if isinstance(content, list) else [] if content is None else [content]
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _jsonl(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line, object_pairs_hook=_pairs)
            except Fault as fault:
                raise Fault(fault.said, f", line {number}") from None
            except (ValueError, RecursionError) as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
                raise Fault(f"it is no JSON: {said}", f", line {number}") from None


def _csv(text: str) -> Iterator[tuple[str, Any]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        head = [name.strip() for name in next(rows, [])]
        for name in head:
            if name not in FIELDS:
                raise Fault(f"unknown field {short(name, 40)!r}; {instead(name, FIELDS)}", ", line 1")
            if head.count(name) > 1:
                raise Fault(f"{name} is given twice", ", line 1")
        for cells in rows:
            if cells and len(cells) != len(head):
                raise Fault(f"{len(cells)} cells under {len(head)} fields", f", line {rows.line_num}")
            if any(cell.strip() for cell in cells):
                pairs = zip(head, cells, strict=True)
                yield f"line {rows.line_num}", {name: _cell(name, cell) for name, cell in pairs if cell.strip()}
    except csv.Error as error:
        raise Fault(f"it is no CSV: {error}", f", line {rows.line_num}") from None


def _cell(field: str, cell: str) -> Any:
    """A cell's text as the value of its field; as it is where it is none, for the check to complain."""
    cell = cell.strip()
    if field in ("seed", "steps"):
        return int(cell) if re.fullmatch(r"[+-]?\d{1,19}", cell) else cell
    if field == "compose":
        try:
            return next(iter(_yaml(cell)))[1]
        except (Fault, StopIteration):
            return cell
    if field == "guidance":
        try:
            return float(cell)
        except ValueError:
            return cell
    if field in ("maps", "trace") and cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    if field in ("controls", "maps"):
        return [part.strip() for part in cell.split(";") if part.strip()]
    return cell


_Reader = Callable[[str], Iterator[tuple[str, Any]]]
_READERS: dict[str, _Reader] = {".yaml": _yaml, ".yml": _yaml, ".jsonl": _jsonl, ".csv": _csv}
