"""Dense regions: logits are drawn towards what a region asks for, softly, and the more so the smaller the region.

DenseDiffusion (Kim et al., ICCV 2023, arXiv 2308.12964, equations 2 to 5). In the conditional rows, the logit S_ij of
place i and key j becomes

    S_ij + c_i (max_j S_ij - S_ij)    where i and j belong together
    S_ij - c_i (S_ij - min_j S_ij)    where they do not
    c_i = strength (1 - s)^5 (1 - a_i)

with s the share of the schedule that is done (the paper's (t / 1000)^5) and a_i the part of the picture that the region
of i covers. At cross-attention a place and a token belong together if the token's phrase has a region with the place in
it; tokens of no phrase belong to no place. In the picture's own attention two places belong together if they share a
region, or are both in none. Text and picture keys of joint attention are taken apart, each with its own max and min.

Unlike with closed keys, the model keeps a say. The paper also replaces the embedding of each phrase by that of the
phrase encoded alone; here the prompt stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnctl.engine.control import AttentionCall, Control, Lane, Proceed, check_window, check_window_in_run
from attnctl.engine.run import Run
from attnctl.engine.sites import Selection, Site, select
from attnctl.errors import ControlError
from attnctl.maps.reader import check_rows
from attnctl.regions import named_regions

from .regions import Masks, Placed, open_in, placed_phrases

LARGEST = 1024
"""Cells of the largest grid whose own attention is changed: its logits stand in memory, cells x cells for each head."""

# --- maths ------------------------------------------------------------------------------------------------------------


def modulation(logits: Tensor, belongs: Tensor, pull: Tensor) -> Tensor:
    """What is added to logits.

    Args:
        logits: (..., queries, keys) float32.
        belongs: (queries, keys) bool.
        pull: (queries,) in [0, 1], the c_i above.

    Returns:
        Like `logits`. At a pull of 1 every logit of a row becomes the row's largest or its smallest.
    """
    high, low = logits.amax(-1, keepdim=True), logits.amin(-1, keepdim=True)
    return pull[:, None] * (torch.where(belongs, high, low) - logits)


def token_belongs(masks: Tensor, tokens: Sequence[Sequence[int]], keys: int) -> Tensor:
    """(cells, keys) bool: the key is a token of a phrase whose mask, of (phrases, cells) bool, has the cell."""
    found = torch.zeros(masks.shape[1], keys, dtype=torch.bool)
    for mask, own in zip(masks, tokens, strict=True):
        found[:, list(own)] |= mask[:, None]
    return found


def place_belongs(masks: Tensor) -> Tensor:
    """(cells, cells) bool: two cells share a mask, or are both in none."""
    free = ~masks.any(0)
    return ((masks.float().mT @ masks.float()) > 0) | (free[:, None] & free)


def areas(masks: Tensor) -> Tensor:
    """(cells,) the part of the picture that the smallest mask with this cell covers; without any, that of the rest."""
    sizes = masks.float().mean(1)
    own = torch.where(masks, sizes[:, None], torch.inf).amin(0)
    return torch.where(masks.any(0), own, 1 - masks.any(0).float().mean())


# --- the control ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DenseRegions(Control):
    """Each phrase is drawn into its own part of the picture, softly; the smaller the region, the stronger.

    Settings:
        masks: regions by phrase, as for `Regions`.
        strength: of text keys, from 0 to 1; the paper has 1.
        self_strength: of the picture's own keys, from 0 to 1; the paper has 0.3. Only on grids of up to 1,024 cells.
        window: part of the schedule to act in, from 0 (noise) to 1 (picture). The paper has the first 30 %.
        where: sites to act at. None: all.

    Raises:
        ControlError: a setting is out of its range, or a region is none.
        NoSiteError: nothing is selected.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has none of them.
    """

    masks: Masks
    strength: float = 1.0
    self_strength: float = 0.3
    window: tuple[float, float] = (0.0, 0.3)
    where: Selection = None

    lane: ClassVar[Lane] = Lane.BIAS

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", named_regions(self.masks))
        if not self.masks:
            raise ControlError("DenseRegions takes at least one region, such as {'cat': (0, 0, 0.5, 1)}")
        if not (0 <= self.strength <= 1 and 0 <= self.self_strength <= 1):
            raise ControlError(
                f"strength and self_strength are from 0 to 1; not {self.strength!r} and {self.self_strength!r}"
            )
        check_window(self.window)

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return select(available, ("cross", "joint", "self") if self.where is None else self.where)

    def begin(self, run: Run) -> Placed:
        if self.strength or self.self_strength:
            check_window_in_run(self.window, run)
        return placed_phrases(run, self.masks)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        text = self.strength if call.site.kind in ("cross", "joint") else 0.0
        cells = call.image.stop - call.image.start
        picture = self.self_strength if call.site.kind in ("self", "joint") and cells <= LARGEST else 0.0
        if not open_in(call.step, self.window) or not (text or picture):
            return proceed(call)
        placed: Placed = call.step.run.state(self)
        rows = call.step.rows
        assert rows.cond is not None
        fading = (1 - call.step.fraction) ** 5
        bias = call.q.new_zeros(*call.q.shape[:3], call.k.shape[2])
        for row, image in zip(range(rows.cond.start, rows.cond.stop), call.step.images, strict=True):
            chosen = [number for number, own in enumerate(placed.tokens[image]) if own]
            tokens = [placed.tokens[image][number] for number in chosen]
            if text:
                check_rows(call, max(map(max, tokens)))
            masks = placed.masks(call.grid, chosen)
            pull = (fading * (1 - areas(masks))).to(call.q.device)
            for keys, strength in ((call.text, text), (call.image, picture)):
                if not strength:
                    continue
                logits = _logits(call, row, keys)
                width = keys.stop - keys.start
                belongs = token_belongs(masks, tokens, width) if keys is call.text else place_belongs(masks)
                own = modulation(logits, belongs.to(call.q.device), strength * pull)
                bias[row, :, call.image, keys] = own.to(bias)
        return proceed(call.add_bias(bias))


def _logits(call: AttentionCall, row: int, keys: slice) -> Tensor:
    """(heads, cells, keys) float32 of one batch row."""
    q, k = call.q[row, :, call.image].float(), call.k[row, :, keys].float()
    k = k.repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    return q @ k.mT * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
