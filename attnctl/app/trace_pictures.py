"""Pictures of what controls did in one run: their losses by step, and the maps of words as they change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from attnctl.maps.pictures import heat
from attnctl.maps.reader import Maps
from attnctl.sheets import Cell, grid

CELL = 96


def loss_curves(traces: Sequence[Mapping[str, Any]], image: int = 0) -> Image.Image | None:
    """The losses of one picture before each step, less the least they can be; a line per term and pair or phrase.

    Args:
        traces: `report.to_dict()["traces"]`.
        image: of the batch, from 0.

    Returns:
        A panel per control and term; None if there is no loss.
    """
    panels = [
        (f"{trace['control']}: {term}", lines) for trace in traces for term, lines in _lines(trace, image).items()
    ]
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2 * len(panels)), dpi=100, layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker=".", label=label.replace(" | ", " and "))
        axes.set(title=title, xlabel="step", ylabel="loss")
        values = [0.0, *(value for points in lines.values() for _, value in points)]
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - room if low < 0 else 0.0, high + room)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if len(lines) <= 12:
            axes.legend(fontsize="small")
    page = BytesIO()
    FigureCanvasAgg(figure).print_png(page)
    return Image.open(page).convert("RGB")


def _lines(trace: Mapping[str, Any], image: int) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """term -> label -> (step, loss); what is read several times in a step lies evenly within it."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for step in trace.get("steps", ()):
        read = [one for one in step["evaluations"] if image in one["images"]]
        for number, one in enumerate(read):
            for term, values in one["losses"].items():
                for label, of_images in values.items():
                    value = of_images[one["images"].index(image)]
                    if value is not None:
                        line = found.setdefault(term, {}).setdefault(label, [])
                        line.append((step["step"] + number / len(read), value))
    return found


def map_sequence(maps: Maps, image: int = 0, most: int = 8) -> Image.Image:
    """How the maps of words change: a row per word, a column per step, each as bright as its own highest value.

    Args:
        maps: recorded with keep="step".
        image: of the batch, from 0.
        most: columns; of more steps some are shown, evenly spread from the first to the last.
    """
    steps = [maps.steps[k] for k in np.linspace(0, len(maps.steps) - 1, min(most, len(maps.steps))).round().astype(int)]
    height, width = maps.get(maps.words[0], step=steps[0]).shape[1:]
    size = CELL, round(CELL * height / width)
    rows: list[list[Cell]] = [[(f"step {step}", None) for step in steps]]
    for word in maps.words:
        row = [heat(maps.get(word, step=step)[image], size) for step in steps]
        rows.append([(word if number == 0 else "", picture) for number, picture in enumerate(row)])
    return grid(rows)
