"""Controls as clicks make them: one word must be there, several are kept apart, linked ones belong together; heads.

All of it is in the text of the controls, one a line: a click changes that text.
"""

from collections.abc import Sequence

from attnctl.app.asked import READ
from attnctl.app.control_settings import find, renamed
from attnctl.app.control_text import parts_of, write_control
from attnctl.engine.heads import pick_heads, write_heads
from attnctl.engine.sites import Site
from attnctl.errors import AttnctlError
from attnctl.files import no_files

ONE, MANY, BOND = "excitation", "segregation", "binding"
"""The controls of a click: on one word, on more of them, on the link between two."""


def said_of(controls: str) -> tuple[list[str], list[str]]:
    """(subjects, bonds) of the controls, as phrases; of a text that cannot be read there are none."""
    try:
        return _phrases(controls, *READ), _phrases(controls, BOND)
    except AttnctlError:
        return [], []


def clicked(key: str, controls: str) -> str:
    """The controls after a click on a chip or a link."""
    kind, _, what = key.partition(" ")
    if kind == "link":
        return _rebound(what, controls)
    phrase = meant(what, _phrases(controls, BOND))
    old = _lines(controls)
    there = next((line for line in old for name in READ if find([line], name)), None)
    if there is None:
        return "\n".join([*old, write_control(ONE, phrase)])
    left = [one for one in parts_of(there)[1] if one != phrase]
    chosen = left if len(left) < len(parts_of(there)[1]) else [*left, phrase]
    name = ONE if len(chosen) == 1 and READ[parts_of(there)[0].lower()] > 1 else None
    name = MANY if len(chosen) > 1 and len(parts_of(there)[1]) == 1 else name
    new = renamed(there, lambda _: chosen, name)
    return "\n".join(filter(None, (line if line is not there else new if chosen else "" for line in old)))


def _rebound(pair: str, controls: str) -> str:
    """The controls with these two words bound, or no longer bound; subjects are named as bound."""
    old, bonds = _lines(controls), _phrases(controls, BOND)
    if pair in bonds:
        rest = [bond for bond in bonds if bond != pair]
        kept = [line for line in old if rest or not find([line], BOND)]
        return "\n".join(renamed(line, lambda _: rest) if find([line], BOND) else line for line in kept)
    there = find(old, BOND)
    old = [renamed(line, lambda all_: [*all_, pair]) if line == there else line for line in old]
    old = old if there else [*old, write_control(BOND, pair)]
    parts = pair.split()
    whole = [renamed(line, lambda all_: list(dict.fromkeys(pair if one in parts else one for one in all_)))
             if any(find([line], name) for name in READ) else line for line in old]  # fmt: skip
    return "\n".join(whole)


def _phrases(controls: str, *names: str) -> list[str]:
    """The phrases of the first control that has one of these names, as they are written."""
    line = next((line for line in _lines(controls) for name in names if find([line], name)), None)
    return parts_of(line)[1] if line else []


def meant(word: str, bonds: list[str]) -> str:
    """What a click on a word means: the phrase it is bound in, or the word."""
    return next((bond for bond in bonds if word.partition("#")[0] in bond.split()), word)


def _lines(controls: str) -> list[str]:
    return [line.strip() for line in controls.splitlines() if line.strip()]


# --- heads -----------------------------------------------------------------------------------------------------------


def picked(sites: Sequence[Site], heads: str) -> dict[Site, tuple[int, ...]]:
    """The heads of a text, by site; none where it names none, which is told when it is drawn. It reads no file."""
    try:
        with no_files():
            return pick_heads(sites, heads)
    except AttnctlError:
        return {}


def toggled(sites: Sequence[Site], heads: str, key: str) -> str:
    """The text of the heads after a click on one, or on a block."""
    chosen = {site: set(own) for site, own in picked(sites, heads).items()}
    for site, own in pick_heads(sites, key).items():
        there = chosen.setdefault(site, set())
        chosen[site] = there - set(own) if there >= set(own) else there | set(own)
    return write_heads({site: tuple(sorted(own)) for site, own in chosen.items() if own})
