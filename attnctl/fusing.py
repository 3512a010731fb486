"""Fuse: write a pipeline that has learnt something as one whole folder that stock diffusers opens."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from attnctl.concepts import ADAPTER
from attnctl.errors import ControlError
from attnctl.loading import quiet

BASE = ".base_layer"


def check_new(folder: str | Path) -> None:
    """Refuse a folder that has something in it.

    Raises:
        ControlError: it exists and is not an empty folder.
    """
    folder = Path(folder)
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ControlError(f"{folder} is there already: name a new folder for the whole pipeline, or remove it first")


def fuse(pipe: Any, folder: str | Path) -> Path:
    """Write a whole pipeline into a new folder, for `DiffusionPipeline.from_pretrained(folder)`.

    Its tokenizers and text encoders have the new words, and the learnt keys and values are plain weights: adapters of
    `Personalizer` are merged. Other adapters, such as those of `load_lora_weights`, are left out. The pipeline itself
    stays as it is.

    Args:
        pipe: one that `Personalizer.learn` trained, that `Learnt.add_to` taught, or that `attnctl.load` opened.
        folder: new or empty. It is whole or not there.

    Raises:
        ControlError: the folder has something in it, or it cannot be written, e.g. because the disk is full.
    """
    folder = Path(folder)
    check_new(folder)
    part = folder.with_name(f".{folder.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.parent.mkdir(parents=True, exist_ok=True)
        with quiet(), _merged(pipe):
            pipe.save_pretrained(part)
        if folder.is_dir():
            folder.rmdir()
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        said = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[-1]
        raise ControlError(f"cannot write {folder}: {said}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


@contextmanager
def _merged(pipe: Any) -> Iterator[None]:
    """While it is open, the pipeline's denoiser has no adapters."""
    name = next(one for one in ("unet", "transformer") if getattr(pipe, one, None) is not None)
    model = getattr(pipe, name)
    pipe.register_modules(**{name: without_adapters(model)})
    try:
        yield
    finally:
        pipe.register_modules(**{name: model})


@torch.no_grad()
def without_adapters(model: Any) -> Any:
    """A model of diffusers with plain weights, those of the training's adapters merged; itself where it has none.

    All weights but the merged ones are shared with `model`.
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    if not layers:
        return model
    weights = {
        name.replace(BASE, ""): weight
        for name, weight in model.state_dict().items()
        if not any(name.startswith(f"{layer}.") and not name.startswith(f"{layer}{BASE}.") for layer in layers)
    }
    for layer, module in layers.items():
        if ADAPTER in module.lora_A:
            up, down = module.lora_B[ADAPTER].weight, module.lora_A[ADAPTER].weight
            key = f"{layer}.weight"
            weights[key] = weights[key] + (up.float() @ down.float()).to(weights[key])
    with torch.device("meta"):
        plain: nn.Module = type(model).from_config(model.config)
    plain.load_state_dict(weights, assign=True)
    return plain.to(next(iter(weights.values())).dtype)
