"""`load`: an embedded model by name, a folder, or a hub id, as the diffusers pipeline it is.

A folder is read through before diffusers sees it, so that a download or a save that was cut short is named by its file
rather than by an error from deep inside a weight loader.
"""

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctl.errors import AttnctlError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline

MODELS = Path(__file__).parent / "glyph" / "models"
"""The folders of the embedded models."""

USUAL: dict[str, dict[str, Any]] = {
    "glyph-sd": {"steps": 20, "guidance": 3.0, "group": 4},
    "glyph-sd3": {"steps": 20, "guidance": 4.0, "group": 4},
}
"""Settings that suit an embedded model better than its pipeline's defaults."""

DTYPES = ("float32", "float16", "bfloat16")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
_WEIGHTS = ("*.safetensors", "*.bin")


class ModelError(AttnctlError):
    """A model that is unknown, out of reach, or not whole."""


def embedded() -> list[str]:
    """The names of the models that ship with the package."""
    return sorted(path.parent.name for path in MODELS.glob("*/model_index.json"))


def load(
    model: str | Path = "glyph-sd",
    *,
    device: "str | torch.device | None" = None,
    dtype: "str | torch.dtype | None" = None,
    **options: Any,
) -> "DiffusionPipeline":
    """A diffusers pipeline: `model` is an embedded name, a folder saved by `save_pretrained`, or a hub id.

    A folder that `attnctl personalize` wrote is the model that learnt, with the new words and what goes with them.

    `dtype` is a torch dtype or one of "float32" (the default), "float16", "bfloat16". Without a `device` the pipeline
    stays on the CPU. `options` go to `DiffusionPipeline.from_pretrained` as they are.
    """
    import torch

    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    if device is not None:
        device = usable_device(device)

    folder = _folder(model)
    if folder is not None and (base := _base_of(folder)) is not None:
        from attnctl.concepts import read_learnt

        pipe = load(base, device=device, **options)
        read_learnt(folder).add_to(pipe)
        return pipe
    if folder is not None:
        check_folder(folder)
        options = left_out(folder) | options | {"local_files_only": True}
    with quiet():
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(str(folder or model), **options)
        except Exception as error:  # what a hub client or a weight loader raises is not a closed set
            raise ModelError(_why(model, folder, error)) from error
    return pipe if device is None else pipe.to(device)


def usual(model: str | Path) -> dict[str, Any]:
    """Settings that suit a model better than its pipeline's defaults; of concepts, those of the model that learnt."""
    name = str(model)
    if name in USUAL or not Path(name).is_dir():
        return USUAL.get(name, {})
    base = _base_of(Path(name))
    return {} if base is None or base == name else usual(base)


def _base_of(folder: Path) -> str | None:
    """The model that the concepts of a folder were learnt by; None if it holds none. Without torch where it can be."""
    if not (folder / "concepts.json").is_file():
        return None
    from attnctl.concepts import base_of

    return base_of(folder)


def written(model: str | Path) -> str:
    """A model's name as it is good from any folder."""
    folder = _folder(model)
    return str(model) if folder is None or str(model) in embedded() else str(folder.resolve())


def load_autoencoder(folder: Path) -> "AutoencoderKL":
    """The autoencoder that `save_pretrained` wrote into a folder; never one from the hub."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder: an autoencoder is one written by save_pretrained")
    config = folder / "config.json"
    if not config.is_file() or _json(config, "").get("_class_name") != "AutoencoderKL":
        raise ModelError(f"{folder} holds no autoencoder: there is no config.json of an AutoencoderKL")
    _check_component(folder)
    with quiet():
        from diffusers import AutoencoderKL

        try:
            return AutoencoderKL.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # what a weight loader raises is not a closed set
            raise ModelError(_why(folder, folder, error)) from error


def _folder(model: str | Path) -> Path | None:
    """The folder of a model on this machine, or None for a hub id."""
    name = str(model)
    if name in embedded():
        return MODELS / name
    if not name.strip():
        raise ModelError(f"the name of the model is empty; {_known()}")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name} is a file: a model is a folder written by save_pretrained")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(name) or name[0] in ".~":
        kind = "is no folder" if "/" in name or isinstance(model, Path) else "is neither an embedded model nor a folder"
        raise ModelError(f"unknown model {name!r}: it {kind}; {_known()}")
    return None


def check_name(model: str | Path) -> None:
    """Raise `ModelError` unless this names an embedded model or a folder, or may name one of the hub."""
    _folder(model)


def _known() -> str:
    return f"embedded models: {', '.join(embedded()) or 'none'}; other models are a folder or a hub id such as org/name"


def _why(model: str | Path, folder: Path | None, error: Exception) -> str:
    said = _short(error)
    if folder is not None:
        return f"cannot load the model folder {folder}: {said}"
    return f"cannot load {str(model)!r} from the hub: unknown, private, or out of reach from here; {_known()} ({said})"


def _short(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 160 else said[:160] + " ..."


def usable_device(device: "str | torch.device") -> "torch.device":
    """The device of this name, once it has held a number and given it back; else a `ModelError`."""
    import torch

    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()  # "meta" holds none
    except (RuntimeError, AssertionError, ImportError) as error:
        unknown = "Expected one of" in str(error)  # torch goes on with all devices that it was ever built for
        why = "torch knows no such device; names are cpu, cuda, cuda:1, mps" if unknown else _short(error)
        raise ModelError(f"device {str(device)!r} cannot be used here: {why}") from error
    return found


_NOISE = ("requires torchvision", "Couldn't connect to the Hub")
"""Advice about image processors, which no pipeline that draws from words runs; and what our own error says better."""


@contextmanager
def quiet() -> Iterator[None]:
    """No bars for the loading of components (a download still shows its own), and none of the `_NOISE`."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.get_logger(), transformers_logging.get_logger()  # give their root loggers a handler
    handlers = [handler for name in ("diffusers", "transformers") for handler in getLogger(name).handlers]
    shown = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for handler in handlers:
        handler.addFilter(_worth_saying)
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()
        for handler in handlers:
            handler.removeFilter(_worth_saying)


def _worth_saying(record: LogRecord) -> bool:
    return not any(noise in record.getMessage() for noise in _NOISE)


# --- a folder, read through -------------------------------------------------------------------------------------------


def left_out(folder: Path) -> dict[str, Any]:
    """The components that a pipeline was saved without, such as T5, which diffusers wants to be told again."""
    index = _json(folder / "model_index.json", "")
    return {name: None for name, entry in index.items() if entry == [None, None]}


def check_folder(folder: Path) -> None:
    """Raise `ModelError` naming the first file of a model folder that is missing or cut short."""
    index = _json(folder / "model_index.json", "it is no diffusers pipeline folder, or was saved halfway")
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue  # a setting of the pipeline, or a component it does without
        _check_component(folder / name)


def _check_component(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing: the model folder was saved or copied halfway")
    for path in sorted(folder.glob("*.json")):
        content = _json(path, "")
        if path.name.endswith(".index.json"):
            for shard in sorted(set(content.get("weight_map", {}).values())):
                _require(folder, shard)
    _require(folder, *_CONFIGS)
    if (folder / "tokenizer_config.json").exists():
        _require(folder, *_VOCABULARIES)
    if (folder / "config.json").exists():
        _require(folder, *_WEIGHTS)
    for path in sorted(folder.glob("*")):
        if path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.is_file() and path.stat().st_size == 0:
            raise ModelError(f"{path} is empty: the model folder was saved or copied halfway")


def _require(folder: Path, *patterns: str) -> None:
    if not any(True for pattern in patterns for _ in folder.glob(pattern)):
        wanted = f"no {patterns[0]}" if len(patterns) == 1 else f"none of {', '.join(patterns)}"
        raise ModelError(f"{folder} holds {wanted}: the model folder was saved or copied halfway")


def _json(path: Path, hint: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: {hint}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): the model folder was saved or copied halfway") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object")
    return content


def _check_safetensors(path: Path) -> None:
    """The header says where the last tensor ends; a file of another length is not whole."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("the header does not fit")
            header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        whole = size == 8 + length + max(ends, default=0)
    except (struct.error, ValueError, AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ModelError(f"{path} is cut short or not a safetensors file: the model folder was saved or copied halfway")
