"""Presets of `Perturb`: heads that were found for a model, with the settings they were found with, in a file.

A preset holds `heads`, and may hold `u`, `scale`, `kind`, `scope`; `shape`, how many blocks and heads the denoiser has;
`model` and `revision`, what it is called; `sample`, a few of its weights by name. `attnctl search heads` writes them.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attnctl.engine.families.registry import family_of
from attnctl.engine.heads import Heads, files_of, shape_of
from attnctl.engine.sites import Site
from attnctl.errors import AttnctlWarning, ControlError, NoSiteError, instead
from attnctl.files import check_file

SHIPPED = Path(__file__).parent / "presets"
SETTINGS = ("u", "scale", "kind", "scope")  # that a preset may hold beside its heads
SAMPLED = 32  # weights of a denoiser that tell it from another
NEAR = 0.02  # of a weight: half precision and storage round by less, training moves some of them by more

_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{7,40})")


class UsualNumber(float):
    """A default that a preset may change; the same number said by the user is an ordinary one."""


class UsualText(str):
    """A default that a preset may change; the same text said by the user is an ordinary one."""

    __slots__ = ()


@dataclass(frozen=True)
class Preset:
    """Heads, and what is known of how and where they were found.

    Attributes:
        name: as the user gave it, for messages.
        heads: see `attnctl.engine.heads`.
        settings: of `SETTINGS`, those that it holds.
        shape: of the denoiser, see `attnctl.engine.heads.shape_of`; None fits all.
        model: name of the model, "" if it is not known.
        revision: of the model, "" if it is not known.
        sample: weights of the denoiser by name, see `sample_of`.
    """

    name: str
    heads: Heads
    settings: dict[str, Any] = field(default_factory=dict)
    shape: str | None = None
    model: str = ""
    revision: str = ""
    sample: dict[str, float] = field(default_factory=dict)

    @property
    def found_on(self) -> str:
        """The model, as text."""
        return f"{self.model or 'a model without a name'}{f' ({self.revision[:12]})' if self.revision else ''}"

    def check_shape(self, sites: tuple[Site, ...]) -> None:
        """Raise unless the denoiser has as many blocks and heads as that of the preset."""
        if self.shape is not None and self.shape != (here := shape_of(sites)):
            raise NoSiteError(f"preset {self.name} is for a denoiser with {self.shape}; this one has {here}")

    def check_model(self, pipe: Any) -> None:
        """Warn if the preset was found on other weights, or, where these are not known, on another model."""
        model, revision = name_of(pipe)
        known = self.sample and same_weights(self.sample, family_of(pipe)[1])
        other = bool(self.model and model and self.model != model)
        older = bool(not other and self.revision and revision and self.revision != revision)
        if known is False or (known is not True and (other or older)):
            here = f"{model or 'this model'}{f' ({revision[:12]})' if revision else ''}"
            warnings.warn(
                f"preset {self.name} was found on {self.found_on}, and {here} has other weights or another name; its "
                "heads may do something else here",
                AttnctlWarning,
                stacklevel=2,
            )


def read_preset(name: str | Path) -> Preset:
    """A preset that ships with attnctl, by its name, or that in a file whose name ends in .json.

    Raises:
        ControlError: there is none, or the file holds none.
    """
    name = str(name)
    if name in shipped():
        path = SHIPPED / f"{name}.json"
    elif name.endswith(".json"):
        check_file(name)
        path = Path(name).expanduser()
    else:
        raise ControlError(f"there is no preset {name!r}; {instead(name, shipped())}, or a file that ends in .json")
    try:
        content = json.loads(path.read_text())
        heads = content["heads"]
    except OSError as error:
        raise ControlError(f"preset {name} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ControlError(f'{name} is no preset: it should hold {{"heads": "7:3 12:9", "u": 0.5}}') from None
    heads = tuple(heads) if isinstance(heads, list) else heads
    if files_of(heads):
        raise ControlError(f"preset {name} names another file of heads; a preset lists heads only")
    sample = content.get("sample") or {}
    if not isinstance(sample, dict) or not all(isinstance(value, float) for value in sample.values()):
        raise ControlError(f"preset {name}: sample is weights by name, not {str(sample)[:40]}")
    texts = {key: content.get(key) for key in ("shape", "model", "revision")}
    if wrong := [key for key, value in texts.items() if not isinstance(value, str | None)]:
        raise ControlError(f"preset {name}: {wrong[0]} is text, not {texts[wrong[0]]!r}")
    settings = {key: content[key] for key in SETTINGS if key in content}
    named = {"model": texts["model"] or "", "revision": texts["revision"] or ""}
    return Preset(name, heads, settings, texts["shape"], sample=sample, **named)


def shipped() -> list[str]:
    """The names of the presets that ship with attnctl."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def name_of(pipe: Any) -> tuple[str, str]:
    """What the model of a pipeline is called, and its revision; "" where it does not tell.

    A model of the hub is "owner/name" and a commit, read off the folder it was cached in; any other is its folder.
    """
    config = getattr(family_of(pipe)[1], "config", {})
    for place in (config.get("_name_or_path") or "", str(getattr(pipe, "name_or_path", "") or "")):
        if found := _CACHED.search(place):
            return f"{found['owner']}/{found['name']}", found["revision"]
    place = str(getattr(pipe, "name_or_path", "") or "")
    return (Path(place).name if Path(place).is_dir() else place), ""


def sample_of(model: torch.nn.Module) -> dict[str, float]:
    """A few weights of a denoiser, by name: the middle number of matrices from its first to its last.

    Weights that cannot be read, as those that are quantised or elsewhere, are left out.
    """
    found = _readable(model)
    names = [name for name, tensor in found.items() if tensor.ndim > 1]
    count = min(SAMPLED, len(names))
    chosen = [names[(2 * k + 1) * len(names) // (2 * count)] for k in range(count)]
    return {name: _middle(found[name]) for name in chosen}


def same_weights(sample: dict[str, float], model: torch.nn.Module) -> bool | None:
    """Whether a denoiser has these weights, but for rounding; None if it cannot be told."""
    found = _readable(model)
    pairs = [(value, _middle(found[name])) for name, value in sample.items() if name in found]
    if len(pairs) < len(sample) / 2 or not pairs:
        return None
    return all(math.isclose(a, b, rel_tol=NEAR, abs_tol=1e-6) for a, b in pairs)


def _readable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by the name they have without LoRA."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.named_parameters()
        if tensor.is_floating_point() and not tensor.is_meta and ".lora_" not in name and tensor.numel()
    }


def _middle(tensor: torch.Tensor) -> float:
    return float(tensor.detach().reshape(-1)[tensor.numel() // 2])
