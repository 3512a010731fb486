"""Wiring: everything attachments install on one pipeline, and its exact inverse.

One Wiring serves all attachments of a pipeline, so they may go in any order. It patches methods on instances (the
pipeline's `encode_prompt` and `check_inputs`, its scheduler's `step`, its denoiser's call and `cache_context`) and
takes a seat at the attention modules that some control selects. When the last attachment goes, all of it is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from torch import nn

from attnctl.engine.control import Control, nest
from attnctl.engine.families import Family, family_of, unwrap
from attnctl.engine.interception import Flow
from attnctl.engine.patch import Patch
from attnctl.engine.seam import Seat, attentions, reachable
from attnctl.errors import ControlError, UnsupportedProcessorError

if TYPE_CHECKING:
    from attnctl.engine.attachment import Attachment

REMEDIES = (  # part of a processor's name -> what to do about it
    ("Sliced", "call pipe.disable_attention_slicing() first"),
    ("XFormers", "call pipe.disable_xformers_memory_efficient_attention() first"),
    ("Linear", "linear attention has no softmax to control; select other sites"),
    ("", "set a processor that uses torch's fused attention, such as AttnProcessor2_0()"),
)


class Wiring:
    """What is installed on one pipeline."""

    live: WeakValueDictionary[int, Wiring] = WeakValueDictionary()  # by id of the denoiser

    def __init__(self, pipe: Any, family: Family, model: nn.Module) -> None:
        self.pipe, self.family, self.model = pipe, family, model
        self.sites = {site.name: site for site in family.sites(model)}
        self.modules = dict(attentions(model))
        self.attachments: list[Attachment] = []
        self.seats: dict[str, Seat] = {}
        self.chains: dict[str, tuple[Control, ...]] = {}
        self.patches: dict[str, Patch] = {}
        self.flow = Flow(self)

    @classmethod
    def of(cls, pipe: Any) -> Wiring:
        """The wiring of a pipeline; a new one if nothing is attached to it.

        Raises:
            UnsupportedPipelineError: no family record describes its denoiser.
            ControlError: it is no pipeline, or the denoiser is under control through another pipeline object.
        """
        family, model = family_of(pipe)
        if unwrap(getattr(pipe, family.denoiser, None)) is not model:
            raise ControlError(f"attach to the pipeline, not to its {type(model).__name__}")
        wiring = cls.live.get(id(model))
        if wiring is None:
            return cls(pipe, family, model)
        if wiring.pipe is not pipe:
            other = type(wiring.pipe).__name__
            raise ControlError(f"this {type(model).__name__} is under control through a {other}; release that first")
        return wiring

    def add(self, attachment: Attachment) -> None:
        """Install an attachment; nothing of it stays if that fails."""
        self.attachments.append(attachment)
        self.live[id(self.model)] = self
        try:
            self._arrange()
            self.refresh()
        except BaseException:
            self.remove(attachment)
            raise

    def remove(self, attachment: Attachment) -> None:
        """Take an attachment off. With the last one goes everything."""
        self.attachments.remove(attachment)
        self._arrange()
        if not self.attachments:
            for patch in reversed(self.patches.values()):
                patch.undo()
            self.patches.clear()
            self.live.pop(id(self.model), None)
            self.flow.finish()  # last, since a control may fail in its end

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

    def _arrange(self) -> None:
        """Sit at exactly the sites that some control selects."""
        chosen: dict[str, list[Control]] = {}
        for attachment in self.attachments:
            for control, sites in zip(attachment.controls, attachment.selected, strict=True):
                for site in sites:
                    chosen.setdefault(site.name, []).append(control)
        chains = {name: nest(controls, self.sites[name]) for name, controls in chosen.items()}
        new = [name for name in chains if name not in self.seats]
        _check([(name, self.modules[name]) for name in new])
        for name in [name for name in self.seats if name not in chains]:
            self.seats.pop(name).restore()
        for name in new:
            self.seats[name] = Seat(self.model, self.modules[name], partial(self.flow.attend, self.sites[name]))
        self.chains = chains

    def reseat(self) -> None:
        """Sit down on processors that were set since, as loading an IP-Adapter does.

        Raises:
            UnsupportedProcessorError: one of them cannot be controlled.
        """
        lost = [name for name, seat in self.seats.items() if not seat.in_place()]
        _check([(name, self.modules[name]) for name in lost])
        for name in lost:
            self.seats[name].restore()
            self.seats[name] = Seat(self.model, self.modules[name], partial(self.flow.attend, self.sites[name]))

    def refresh(self) -> None:
        """Patch what the pipeline holds now: between calls, schedulers get swapped and denoisers compiled."""
        outer = getattr(self.pipe, self.family.denoiser)
        if unwrap(outer) is not self.model:
            raise ControlError(f"pipe.{self.family.denoiser} was replaced while controls were attached; attach again")
        self._patch("check", self.pipe, "check_inputs", self.flow.on_check)
        self._patch("encode", self.pipe, "encode_prompt", self.flow.on_encode)
        self._patch("step", getattr(self.pipe, "scheduler", None), "step", self.flow.on_step)
        self._patch("context", self.model, "cache_context", self.flow.on_context)
        # nn.Module.__call__ looks here first, so this is outside of forward hooks, compiled graphs and offloading.
        compiled = vars(outer).get("_compiled_call_impl")
        self._patch("call", outer, "_compiled_call_impl", self.flow.on_call, compiled or outer._call_impl)

    def _patch(self, key: str, owner: Any, name: str, around: Callable[..., Any], original: Any = None) -> None:
        old = self.patches.get(key)
        if old is not None and old.owner is owner and old.in_place():
            return
        if old is not None:
            self.patches.pop(key).undo()
        if hasattr(owner, name):
            self.patches[key] = Patch(owner, name, around, original)


def _check(modules: list[tuple[str, Any]]) -> None:
    bad = [(name, type(module.processor).__name__) for name, module in modules if not reachable(module)]
    if bad:
        name, processor = bad[0]
        more = f" and {len(bad) - 1} other sites" if len(bad) > 1 else ""
        remedy = next(text for part, text in REMEDIES if part in processor)
        raise UnsupportedProcessorError(f"{name}{more} run {processor}, which never calls fused attention; {remedy}")
