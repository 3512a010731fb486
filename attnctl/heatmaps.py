"""Pictures of maps: a map as heat over its picture, and a titled row of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Dark violet over red to pale yellow, ever brighter: equal steps of a map look like equal steps to any eye.
STOPS = ((13, 8, 50), (70, 12, 105), (140, 30, 100), (203, 62, 68), (244, 116, 28), (252, 186, 40), (252, 250, 160))
GAP, PAPER, INK = 8, (255, 255, 255), (32, 32, 36)


def heat(values: Any, size: tuple[int, int]) -> Image.Image:
    """A map as colours.

    Args:
        values: (height, width) of non-negative numbers, tensor or array; its highest becomes the brightest colour.
        size: (width, height) of the picture in pixels.
    """
    return Image.fromarray(_colours(_levels(values, size)))


def overlay(picture: Image.Image, values: Any, strength: float = 0.75) -> Image.Image:
    """A map as heat over its picture: where it is high it glows, where it is low the picture shows, darkened.

    Args:
        picture: any size and mode; the result is RGB of the same size.
        values: (height, width) of non-negative numbers, tensor or array; its highest becomes the brightest colour.
        strength: how much of the picture the heat hides where it is highest, from 0 to 1.
    """
    levels = _levels(values, picture.size)[..., None]
    base = np.asarray(picture.convert("RGB"), dtype=np.float32)
    grey = base.mean(axis=-1, keepdims=True) * 0.5 + base * 0.5  # loud colours would drown those of the heat
    alpha = strength * (0.4 + 0.6 * levels)
    return Image.fromarray((grey * (1 - alpha) + _colours(levels[..., 0]) * alpha).round().astype(np.uint8))


def sheet(picture: Image.Image, maps: Mapping[str, Any], title: str = "") -> Image.Image:
    """A row of pictures under their titles: the picture, then each map over it.

    Args:
        picture: what was drawn; shown at least 192 pixels high.
        maps: title -> (height, width).
        title: of the picture itself.
    """
    scale = max(1, -(-192 // picture.height))
    shown = picture.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    cells = [(title, shown), *((word, overlay(shown, values)) for word, values in maps.items())]
    points = max(14, min(shown.height // 12, 28))
    font, bar = ImageFont.load_default(points), round(points * 1.6)
    page = Image.new("RGB", (len(cells) * (shown.width + GAP) + GAP, shown.height + bar + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    for i, (text, cell) in enumerate(cells):
        left = GAP + i * (shown.width + GAP)
        page.paste(cell, (left, bar))
        pen.text((left, bar // 2), _fitting(text, font, shown.width), INK, font, anchor="lm")
    return page


def stack(rows: list[Image.Image]) -> Image.Image:
    """Sheets below one another."""
    page = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), PAPER)
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    return page


def _levels(values: Any, size: tuple[int, int]) -> np.ndarray:
    """(height, width) in [0, 1], at the size of the picture; smooth, because a cell of the grid has no sharp edges."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    levels = np.nan_to_num(np.asarray(values, dtype=np.float32))
    levels = levels / max(float(levels.max()), 1e-12)
    large = Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(large).clip(0, 1)


def _colours(levels: np.ndarray) -> np.ndarray:
    """(height, width) in [0, 1] -> (height, width, 3) uint8."""
    at = np.linspace(0, 1, len(STOPS))
    channels = [np.interp(levels, at, [stop[i] for stop in STOPS]) for i in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _fitting(text: str, font: Any, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
