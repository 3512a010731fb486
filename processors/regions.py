"""Regions: words of the prompt act in a part of the picture only.

In the conditional rows, the logit S_ij of a place i of the picture and a token j of phrase r with region M_r becomes

    S_ij + inside    where i lies in M_r
    -inf             where it does not: the phrase's keys are closed there

This is region-constrained attention (RCA) as in PrimeComposer (Wang et al., ACM MM 2024, arXiv 2403.05053), for any
number of phrases; `inside` is ours. The tokens that belong to no phrase stay open to all places, so no row of the map
is ever empty. `Isolation` closes the picture's own attention between places of different regions, as Bounded
Attention does (Dahary et al., ECCV 2024, arXiv 2403.16990): a place of region r sees M_r and what is in no region.

Where text and picture are one sequence, both act by row groups: places that may see the same keys are one call of the
model's own kernel, and no mask of all queries by all keys is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.areas import on_grid
from attnctl.engine.control import AttentionCall, Control, Lane, Proceed, check_window, check_window_in_run
from attnctl.engine.run import Run, Step
from attnctl.engine.sites import Selection, Site, select, with_text
from attnctl.errors import ControlError, PhraseError
from attnctl.maps.reader import check_rows
from attnctl.regions import Region, named_regions
from attnctl.words.phrases import tokens

from .row_groups import Group, Part, RowGroups, alike, by_membership, joined, together

Masks = tuple[tuple[str, Any], ...]  # (phrase, anything a Region is made of)

# --- maths ------------------------------------------------------------------------------------------------------------


def constrained(
    masks: Tensor, tokens: Sequence[Sequence[int]], keys: int, inside: float, outside: float = -math.inf
) -> Tensor:
    """What is added to the logits of one image, (cells, keys) float32.

    Args:
        masks: (phrases, cells) bool.
        tokens: for each phrase, its keys. A key of several phrases is open in the regions of all of them.
        keys: how many there are.
        inside, outside: added where a place lies in a phrase's region, and where it does not.
    """
    bias = torch.zeros(masks.shape[1], keys)
    for key in sorted({key for own in tokens for key in own}):
        having = [number for number, own in enumerate(tokens) if key in own]
        bias[:, key] = torch.where(masks[having].any(0), inside, outside)
    return bias


def isolated(masks: Tensor) -> Tensor:
    """Which cells may see which, (cells, cells) bool, from masks (regions, cells).

    A cell sees the cells of its own regions and those of no region. A cell of no region sees all.
    """
    free = ~masks.any(0)
    together = (masks.float().mT @ masks.float()) > 0
    return together | free[:, None] | free[None]


# --- the controls -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Placed:
    """What a control of regions knows of one run: the regions, the tokens of each image, and biases by their shape."""

    regions: tuple[Region, ...]
    tokens: list[list[list[int]]]  # image, phrase, text rows; empty where the image's prompt has no such phrase
    picture: tuple[int, int]  # (height, width) of the whole picture, in pixels
    view: tuple[float, float, float, float]  # what is drawn of it
    grids: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    made: dict[str, Tensor | RowGroups] = field(default_factory=dict)  # biases and row groups, by what they depend on

    def masks(self, grid: tuple[int, int], chosen: Sequence[int]) -> Tensor:
        """(regions, cells) bool."""
        if grid not in self.grids:
            self.grids[grid] = torch.stack(
                [on_grid(region, grid, self.picture, self.view).flatten() for region in self.regions]
            )
        return self.grids[grid][list(chosen)]


def placed_phrases(run: Run, masks: Masks) -> Placed:
    """The regions of phrases in a run.

    Raises:
        PhraseError: no prompt has a phrase, or an image has none of them.
    """
    found: list[list[list[int]]] = []
    trouble: dict[str, PhraseError] = {}
    for image in range(run.images):
        found.append([])
        for phrase, _ in masks:
            try:
                found[-1].append(tokens(run, phrase, image))
            except PhraseError as error:
                trouble.setdefault(phrase, error)
                found[-1].append([])
        if not any(found[-1]):
            raise next(iter(trouble.values()))
    for number, (phrase, _) in enumerate(masks):
        if not any(image[number] for image in found):
            raise trouble[phrase]
    return Placed(tuple(region for _, region in masks), found, run.whole, run.view)


def check_neighbours(step: Step) -> None:
    """Raise if masks of IP-Adapter images were given to a model whose processor drops them without a word."""
    if "ip_adapter_masks" in (step.arguments.get("joint_attention_kwargs") or {}):
        raise ControlError(
            f"{step.run.family.name} ignores ip_adapter_masks: its IP-Adapter has no regions in diffusers"
        )


def open_in(step: Step, window: tuple[float, float]) -> bool:
    """Whether this step lies in a window, and has conditional rows."""
    return step.rows.cond is not None and window[0] <= step.fraction < window[1]


@dataclass(frozen=True)
class Regions(Control):
    """Each phrase acts in its own part of the picture only.

    Settings:
        masks: regions by phrase, as a dict or pairs: a box (left, top, right, bottom) in shares of the picture or in
            pixels, a mask, a picture, a painted layer; see `attnctl.regions.Region`. An image of a batch uses the
            phrases that its own prompt has.
        inside: added to a phrase's logits in its region, 0 or more; each unit multiplies its weight by e. The default
            is ours, chosen on glyph-sd.
        strength: how far a phrase is closed outside of its region, from 0 (not at all) to 1 (no trace of it is left);
            between them its weight there is multiplied by 1 - strength.
        window: part of the schedule to act in, from 0 (noise) to 1 (picture).
        where: sites to act at. None: all where the picture attends to text.

    Raises:
        ControlError: a setting is out of its range, or a region is none.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has none of them.
    """

    masks: Masks
    inside: float = 2.0
    strength: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    where: Selection = None

    lane: ClassVar[Lane] = Lane.BIAS

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", named_regions(self.masks))
        if not self.masks:
            raise ControlError("Regions takes at least one region, such as {'cat': (0, 0, 0.5, 1)}")
        if not 0 <= self.strength <= 1 or not 0 <= self.inside < 100:
            raise ControlError(
                f"strength is from 0 to 1, and inside from 0 to 100; not {self.strength!r} and {self.inside!r}"
            )
        check_window(self.window)

    @property
    def phrases(self) -> tuple[str, ...]:
        return tuple(phrase for phrase, _ in self.masks)

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return with_text(available, self.where)

    def begin(self, run: Run) -> Placed:
        if self.strength or self.inside:
            check_window_in_run(self.window, run)
        return placed_phrases(run, self.masks)

    def inputs(self, step: Step) -> Mapping[str, Any]:
        check_neighbours(step)
        return {}

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        if not open_in(call.step, self.window) or not (self.strength or self.inside):
            return proceed(call)
        placed: Placed = call.step.run.state(self)
        joint, images = call.site.kind == "joint", call.step.images
        shape = str((joint, call.grid, call.k.shape[2], call.text, call.q.dtype, call.q.device, call.step.rows, images))
        if shape not in placed.made:
            texts = [self._text(call, placed, image) for image in images]
            placed.made[shape] = self._groups(call, texts) if joint else self._bias(call, [bias for bias, _ in texts])
        made = placed.made[shape]
        return proceed(call.add_bias(made) if isinstance(made, Tensor) else call.add_groups(made))

    def _text(self, call: AttentionCall, placed: Placed, image: int) -> tuple[Tensor, Tensor]:
        """What is added to one image's logits, (cells, text keys), and the masks of its phrases, (phrases, cells)."""
        chosen = [number for number, own in enumerate(placed.tokens[image]) if own]
        own = [placed.tokens[image][number] for number in chosen]
        check_rows(call, max(map(max, own)))
        masks = placed.masks(call.grid, chosen)
        outside = -math.inf if self.strength == 1 else math.log1p(-self.strength)
        text = constrained(masks, own, call.text.stop - call.text.start, self.inside, outside)
        if text.isneginf().all(1).any():
            raise ControlError(f"{call.site.name} would have places without any token; leave words out of the regions")
        return text, masks

    def _bias(self, call: AttentionCall, texts: list[Tensor]) -> Tensor:
        """(rows, 1, queries, keys) of a cross site, of one row where all are the same."""
        rows = call.step.rows
        assert rows.cond is not None
        bias = torch.zeros(rows.total, 1, call.q.shape[2], call.k.shape[2])
        for row, text in zip(range(rows.cond.start, rows.cond.stop), texts, strict=True):
            bias[row, 0, call.image, call.text] = text
        alike = rows.total == rows.cond.stop - rows.cond.start and bool((bias == bias[:1]).all())
        return (bias[:1] if alike else bias).to(call.q)

    def _groups(self, call: AttentionCall, texts: list[tuple[Tensor, Tensor]]) -> RowGroups:
        """The rows of a joint site: places of one kind see the same keys, all other rows see all keys."""
        rows, size = call.step.rows, call.q.shape[2]
        assert rows.cond is not None
        everything = torch.arange(size)
        others = torch.cat([everything[: call.image.start], everything[call.image.stop :]])
        plain = Group(everything, everything)
        parts = [] if rows.uncond is None else [Part(rows.uncond, (plain,))]
        for row, (text, masks) in zip(range(rows.cond.start, rows.cond.stop), texts, strict=True):
            groups = [Group(others, everything)]
            for _, cells in by_membership(masks):
                bias = torch.zeros(size)
                bias[call.text] = text[cells[0]]  # the places of one kind have one bias
                keys = (~bias.isneginf()).nonzero().flatten()
                own = bias[keys]
                groups.append(Group(call.image.start + cells, keys, None, own if own.any() else None))
            parts.append(Part(slice(row, row + 1), together(groups)))
        return RowGroups(alike(parts, rows.total), size, call.k.shape[2])


@dataclass(frozen=True)
class Isolation(Control):
    """Places of different regions do not see each other; what is in no region sees all and is seen by all.

    It keeps things from melting into one, but also from agreeing with each other (light, ground), so it is best for the
    first steps only. It acts in all rows, since guidance would blow up a difference between them.

    Settings:
        masks: regions, as a dict by any name, or pairs; see `Regions`.
        window: part of the schedule to act in, from 0 (noise) to 1 (picture). The default is ours.
        where: sites to act at. None: all where the picture attends to itself.

    Raises:
        ControlError: a setting is out of its range, or there are fewer than two regions.
        NoSiteError: no selected site has keys of the picture.
    """

    masks: Masks
    window: tuple[float, float] = (0.0, 0.3)
    where: Selection = None

    lane: ClassVar[Lane] = Lane.BIAS

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", named_regions(self.masks))
        if len(self.masks) < 2:
            raise ControlError("Isolation keeps regions apart, so it needs two or more")
        check_window(self.window)

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return select(available, ("self", "joint") if self.where is None else self.where)

    def begin(self, run: Run) -> Placed:
        return Placed(tuple(region for _, region in self.masks), [], run.whole, run.view)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        if not self.window[0] <= call.step.fraction < self.window[1] or call.site.kind not in ("self", "joint"):
            return proceed(call)
        placed: Placed = call.step.run.state(self)
        shape = str((call.grid, call.k.shape[2], call.image))
        if shape not in placed.made:
            placed.made[shape] = self._groups(call, placed.masks(call.grid, range(len(placed.regions))))
        groups = placed.made[shape]
        assert isinstance(groups, RowGroups)
        return proceed(call.add_groups(groups))

    def _groups(self, call: AttentionCall, masks: Tensor) -> RowGroups:
        everything = torch.arange(call.q.shape[2])
        others = torch.cat([everything[: call.image.start], everything[call.image.stop :]])
        may = isolated(masks)
        groups = [Group(others, everything)] if len(others) else []
        for _, cells in by_membership(masks):
            seen = call.image.start + may[cells[0]].nonzero().flatten()
            groups.append(Group(call.image.start + cells, joined(others, seen)))
        return RowGroups((Part(None, together(groups)),), call.q.shape[2], call.k.shape[2])
