"""A training that was interrupted goes on: what was prepared, and where the training stands, in two files."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from attnctl.concepts import Concept, write
from attnctl.errors import ControlError
from attnctl.pipelines.personalize.examples import Examples
from attnctl.pipelines.personalize.settings import Settings

FOLDER, PREPARED, STATE = "training", "prepared.safetensors", "state.pt"
NAMES = ("views", "regular")
PARTS = ("latents", "valid", "subset", "masks", "places")  # tensors of `Examples`


def about(
    concepts: tuple[Concept, ...],
    settings: Settings,
    picture: Image.Image,
    model: torch.nn.Module,
    masks: torch.Tensor | None = None,
) -> dict[str, str]:
    """What must be the same for a training to go on, by name; of masks those that the caller gave."""
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():  # a few numbers of each tell models apart
        weights.update(name.encode() + np.asarray(parameter.detach().flatten()[:4].float().cpu()).tobytes())
    return {
        "concepts": json.dumps([one.phrase for one in concepts]),
        "settings": json.dumps(settings.to_dict(), sort_keys=True),
        "picture": hashlib.sha256(np.asarray(picture.convert("RGB")).tobytes()).hexdigest(),
        "masks": "" if masks is None else hashlib.sha256(masks.numpy().tobytes()).hexdigest(),
        "model": weights.hexdigest(),
    }


def _examples(file: Any, name: str, told: dict[str, str]) -> Examples:
    parts = {part: file.get_tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in file.keys()}
    return Examples(captions=json.loads(told[name]), **parts)


@dataclass(frozen=True)
class Checkpoints:
    """The files of one training, in `training` inside the folder of its results.

    Attributes:
        folder: of the results.
        about: see the function of that name.
    """

    folder: Path
    about: dict[str, str]

    @property
    def _inside(self) -> Path:
        return self.folder / FOLDER

    def prepared(self) -> tuple[Examples, Examples | None] | None:
        """Views and regular pictures of this training; None if they were not written.

        Raises:
            ControlError: they are of another training, or damaged.
        """
        path = self._inside / PREPARED
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata()
                self._check(json.loads(told["about"]))
                views, regular = (_examples(file, name, told) if name in told else None for name in NAMES)
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            if isinstance(error, ControlError):
                raise
            raise ControlError(f"{path} is damaged: begin again without --resume") from error
        assert views is not None
        return views, regular

    def prepare(self, views: Examples, regular: Examples | None) -> None:
        """Keep what was prepared; a training that was there is forgotten."""
        self._inside.mkdir(parents=True, exist_ok=True)
        (self._inside / STATE).unlink(missing_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        told = {"about": json.dumps(self.about)}
        for name, one in zip(NAMES, (views, regular), strict=True):
            if one is not None:
                parts = {part: getattr(one, part) for part in PARTS}
                tensors |= {f"{name}.{part}": x.contiguous() for part, x in parts.items() if x is not None}
                told[name] = json.dumps(one.captions)
        write(self._inside / PREPARED, save(tensors, told))

    def state(self) -> dict[str, Any] | None:
        """Where the training stands, see `Trainer.state`; None if it has not come to a checkpoint."""
        path = self._inside / STATE
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # what a broken zip file makes torch raise is not a closed set
            raise ControlError(f"{path} is damaged: begin again without --resume") from error
        return state

    def keep(self, state: dict[str, Any]) -> None:
        """Keep where the training stands."""
        content = io.BytesIO()
        torch.save(state, content)
        write(self._inside / STATE, content.getvalue())

    def _check(self, before: dict[str, str]) -> None:
        changed = [name for name, value in self.about.items() if before.get(name) != value]
        if not changed:
            return
        name = changed[0]
        if name == "settings":
            old, new = json.loads(before.get(name, "{}")), json.loads(self.about[name])
            one = next(key for key in new if old.get(key) != new[key])
            raise ControlError(f"the training in {self.folder} was begun with {one}={old.get(one)}, not {new[one]}")
        other = "other masks" if name == "masks" else f"another {name.removesuffix('s')}"
        raise ControlError(f"the training in {self.folder} was begun with {other}")


def end_training(folder: Path) -> None:
    """Remove the checkpoints of a training whose results are saved."""
    inside = folder / FOLDER
    for name in (PREPARED, STATE):
        (inside / name).unlink(missing_ok=True)
    if inside.is_dir() and not any(inside.iterdir()):
        inside.rmdir()
