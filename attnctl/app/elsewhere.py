"""A recipe for use elsewhere: as the command that draws the same, and as a Python program."""

import shlex
from collections.abc import Sequence
from typing import Any

from attnctl.app.asked import known_controls
from attnctl.app.control_text import python_call
from attnctl.app.recipe import Recipe
from attnctl.app.region_text import region_lines


def command_of(recipe: Recipe, trace: bool = False) -> str:
    """The `attnctl generate` of a recipe. Regions that are boxes become --region."""
    regions, controls = split_regions(recipe.controls)
    options: dict[str, Any] = {
        "--model": recipe.model if recipe.model != "glyph-sd" else None,
        "--dtype": recipe.dtype if recipe.dtype != "float32" else None,
        "--negative": recipe.negative,
        "--seed": recipe.seed,
        "--steps": recipe.steps,
        "--guidance": None if recipe.guidance is None else f"{recipe.guidance:g}",
        "--size": f"{recipe.width}x{recipe.height}" if recipe.width and recipe.height else None,
    }
    words = ["attnctl", "generate", recipe.prompt]
    for name, values in (("--region", regions), ("--control", controls)):
        words += [word for value in values for word in (name, value)]
    words += [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    words += ["--compare"] * bool(recipe.controls) + ["--maps"] * bool(recipe.maps)
    return shlex.join(words + ["--trace"] * (trace and bool(recipe.controls)))


def python_of(recipe: Recipe) -> str:
    """A program that draws the picture of a recipe, with its controls, and saves it."""
    call = {
        "negative_prompt": recipe.negative,
        "num_inference_steps": recipe.steps,
        "guidance_scale": recipe.guidance,
        "width": recipe.width,
        "height": recipe.height,
    }
    settings = [f"{name}={value!r}," for name, value in call.items() if value is not None]
    where = f"device={recipe.device!r}, dtype={recipe.dtype!r}"
    controls = [f"attnctl.processors.{python_call(text, known_controls())}," for text in recipe.controls]
    drawn = ["picture = pipe(", f"    {recipe.prompt!r},", *(f"    {one}" for one in settings)]
    drawn += [f'    generator=torch.Generator("cpu").manual_seed({recipe.seed}),', ").images[0]"]
    if controls:
        drawn = ["with attnctl.attach(pipe, *controls):", *(f"    {line}" for line in drawn)]
        drawn = ["controls = [", *(f"    {one}" for one in controls), "]", *drawn]
    head = ["import torch", "", "import attnctl", ""]
    head += [f"torch.set_num_threads({recipe.threads})  # the last bits depend on it"] * (recipe.device == "cpu")
    head += [f"pipe = attnctl.load({recipe.model!r}, {where})"]
    return "\n".join([*head, *drawn, 'picture.save("picture.png")', ""])


def split_regions(controls: Sequence[str]) -> tuple[list[str], list[str]]:
    """Controls as (lines of boxes, the other controls): the first `regions` of boxes with its usual settings."""
    for number, text in enumerate(controls):
        if (lines := region_lines(text)) is not None:
            return lines, [*controls[:number], *controls[number + 1 :]]
    return [], list(controls)
