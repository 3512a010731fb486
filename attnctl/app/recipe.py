"""The recipe of a picture: everything that drew it, kept as JSON inside the PNG so that it can be drawn again.

The recipe also holds the hash of the picture's pixels, so "bit-identical" is a fact that anyone can check.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from attnctl.app.limits import GROUP, LARGEST, STEPS, THREADS
from attnctl.errors import AttnctlError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.nn import Module

CHUNK = "attnctl"
"""Keyword of the PNG text chunk."""

PACKAGES = ("attnctl", "torch", "diffusers", "transformers")


class RecipeError(AttnctlError):
    """A picture without a recipe, or with one that cannot be read."""


@dataclass(frozen=True)
class Recipe:
    """What drew one picture. `shows` says which picture it is; a size or guidance of None is the pipeline's own."""

    model: str
    weights: str  # weights_hash of the pipeline
    prompt: str
    negative: str | None
    seed: int
    steps: int
    width: int | None
    height: int | None
    guidance: float | None
    controls: tuple[str, ...]  # as --control writes them
    maps: tuple[str, ...]  # the phrases whose maps were drawn
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    sampler: str | None = None  # as other tools call it, see `sampler_of`
    together: int = 1  # pictures of the batch it was drawn in; other sizes round in other ways
    shows: str = "controlled"  # plain | controlled | maps | comparison | composed
    pixels: str | None = None  # pixel_hash of the picture that carries this recipe
    compose: dict[str, Any] | None = None  # what went into which picture, see `composing`

    def to_json(self) -> str:
        told = asdict(self)
        if self.compose is None:
            del told["compose"]  # so that drawings are named as they always were
        return json.dumps(told, ensure_ascii=False, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Read what `to_json` wrote.

        Raises:
            RecipeError: something is missing, or is not what a recipe holds there.
        """
        try:
            content = json.loads(text)
            content = {"sampler": None, "together": 1, "compose": None} | content  # older recipes do not tell them
            recipe = cls(**{field.name: content[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecipeError(f"the recipe cannot be read: {type(error).__name__} {error}") from None
        for name, (fits, wanted) in _HOLDS.items():
            if not fits(content[name]):
                raise RecipeError(f"the recipe cannot be read: {name} is {content[name]!r:.40}, not {wanted}")
        if recipe.shows == "maps" and not recipe.maps:
            raise RecipeError("the recipe cannot be read: it shows maps, but of no word")
        if (recipe.shows == "composed") != (recipe.compose is not None):
            raise RecipeError("the recipe cannot be read: what is composed stands with a composition alone")
        return replace(recipe, controls=tuple(recipe.controls), maps=tuple(recipe.maps))

    def digest(self) -> str:
        """Names the drawing: the same for all pictures of one drawing, another for any other."""
        return hashlib.sha256(replace(self, shows="", pixels=None).to_json().encode()).hexdigest()[:6]

    def differences(self, versions: dict[str, str], weights: str) -> list[str]:
        """What is not as it was when the picture was drawn, one line each."""
        lines = [
            f"drawn with {name} {was}, redrawn with {name} {versions.get(name)}"
            for name, was in self.versions.items()
            if versions.get(name) != was
        ]
        if weights != self.weights:
            lines.append(f"the weights of {self.model} are not those it was drawn with")
        return lines


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _whole(value: Any, least: int, most: int = 2**63 - 1) -> bool:
    return type(value) is int and least <= value <= most


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


_Fits = Callable[[Any], bool]
_HOLDS: dict[str, tuple[_Fits, str]] = {
    **dict.fromkeys(("model", "weights", "prompt", "device", "dtype"), (_text, "text")),
    **dict.fromkeys(("negative", "sampler", "pixels"), (lambda value: value is None or _text(value), "text or null")),
    **dict.fromkeys(("controls", "maps"), (_texts, "a list of texts")),
    **dict.fromkeys(
        ("width", "height"),
        (lambda value: value is None or _whole(value, 1, LARGEST), f"a whole number from 1 to {LARGEST}, or null"),
    ),
    "steps": (lambda value: value is None or _whole(value, 1, STEPS), f"a whole number from 1 to {STEPS}, or null"),
    "seed": (lambda value: _whole(value, 0), "a whole number from 0 up"),
    "together": (lambda value: _whole(value, 1, GROUP), f"a whole number from 1 to {GROUP}"),
    "threads": (lambda value: _whole(value, 1, THREADS), f"a whole number from 1 to {THREADS}"),
    "guidance": (lambda value: value is None or _number(value), "a number from 0 up, or null"),
    "versions": (lambda value: isinstance(value, dict) and _texts(list(value.values())), "texts by name"),
    "shows": (lambda value: value in ("plain", "controlled", "maps", "comparison", "composed"), "a kind of picture"),
    "compose": (lambda value: value is None or isinstance(value, dict), "what is composed, or null"),
}
"""What each field of a recipe holds, and how that is called."""


_SAMPLERS = {
    "DDIM": "DDIM",
    "PNDM": "PLMS",
    "EulerDiscrete": "Euler",
    "EulerAncestralDiscrete": "Euler a",
    "FlowMatchEulerDiscrete": "Euler",
    "HeunDiscrete": "Heun",
    "FlowMatchHeunDiscrete": "Heun",
    "LMSDiscrete": "LMS",
    "KDPM2Discrete": "DPM2",
    "KDPM2AncestralDiscrete": "DPM2 a",
    "DPMSolverMultistep": "DPM++ 2M",
    "DPMSolverSDE": "DPM++ SDE",
    "UniPCMultistep": "UniPC",
    "LCM": "LCM",
}


def sampler_of(pipe: "DiffusionPipeline") -> str | None:
    """The pipeline's scheduler, by the name that other tools know it by."""
    name = type(getattr(pipe, "scheduler", None)).__name__.removesuffix("Scheduler")
    return None if name == "NoneType" else _SAMPLERS.get(name, name)


def parameters(picture: Image.Image, recipe: Recipe) -> str:
    """The recipe as the AUTOMATIC1111 web UI writes it, which many tools read: prompts, and a line of settings."""
    size = (recipe.width, recipe.height) if recipe.width and recipe.height else None
    if size is None and recipe.shows in ("plain", "controlled"):
        size = picture.size
    settings = {
        "Steps": recipe.steps,
        "Sampler": recipe.sampler,
        "CFG scale": None if recipe.guidance is None else f"{recipe.guidance:g}",
        "Seed": recipe.seed,
        "Size": None if size is None else f"{size[0]}x{size[1]}",
        "Model": Path(recipe.model).name,
    }
    lines = [recipe.prompt, *([f"Negative prompt: {recipe.negative}"] if recipe.negative else [])]
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items() if value is not None)
    return "\n".join([*lines, line])


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


def installed_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def pixel_hash(picture: Image.Image) -> str:
    head = f"{picture.mode} {picture.width}x{picture.height} ".encode()
    return hashlib.sha256(head + picture.tobytes()).hexdigest()


def weights_hash(pipe: "DiffusionPipeline") -> str:
    """One hash over every parameter and buffer of every component, in the type they are loaded in."""
    import torch

    return modules_hash({name: it for name, it in pipe.components.items() if isinstance(it, torch.nn.Module)})


def modules_hash(modules: Mapping[str, "Module"]) -> str:
    """One hash over every parameter and buffer of modules by name."""
    import torch

    digest = hashlib.sha256()
    for name, module in sorted(modules.items()):
        for key, tensor in module.state_dict().items():
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(picture: Image.Image, path: Path, recipe: Recipe) -> None:
    """Write the PNG with its recipe; `path` appears whole or not at all."""
    info = PngInfo()
    info.add_text("parameters", parameters(picture, recipe))
    info.add_itxt(CHUNK, replace(recipe, pixels=pixel_hash(picture)).to_json())
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    temporary = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:  # tempfile's are for their owner alone; these get the usual rights
            picture.save(file, format="PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without the picture
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def open_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except (OSError, SyntaxError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else "it is not a whole picture"
        raise RecipeError(f"cannot read {path}: {reason}") from None


def read(path: Path) -> tuple[Image.Image, Recipe]:
    """A picture and its recipe."""
    picture = open_picture(path)
    text: Any = picture.info.get(CHUNK)
    if text is None:
        raise RecipeError(f"{path} carries no attnctl recipe: it was not drawn by attnctl, or was saved again since")
    recipe = Recipe.from_json(str(text))
    if recipe.pixels != pixel_hash(picture):
        raise RecipeError(f"{path} was changed since it was drawn: its pixels are not those of its recipe")
    return picture, recipe
