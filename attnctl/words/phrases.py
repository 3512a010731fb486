"""Phrases, not indices: which text rows of an attention site hold which words of a prompt.

A phrase is found in the prompt as a person reads it, then carried over to tokens by the characters each token covers.
So a phrase of several words or a word of several tokens needs nothing special, and one rule serves CLIP and T5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

from attnctl.engine.run import Run
from attnctl.errors import PhraseError, of_image
from attnctl.words.spelling import WORD, Span, inventory, places, words

SPECIAL = ("<start>", "<end>")
"""Phrases that stand for the start and end tokens of a prompt."""
NEGATIVE = "negative:"
"""How a phrase of the negative prompt begins."""


@dataclass(frozen=True)
class TextStream:
    """Text rows of a site that come from one tokenizer.

    Attributes:
        tokenizer: a CLIP, T5 or similar tokenizer of transformers.
        prompt: what it reads.
        offset: row of its first token.
        length: how many rows it fills; longer prompts are cut there.
        chunks: how many pieces of so many rows follow one another, each with a start and an end token of its own, as
            prompt weighting tools make them of long prompts.
    """

    tokenizer: Any
    prompt: str
    offset: int = 0
    length: int = 77
    chunks: int = 1

    @cached_property
    def spans(self) -> list[Span | None]:
        """The characters each token covers, before truncation, see `_spans`; tokenized once."""
        return _spans(self.tokenizer, self.prompt)

    @cached_property
    def layout(self) -> Layout:
        """Where special tokens and the prompt's own are, as if all chunks were one."""
        special = [span is None for span in self.spans]
        ends = sum(special) * (self.chunks - 1)
        return _layout(special, self.length * self.chunks - ends)

    def rows(self, tokens: Iterable[int]) -> list[int]:
        """The text rows of the prompt's own tokens, which are counted with the start token as 0."""
        start = len(self.layout.start)
        body = self.length - start - len(self.layout.end)
        if self.chunks == 1:
            return [self.offset + token for token in tokens]
        chunks = (divmod(token - start, body) for token in tokens)
        return [self.offset + chunk * self.length + start + place for chunk, place in chunks]


@dataclass(frozen=True)
class Layout:
    """What the rows of one tokenizer's output hold: start token, the prompt's own tokens, end token, padding.

    Each is a range of positions; they follow one another from 0 to the length. T5 has no start token.
    """

    start: range
    text: range
    end: range
    padding: range


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
    where = places(prompt, phrase)
    text = stream.layout.text
    found = [i for i, span in enumerate(spans) if span and any(_overlap(span, place) for place in where)]
    if not found:
        raise PhraseError(f"{type(tokenizer).__name__} makes no token of {phrase!r}; {inventory(prompt)}")
    if found[-1] >= text.stop:
        end = max((span[1] for span in spans[: text.stop] if span), default=0)
        whole = [word for word, match in zip(words(prompt), WORD.finditer(prompt), strict=True) if match.end() <= end]
        raise PhraseError(
            f"{phrase!r} is cut off: {type(tokenizer).__name__} keeps the first {max_length} tokens of the prompt, "
            f"with {'the words ' + ', '.join(whole) if whole else 'no whole word'}"
        )
    return found


def _overlap(one: Span, other: Span) -> bool:
    return max(one[0], other[0]) < min(one[1], other[1])


def positions(streams: Sequence[TextStream], phrase: str) -> list[int]:
    """Text rows of a site that hold a phrase, ascending, over all tokenizers that feed the site.

    A phrase that one tokenizer does not see or cuts off is found through the others. "<start>" and "<end>" stand for
    the start and end tokens, of every chunk if there are several.

    Raises:
        PhraseError: no tokenizer sees the whole phrase; says what the first of them had to say. Or two tokenizers read
            different words into the same text rows, and only one of them reads this phrase. Or it is of the negative
            prompt.
    """
    if of_negative(phrase) is not None:
        raise PhraseError(
            f"{phrase!r} is of the negative prompt, of which TokenMaps records maps and nothing else acts"
        )
    found: dict[TextStream, set[int]] = {}
    trouble = PhraseError(f"there is no tokenizer to find {phrase!r} with")
    for stream in reversed(streams):
        try:
            rows = _special(stream, phrase) if phrase in SPECIAL else stream.rows(_found(stream, phrase))
        except PhraseError as error:
            trouble = error
            rows = []
        found[stream] = set(rows)
    if not any(found.values()):
        raise trouble
    for one, other in permutations(found, 2):
        if one.offset == other.offset and one.prompt != other.prompt:
            if meant := (found[one] - found[other]) & set(other.rows(other.layout.text)):
                raise PhraseError(
                    f"{phrase!r} shares text row {min(meant)} with another word: one encoder reads {one.prompt!r}, "
                    f"another {other.prompt!r}; give both the same prompt"
                )
    return sorted(set().union(*found.values()))


def of_negative(phrase: str) -> str | None:
    """The phrase without its beginning "negative:", or None if it is one of the prompt."""
    return phrase.removeprefix(NEGATIVE).strip() if phrase.startswith(NEGATIVE) else None


def _special(stream: TextStream, phrase: str) -> list[int]:
    """Rows of the start or end tokens of a stream."""
    own = stream.layout.start if phrase == "<start>" else stream.layout.end
    if not own:
        raise PhraseError(f"{type(stream.tokenizer).__name__} has no {phrase[1:-1]} token")
    if stream.chunks == 1:
        return [stream.offset + row for row in own]
    first = range(len(own)) if phrase == "<start>" else range(stream.length - len(own), stream.length)
    return [stream.offset + chunk * stream.length + row for chunk in range(stream.chunks) for row in first]


def layout(tokenizer: Any, prompt: str, max_length: int = 77) -> Layout:
    """Where the special tokens of a prompt padded to `max_length` are, and where its own."""
    return _layout([span is None for span in _spans(tokenizer, prompt)], max_length)


def text_rows(streams: Sequence[TextStream]) -> list[int]:
    """Text rows of a site that hold tokens of the prompt: neither start nor end nor padding. Ascending."""
    return sorted({row for stream in streams for row in stream.rows(stream.layout.text)})


def streams(run: Run, image: int, negative: bool = False) -> tuple[TextStream, ...]:
    """The text streams of one image of a run, as its family record and its prompts say.

    Equal ones are the same object, so that a run tokenizes each text once.

    Args:
        run: the pipeline call.
        image: index of the picture.
        negative: of the negative prompt, whose text rows are those of unconditional rows of the batch.

    Raises:
        PhraseError: the pipeline was given embeddings and nobody said what they mean; or no negative prompt.
    """
    if negative and "prompt" not in run.negatives:
        raise PhraseError("this call has no negative prompt in words: give negative_prompt and guide by it")
    texts, prompts = (run.negatives, run.negatives["prompt"]) if negative else (run.texts, run.prompts)
    found, known = list[TextStream](), getattr(run, "streams", {})
    alone = all(stream.offset == 0 and isinstance(stream.rows, int) for stream in run.family.streams)  # CLIP's rows
    for stream in run.family.streams:
        tokenizer = getattr(run.pipe, stream.tokenizer, None)
        if tokenizer is None:
            continue
        text = run.family.reads(run.pipe, texts.get(stream.prompt, prompts)[image])
        if hasattr(run.pipe, "maybe_convert_prompt"):  # textual inversion: one word may stand for several tokens
            text = run.pipe.maybe_convert_prompt(text, tokenizer)
        rows = (run.max_sequence_length if isinstance(stream.rows, str) else stream.rows) or tokenizer.model_max_length
        own = text, stream.tokenizer, stream.offset
        if own not in known:
            longer = run.text_rows if alone and run.text_rows and run.text_rows % rows == 0 else rows
            known[own] = TextStream(tokenizer, text, stream.offset, rows, longer // rows)
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
