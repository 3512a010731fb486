"""Phrases, not indices: which text rows of an attention site hold which words of a prompt.

A phrase is found in the prompt as a person reads it, then carried over to tokens by the characters each token covers.
So a phrase of several words or a word of several tokens needs nothing special, and one rule serves CLIP and T5.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from attnctl.engine.run import Run
from attnctl.errors import PhraseError, of_image, short

Span = tuple[int, int]  # first character, one past the last

LETTER = r"[^\W_]"
WORD = re.compile(rf"{LETTER}+(?:['’-]{LETTER}+)*")  # "cat's" and "t-shirt" are one word each
NUMBERED = re.compile(r"\s*(.*\S)\s*#(\d+)\s*", re.DOTALL)


@dataclass(frozen=True)
class TextStream:
    """Text rows of a site that come from one tokenizer.

    Attributes:
        tokenizer: a CLIP, T5 or similar tokenizer of transformers.
        prompt: what it reads.
        offset: row of its first token.
        length: how many rows it fills; longer prompts are cut there.
    """

    tokenizer: Any
    prompt: str
    offset: int = 0
    length: int = 77

    @cached_property
    def spans(self) -> list[Span | None]:
        """The characters each token covers, before truncation, see `_spans`; tokenized once."""
        return _spans(self.tokenizer, self.prompt)


@dataclass(frozen=True)
class Layout:
    """What the rows of one tokenizer's output hold: start token, the prompt's own tokens, end token, padding.

    Each is a range of positions; they follow one another from 0 to the length. T5 has no start token.
    """

    start: range
    text: range
    end: range
    padding: range


def words(prompt: str) -> tuple[str, ...]:
    """The words of a prompt, in order and in lower case, as phrases: a repeated word carries its number.

    >>> words("A cat and a red car")
    ('a#1', 'cat', 'and', 'a#2', 'red', 'car')
    """
    spelled = [match[0] for match in WORD.finditer(prompt)]
    found = [word.lower() if len(word.lower()) == len(word) else word for word in spelled]  # "İ" would become two
    total, seen, phrases = Counter(found), Counter[str](), []
    for word in found:
        seen[word] += 1
        phrases.append(f"{word}#{seen[word]}" if total[word] > 1 else word)
    return tuple(phrases)


def find(tokenizer: Any, prompt: str, phrase: str, max_length: int = 77) -> list[int]:
    """Positions of a phrase among a prompt's tokens, counting a start token as 0.

    Whole words match, whatever their case and the punctuation around them: "cat" is in "(Cat)," and not in "catalog".
    Words joined by an apostrophe or a hyphen are one word; a part of it ("cat" in "cat's") matches if nothing else
    does. A phrase that occurs several times means all its occurrences; "cat#2" means the second alone.

    Args:
        tokenizer: a tokenizer of transformers; one without character offsets is read by decoding token by token.
        prompt: the text as the pipeline gives it to the tokenizer.
        phrase: one or more words of the prompt.
        max_length: how many tokens the pipeline keeps, special ones included.

    Raises:
        PhraseError: the phrase is not in the prompt, or the tokenizer cuts it off; names the words there are.
    """
    return _found(TextStream(tokenizer, prompt, 0, max_length), phrase)


def _found(stream: TextStream, phrase: str) -> list[int]:
    """`find` in a stream, whose offset does not count."""
    tokenizer, prompt, max_length, spans = stream.tokenizer, stream.prompt, stream.length, stream.spans
    places = _places(prompt, phrase)
    text = _layout([span is None for span in spans], max_length).text
    found = [i for i, span in enumerate(spans) if span and any(_overlap(span, place) for place in places)]
    if not found:
        raise PhraseError(f"{type(tokenizer).__name__} makes no token of {phrase!r}; {_inventory(prompt)}")
    if found[-1] >= text.stop:
        end = max((span[1] for span in spans[: text.stop] if span), default=0)
        whole = [word for word, match in zip(words(prompt), WORD.finditer(prompt), strict=True) if match.end() <= end]
        raise PhraseError(
            f"{phrase!r} is cut off: {type(tokenizer).__name__} keeps the first {max_length} tokens of the prompt, "
            f"with {'the words ' + ', '.join(whole) if whole else 'no whole word'}"
        )
    return found


def positions(streams: Sequence[TextStream], phrase: str) -> list[int]:
    """Text rows of a site that hold a phrase, ascending, over all tokenizers that feed the site.

    A phrase that one tokenizer does not see or cuts off is found through the others.

    Raises:
        PhraseError: no tokenizer sees the whole phrase; says what the first of them had to say.
    """
    found: set[int] = set()
    trouble = PhraseError(f"there is no tokenizer to find {phrase!r} with")
    for stream in reversed(streams):
        try:
            rows = _found(stream, phrase)
        except PhraseError as error:
            trouble = error
        else:
            found.update(stream.offset + row for row in rows)
    if not found:
        raise trouble
    return sorted(found)


def layout(tokenizer: Any, prompt: str, max_length: int = 77) -> Layout:
    """Where the special tokens of a prompt padded to `max_length` are, and where its own."""
    return _layout([span is None for span in _spans(tokenizer, prompt)], max_length)


def text_rows(streams: Sequence[TextStream]) -> list[int]:
    """Text rows of a site that hold tokens of the prompt: neither start nor end nor padding. Ascending."""
    layouts = ((stream, _layout([span is None for span in stream.spans], stream.length)) for stream in streams)
    return sorted({stream.offset + row for stream, rows in layouts for row in rows.text})


def streams(run: Run, image: int) -> tuple[TextStream, ...]:
    """The text streams of one image of a run, as its family record and its prompts say.

    Equal ones are the same object, so that a run tokenizes each text once.

    Raises:
        PhraseError: the pipeline was given embeddings and nobody said what they mean.
    """
    found, known = list[TextStream](), getattr(run, "streams", {})
    for stream in run.family.streams:
        tokenizer = getattr(run.pipe, stream.tokenizer, None)
        if tokenizer is None:
            continue
        text = run.texts.get(stream.prompt, run.prompts)[image]
        if hasattr(run.pipe, "maybe_convert_prompt"):  # textual inversion: one word may stand for several tokens
            text = run.pipe.maybe_convert_prompt(text, tokenizer)
        rows = run.max_sequence_length if isinstance(stream.rows, str) else stream.rows
        own = text, stream.tokenizer, stream.offset
        if own not in known:
            known[own] = TextStream(tokenizer, text, stream.offset, rows or tokenizer.model_max_length)
        found.append(known[own])
    return tuple(found)


def tokens(run: Run, phrase: str, image: int) -> list[int]:
    """Text rows of a site that hold a phrase of one image's prompt, over all tokenizers of the pipeline.

    Args:
        run: the pipeline call.
        phrase: words of the prompt; "cat#2" is the second "cat".
        image: index of the picture.

    Returns:
        Positions relative to `AttentionCall.text`, ascending.

    Raises:
        PhraseError: the phrase is in none of the prompts the tokenizers read, or was cut off; names what there is.
    """
    try:
        return positions(streams(run, image), phrase)
    except PhraseError as error:
        raise of_image(error, image, run.prompts) from None


# --- words -> characters ----------------------------------------------------------------------------------------------


def _places(prompt: str, phrase: str) -> list[Span]:
    """Where in the prompt a phrase is."""
    if found := occurrences(prompt, phrase):  # first as it stands: a prompt may hold "room #2"
        return found
    if numbered := NUMBERED.fullmatch(phrase):
        found, number = occurrences(prompt, numbered[1]), int(numbered[2])
        if 1 <= number <= len(found):
            return [found[number - 1]]
        if found:
            raise PhraseError(f"there is no {phrase!r}: {numbered[1]!r} is in the prompt {_times(len(found))}")
    raise PhraseError(f"{phrase!r} is not in the prompt; {_inventory(prompt)}")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def occurrences(prompt: str, phrase: str) -> list[Span]:
    """Where a prompt has the words of a phrase in a row, (first character, one past the last) each; whole words only.

    Raises:
        PhraseError: the phrase has no words.
    """
    parts = phrase.split()
    if not parts:
        raise PhraseError(f"an empty phrase stands for no word; {_inventory(prompt)}")
    body = r"\s+".join(re.escape(part) for part in parts)
    head = re.match(LETTER, parts[0]) is not None  # a phrase may begin or end with a sign, which needs no boundary
    tail = re.match(LETTER, parts[-1][-1]) is not None
    strict = (rf"(?<!{LETTER})(?<!{LETTER}['’-])" if head else "", rf"(?!{LETTER})(?!['’-]{LETTER})" if tail else "")
    loose = (rf"(?<!{LETTER})" if head else "", rf"(?!{LETTER})" if tail else "")
    for before, after in (strict, loose):
        if found := [match.span() for match in re.finditer(before + body + after, prompt, re.IGNORECASE)]:
            return found
    return []


def _overlap(one: Span, other: Span) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


def _inventory(prompt: str) -> str:
    found = words(prompt)
    return f"its words are: {short(', '.join(found), 200)}" if found else "the prompt has no words"


# --- characters -> tokens ---------------------------------------------------------------------------------------------


def _layout(special: list[bool], max_length: int) -> Layout:
    """Special tokens stand at both ends; what is too long loses its last own tokens, never the end token."""
    count = len(special)
    start = next((i for i, one in enumerate(special) if not one), 0)
    end = next((i for i, one in enumerate(reversed(special)) if not one), count - start)
    kept = min(count, max_length)
    stop = max(kept - end, start)
    return Layout(range(start), range(start, stop), range(stop, kept), range(kept, max_length))


def _spans(tokenizer: Any, prompt: str) -> list[Span | None]:
    """The characters each token covers, before truncation; None for special tokens, an empty span for mere spaces."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(prompt, return_special_tokens_mask=True, return_offsets_mapping=fast, verbose=False)
    ids, special = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    covered = encoded["offset_mapping"] if fast else _decoded(tokenizer, ids, prompt)
    # SentencePiece's mark of a new word, where it is a token by itself, claims the letter that follows it.
    marks = [piece == "▁" for piece in tokenizer.convert_ids_to_tokens(ids)]
    return [
        None if end else ((span[0], span[0]) if mark else (span[0], span[1]))
        for span, end, mark in zip(covered, special, marks, strict=True)
    ]


def _decoded(tokenizer: Any, ids: list[int], prompt: str) -> list[Span]:
    """Characters by decoding ever longer beginnings: what a token adds is looked for behind what came before."""
    at = [i for i, char in enumerate(prompt) if not char.isspace()]  # decoding moves spaces about, so they do not count
    letters = "".join(prompt[i].lower()[0] for i in at)
    spans, cursor, before = [], 0, 0
    for end in range(1, len(ids) + 1):
        text = "".join(tokenizer.decode(ids[:end], skip_special_tokens=True).lower().split()).rstrip("\ufffd")
        piece, before = text[before:], len(text)
        where = letters.find(piece, cursor) if piece else -1
        if where >= 0:
            spans.append((at[where], at[where + len(piece) - 1] + 1))
            cursor = where + len(piece)
        else:  # a special token, half a character, or one the vocabulary does not have
            here = at[cursor] if cursor < len(at) else len(prompt)
            spans.append((here, here))
    return spans
