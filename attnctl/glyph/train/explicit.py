"""Explicit: attention by plain matrix products, for training on a CPU and for losses on its maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.engine.control import AttentionCall, Control, Lane, Proceed
from attnctl.engine.run import Run
from attnctl.engine.sites import Site

Maps = dict[int, list[Tensor]]
"""Side of the grid -> [(batch, cells, text rows), ...], a mean over heads for each site."""


@dataclass(frozen=True)
class Explicit(Control):
    """softmax(q k^T * scale + bias) v, written out: on a CPU its backward is much faster than the fused kernel's.

    Its state in a training batch (`Maps`) holds what pictures attend to in the text, at sites with 64 queries or more.

    repeats: as many numbers as the text has rows; text row j stands for repeats[j] equal rows. A key that is there n
    times gets n times its weight, that is log n on its logit, so that padding need not be computed row by row.
    """

    repeats: tuple[int, ...] = field(default=())

    lane: ClassVar[Lane] = Lane.PROBS

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return available

    def begin(self, run: Run) -> Maps:
        return {}

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        call = call.dense()
        scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
        logits = (call.q * scale) @ call.k.transpose(-1, -2)  # (batch, heads, queries, keys)
        if self.repeats:
            weights = torch.zeros(call.k.shape[2], device=logits.device)
            weights[call.text] = torch.tensor([log(count) for count in self.repeats], device=logits.device)
            logits = logits + weights.to(logits.dtype)
        if call.bias is not None:
            logits = logits + call.bias
        probabilities = torch.softmax(logits, -1)
        maps: Maps = call.step.run.state(self)
        height, width = call.grid
        if call.text.stop and call.text.stop > (call.text.start or 0) and height * width >= 64:
            maps.setdefault(height, []).append(probabilities[:, :, call.image, call.text].mean(1))
        return probabilities.to(call.v.dtype) @ call.v
