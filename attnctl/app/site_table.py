"""The rows of `attnctl sites`: each site with its grid at one picture size, and where text stands among its keys."""

import inspect
from typing import TYPE_CHECKING, Any

from attnctl.engine.families.registry import discover, family_of
from attnctl.engine.sites import Selection, select

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from attnctl.engine.families.record import Family
    from attnctl.engine.sites import Site

HEADINGS = ("layer", "block", "site", "kind", "heads", "dim", "grid", "text keys")


def site_rows(pipe: "DiffusionPipeline", selection: Selection, size: tuple[int, int] | None) -> list[tuple[str, ...]]:
    """One row of `HEADINGS` per selected site; `size` is the picture's width and height, by default the model's own."""
    family, denoiser = family_of(pipe)
    width, height = size or default_size(pipe, denoiser)
    latent = height // pipe.vae_scale_factor, width // pipe.vae_scale_factor
    rows: list[tuple[str, ...]] = []
    for site in select(discover(pipe), selection):
        grid = None if site.factor is None else site.grid(*latent)
        rows.append(
            (
                str(site.layer),
                str(site.block),
                site.name,
                site.kind,
                str(site.heads),
                str(site.head_dim),
                "-" if grid is None else f"{grid[0]}x{grid[1]}",
                _text_keys(pipe, family, site, grid),
            )
        )
    return rows


def default_size(pipe: "DiffusionPipeline", denoiser: Any) -> tuple[int, int]:
    """The width and height a pipeline draws when it is not told."""
    cells = getattr(pipe, "default_sample_size", None) or denoiser.config.sample_size
    height, width = (cells, cells) if isinstance(cells, int) else cells
    return width * pipe.vae_scale_factor, height * pipe.vae_scale_factor


def _text_keys(pipe: "DiffusionPipeline", family: "Family", site: "Site", grid: tuple[int, int] | None) -> str:
    """first:end of the text among the keys, for the length the pipeline encodes by default."""
    if site.kind == "self":
        return "-"
    length = max(
        stream.offset + (stream.rows if isinstance(stream.rows, int) else _default_rows(pipe, stream.rows))
        for stream in family.streams
        if getattr(pipe, stream.tokenizer, None) is not None
    )
    first = grid[0] * grid[1] if site.order == "image-first" and grid is not None else 0
    return f"{first}:{first + length}"


def _default_rows(pipe: "DiffusionPipeline", argument: str) -> int:
    return inspect.signature(pipe.__call__).parameters[argument].default
