"""Concepts: new words before class nouns, their captions, and their rows in the text encoders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnctl.concepts import Concept
from attnctl.errors import ControlError, PhraseError
from attnctl.pipelines.personalize.denoising import Pair
from attnctl.pipelines.personalize.settings import Settings

WORD = re.compile(r"<[A-Za-z0-9_-]+>")
RARE = ("ktn</w>", "pll</w>", "ucd</w>", "ktn", "pll", "ucd")


def read_concepts(text: str | Iterable[str | Concept]) -> tuple[Concept, ...]:
    """Concepts from "cat, car", or with words of one's own "<rex>=dog, <kit>=cat".

    Raises:
        ControlError: there is none, one has no class noun, or two have the same word or noun.
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    found: list[Concept] = []
    for number, part in enumerate(parts, 1):
        if isinstance(part, Concept):
            found.append(part)
            continue
        word, equals, noun = part.rpartition("=")
        word, noun = word.strip().lower(), " ".join(noun.split())  # CLIP reads no capitals
        if not noun:
            raise ControlError(f"concept {number} has no class noun; write 'cat, car' or '<rex>=dog, <kit>=cat'")
        if equals and not WORD.fullmatch(word):
            raise ControlError(f"{word!r} is no new word; write it as <rex>, of letters, digits, - and _")
        found.append(Concept(word or f"<v{number}>", noun))
    if not found:
        raise ControlError("there is no concept; write 'cat, car' or '<rex>=dog, <kit>=cat'")
    for name in ("word", "noun"):
        each = [getattr(one, name).lower() for one in found]
        if len(set(each)) < len(each):
            twice = next(one for one in each if each.count(one) > 1)
            raise ControlError(f"two concepts have the {'class noun' if name == 'noun' else 'word'} {twice!r}")
    return tuple(found)


def caption(names: Sequence[str], settings: Settings) -> str:
    """ "a <v1> cat and a <v2> car"; three are joined "a, b and c"."""
    spoken = [settings.article + name for name in names]
    return settings.lead + " and ".join([*([", ".join(spoken[:-1])] if spoken[:-1] else []), spoken[-1]])


@dataclass(eq=False)
class Encoder:
    """One text encoder with its tokenizer, and the trained rows of the new words.

    Attributes:
        rows: (words, width) float32, the parameter that is trained.
        ids: of the new words in the tokenizer.
    """

    tokenizer: Any
    model: Any
    ids: list[int]
    rows: nn.Parameter

    @property
    def table(self) -> Tensor:
        """The model's table of embeddings."""
        return self.model.get_input_embeddings().weight

    def write(self) -> None:
        """Put the rows where the model looks them up, so that it knows the words by itself."""
        with torch.no_grad():
            self.table[self.ids] = self.rows.to(self.table)

    @contextmanager
    def trained(self) -> Iterator[None]:
        """While it is open, the new words are looked up in `rows`, and nothing else of the table can change."""

        def look_up(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            for token, row in zip(self.ids, self.rows, strict=True):
                output = torch.where((args[0] == token).unsqueeze(-1), row.to(output), output)
            return output

        tables = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m.weight is self.table]  # T5: two
        handles = [module.register_forward_hook(look_up) for module in tables]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Encoders:
    """All text encoders of a pipeline that have a row for a new word."""

    def __init__(
        self, found: Sequence[Pair], concepts: Sequence[Concept], settings: Settings, generator: torch.Generator
    ) -> None:
        words = [one.word for one in concepts]
        for tokenizer, _ in found:
            if taken := [word for word in words if word in tokenizer.get_vocab()]:
                raise ControlError(f"the tokenizer has a word {taken[0]!r} already; name it otherwise: '<other>=noun'")
        self.all = [_with_words(*pair, concepts, settings, generator) for pair in found]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The rows of all encoders."""
        return [one.rows for one in self.all]

    @contextmanager
    def trained(self) -> Iterator[None]:
        """See `Encoder.trained`."""
        with ExitStack() as stack:
            for one in self.all:
                stack.enter_context(one.trained())
            yield


def _with_words(
    tokenizer: Any, model: Any, concepts: Sequence[Concept], settings: Settings, generator: torch.Generator
) -> Encoder:
    words = [one.word for one in concepts]
    known = tokenizer.get_vocab()
    table = model.get_input_embeddings().weight
    pieces = [_pieces(tokenizer, one, at, settings, known) for at, one in enumerate(concepts)]
    spread = float(table.detach().float().std())
    rows = [
        table[ids].detach().float().mean(0)
        if ids
        else (torch.randn(table.shape[1], generator=generator) * spread).to(table.device)
        for ids in pieces
    ]
    tokenizer.add_tokens(words)
    model.resize_token_embeddings(max(len(tokenizer), table.shape[0]), mean_resizing=False)
    encoder = Encoder(tokenizer, model, tokenizer.convert_tokens_to_ids(words), nn.Parameter(torch.stack(rows)))
    encoder.write()  # what the table had there is random
    return encoder


def _pieces(tokenizer: Any, concept: Concept, at: int, settings: Settings, known: dict[str, int]) -> list[int]:
    """Tokens whose rows' mean a new word begins as; none: a random row."""
    if settings.start == "rare":
        piece = next((known[one] for one in RARE[at % 3 :: 3] if one in known), None)
        return [] if piece is None else [piece]
    ids = tokenizer(concept.noun, add_special_tokens=False).input_ids
    if not ids:
        raise PhraseError(f"the tokenizer makes no token of the class noun {concept.noun!r}")
    return list(ids)
