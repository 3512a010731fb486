"""Subjects: the things a prompt names, with their modifiers, read by a part-of-speech tagger.

The tagger is HanTa (Wartena, "A Probabilistic Morphology Model for German Lemmatization", KONVENS 2019), whose English
model comes with the package: `pip install attnctl[subjects]`. What is a subject is decided here, by rules of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from attnctl.errors import AttnctlError, PhraseError
from attnctl.words.spelling import WORD

# The tags of the British National Corpus, which the tagger speaks.
_NOUNS, _MODIFIERS = ("NN", "NP0"), ("AJ", "VVN")
_DETERMINERS = ("AT0", "CRD", "DPS", "DT0", "ORD")
_OF = "PRF"
_MEDIA = frozenset(
    "photo photograph picture image painting drawing portrait illustration sketch render rendering closeup shot view "
    "watercolor watercolour poster scene".split()
)


class SubjectsError(AttnctlError):
    """Subjects cannot be read: the tagger is not installed."""


@dataclass(frozen=True)
class Subject:
    """A thing of the prompt.

    Attributes:
        phrase: its noun, or nouns ("teddy bear"); numbered, as "cat#2", if the prompt has it several times.
        modifiers: the adjectives before it, as phrases.
        whole: from its first modifier to its noun: "red car".
    """

    phrase: str
    modifiers: tuple[str, ...]
    whole: str

    def __str__(self) -> str:
        return self.whole


def read_subjects(prompt: str) -> tuple[Subject, ...]:
    """The things a prompt names, in order.

    A thing is a noun phrase with an article, a number or the like ("a red car", "two dogs"); if a prompt has none of
    those ("cat and dog"), every noun phrase is one. "A photo of" and its kin are left out.

    >>> [str(subject) for subject in read_subjects("a photo of a cat on a wooden bench, oil painting")]
    ['cat', 'wooden bench']

    Raises:
        SubjectsError: the tagger is not installed.
        PhraseError: the prompt names no thing.
    """
    found = list(_noun_phrases(prompt))
    chosen = [one for one in found if one.determined] or found
    if not chosen:
        raise PhraseError(f"no noun was found in the prompt {prompt!r}: name the subjects instead")

    def subject(one: _NounPhrase) -> Subject:
        first = one.modifiers[0] if one.modifiers else one.noun
        modifiers = tuple(_numbered(prompt, *modifier) for modifier in one.modifiers)
        return Subject(_numbered(prompt, *one.noun), modifiers, _numbered(prompt, first[0], one.noun[1]))

    return tuple(map(subject, chosen))


Span = tuple[int, int]  # first character, one past the last


@dataclass(frozen=True)
class _NounPhrase:
    noun: Span
    modifiers: tuple[Span, ...]
    determined: bool


def _noun_phrases(prompt: str) -> Iterator[_NounPhrase]:
    """Runs of determiner, modifiers and nouns, none of them with anything but spaces inside."""
    tokens = [(match.span(), tag) for match, tag in zip(WORD.finditer(prompt), _tags(prompt), strict=True)]
    determined, modifiers, nouns = False, list[Span](), list[Span]()
    for number, (span, tag) in enumerate([*tokens, ((len(prompt), len(prompt)), "")]):
        apart = number > 0 and bool(prompt[tokens[number - 1][0][1] : span[0]].strip())
        if nouns and (apart or not tag.startswith(_NOUNS)):
            medium = prompt[slice(*nouns[-1])].lower() in _MEDIA
            if not (medium and tag == _OF):
                yield _NounPhrase((nouns[0][0], nouns[-1][1]), tuple(modifiers), determined)
            determined, modifiers, nouns = False, [], []
        if tag.startswith(_NOUNS):
            nouns.append(span)
        elif tag.startswith(_MODIFIERS):
            modifiers.append(span)
        elif tag.startswith(_DETERMINERS):
            determined, modifiers = True, []
        elif not tag.startswith("AV"):  # "a very red car"
            determined, modifiers = False, []


def _numbered(prompt: str, start: int, stop: int) -> str:
    """The words there as a phrase that means this place alone."""
    text = prompt.lower()
    if len(text) != len(prompt):  # some letters change their length
        text = prompt
    spans = [match.span() for match in WORD.finditer(prompt)]
    starts = {first for first, _ in spans}
    stops = {last for _, last in spans}
    phrase, same, at = text[start:stop], [], text.find(text[start:stop])
    while at >= 0:
        if at in starts and at + len(phrase) in stops:
            same.append(at)
        at = text.find(phrase, at + 1)
    return phrase if len(same) == 1 else f"{phrase}#{same.index(start) + 1}"


def _tags(prompt: str) -> list[str]:
    """A tag for each word."""
    spelled = [match[0] for match in WORD.finditer(prompt)]
    return [tag for _, _, tag in _tagger().tag_sent(spelled)] if spelled else []


@cache
def _tagger() -> Any:
    try:
        from HanTa.HanoverTagger import HanoverTagger
    except ImportError:
        raise SubjectsError(
            "reading a prompt needs the tagger HanTa: pip install attnctl[subjects]; or name the subjects"
        ) from None
    return HanoverTagger("morphmodel_en.pgz")
