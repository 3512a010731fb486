"""Installation: everything attachments install on one pipeline, and its exact inverse.

One Installation serves all attachments of a pipeline, so they may go in any order. It patches methods on instances (the
pipeline's `encode_prompt` and `check_inputs`, its scheduler's `step`, its denoiser's call and `cache_context`) and
takes a seat at the attention modules that some control selects. When the last attachment goes, all of it is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from attnctl.engine.control import Control, nest
from attnctl.engine.families.record import Family
from attnctl.engine.families.registry import family_of, unwrap
from attnctl.engine.interception import Interception
from attnctl.engine.patch import Patch
from attnctl.engine.seam import Seat, reachable
from attnctl.engine.target import Attached, Target
from attnctl.errors import ControlError, UnsupportedProcessorError

REMEDIES = (  # part of a processor's name -> what to do about it
    ("Sliced", "call pipe.disable_attention_slicing() first"),
    ("XFormers", "call pipe.disable_xformers_memory_efficient_attention() first"),
    ("Linear", "linear attention has no softmax to control; select other sites"),
    ("", "set a processor that uses torch's fused attention, such as AttnProcessor2_0()"),
)


class Installation:
    """What is installed on one pipeline."""

    live: WeakValueDictionary[int, Installation] = WeakValueDictionary()  # by id of the denoiser

    def __init__(self, pipe: Any, family: Family, model: nn.Module) -> None:
        self.target = Target(pipe, family, model)
        self.interception = Interception(self.target, self)

    @classmethod
    def of(cls, pipe: Any) -> Installation:
        """The installation of a pipeline; a new one if nothing is attached to it.

        Raises:
            UnsupportedPipelineError: no family record describes its denoiser.
            ControlError: it is no pipeline, or the denoiser is under control through another pipeline object.
        """
        family, model = family_of(pipe)
        if unwrap(getattr(pipe, family.denoiser, None)) is not model:
            raise ControlError(f"attach to the pipeline, not to its {type(model).__name__}")
        found = cls.live.get(id(model))
        if found is None:
            return cls(pipe, family, model)
        if found.target.pipe is not pipe:
            other = type(found.target.pipe).__name__
            raise ControlError(f"this {type(model).__name__} is under control through a {other}; release that first")
        return found

    def add(self, attachment: Attached) -> None:
        """Install an attachment; nothing of it stays if that fails."""
        self.target.attachments.append(attachment)
        self.live[id(self.target.model)] = self
        try:
            self._arrange()
            self.refresh()
        except BaseException:
            self.remove(attachment)
            raise

    def remove(self, attachment: Attached) -> None:
        """Take an attachment off. With the last one goes everything."""
        self.target.attachments.remove(attachment)
        self._arrange()
        if not self.target.attachments:
            for patch in reversed(self.target.patches.values()):
                patch.undo()
            self.target.patches.clear()
            self.live.pop(id(self.target.model), None)
            self.interception.finish()  # last, since a control may fail in its end

    def _arrange(self) -> None:
        """Sit at exactly the sites that some control selects."""
        chosen: dict[str, list[Control]] = {}
        for attachment in self.target.attachments:
            for control, sites in zip(attachment.controls, attachment.selected, strict=True):
                for site in sites:
                    chosen.setdefault(site.name, []).append(control)
        chains = {name: nest(controls, self.target.sites[name]) for name, controls in chosen.items()}
        new = [name for name in chains if name not in self.target.seats]
        _check([(name, self.target.modules[name]) for name in new])
        for name in [name for name in self.target.seats if name not in chains]:
            self.target.seats.pop(name).restore()
        for name in new:
            self._seat(name)
        self.target.chains = chains

    def _seat(self, name: str) -> None:
        target = self.target
        handler = partial(self.interception.attend, target.sites[name])
        target.seats[name] = Seat(target.model, target.modules[name], handler)

    def reseat(self) -> None:
        """Sit down on processors that were set since, as loading an IP-Adapter does.

        Raises:
            UnsupportedProcessorError: one of them cannot be controlled.
        """
        lost = [name for name, seat in self.target.seats.items() if not seat.in_place()]
        _check([(name, self.target.modules[name]) for name in lost])
        for name in lost:
            self.target.seats[name].restore()
            self._seat(name)

    def refresh(self) -> None:
        """Patch what the pipeline holds now: between calls, schedulers get swapped and denoisers compiled."""
        outer = getattr(self.target.pipe, self.target.family.denoiser)
        if unwrap(outer) is not self.target.model:
            raise ControlError(
                f"pipe.{self.target.family.denoiser} was replaced while controls were attached; attach again"
            )
        self._patch("check", self.target.pipe, "check_inputs", self.interception.on_check)
        self._patch("encode", self.target.pipe, "encode_prompt", self.interception.on_encode)
        self._patch("step", getattr(self.target.pipe, "scheduler", None), "step", self.interception.on_step)
        guider = getattr(self.target.pipe, "guider", None)  # of Modular Diffusers
        for name in ("prepare_inputs", "prepare_inputs_from_block_state"):
            self._patch(name, guider, name, self.interception.on_guider)
        self._patch("context", self.target.model, "cache_context", self.interception.on_context)
        # nn.Module.__call__ looks here first, so this is outside of forward hooks, compiled graphs and offloading.
        compiled = vars(outer).get("_compiled_call_impl")
        self._patch("call", outer, "_compiled_call_impl", self.interception.on_call, compiled or outer._call_impl)

    def _patch(self, key: str, owner: Any, name: str, around: Callable[..., Any], original: Any = None) -> None:
        old = self.target.patches.get(key)
        if old is not None and old.owner is owner and old.in_place():
            return
        if old is not None:
            self.target.patches.pop(key).undo()
        if hasattr(owner, name):
            self.target.patches[key] = Patch(owner, name, around, original)


def _check(modules: list[tuple[str, Any]]) -> None:
    bad = [(name, type(module.processor).__name__) for name, module in modules if not reachable(module)]
    if bad:
        name, processor = bad[0]
        more = f" and {len(bad) - 1} other sites" if len(bad) > 1 else ""
        remedy = next(text for part, text in REMEDIES if part in processor)
        raise UnsupportedProcessorError(f"{name}{more} run {processor}, which never calls fused attention; {remedy}")
