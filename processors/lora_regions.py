"""LoRA by region: an adapter changes the model in its own part of the picture only.

A LoRA adds scale B A x to what a layer makes of each row x. Here it becomes

    m_i scale B A x_i    m_i: how much of the place of row i lies in the adapter's region, from 0 to 1

so several adapters work side by side in one forward, instead of in a pass for each. Rows of text belong to no place: an
adapter leaves them alone, unless told otherwise, and so it does with what is made from the time step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnctl.engine.control import Control, Lane
from attnctl.engine.families.registry import unwrap
from attnctl.engine.run import Run, Step
from attnctl.engine.sites import Site
from attnctl.errors import ControlError
from attnctl.regions import Region, named_regions

TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "context_embedder", "norm1_context")
"""Layers of joint blocks whose rows are text."""


@dataclass(eq=False)
class Hooked:
    """What `LoraRegions` has put on the layers of one run."""

    run: Run
    handles: list[Any] = field(default_factory=list)
    text_rows: int | None = None  # of the denoiser call under way
    kept: dict[Any, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraRegions(Control):
    """Each LoRA acts in its own part of the picture only.

    Settings:
        masks: regions by the name of the adapter, as for `Regions`. Adapters without a region act everywhere.
        text: whether an adapter also acts on rows of text, which all places see.

    Raises:
        ControlError: a region is none; at the pipeline call, if there is no such adapter, it is fused into the weights
            or a DoRA, or the model is compiled, or trained.
    """

    masks: tuple[tuple[str, Any], ...]
    text: bool = False

    lane: ClassVar[Lane] = Lane.OUTPUT

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", named_regions(self.masks))
        if not self.masks:
            raise ControlError("LoraRegions takes at least one region, such as {'my-lora': (0, 0, 0.5, 1)}")

    def begin(self, run: Run) -> Hooked:
        if not run.schedule:  # nobody says when such a run is over, and its blocks may run again in a backward
            raise ControlError("LoraRegions is for drawing, not for a training batch")
        state = Hooked(run)
        outer = getattr(run.pipe, run.family.denoiser)
        model: nn.Module = unwrap(outer)
        if model is not outer or any(vars(m).get("_compiled_call_impl") for m in model.modules() if m is not model):
            raise ControlError("LoraRegions does not reach into a compiled model")
        layers = {name: m for name, m in model.named_modules() if isinstance(getattr(m, "lora_B", None), nn.ModuleDict)}
        loaded = sorted({adapter for layer in layers.values() for adapter in layer.lora_B})
        sites = run.family.sites(model)
        found: list[tuple[str, Any, Region]] = []
        for adapter, region in self.masks:
            own = {name: layer for name, layer in layers.items() if adapter in layer.lora_B}
            if not own:
                there = f"there are {', '.join(loaded)}" if loaded else "the model has none"
                raise ControlError(f"no LoRA is named {adapter!r}; {there}")
            if any(getattr(layer, "merged", False) for layer in own.values()):
                raise ControlError(f"the LoRA {adapter!r} is fused into the weights; call pipe.unfuse_lora() first")
            if any(getattr(layer, "use_dora", {}).get(adapter) for layer in own.values()):
                raise ControlError(f"{adapter!r} is a DoRA, whose change is no sum of rows; LoraRegions takes a LoRA")
            found += [(name, layer.lora_B[adapter], region) for name, layer in own.items()]
        for name, layer, region in found:  # once nothing can fail any more
            hook = partial(self._masked, state, region, name, _nearest(sites, name))
            state.handles.append(layer.register_forward_hook(hook))
        return state

    def inputs(self, step: Step) -> Mapping[str, Any]:
        step.run.state(self).text_rows = step.text_rows
        return {}

    def end(self, run: Run) -> None:
        for handle in run.state(self).handles:
            handle.remove()

    def _masked(
        self, state: Hooked, region: Region, name: str, site: Site, module: Any, given: Any, output: Tensor
    ) -> Tensor:
        """A layer's change with only the region's rows left of it."""
        known = id(region), name, output.shape[1:], state.text_rows, output.dtype
        if known not in state.kept:
            state.kept[known] = self._weights(state, region, name, site, output).to(output)
        return output * state.kept[known]

    def _weights(self, state: Hooked, region: Region, name: str, site: Site, output: Tensor) -> Tensor:
        """Broadcasts to a layer's output: (rows, channels), or (channels, height, width) of a convolution."""
        run, on_text = state.run, float(self.text)
        if output.ndim == 4:
            return region.on((output.shape[2], output.shape[3]), run.whole, run.view)
        if output.ndim != 3:
            return torch.tensor(on_text)
        rows, grid = output.shape[1], site.grid(*run.latent_size)
        cells, text = grid[0] * grid[1], state.text_rows or 0
        layer = name.rpartition(".")[2]
        if any(part in name for part in TEXT) or (
            site.kind == "cross" and "attn2" in name and layer in ("to_k", "to_v")
        ):
            return torch.tensor(on_text)
        places = region.on(grid, run.whole, run.view).flatten()[:, None]
        if rows == cells:
            return places
        if rows == text:
            return torch.tensor(on_text)
        if rows == text + cells:  # one sequence of both
            words = torch.full((text, 1), on_text)
            return torch.cat([places, words] if site.order == "image-first" else [words, places])
        raise ControlError(f"{name} has {rows} rows, which is neither the {grid[0]} x {grid[1]} grid nor the text")


def _nearest(sites: tuple[Site, ...], name: str) -> Site:
    """The site whose name has the longest beginning in common with a layer's."""

    def common(site: Site) -> int:
        return next((i for i, (a, b) in enumerate(zip(site.name + " ", name, strict=False)) if a != b), len(name))

    return max(sites, key=common)
