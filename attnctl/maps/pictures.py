"""Pictures of maps: a map as heat over its picture, and the cells of a sheet of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from attnctl.sheets import Cell

COLOURS = "inferno"  # of matplotlib; ever brighter, so that equal steps of a map look like equal steps to any eye


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


def cells(picture: Image.Image, maps: Mapping[str, Any], title: str = "") -> list[Cell]:
    """A row of a sheet: the picture, then each map over it, all under their captions.

    Args:
        picture: what was drawn; shown at least 192 pixels high.
        maps: caption -> (height, width).
        title: of the picture itself.
    """
    scale = max(1, -(-192 // picture.height))
    shown = picture.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return [(title, shown), *((word, overlay(shown, values)) for word, values in maps.items())]


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
    from matplotlib import colormaps

    return colormaps[COLOURS](levels, bytes=True)[..., :3]
