"""Pictures of ours as jobs: each PNG of a folder holds the recipe it was drawn by."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnctl.app.batch.faults import Fault


def rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """A row for each picture of a folder, with its place; sheets and maps, which others make, are passed over."""
    from attnctl.app.recipe import CHUNK, RecipeError, open_picture, read

    for path in sorted(folder.glob("*.png")):
        try:
            if CHUNK not in open_picture(path).info:
                continue  # a contact sheet, or somebody else's
            _, recipe = read(path)
        except RecipeError as error:
            raise Fault(str(error)) from None
        if recipe.shows not in ("plain", "controlled", "composed"):
            continue
        row: dict[str, Any] = {"prompt": recipe.prompt, "seed": recipe.seed, "steps": recipe.steps}
        row |= {"model": recipe.model, "controls": list(recipe.controls) if recipe.shows != "plain" else []}
        if recipe.compose is not None:
            row["compose"] = {name: value for name, value in recipe.compose.items() if name != "files"}
        for name, value in (("negative", recipe.negative), ("guidance", recipe.guidance), ("maps", list(recipe.maps))):
            if value is not None and value != []:
                row[name] = value
        if recipe.width and recipe.height:
            row["size"] = f"{recipe.width}x{recipe.height}"
        yield path.name, row
