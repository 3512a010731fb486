"""Layouts: a prompt of several regions as users of Regional Prompter and Forge Couple write it, as a `Couple`.

    a hill ADDCOMM a sunset ADDBASE a cat ADDCOL a dog ADDROW a lake        Regional Prompter
    a cat                                                                   Forge Couple: a line for each column
    a dog

BREAK goes on to the next region in the layout's own direction, ADDCOL to the next column, ADDROW to the next row. What
stands before ADDCOMM belongs to every region, what stands before ADDBASE is the prompt of the picture. Without BREAK,
ADDCOL and ADDROW, each line is a region. A layout is said in words, in any order:

    columns | rows     what BREAK and lines mean; columns if it is not said
    1,2,1              shares of the columns (or rows)
    1,2,1;3,1          rows with columns: a row of height 1 with columns 2 and 1 wide, and one of height 3
    base=0.2           how much of each region comes from the prompt of the picture; 0.2 with ADDBASE, else 0
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from attnctl.errors import AttnctlError, short

BASE = 0.2
"""The share of the picture's prompt where ADDBASE stands and nothing is said: that of Regional Prompter."""

_MARK = re.compile(r"\s*\b(BREAK|ADDCOL|ADDROW)\b\s*")
Box = tuple[float, float, float, float]


class LayoutError(AttnctlError):
    """A layout, or a prompt of regions, that cannot be read."""


@dataclass(frozen=True)
class Layout:
    """What a prompt of regions says.

    Attributes:
        prompt: of the picture.
        negative: of the picture.
        control: the text of the control that places the regions.
    """

    prompt: str
    negative: str | None
    control: str


@dataclass(frozen=True)
class _Parts:
    """One text: what belongs to all, to the picture, and to the regions, row by row."""

    common: str
    base: str | None
    rows: list[list[str]]

    @property
    def regions(self) -> list[str]:
        return [_and(self.common, one) for row in self.rows for one in row]

    @property
    def whole(self) -> str:
        """The prompt of the picture: what is said to be it, else all there is."""
        return _and(
            self.common, self.base if self.base is not None else ", ".join(one for row in self.rows for one in row)
        )


def read_layout(prompt: str, layout: str, negative: str | None = None) -> Layout:
    """The prompts and the control that a prompt of regions and its layout mean.

    Args:
        prompt: with BREAK and its like, or a line for each region.
        layout: see above.
        negative: one for the picture, or as many regions as the prompt has, in the same way.

    Raises:
        LayoutError: one of them cannot be read, or they do not fit.
    """
    rows, shares, base = _said(layout)
    parts = _parts(prompt, rows)
    if len(parts.regions) < 2:
        raise LayoutError("--layout: write a region on each line of the prompt, or put BREAK, ADDCOL or ADDROW between")
    if any(not one.strip() for row in parts.rows for one in row):
        raise LayoutError(f"--layout: the prompt {short(prompt, 60)!r} has an empty region")
    boxes = _boxes(parts.rows, shares, rows)
    texts = parts.regions
    masks = ", ".join(
        f"[{quoted(text)}, [{', '.join(f'{side:g}' for side in box)}]]" for text, box in zip(texts, boxes, strict=True)
    )
    share = base if base is not None else BASE if parts.base is not None else 0.0
    settings = [f"masks=[{masks}]", f"base={share:g}"]
    against = None if negative is None else _parts(negative, rows)
    if against is not None and len(against.regions) > 1:
        if len(against.regions) != len(texts):
            raise LayoutError(f"--negative has {len(against.regions)} regions, and the prompt has {len(texts)}")
        if len(set(texts)) < len(texts):
            raise LayoutError("--negative by regions needs prompts of regions that differ")
        pairs = ", ".join(
            f"[{quoted(own)}, {quoted(no)}]" for own, no in zip(texts, against.regions, strict=True) if no
        )
        settings.append(f"negatives=[{pairs}]")
    return Layout(parts.whole, negative if against is None else against.whole, f"couple({', '.join(settings)})")


def quoted(text: str) -> str:
    """A text as a control's setting, whatever quotes and lines are in it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\x27").replace("\n", "\\n") + "'"


def _and(common: str, text: str) -> str:
    return ", ".join(part.strip().rstrip(",") for part in (common, text) if part.strip())


def _said(layout: str) -> tuple[bool, list[list[float]] | None, float | None]:
    """(rows rather than columns, shares by row as they are written, share of the base) of a layout."""
    rows, shares, base = False, None, None
    for word in layout.split():
        if word.lower() in ("columns", "rows"):
            rows = word.lower() == "rows"
        elif match := re.fullmatch(r"base=(\d*\.?\d+)", word):
            base = float(match[1])
        elif re.fullmatch(r"[\d.,;]+", word):
            try:
                shares = [[float(number) for number in row.split(",")] for row in word.split(";")]
            except ValueError:
                raise LayoutError(f"--layout {word!r}: shares are numbers with commas, such as 1,2,1") from None
        else:
            raise LayoutError(
                f"--layout {short(word, 40)!r}: say columns or rows, shares such as 1,2,1 or 1,2,1;3,1, and base=0.2"
            )
    if shares is not None and not all(number > 0 for row in shares for number in row):
        raise LayoutError("--layout: shares are above 0")
    if base is not None and base > 1:
        raise LayoutError("--layout: base is from 0 to 1")
    return rows, shares, base


def _parts(text: str, rows: bool) -> _Parts:
    common, mark, rest = text.rpartition("ADDCOMM")
    base, based, rest = rest.rpartition("ADDBASE")
    pieces = _MARK.split(rest.strip())
    found = [[pieces[0].strip()]]
    if len(pieces) == 1:
        lines = [line.strip() for line in rest.splitlines() if line.strip()] or [""]
        return _Parts(common.strip() if mark else "", base.strip() if based else None,
                      [[line] for line in lines] if rows else [lines])  # fmt: skip
    for keyword, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        if keyword == "ADDROW" or (keyword == "BREAK" and rows):
            found.append([piece.strip()])
        else:
            found[-1].append(piece.strip())
    return _Parts(common.strip() if mark else "", base.strip() if based else None, found)


def _boxes(texts: list[list[str]], shares: list[list[float]] | None, rows: bool) -> list[Box]:
    """A box for each region, row by row."""
    counts = [len(row) for row in texts]
    heights, widths = [1.0] * len(counts), [[1.0] * count for count in counts]
    if shares is not None and len(shares) == 1 and max(counts) == 1:
        heights = shares[0]
    elif shares is not None and len(shares) == 1 and len(counts) == 1:
        widths = shares
    elif shares is not None:  # each row: its height, then the widths of its columns; no width: one column
        heights, widths = [row[0] for row in shares], [row[1:] or [1.0] for row in shares]
    if len(heights) != len(counts) or [len(row) for row in widths] != counts:
        told = f"{counts[0]} columns" if len(counts) == 1 else f"rows of {', '.join(map(str, counts))} regions"
        raise LayoutError(f"--layout: the shares do not fit the prompt, which has {told}")
    found: list[Box] = []
    for (top, bottom), row in zip(_spans(heights), widths, strict=True):
        found += [(left, top, right, bottom) for left, right in _spans(row)]
    return found


def _spans(shares: list[float]) -> list[tuple[float, float]]:
    """Where each share of [0, 1] begins and ends, to six digits, so that no gap is left between neighbours."""
    edges = [round(sum(shares[:count]) / sum(shares), 6) for count in range(len(shares) + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))
