"""Site: frozen facts about one attention of a denoiser. `select` picks some of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from attnctl.errors import ControlError, NoSiteError

Kind = Literal["self", "cross", "joint", "text"]
Selection = str | int | Callable[["Site"], bool] | Iterable[Any] | None  # a Site selects itself

KINDS: tuple[Kind, ...] = ("self", "cross", "joint", "text")


@dataclass(frozen=True)
class Site:
    """Facts about one place where the denoiser attends.

    Attributes:
        name: module path inside the denoiser, e.g. "mid_block.attentions.0.transformer_blocks.0.attn2".
        kind: "self" (image to image), "cross" (image to text), "joint" (one sequence of both), "text" (text to text).
        heads: number of query heads.
        head_dim: channels of one head.
        layer: position in execution order among all sites of the denoiser, from 0 (UNet: down, mid, up).
        factor: latent cells per grid cell along one side (UNet 1, 2, 4, 8; SD3 and FLUX 2); None at text sites.
        order: at joint sites, which rows come first; else None.
        block: position of its transformer block among those of the denoiser, from 0: the number that papers give. The
            self and cross site of a UNet's block share it, as do the two attentions of a block of SD 3.5.
    """

    name: str
    kind: Kind
    heads: int
    head_dim: int
    layer: int
    factor: int | None
    order: Literal["text-first", "image-first"] | None = None
    block: int = 0

    def grid(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """(height, width) of the grid of image queries for latents of this many cells; halving rounds up."""
        if self.factor is None:
            raise NoSiteError(f"{self.name} attends over text only and has no image grid")
        return -(-latent_height // self.factor), -(-latent_width // self.factor)

    def layout(self, grid: tuple[int, int], queries: int, keys: int, text_rows: int | None) -> tuple[slice, slice]:
        """(text keys, image queries) of one attention call.

        Args:
            grid: what `grid` says for the latents being drawn.
            queries, keys: lengths of the call.
            text_rows: length of the text sequence, where it is known; only joint sites need it.

        Raises:
            ControlError: the call is not shaped as the grid says, e.g. because tokens were merged.
        """
        cells = grid[0] * grid[1]
        if self.kind == "joint":
            text = keys - cells if text_rows is None else text_rows
            if self.order == "text-first" and text >= 0 and text + cells <= keys == queries:
                return slice(0, text), slice(text, text + cells)  # a reference picture may follow
            if self.order == "image-first" and text >= 0 and text + cells == keys == queries:
                return slice(cells, keys), slice(0, cells)
        elif self.kind == "text":
            return slice(0, keys), slice(0, 0)
        elif queries == cells:
            return slice(0, keys if self.kind == "cross" else 0), slice(0, cells)
        raise ControlError(
            f"{self.name} attends with {queries} queries and {keys} keys, which is no {grid[0]} x {grid[1]} grid; "
            "is something else changing the tokens (token merging, an unknown picture input)?"
        )


def select(sites: Sequence[Site], selection: Selection) -> tuple[Site, ...]:
    """Pick sites, in execution order.

    Args:
        sites: what there is, e.g. `attnctl.sites(pipe)`.
        selection: one of
            None             all sites that see the image;
            "cross"          a kind: self, cross, joint, text;
            "factor:2"       sites whose grid cell spans 2 latent cells;
            7, "7", "7-10"   layers, both ends included;
            "up_blocks.*"    a name, or a glob over names;
            a predicate      Site -> bool;
            a list of these  any of them.

    Raises:
        NoSiteError: nothing matches, or it is none of these; the message names what exists.
    """
    if isinstance(selection, Iterator):
        selection = tuple(selection)  # it is gone through more than once
    _check(selection)
    found = tuple(site for site in sites if _matches(site, selection))
    if not found:
        raise NoSiteError(f"no attention site matches {_spell(selection)}; {_inventory(sites)}")
    return found


def with_text(available: tuple[Site, ...], where: Selection) -> tuple[Site, ...]:
    """The selected sites where image queries meet text keys.

    Raises:
        NoSiteError: none of the selected sites does, or none was selected.
    """
    chosen = select(available, where)
    found = tuple(site for site in chosen if site.kind in ("cross", "joint"))
    if not found:
        kinds = ", ".join(sorted({site.kind for site in chosen}))
        raise NoSiteError(
            f"maps need cross or joint sites, where the picture attends to words; selected are only {kinds}"
        )
    return found


def _check(selection: Selection) -> None:
    if isinstance(selection, bool) or not (
        selection is None or isinstance(selection, (str, int, Site, Iterable)) or callable(selection)
    ):
        raise NoSiteError(
            f"{selection!r} selects no attention site: say a kind ({', '.join(KINDS)}), factor:2, a layer such as 7 or "
            "7-10, a name, a glob, or a list of these"
        )
    if isinstance(selection, Iterable) and not isinstance(selection, str):
        for one in selection:
            _check(one)


def _matches(site: Site, selection: Selection) -> bool:
    if selection is None:
        return site.kind != "text"
    if isinstance(selection, int):
        return site.layer == selection
    if isinstance(selection, str):
        if selection in KINDS:
            return site.kind == selection
        if match := re.fullmatch(r"factor:(\d+)", selection):
            return site.factor == int(match[1])
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", selection):
            return int(match[1]) <= site.layer <= int(match[2] or match[1])
        return site.name == selection or fnmatch.fnmatchcase(site.name, selection)
    if isinstance(selection, Site):
        return site == selection
    if callable(selection):
        return bool(selection(site))
    return any(_matches(site, one) for one in selection)


def _spell(selection: Selection) -> str:
    if isinstance(selection, Site):
        return repr(selection.name)
    if selection is None or isinstance(selection, (str, int)):
        return repr(selection)
    if callable(selection):
        return f"the predicate {getattr(selection, '__name__', selection)!s}"
    return "any of " + ", ".join(_spell(one) for one in selection) if selection else "an empty selection"


def _inventory(sites: Sequence[Site]) -> str:
    if not sites:
        return "the denoiser has no sites"
    kinds = {kind: sum(site.kind == kind for site in sites) for kind in KINDS}
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    factors = sorted({site.factor for site in sites if site.factor is not None})
    return (
        f"there are {counts} in layers 0-{sites[-1].layer} with factors {', '.join(map(str, factors))}, "
        f"from {sites[0].name!r} to {sites[-1].name!r}"
    )
