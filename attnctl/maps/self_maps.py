"""SelfMaps: how much each place of the picture attends to each other place, in a training batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.engine.control import AttentionCall, Control, Lane, Proceed
from attnctl.engine.run import Run
from attnctl.engine.sites import Selection, Site, select
from attnctl.errors import ControlError


@dataclass(frozen=True)
class SelfMaps(Control):
    """Reads self-attention in a training batch, without gradient. `batch.state(control).mean()` gives it.

    Args:
        where: which sites, all of one grid, see `attnctl.select`; of joint ones the block from picture to picture, as
            if there were no text. A place for each of a thousand cells costs 4 MiB.
    """

    where: Selection = None
    lane: ClassVar[Lane] = Lane.MAPS

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in select(available, self.where) if site.kind in ("self", "joint"))

    def begin(self, run: Run) -> SelfAttention:
        return SelfAttention()

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        call.step.run.state(self).add(call)
        return proceed(call)


class SelfAttention:
    """Sum of the maps of all rows, heads and sites.

    Attributes:
        grid: (height, width) of the places.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count, self.grid = 0, (0, 0)

    @torch.no_grad()
    def add(self, call: AttentionCall) -> None:
        """One attention call, row by row: all rows at once might not fit."""
        if self.count and self.grid != call.grid:
            raise ControlError(f"SelfMaps reads sites of one grid, not of {self.grid} and {call.grid}")
        self.grid = call.grid
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        for q, k in zip(call.q[:, :, call.image].float(), call.k[:, :, call.image].float(), strict=True):
            maps = torch.softmax(scale * q @ k.mT, -1).mean(0)  # (cells, cells)
            self.total = maps if self.total is None else self.total + maps
            self.count += 1

    def mean(self) -> Tensor:
        """(cells, cells): each row is a place, and adds up to 1."""
        if self.total is None:
            raise ControlError("no self-attention was read: call the denoiser inside the batch first")
        return self.total / self.count
