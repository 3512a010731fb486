"""Contact sheets of a folder: a field of the recipes along the columns, one along the rows, one over the pages."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from attnctl.app.command import UsageError
from attnctl.errors import instead, short
from attnctl.sheets import Cell, grid

if TYPE_CHECKING:
    from attnctl.app.recipe import Recipe

_THUMB, _COLUMNS, _PER_SHEET = 192, 6, 120
_LARGEST = 40_000_000  # pixels of a sheet


@dataclass(frozen=True)
class Shown:
    """A picture of the folder: its file's name, its key, its recipe, and a small picture of it."""

    name: str
    key: str
    recipe: "Recipe"
    thumb: Image.Image

    @classmethod
    def of(cls, name: str, key: str, recipe: "Recipe", picture: Image.Image) -> "Shown":
        thumb = picture.convert("RGB")
        thumb.thumbnail((_THUMB, _THUMB))
        return cls(name, key, recipe, thumb)


def _size(recipe: "Recipe") -> str:
    return f"{recipe.width}x{recipe.height}" if recipe.width and recipe.height else "its own size"


_Reader = Callable[["Recipe"], Any]
READERS: dict[str, _Reader] = {
    "prompt": lambda recipe: recipe.prompt,
    "negative": lambda recipe: recipe.negative or "",
    "seed": lambda recipe: recipe.seed,
    "steps": lambda recipe: recipe.steps,
    "guidance": lambda recipe: -1.0 if recipe.guidance is None else recipe.guidance,
    "size": _size,
    "controls": lambda recipe: "; ".join(recipe.controls) or "plain",
    "model": lambda recipe: recipe.model,
}
"""What an axis may be, and its value in a recipe."""


@dataclass(frozen=True)
class Axes:
    """The fields along columns (x), rows (y) and pages (z)."""

    x: str
    y: str | None = None
    z: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Axes":
        """Read "x=seed,y=controls,z=prompt".

        Raises:
            UsageError: an axis or a field is unknown, or stands twice; or there is no x.
        """
        found: dict[str, str] = {}
        for part in text.split(","):
            name, _, value = (one.strip() for one in part.partition("="))
            if name not in ("x", "y", "z") or name in found:
                raise UsageError(f"--sheet {short(text)}: write it as x=seed,y=controls,z=prompt")
            if value not in READERS or value in found.values():
                said = "stands twice" if value in READERS else f"is no field; {instead(value, READERS)}"
                raise UsageError(f"--sheet {short(text)}: {short(value, 40)!r} {said}")
            found[name] = value
        if "x" not in found:
            raise UsageError(f"--sheet {short(text)}: x is missing, as in x=seed,y=controls")
        return cls(**found)


def sheets(found: Iterable[Shown], axes: Axes | None = None) -> list[Image.Image]:
    """The pages; of no picture, none."""
    found = list(found)
    return list(_pages(found, axes) if axes else _usual(found)) if found else []


def _usual(found: list[Shown]) -> Iterable[Image.Image]:
    """One row for each prompt and seed, its pictures side by side."""
    rows: dict[tuple[str, int], list[Cell]] = {}
    ordered = sorted(found, key=lambda one: (one.recipe.prompt, one.recipe.seed, one.recipe.model, one.recipe.controls))
    for one in ordered:
        told = "; ".join(short(text, 200) for text in one.recipe.controls) or one.recipe.shows
        cell = f"{one.recipe.seed}: {one.recipe.prompt}", grid([[(told, one.thumb)]], 12, border=False)
        rows.setdefault((one.recipe.prompt, one.recipe.seed), []).append(cell)
    cut = [cells[at : at + _COLUMNS] for cells in rows.values() for at in range(0, len(cells), _COLUMNS)]
    for at in range(0, len(cut), _PER_SHEET // _COLUMNS):
        yield grid(cut[at : at + _PER_SHEET // _COLUMNS], 12)


def _pages(found: list[Shown], axes: Axes) -> Iterable[Image.Image]:
    for title, of_page in _by(found, axes.z).items():
        columns = list(_by(of_page, axes.x))
        rows = []
        for row, of_row in _by(of_page, axes.y).items():
            cells = _by(of_row, axes.x)
            rows.append([_cell(column, row, cells.get(column, [])) for column in columns])
        if len(columns) * len(rows) * _THUMB**2 > _LARGEST:
            most = _LARGEST // _THUMB**2
            raise UsageError(f"--sheet: {len(columns)} x {len(rows)} pictures on a page; there is room for {most}")
        page = grid(rows, 12)
        yield grid([[(title, page)]], 14) if title else page


def _by(found: list[Shown], field: str | None) -> dict[str, list[Shown]]:
    """In the order of the field's values, by how they are written."""
    if field is None:
        return {"": found}
    read = READERS[field]
    parts: dict[Any, list[Shown]] = {}
    for one in sorted(found, key=lambda one: read(one.recipe)):
        parts.setdefault(read(one.recipe), []).append(one)
    return {_written(value): part for value, part in parts.items()}


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(column: str, row: str, found: list[Shown]) -> Cell:
    caption = ", ".join(filter(None, [column, row]))
    if len(found) < 2:
        return caption, found[0].thumb if found else None
    return caption, grid([[("", one.thumb) for one in found]], 12, 2, border=False)
