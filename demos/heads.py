"""The head grid: a row for each block of the model, a button for each head. A view of the setting `heads`."""

from collections.abc import Sequence

from attnctl.app.clicks import picked
from attnctl.engine.sites import Site

NO_GRID = "<p>Draw once with this model to see its heads here; or write them above, as block:head.</p>"


def grid(sites: Sequence[Site], heads: str) -> str:
    """The grid as HTML, with these heads chosen."""
    rows: dict[int, Site] = {}
    for site in sites:
        if site.kind in ("self", "joint"):
            rows.setdefault(site.block, site)
    if not rows:
        return NO_GRID
    chosen = picked(sites, heads)
    shown = []
    for block, site in rows.items():
        on = chosen.get(site, ())
        place = site.name.split(".")[0].removesuffix("_blocks").removesuffix("_block")
        cells = [_cell("block", f"{block}", len(on) == site.heads, f"{place} {block}")]
        cells += [_cell("head", f"{block}:{head}", head in on, str(head)) for head in range(site.heads)]
        shown.append(f"<div>{''.join(cells)}</div>")
    return f'<div role="group" aria-label="Heads">{"".join(shown)}</div>'


def _cell(kind: str, key: str, on: bool, shows: str) -> str:
    named = f'class="{kind}" data-k="{key}" aria-pressed="{str(on).lower()}" aria-label="{kind} {key}"'
    return f"<button {named}>{shows}</button>"
