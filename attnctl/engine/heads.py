"""Attention heads as text: "7:3 12:9", "7-10", "mid", "up_blocks.1.*", or a file that holds such a list.

A head is numbered as papers number it, block:head, both from 0: the block's position among the transformer blocks of
the denoiser (FLUX: double blocks, then single ones), and the head in it. Only attention of the picture to itself has
such heads: the self sites of a UNet, the joint sites elsewhere. The second, image-only attention of SD 3.5 medium has
no number of its own; a name or glob reaches it.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path

from attnctl.engine.sites import Site
from attnctl.errors import NoSiteError
from attnctl.files import check_file

Heads = str | int | tuple[str | int, ...]

STAGES = {"down": "down_blocks.", "mid": "mid_block.", "up": "up_blocks."}
_NUMBERS = re.compile(r"([0-9]+)(?:-([0-9]+))?")
_PUBLISHED = re.compile(r"[Ll]([0-9]+)[Hh]([0-9]+)")
_AMBIGUOUS = re.compile(r"([0-9]+):[0-9-]+,([0-9]+)(?![0-9:-])")


def pick_heads(sites: Sequence[Site], heads: Heads) -> dict[Site, tuple[int, ...]]:
    """The heads that a text names, by site, in execution order.

    Args:
        sites: what there is, e.g. `attnctl.sites(pipe)`.
        heads: terms with blanks or commas between them, or a tuple of terms. A term is a place, or place:heads:
            7:3, 7:0-5, L7H3   heads of one block;
            7, 7-10, 7-10:3    blocks, with all heads or these;
            all                every block;
            mid                the middle block of a UNet, elsewhere the middle third of the blocks (ours);
            down, up           the blocks on that side of a UNet;
            up_blocks.1.*:0    sites whose name is this, or fits this glob;
            a.json             a file {"heads": "1:2 1:10"}; with "shape": "24 blocks of 24 heads" it fits no other.

        A path with blanks in it is a term of its own in a tuple.

    Raises:
        NoSiteError: a term names nothing, or a block or head that does not exist; says what exists.
    """
    able = tuple(site for site in sites if site.kind in ("self", "joint"))
    if not able:
        raise NoSiteError("this denoiser has no self or joint attention, so it has no heads to pick")
    found: dict[Site, set[int]] = {}
    for term in _terms(heads, able):
        place, _, own = term.partition(":")
        for site in _places(able, place, term):
            found.setdefault(site, set()).update(_heads(site, own, term) if ":" in term else range(site.heads))
    if not found:
        raise NoSiteError(f"{heads!r} names no head; {_inventory(able)}")
    return {site: tuple(sorted(found[site])) for site in able if site in found}


def write_heads(picked: dict[Site, tuple[int, ...]]) -> str:
    """The same heads as text, short: whole sites without their heads."""
    words = []
    for site, heads in picked.items():
        numbered = _numbered(picked).get(site.block) is site
        place = str(site.block) if numbered else site.name
        words += [place] if len(heads) == site.heads else [f"{place}:{head}" for head in heads]
    return " ".join(words)


def _terms(heads: Heads, sites: Sequence[Site]) -> list[str]:
    words: list[str] = []
    for word in _words(heads):
        published = _PUBLISHED.fullmatch(word)
        if word.endswith(".json"):
            listed = read_heads(Path(word).expanduser(), sites)
            if nested := files_of(listed):
                raise NoSiteError(f"{word} names another file, {nested[0]}; a file of heads lists heads only")
            words += _terms(listed, sites)
        else:
            words.append(f"{published[1]}:{published[2]}" if published else word)
    return words


def _words(heads: Heads) -> list[str]:
    words: list[str] = []
    for one in heads if isinstance(heads, (tuple, list)) else (heads,):
        if not isinstance(one, (str, Integral)) or isinstance(one, bool):
            raise NoSiteError(f"heads are text such as '7:3 12:9', 'mid' or '7-10'; not {one!r}")
        text = str(one).strip()
        if unclear := _AMBIGUOUS.search(text):
            block, number = unclear.groups()
            raise NoSiteError(f"heads {text!r}: is {number} a head or a block? Write {block}:{number}, or a blank")
        whole = text.endswith(".json") and Path(text).expanduser().exists()  # such a path may hold blanks
        words += [text] if whole else [word for word in re.split(r"[\s,;]+", text) if word]
    return words


def files_of(heads: Heads) -> list[str]:
    """The files that a list of heads names."""
    return [word for word in _words(heads) if word.endswith(".json")]


def read_heads(path: Path, sites: Sequence[Site] | None = None) -> Heads:
    """The heads in a file; with `sites`, only if they are for a denoiser of that shape.

    Raises:
        NoSiteError: it cannot be read, or it was made for a denoiser of another shape.
    """
    check_file(path)
    try:
        content = json.loads(path.read_text())
        heads = content["heads"]
        shape = content.get("shape")
    except OSError as error:
        raise NoSiteError(f"heads cannot be read from {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise NoSiteError(f'{path} is no list of heads: it should hold {{"heads": "7:3 12:9"}}') from None
    if sites is not None and shape is not None and shape != shape_of(sites):
        raise NoSiteError(f"the heads in {path} are for a denoiser with {shape}; this one has {shape_of(sites)}")
    if isinstance(heads, list):
        return tuple(heads)
    if not isinstance(heads, (str, int)):
        raise NoSiteError(f"{path}: heads are text or a list of texts, not {heads!r}")
    return heads


def shape_of(sites: Iterable[Site]) -> str:
    """How many blocks and heads there are, as text: what a list of heads must fit."""
    numbered = _numbered(site for site in sites if site.kind in ("self", "joint"))
    counts = {site.heads for site in numbered.values()}
    return f"{len(numbered)} blocks of {' or '.join(map(str, sorted(counts)))} heads"


def _numbered(sites: Iterable[Site]) -> dict[int, Site]:
    """The site that a block's number speaks of: the first, which joins text and picture where there are two."""
    found: dict[int, Site] = {}
    for site in sites:
        found.setdefault(site.block, site)
    return found


def _places(sites: Sequence[Site], place: str, term: str) -> list[Site]:
    blocks = _numbered(sites)
    if number := _NUMBERS.fullmatch(place):
        first, last = int(number[1]), int(number[2] or number[1])
        wanted = [block for block in blocks if first <= block <= last]
        if last < first:
            raise NoSiteError(f"heads {term!r}: write the smaller block first, {last}-{first}")
        if last not in blocks or first not in blocks:
            raise NoSiteError(f"heads {term!r}: there is no such block; {_inventory(sites)}")
        return [blocks[block] for block in wanted]
    if place.lower() == "all":
        return list(blocks.values())
    if (stage := place.lower()) in STAGES:
        found = [site for site in blocks.values() if site.name.startswith(STAGES[stage])]
        third = len(blocks) // 3
        if not found and stage == "mid" and all(site.kind == "joint" for site in blocks.values()):
            found = list(blocks.values())[third : len(blocks) - third]
    else:
        found = [site for site in sites if fnmatch.fnmatchcase(site.name, place)]
    if not found and "attn2" in place:
        raise NoSiteError(f"heads {term!r}: cross-attention has no heads to break; {_inventory(sites)}")
    if not found:
        raise NoSiteError(f"heads {term!r} name nothing here; {_inventory(sites)}")
    return found


def _heads(site: Site, own: str, term: str) -> range:
    number = _NUMBERS.fullmatch(own)
    first, last = (int(number[1]), int(number[2] or number[1])) if number else (0, -1)
    if not first <= last < site.heads:
        raise NoSiteError(f"heads {term!r}: {site.name} has heads 0 to {site.heads - 1}")
    return range(first, last + 1)


def _inventory(sites: Sequence[Site]) -> str:
    blocks = list(_numbered(sites))
    return f"there are blocks {blocks[0]} to {blocks[-1]} ({shape_of(sites)}), 'mid', 'all', and names such as " + repr(
        sites[0].name
    )
