"""Objectives of a search: pictures, prompts -> scores, the higher the better.

Those here run on weights of the user's, from folders that `save_pretrained` wrote or from the hub's cache:

    ClipScore   100 times the cosine of picture and prompt, not below 0 (Hessel et al. 2021, arXiv 2104.08718, without
                its factor of 2.5)
    PickScore   a CLIP model trained on choices of people: its logit scale times the cosine (Kirstain et al. 2023,
                arXiv 2305.01569)
    Aesthetic   linear layers on the picture's CLIP embedding of length 1, as LAION's predictors (versions 1 and 2)
    Harmonic    2 a b / (a + b) of two of them, which is high only if both are (arXiv 2506.10978)

The judge of the glyph world is `attnctl.glyph.objective.Shown`. Any callable will do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from attnctl.errors import ControlError, short
from attnctl.loading import quiet
from attnctl.pipelines.head_bench import Objective


def styled(style: str, contents: Sequence[str]) -> list[str]:
    """Prompts "<style>, <content>", by which heads of a style are searched (arXiv 2506.10978).

    Raises:
        ControlError: the style is empty.
    """
    if not style.strip():
        raise ControlError("the style is empty")
    return [f"{style.strip()}, {content}" for content in contents]


class ClipScore:
    """How near a CLIP model finds picture and prompt.

    Args:
        folder: of the model.
        processor: folder of its processor; default: the same.
        template: what is compared with the picture; {} is the prompt.
        device: of the model.

    Raises:
        ControlError: the model cannot be loaded, or the template has no {}.
    """

    def __init__(
        self, folder: str | Path, processor: str | Path | None = None, template: str = "{}", device: str = "cpu"
    ) -> None:
        if "{}" not in template:
            raise ControlError(f"the template {template!r} has no {{}}, where the prompt is to stand")
        self.template, self.device = template, device
        self.model = _loaded("CLIPModel", folder).to(device).eval()
        self.processor = _loaded("CLIPProcessor", processor or folder)

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return [max(0.0, 100 * value) for value in self.cosines(pictures, prompts)]

    @torch.inference_mode()
    def cosines(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Of each picture and its prompt, from -1 to 1."""
        texts = [self.template.replace("{}", prompt) for prompt in prompts]
        images = [picture.convert("RGB") for picture in pictures]
        inputs = self.processor(text=texts, images=images, return_tensors="pt", truncation=True, padding=True)
        out = self.model(**inputs.to(self.device))  # its embeddings have length 1
        return [float(value) for value in (out.image_embeds * out.text_embeds).sum(-1)]


class PickScore(ClipScore):
    """What people would rather choose, by a CLIP model that was trained on it; about 20 for usual pictures."""

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        scale = float(self.model.logit_scale.detach().exp())
        return [scale * value for value in self.cosines(pictures, prompts)]


class Aesthetic:
    """How pleasing a picture is, whatever its prompt: linear layers on its CLIP embedding.

    Args:
        weights: a file of them, .safetensors or a state dict of torch's: layers one after another, as in LAION's
            predictors.
        folder: of the CLIP model they were trained on, ViT-L/14 for LAION's.
        device: of both.

    Raises:
        ControlError: one cannot be loaded, or they do not fit each other.
    """

    def __init__(self, weights: str | Path, folder: str | Path, device: str = "cpu") -> None:
        self.device = device
        self.model = _loaded("CLIPModel", folder).to(device).eval()
        self.processor = _loaded("CLIPImageProcessor", folder)
        self.layers = [(weight.to(device), bias.to(device)) for weight, bias in _layers(Path(weights).expanduser())]
        width = self.model.config.projection_dim
        if self.layers[0][0].shape[1] != width or self.layers[-1][0].shape[0] != 1:
            shapes = ", ".join(str(tuple(weight.shape)) for weight, _ in self.layers)
            raise ControlError(f"{weights} holds layers {shapes}; they should lead from {width}, as {folder} has, to 1")

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        inputs = self.processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt")
        pooled = self.model.vision_model(**inputs.to(self.device)).pooler_output
        embeds = self.model.visual_projection(pooled).float()
        found = embeds / embeds.norm(dim=-1, keepdim=True)  # (pictures, width)
        for weight, bias in self.layers:
            found = torch.nn.functional.linear(found, weight, bias)
        return [float(value) for value in found[:, 0]]


class Harmonic:
    """The harmonic mean of two objectives.

    Raises:
        ControlError: when called, if one gives a score below 0, of which there is no such mean.
    """

    def __init__(self, first: Objective, second: Objective) -> None:
        self.parts = (first, second)

    def __call__(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        one, two = ([float(value) for value in part(list(pictures), list(prompts))] for part in self.parts)
        if (least := min([*one, *two], default=0.0)) < 0:
            raise ControlError(f"a harmonic mean is of scores from 0, and one is {least:.3g}")
        return [2 * a * b / (a + b) if a + b else 0.0 for a, b in zip(one, two, strict=True)]


def _loaded(name: str, folder: str | Path) -> Any:
    place = Path(folder).expanduser()
    with quiet():
        import transformers

        try:
            return getattr(transformers, name).from_pretrained(str(place) if place.is_dir() else str(folder))
        except Exception as error:  # what a weight loader raises is not a closed set
            said = short(" ".join(str(error).split()), 200)
            raise ControlError(f"no {name} can be loaded from {folder}: {said}") from error


def _layers(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of linear layers, in order."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        names = [name for name in state if name.endswith("weight") and state[name].ndim == 2]
        names.sort(key=lambda name: [int(part) for part in re.findall(r"\d+", name)])
        found = [(state[name].float(), state[f"{name.removesuffix('weight')}bias"].float()) for name in names]
    except Exception as error:  # what a weight loader raises is not a closed set
        raise ControlError(f"no layers can be read from {path}: {short(' '.join(str(error).split()), 200)}") from error
    if not found:
        raise ControlError(f"{path} holds no linear layer")
    return found
