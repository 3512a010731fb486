"""Control: one intention about attention. AttentionCall: what it is handed. Lane: what it does to the call.

Controls are frozen dataclasses of settings. Whatever changes while a picture is drawn lives in the attachment's `Run`
(`run.state(self)`), never in the control, so one control object may serve several pipelines and threads.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from attnctl.engine.run import Run, Step
from attnctl.engine.sites import Site
from attnctl.errors import ControlError, instead


class Lane(enum.Enum):
    """What a control does at a site. Only PROBS needs (queries, keys) probabilities, so only it costs the kernel."""

    IDENTITY = "identity"  # nothing
    BIAS = "bias"  # adds to the logits
    QKV = "qkv"  # edits q, k or v
    OUTPUT = "output"  # edits or replaces what attention returns
    MAPS = "maps"  # reads attention maps, changes nothing
    PROBS = "probs"  # owns the probabilities; one such control per site
    GRADIENT = "gradient"  # reads sites in an extra forward with gradients, `Step.probe`


class Groups(Protocol):
    """Which rows see which keys, without a mask; see `attnctl.processors.row_groups.RowGroups`."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, kernel: Callable[..., Tensor]
    ) -> Tensor:
        """Attention in which each row sees its own keys only, with `bias` on top."""

    def dense(self, batch: int, like: Tensor) -> Tensor:
        """The same as a bias, (batch or 1, 1, queries, keys) in the dtype and on the device of `like`."""


@dataclass
class AttentionCall:
    """One attention call of one site, in canonical layout. `replace` makes an edited copy to hand to `proceed`.

    Attributes:
        q: (batch, heads, queries, head_dim).
        k, v: (batch, heads, keys, head_dim); with grouped queries they may have fewer heads than q.
        bias: None, bool (True = may attend) or additive; broadcasts to (batch, heads, queries, keys).
        scale: factor of the logits; None means head_dim ** -0.5.
        site: where we are.
        step: the denoiser call we are in; `step.rows` says which batch rows are conditional.
        index: 0 for the site's first attention call in this forward. Further ones (IP-Adapter) bypass the controls.
        grid: (height, width) of the image queries.
        text: slice over keys that are text tokens; empty at self sites.
        image: slice over queries that are image; at self and joint sites it selects the same rows among the keys.
        groups: None, or which rows see which keys, on top of the bias. Only controls of the lanes BIAS and QKV get to
            see it; all others find it in the bias.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    scale: float | None
    site: Site
    step: Step
    index: int
    grid: tuple[int, int]
    text: slice
    image: slice
    groups: Groups | None = None

    def replace(self, **changes: Any) -> AttentionCall:
        """A copy with some fields changed; the original is left alone."""
        return replace(self, **changes)

    def add_bias(self, extra: Tensor) -> AttentionCall:
        """A copy whose logits get `extra` on top of the bias that is there.

        Args:
            extra: additive, broadcasts to (batch, heads, queries, keys); cast to q's dtype.
        """
        extra = extra.to(self.q.dtype)
        if self.bias is None:
            return self.replace(bias=extra)
        if self.bias.dtype == torch.bool:
            closed = torch.zeros_like(self.bias, dtype=self.q.dtype).masked_fill_(~self.bias, float("-inf"))
            return self.replace(bias=closed + extra)
        return self.replace(bias=self.bias + extra)

    def add_groups(self, groups: Groups) -> AttentionCall:
        """A copy whose rows see only what these groups, the bias and the groups that are there let them see."""
        if self.groups is None:
            return self.replace(groups=groups)
        return self.add_bias(groups.dense(self.q.shape[0], self.q))

    def dense(self) -> AttentionCall:
        """The same call without groups: what they say is in the bias."""
        if self.groups is None:
            return self
        return self.replace(groups=None).add_bias(self.groups.dense(self.q.shape[0], self.q))


Proceed = Callable[[AttentionCall], Tensor]


class _Checked(type):
    """Has a control say in one line which setting it does not know, or lacks."""

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        signature = cls.__signature__
        try:
            signature.bind(*args, **settings)
        except TypeError as error:
            known = [name for name, one in signature.parameters.items() if one.kind is not one.VAR_POSITIONAL]
            for name in settings:
                if name not in signature.parameters:
                    raise ControlError(f"{cls.__name__} has no setting {name!r}; {instead(name, known)}") from None
            raise ControlError(f"{cls.__name__}: {error}; its settings are {', '.join(known)}") from None
        return super().__call__(*args, **settings)

    @property
    def __signature__(cls) -> inspect.Signature:
        """How it is called: else `inspect` would show the arguments of `__call__` above."""
        if (told := vars(cls).get("_told")) is not None:
            return told
        made = vars(next(base for base in cls.__mro__ if "__init__" in vars(base)))["__init__"]
        if made is object.__init__:
            return inspect.Signature()
        own = inspect.signature(made)
        return own.replace(parameters=[*own.parameters.values()][1:])

    @__signature__.setter
    def __signature__(cls, told: inspect.Signature) -> None:
        cls._told = told


class Control(metaclass=_Checked):
    """Base of all controls. Subclass as a frozen dataclass, name a lane, override what you need.

    Making one raises ControlError for a setting that it does not know, or lacks.
    """

    lane: ClassVar[Lane] = Lane.IDENTITY
    innermost: ClassVar[bool] = False  # comes after those that edit queries, keys, values or logits, however listed
    gives_maps: ClassVar[bool] = False  # its state in a run is what `attachment.maps` gives

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites this control touches. () for a control that acts on steps only.

        Raises:
            NoSiteError: nothing in `available` is what the control was asked to touch.
        """
        return ()

    def begin(self, run: Run) -> Any:
        """Called once per pipeline call, before its first denoiser forward. What it returns is `run.state(self)`.

        The place to resolve phrases and regions, and to fail if they do not exist.
        """
        return None

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        """Act on one attention call of a selected site.

        Args:
            call: the call, as edited by the controls before this one.
            proceed: runs the controls after this one and then attention itself.

        Returns:
            (batch, heads, queries, head_dim).
        """
        return proceed(call)

    def inputs(self, step: Step) -> Mapping[str, Any]:
        """Called before each denoiser call, unconditional and further ones too.

        Returns:
            Arguments to use instead of the pipeline's, by name. Not the latents: those are `step.latents`.
        """
        return {}

    def before_denoise(self, step: Step) -> None:
        """Called before each conditional denoiser forward. May assign `step.latents` and call `step.probe`."""

    def after_denoise(self, step: Step, output: Tensor) -> Tensor | None:
        """Called after each denoiser forward, also the unconditional one of a pipeline that runs CFG in two calls.

        Args:
            step: `step.rows` says which rows of `output` are conditional and unconditional.
            output: the denoiser's prediction, (rows.total, ...).

        Returns:
            The prediction to use instead, or None to leave it.
        """
        return None

    def end(self, run: Run) -> None:
        """Called when the pipeline call's last denoising step is done, or when it was given up."""


def run_chain(
    chain: tuple[Control, ...],
    call: AttentionCall,
    kernel: Callable[..., Tensor],
    see: Callable[[AttentionCall], None] | None = None,
) -> Tensor:
    """One attention call through the controls of its site.

    Args:
        chain: outermost first, see `nest`.
        call: as the site made it.
        kernel: (q, k, v, bias, scale) -> (batch, heads, queries, head_dim), the attention the site is set to use.
        see: called with the call as the controls have edited it, before attention itself.

    Raises:
        ControlError: what comes out has another shape than the site needs.
    """

    def proceed(position: int, call: AttentionCall) -> Tensor:
        if see is not None and (position == len(chain) or chain[position].lane is Lane.PROBS):
            see(call.dense())
        if position == len(chain):
            if call.groups is not None:
                return call.groups.attend(call.q, call.k, call.v, call.bias, call.scale, kernel)
            return kernel(call.q, call.k, call.v, call.bias, call.scale)
        control = chain[position]
        if call.groups is None or control.lane in (Lane.BIAS, Lane.QKV):
            return control.attend(call, partial(proceed, position + 1))
        shown = call.dense()  # it may read the bias; if it hands on what it was shown, the groups stay groups
        return control.attend(shown, lambda edited: proceed(position + 1, call if edited is shown else edited))

    out = proceed(0, call)
    expected = (*call.q.shape[:-1], call.v.shape[-1])
    if out.shape != expected:
        names = ", ".join(type(control).__name__ for control in chain)
        raise ControlError(f"{names} returned {tuple(out.shape)} at {call.site.name}, which needs {tuple(expected)}")
    return out


def nest(controls: Sequence[Control], site: Site) -> tuple[Control, ...]:
    """The controls of one site as they are nested, outermost first: as listed, `innermost` ones and PROBS last.

    A PROBS control does not proceed to attention, it *is* attention; placed last it sees every bias and q/k/v edit.

    Raises:
        ControlError: two controls want to own the probabilities of this site.
    """
    owners = [c for c in controls if c.lane is Lane.PROBS]
    if len(owners) > 1:
        names = " and ".join(type(c).__name__ for c in owners)
        raise ControlError(f"{names} both own the attention probabilities of {site.name}; attach one of them at a time")
    return tuple(sorted(controls, key=lambda c: 2 if c.lane is Lane.PROBS else int(c.innermost)))  # a stable sort


def check_window_in_run(window: tuple[float, float], run: Run) -> None:
    """Raise if a window holds none of the steps of a run, as that of an image-to-image call may not."""
    left = run.fractions
    if left and not any(window[0] <= at < window[1] for at in left):
        raise ControlError(
            f"window {window} holds none of the {len(left)} steps of this run, which lie from {left[0]:.2f} "
            f"to {left[-1]:.2f} of the schedule"
        )


def check_window(window: tuple[float, float]) -> None:
    """Raise unless this is a part of the schedule."""
    try:
        fits = len(window) == 2 and 0 <= window[0] < window[1] <= 1
    except TypeError:
        fits = False
    if not fits:
        raise ControlError(f"window is (start, end) with 0 <= start < end <= 1, parts of the schedule; not {window!r}")
