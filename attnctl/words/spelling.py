"""Spelling: which words a prompt has, and where in it a phrase is, in characters."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

from attnctl.errors import PhraseError, short

Span = tuple[int, int]  # first character, one past the last

LETTER = r"[^\W_]"
MARK = "\u0300-\u036f"  # accents that are characters of their own, behind their letter
_PART = rf"{LETTER}(?:{LETTER}|[{MARK}])*"
WORD = re.compile(rf"{_PART}(?:['’-]{_PART})*")  # "cat's" and "t-shirt" are one word each
NUMBERED = re.compile(r"\s*(.*\S)\s*#(\d+)\s*", re.DOTALL)
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE")


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


def places(prompt: str, phrase: str) -> list[Span]:
    """Where in the prompt a phrase is."""
    if found := occurrences(prompt, phrase):  # first as it stands: a prompt may hold "room #2"
        return found
    if numbered := NUMBERED.fullmatch(phrase):
        found, number = occurrences(prompt, numbered[1]), int(numbered[2])
        if 1 <= number <= len(found):
            return [found[number - 1]]
        if found:
            raise PhraseError(f"there is no {phrase!r}: {numbered[1]!r} is in the prompt {_times(len(found))}")
    raise PhraseError(f"{phrase!r} is not in the prompt; {inventory(prompt)}")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def occurrences(prompt: str, phrase: str) -> list[Span]:
    """Where a prompt has the words of a phrase in a row, (first character, one past the last) each; whole words only.

    Accents may be written as characters of their own, or not, on either side. In scripts without spaces between words a
    phrase is found wherever it stands.

    Raises:
        PhraseError: the phrase has no words.
    """
    parts = _decomposed(phrase)[0].split()
    if not parts:
        raise PhraseError(f"an empty phrase stands for no word; {inventory(prompt)}")
    text, index = _decomposed(prompt)
    body = r"\s+".join(re.escape(part) for part in parts)
    head, tail = _bounded(parts[0][0]), _bounded(re.sub(f"[{MARK}]+$", "", parts[-1])[-1:])
    letter = f"(?:{LETTER}|[{MARK}])"
    strict = (rf"(?<!{letter})(?<!{letter}['’-])" if head else "", rf"(?!{letter})(?!['’-]{letter})" if tail else "")
    loose = (rf"(?<!{letter})" if head else "", rf"(?!{letter})" if tail else f"(?![{MARK}])")
    for before, after in (strict, loose):
        if found := [match.span() for match in re.finditer(before + body + after, text, re.IGNORECASE)]:
            return [(index[first], index[last - 1] + 1) for first, last in found]
    return []


def _decomposed(text: str) -> tuple[str, list[int]]:
    """A text with its accents behind their letters, and which character of the text each character comes from."""
    pieces = [unicodedata.normalize("NFD", one) for one in text]
    return "".join(pieces), [number for number, piece in enumerate(pieces) for _ in piece]


def _bounded(char: str) -> bool:
    """Whether words end where this character does: a sign needs no boundary, and some scripts write none."""
    return re.match(LETTER, char) is not None and not unicodedata.name(char, "").startswith(UNSPACED)


LEARNED = re.compile(r"<[^\W\d_][^<>\s]*>")  # "<v1>", "<rex>": how words that a model learns later are written


def unlearned(prompt: str, tokenizers: Iterable[Any]) -> tuple[str, ...]:
    """The words in angle brackets that no tokenizer was taught, so that they would be read letter by letter."""
    taught = {word for tokenizer in tokenizers for word in tokenizer.get_added_vocab()}
    return tuple(word for word in dict.fromkeys(LEARNED.findall(prompt)) if word not in taught)


def inventory(prompt: str) -> str:
    found = words(prompt)
    return f"its words are: {short(', '.join(found), 200)}" if found else "the prompt has no words"
