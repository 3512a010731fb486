"""A real `CLIPTokenizer` with a small vocabulary of its own: the glyph world's words, and bytes for everything else."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from attnctl.glyph.words import COLOURS, CONCEPTS

SPLIT = {"backpack": ("back", "pack"), "suitcase": ("suit", "case"), "elephant": ("ele", "phant")}
"""Words of several pieces, so that phrases of several tokens are ordinary; the other words of the world stay whole."""

_END = "</w>"
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def _pieces() -> list[list[str]]:
    """What has to become one token each, as symbols: letters, the last of a word marked with `</w>`."""
    pieces = []
    for word in ("a", "and", "with", *COLOURS, *CONCEPTS):
        *firsts, last = SPLIT.get(word, (word,))
        pieces += [[*first] for first in firsts] + [[*last[:-1], last[-1] + _END]]
    return pieces


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _merges(pieces: Iterable[list[str]]) -> list[tuple[str, str]]:
    """Learns byte-pair merges on the pieces alone, most frequent pair first, until each piece is one symbol.

    Learning them, rather than spelling each piece from the left, makes the merges of different words agree.
    """
    merges, pieces = [], list(pieces)
    while pairs := Counter(pair for piece in pieces for pair in pairwise(piece)):
        pair = min(pairs, key=lambda pair: (-pairs[pair], pair))
        pieces = [_merged(piece, pair) for piece in pieces]
        merges.append(pair)
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """As in Stable Diffusion 1: 77 positions, lower case, `<|startoftext|>` first, `<|endoftext|>` last and as padding.

    Bytes are the base of the vocabulary (under 1,000 entries), so that no text has unknown tokens.
    """
    bytes_ = sorted(ByteLevel.alphabet())
    merges = _merges(_pieces())
    entries = [*bytes_, *(byte + _END for byte in bytes_), *(a + b for a, b in merges), _BOS, _EOS]
    vocab = {entry: index for index, entry in enumerate(entries)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)
