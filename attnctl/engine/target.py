"""Target: the pipeline that controls are attached to, and what is installed on it just now."""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn

from attnctl.engine.control import Control
from attnctl.engine.families.record import Family
from attnctl.engine.patch import Patch
from attnctl.engine.run import Run
from attnctl.engine.seam import Seat, attentions
from attnctl.engine.sites import Site


class Attached(Protocol):
    """What a target knows of an attachment: its controls, the sites each of them selects, and what it was told."""

    controls: tuple[Control, ...]
    selected: tuple[tuple[Site, ...], ...]
    prompt: str | list[str] | None
    latest: Run | None


class Target:
    """A pipeline under control.

    Attributes:
        pipe, family, model: the pipeline, its record and its denoiser, uncompiled.
        sites, modules: of the denoiser, by name.
        attachments: in order.
        seats: attention modules that are under control, by site name.
        chains: the controls of each of those, outermost first.
        patches: of methods: "check", "encode", "step", "context", "call" and those of a guider, where there are such.
    """

    def __init__(self, pipe: Any, family: Family, model: nn.Module) -> None:
        self.pipe, self.family, self.model = pipe, family, model
        self.sites = {site.name: site for site in family.sites(model)}
        self.modules = dict(attentions(model))
        self.attachments: list[Attached] = []
        self.seats: dict[str, Seat] = {}
        self.chains: dict[str, tuple[Control, ...]] = {}
        self.patches: dict[str, Patch] = {}

    def controls(self) -> list[Control]:
        """All controls in order of attachment."""
        return [control for attachment in self.attachments for control in attachment.controls]

    @property
    def compiled(self) -> bool:
        """True if the denoiser, or a module in it, runs compiled."""
        written = self.patches["call"].ours.call == self.model._call_impl
        modules = (vars(module) for module in self.model.modules() if module is not self.model)
        return not written or any(
            one.get("_compiled_call_impl") is not None or hasattr(one.get("forward"), "_torchdynamo_orig_callable")
            for one in (*modules, {"forward": vars(self.model).get("forward")})
        )

    def denoiser(self, *args: Any, **kwargs: Any) -> Any:
        """Call the denoiser as the pipeline would if nothing were patched around it; compiled if it is."""
        return self.patches["call"].ours.call(*args, **kwargs)
