"""Concepts that were learnt: new words and a change of weights, as small files that other programs load, and back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from attnctl.comfy import DOWN, UP, fused_keys
from attnctl.errors import ControlError

INDEX, LORA = "concepts.json", "pytorch_lora_weights.safetensors"
KOHYA, COMFY = "kohya_lora.safetensors", "comfy_lora.safetensors"
ADAPTER = "attnctl_learning"  # what peft calls the adapters while they are trained
ENCODERS = {
    "UNet": {"": "clip_l", "_2": "clip_g"},
    "SD3": {"": "clip_l", "_2": "clip_g", "_3": "t5xxl"},
    "FLUX": {"": "clip_l", "_2": "t5xxl"},
}
"""Family -> how the pipeline's names of its text encoders end -> their names in files of words; some lack the last."""


@dataclass(frozen=True)
class Concept:
    """One thing to learn.

    Attributes:
        word: the new word, such as "<v1>".
        noun: what kind of thing it is, one or more words the model knows; it follows the new word in prompts.
    """

    word: str
    noun: str

    @property
    def phrase(self) -> str:
        """As prompts say it: "<v1> cat"."""
        return f"{self.word} {self.noun}"


@dataclass(frozen=True, eq=False)
class Learnt:
    """Concepts that were learnt.

    Attributes:
        concepts: in the order of the captions.
        words: new word -> its row for each text encoder, (width,) float32.
        lora: module of the denoiser -> (down, up) with down (rank, in) and up (out, rank): what is added to its weight
            is up @ down. All have one rank.
        settings: what they were learnt with, as plain data; `masks` is "given" where the caller gave them.
        base: the model they were learnt by, as `attnctl.load` takes it; None where nobody said.
        family: of that model, one of `ENCODERS`.
    """

    concepts: tuple[Concept, ...]
    words: dict[str, tuple[Tensor, ...]]
    lora: dict[str, tuple[Tensor, Tensor]]
    settings: dict[str, Any]
    base: str | None = None
    family: str = "UNet"

    @property
    def part(self) -> str:
        """The pipeline's name of its denoiser."""
        return "unet" if self.family == "UNet" else "transformer"

    @property
    def files(self) -> tuple[str, ...]:
        """The names of what `save` writes."""
        return (
            LORA,
            KOHYA if self.part == "unet" else COMFY,
            *(embedding_name(one.word) for one in self.concepts),
            INDEX,
        )

    def save(self, folder: str | Path) -> Path:
        """Write the files of the concepts into a folder, which is made if need be.

        - `pytorch_lora_weights.safetensors`: for `pipe.load_lora_weights(folder)`.
        - `kohya_lora.safetensors`: the same for ComfyUI and A1111, which read other names.
          Of SD 3 and FLUX `comfy_lora.safetensors`, see `attnctl.comfy`.
        - one file for each word, such as `v1.safetensors`: for `pipe.load_textual_inversion(file)`, and in ComfyUI and
          A1111 an embedding called v1.
        - `concepts.json`: words, nouns and settings.

        Every file is whole or not there; the index comes last.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": "pt", "concepts": json.dumps([one.phrase for one in self.concepts])}
        other = self.kohya_keys() if self.part == "unet" else fused_keys(self.lora, self.family)
        files = {LORA: save(self.lora_keys(), about), self.files[1]: save(other, about)}
        for concept in self.concepts:
            files[embedding_name(concept.word)] = save(self.embedding(concept.word), {"format": "pt"})
        files[INDEX] = (json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode()
        for name, content in files.items():
            write(folder / name, content)
        return folder

    def add_to(self, pipe: Any) -> None:
        """Teach a pipeline these concepts: the words, and the change of the weights, which is added to them for good.

        Needs nothing but the pipeline. To be able to take the weights off again, use `pipe.load_lora_weights(folder)`
        and `pipe.load_textual_inversion(file)` instead.

        Raises:
            ControlError: the pipeline is of another size or kind, or has one of the words already.
        """
        other = ControlError(f"the concepts are of another model than this {type(pipe).__name__}")
        modules = dict(getattr(pipe, self.part).named_modules()) if hasattr(pipe, self.part) else {}
        for module, (down, up) in self.lora.items():
            if getattr(getattr(modules.get(module), "weight", None), "shape", None) != (up.shape[0], down.shape[1]):
                raise other
        rows = next(iter(self.words.values()))
        names = [*ENCODERS[self.family]][: len(rows)]
        parts = ("tokenizer", "text_encoder")
        pairs: list[Any] = [[getattr(pipe, part + name, None) for part in parts] for name in names]
        for (tokenizer, encoder), row in zip(pairs, rows, strict=True):
            if tokenizer is None or encoder is None or encoder.get_input_embeddings().weight.shape[1] != len(row):
                raise other
            if taken := [word for word in self.words if word in tokenizer.get_vocab()]:
                raise ControlError(f"the pipeline has a word {taken[0]!r} already")
        with torch.no_grad():
            for at, (tokenizer, encoder) in enumerate(pairs):
                tokenizer.add_tokens(list(self.words))
                most = max(len(tokenizer), encoder.get_input_embeddings().weight.shape[0])
                encoder.resize_token_embeddings(most, mean_resizing=False)
                table = encoder.get_input_embeddings().weight
                for word, own in self.words.items():
                    table[tokenizer.convert_tokens_to_ids(word)] = own[at].to(table)
            for module, (down, up) in self.lora.items():
                weight = modules[module].weight
                weight += (up @ down).to(weight)

    def lora_keys(self) -> dict[str, Tensor]:
        """As diffusers names them; without an alpha, so the scale is 1."""
        found = {}
        for module, (down, up) in self.lora.items():
            name = f"{self.part}.{module}"
            found[name + DOWN], found[name + UP] = down.contiguous(), up.contiguous()
        return found

    def kohya_keys(self) -> dict[str, Tensor]:
        """As Kohya's scripts name them: `lora_unet_`, dots as underscores; the alpha is the rank, so the scale is 1."""
        found = {}
        for module, (down, up) in self.lora.items():
            name = f"lora_unet_{module.replace('.', '_')}"
            found[f"{name}.lora_down.weight"], found[f"{name}.lora_up.weight"] = down.contiguous(), up.contiguous()
            found[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
        return found

    def embedding(self, word: str) -> dict[str, Tensor]:
        """The tensors of a word's file: of one encoder under the word itself, of more see `ENCODERS`; (1, width)."""
        rows = self.words[word]
        names = [word] if len(rows) == 1 else [*ENCODERS[self.family].values()]
        return {name: row[None].contiguous() for name, row in zip(names, rows, strict=False)}

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "concepts": [
                {"word": one.word, "noun": one.noun, "file": embedding_name(one.word)} for one in self.concepts
            ],
            "lora": LORA,
            "family": self.family,
            "base": self.base,
            "settings": self.settings,
        }


def embedding_name(word: str) -> str:
    """The file of a word: no < and >, which some systems do not take."""
    return word.strip("<>") + ".safetensors"


def write(path: Path, content: bytes) -> None:
    """Write a file through a neighbour of another name, so that it is whole or as it was.

    Raises:
        ControlError: it cannot be written, e.g. because the disk is full.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ControlError(f"cannot write {path}: {error.strerror or error}") from error


def base_of(folder: str | Path) -> str | None:
    """The model that the concepts of a folder were learnt by; None if the folder holds no concepts.

    Raises:
        ControlError: it holds some, but they are damaged, or nobody said which model it was.
    """
    if not (Path(folder) / INDEX).is_file():
        return None
    base = read_learnt(folder).base
    if base is None:
        raise ControlError(f"{folder} does not say which model its concepts belong to; load that, then add them to it")
    return base


def read_learnt(folder: str | Path) -> Learnt:
    """Concepts from a folder that `Learnt.save` wrote.

    Raises:
        ControlError: it holds none, or a file of theirs is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise ControlError(f"{folder} holds no concepts: there is no {INDEX}; attnctl personalize makes such a folder")
    try:
        about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        concepts = tuple(Concept(one["word"], one["noun"]) for one in about["concepts"])
        words, family = {}, about.get("family", "UNet")
        for one in about["concepts"]:
            rows = load_file(folder / one["file"])
            names = [one["word"]] if one["word"] in rows else [*ENCODERS[family].values()][: len(rows)]
            words[one["word"]] = tuple(rows[name][0] for name in names)
        tensors = load_file(folder / about["lora"])
        downs = {name: one for name, one in tensors.items() if name.endswith(DOWN)}
        lora = {
            name.partition(".")[2].removesuffix(DOWN): (down, tensors[name.replace(DOWN, UP)])
            for name, down in downs.items()
        }
        return Learnt(concepts, words, lora, about["settings"], about.get("base"), family)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ControlError(f"the concepts in {folder} are damaged: {type(error).__name__} {error}") from error
