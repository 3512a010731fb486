"""What is derived from the folder of a batch and can be made again at any time: its manifest and contact sheets."""

import json
import re
from dataclasses import asdict
from pathlib import Path

from attnctl.app.batch.folder import MANIFEST, PICTURE, png, write_whole
from attnctl.app.command import tell
from attnctl.errors import short

_THUMB, _COLUMNS, _PER_SHEET = 192, 6, 120


def write_report(out: Path) -> list[Path]:
    """Write manifest.jsonl and the contact sheets of a folder; their paths.

    A sheet has one row for each prompt and seed, its pictures side by side. What cannot be read is told and left out.
    """
    from attnctl.app.recipe import Recipe, RecipeError, read
    from attnctl.sheets import Cell, grid

    lines = list[str]()
    found: list[tuple[Recipe, Cell]] = []
    for path in sorted(out.iterdir()):
        if not (match := PICTURE.fullmatch(path.name)):
            continue
        try:
            picture, recipe = read(path)
        except RecipeError as error:
            tell(str(error))
            continue
        lines.append(json.dumps({"file": path.name, "key": match[1], **asdict(recipe)}, ensure_ascii=False) + "\n")
        thumb = picture.convert("RGB")
        thumb.thumbnail((_THUMB, _THUMB))
        told = "; ".join(short(text, 200) for text in recipe.controls) or "plain"
        found.append((recipe, (f"{recipe.seed}: {recipe.prompt}", grid([[(told, thumb)]], 12, border=False))))
    files = {out / MANIFEST: "".join(lines).encode()}
    rows: dict[tuple[str, int], list[Cell]] = {}
    for recipe, cell in sorted(found, key=lambda one: (one[0].prompt, one[0].seed, one[0].model, one[0].controls)):
        rows.setdefault((recipe.prompt, recipe.seed), []).append(cell)
    cut = [cells[at : at + _COLUMNS] for cells in rows.values() for at in range(0, len(cells), _COLUMNS)]
    for number, at in enumerate(range(0, len(cut), _PER_SHEET // _COLUMNS), 1):
        page = grid(cut[at : at + _PER_SHEET // _COLUMNS], 12)
        files[out / f"sheet{f'-{number}' if number > 1 else ''}.png"] = png(page)
    for old in out.glob("sheet*.png"):
        if re.fullmatch(r"sheet(-\d+)?\.png", old.name) and old not in files:
            old.unlink()
    for path, content in files.items():
        write_whole(path, content)
    return list(files)
