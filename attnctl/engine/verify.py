"""verify(): is a family record true of this pipeline? Move one thing, watch what moves with it.

The oracle needs no knowledge of the model: it draws one step, then the same step with the text moved, with another
prompt, and with one cell of the latents moved, and looks at queries and keys of the first site that sees the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnctl.engine.attachment import attach
from attnctl.engine.calls import named
from attnctl.engine.control import AttentionCall, Control, Proceed
from attnctl.engine.families.registry import discover, family_of
from attnctl.engine.sites import Site, select
from attnctl.errors import FamilyError


@dataclass(frozen=True)
class Findings:
    """What `verify` saw at one site.

    Attributes:
        site: the first site that attends to the text.
        text: (first, last + 1) of the keys that move with the text.
        rows: batch rows, over all denoiser calls of one step, that move with the prompt.
        cell: (row, column) of the query that moves most with that cell of the grid.
    """

    site: Site
    text: tuple[int, int]
    rows: tuple[int, ...]
    cell: tuple[int, int]


@dataclass(frozen=True, eq=False)
class _Look(Control):
    site: Site
    calls: list[AttentionCall] = field(default_factory=list)

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return (self.site,)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        self.calls.append(call)
        return proceed(call)


def verify(pipe: Any, prompt: str = "a cat", other: str = "two red dogs", **call: Any) -> Findings:
    """Check the family record of a pipeline against its behaviour: text rows, branch rule and grid.

    Draws four single steps. Give a small height and width: the answer does not depend on them.

    Args:
        pipe: the pipeline, nothing attached.
        prompt, other: two prompts that differ.
        call: further arguments of the pipeline.

    Raises:
        FamilyError: the record says something else than what moved.
    """
    family, model = family_of(pipe)
    site = select(discover(pipe), ("cross", "joint"))[0]

    def draw(text: str, edit: Callable[[dict[str, Any]], dict[str, Any]] | None = None) -> list[AttentionCall]:
        look = _Look(site)

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            arguments = named(module, args, kwargs)
            return (), arguments | (edit(arguments) if edit else {})

        handle = model.register_forward_pre_hook(hook, with_kwargs=True)
        settings = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        try:
            with attach(pipe, look):
                pipe(**{"prompt": text} | settings | call)
        finally:
            handle.remove()
        return look.calls

    def move_text(arguments: dict[str, Any]) -> dict[str, Any]:
        text = arguments[family.text]
        noise = torch.randn(text.shape, generator=torch.Generator().manual_seed(1))
        return {family.text: text + noise.to(text)}

    def move_cell(arguments: dict[str, Any]) -> dict[str, Any]:
        sample, size = arguments[family.sample].clone(), site.factor or 1
        if family.channel_dim == 2:  # packed: one token is one cell
            sample[:, row * width + column] += 3.0
        else:
            sample[..., row * size : (row + 1) * size, column * size : (column + 1) * size] += 3.0
        return {family.sample: sample}

    plain = draw(prompt)
    height, width = plain[0].grid
    row, column = height // 4, 3 * width // 4

    moved = _moved(plain[0].k, draw(prompt, move_text)[0].k, 2)
    text = (int(moved[0]), int(moved[-1]) + 1) if len(moved) else (0, 0)
    if text != (plain[0].text.start, plain[0].text.stop) or len(moved) != text[1] - text[0]:
        raise FamilyError(f"{family.name}: text moves keys {_span(moved)} of {site.name}, not {_slice(plain[0].text)}")

    rows: list[int] = []
    first = 0
    for one, two in zip(plain, draw(other), strict=True):
        moved, cond = _moved(one.k, two.k, 0), one.step.rows.cond or slice(0, 0)
        if moved.tolist() != list(range(cond.start, cond.stop)):
            raise FamilyError(f"{family.name}: the prompt moves batch rows {_span(moved)}, not {_slice(cond)}")
        rows += (moved + first).tolist()
        first += one.step.rows.total

    far = (draw(prompt, move_cell)[0].q - plain[0].q).float().norm(dim=-1).amax((0, 1))[plain[0].image]
    cell = divmod(int(far.argmax()), width)
    if max(abs(cell[0] - row), abs(cell[1] - column)) > 3:  # convolutions before the site spread it that far
        raise FamilyError(f"{family.name}: latents at cell {(row, column)} move the query of {cell} at {site.name}")
    return Findings(site, text, tuple(rows), cell)


def _moved(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Indices along one dimension at which two tensors differ."""
    rest = tuple(d for d in range(one.ndim) if d != dim)
    return (one != other).any(rest[2]).any(rest[1]).any(rest[0]).nonzero().flatten()


def _span(moved: Tensor) -> str:
    return f"{int(moved[0])}-{int(moved[-1])} ({len(moved)} of them)" if len(moved) else "none"


def _slice(rows: slice) -> str:
    return f"{rows.start}-{rows.stop - 1}" if rows.stop > rows.start else "none"
