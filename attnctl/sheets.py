"""Sheets: pictures in a grid, each under its caption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

GAP, PAPER, INK = 8, (255, 255, 255), (32, 32, 36)

Cell = tuple[str, Image.Image | None]  # caption, picture; without a picture, the caption stands alone


def grid(rows: Sequence[Sequence[Cell]], points: int = 14, gap: int = GAP, border: bool = True) -> Image.Image:
    """Pictures in rows, each under its caption.

    Args:
        rows: from top to bottom; they may differ in length. A row without any caption keeps no room for one.
        points: size of the captions. What does not fit over its picture ends in "…".
        gap: pixels between pictures.
        border: also leave a gap around all of them; without it, a sheet can be a picture of another.

    Returns:
        A page whose columns are as wide as their widest picture, its rows as high as their highest.
    """
    font, line = ImageFont.load_default(points), round(points * 1.6)
    count = max(map(len, rows))
    widths = [max((row[x][1].width for row in rows if x < len(row) and row[x][1]), default=0) for x in range(count)]  # type: ignore[union-attr]
    lines = [line if any(caption for caption, _ in row) else 0 for row in rows]
    heights = [max((picture.height for _, picture in row if picture), default=0) for row in rows]
    edge = gap if border else 0
    lefts = [edge + sum(widths[:x]) + x * gap for x in range(count)]
    tops = [edge + sum(lines[:y]) + sum(heights[:y]) + y * gap for y in range(len(rows))]
    size = lefts[-1] + widths[-1] + edge, tops[-1] + lines[-1] + heights[-1] + edge
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    for row, top, room in zip(rows, tops, lines, strict=True):
        for (caption, picture), left, width in zip(row, lefts, widths, strict=False):
            pen.text((left, top + room // 2), _fitting(caption, font, width), INK, font, anchor="lm")
            if picture is not None:
                page.paste(picture, (left, top + room))
    return page


def _fitting(text: str, font: Any, width: int) -> str:
    text = " ".join(text[:500].split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
