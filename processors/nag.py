"""NAG, normalized attention guidance: what a negative text would have brought is taken out of what attention gives.

Chen et al., "Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models", arXiv 2505.21179. With
Z+ what a place of the picture gets where the prompt is its text, and Z- what it would get with the negative text,

    Z~ = s Z+ - (s - 1) Z-                      extrapolation; s = 1 does nothing
    Z^ = Z~ min(r, tau) / r,  r = |Z~|_1 / |Z+|_1     its size is kept, place by place
    out = alpha Z^ + (1 - alpha) Z+

All are (batch, heads, cells, head_dim); a norm is over heads and head_dim together, as each place has one output. The
norm is that of the paper; the authors' code for FLUX takes the Euclidean one. It needs no second forward, so it works
with few-step models and at guidance 1, where pipelines ignore their own `negative_prompt`.

How the negative text gets in: as in `couple`, its rows go behind those of the prompt in the text the denoiser is given.
At cross-attention they are more keys, read in one more attention call. At joint attention they pass through all blocks:
they see themselves and the picture, nobody sees them, and Z- is the picture's attention to them and to itself. The
pooled embedding, where a model has one, stays that of the prompt. Unconditional rows see nothing of all this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.engine.control import AttentionCall, Control, Lane, Proceed, check_window, check_window_in_run
from attnctl.engine.families.registry import discover
from attnctl.engine.run import Run, Step
from attnctl.engine.sites import Selection, Site, select
from attnctl.errors import ControlError, short

from .couple import encoded
from .regions import check_neighbours
from .row_groups import Group, Kernel, Part, RowGroups, alike, joined

TINY = 1e-18

# --- maths ------------------------------------------------------------------------------------------------------------


def extrapolated(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Z~ = s Z+ - (s - 1) Z-, from Z+ on and away from Z-; all (batch, heads, cells, head_dim)."""
    return positive + (scale - 1) * (positive - negative)


def limited(far: Tensor, positive: Tensor, tau: float) -> Tensor:
    """Z^ = Z~ min(r, tau) / r with r = |Z~|_1 / |Z+|_1 of each place; (batch, heads, cells, head_dim)."""
    ratio = (_size(far) / _size(positive).clamp_min(TINY)).clamp_min(TINY)
    return far * (tau / ratio).clamp(max=1).to(far.dtype)


def steered(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """alpha Z^ + (1 - alpha) Z+, (batch, heads, cells, head_dim)."""
    return torch.lerp(positive, limited(extrapolated(positive, negative, scale), positive, tau), alpha)


def _size(z: Tensor) -> Tensor:
    """The L1 norm of each place, (batch, 1, cells, 1), in float32 at least: half precision would overflow."""
    return z.to(torch.promote_types(z.dtype, torch.float32)).abs().sum((1, 3), keepdim=True)


# --- row groups -------------------------------------------------------------------------------------------------------


def prompt_groups(image: slice, text: Tensor, negative: Tensor, size: int | None) -> tuple[Group, ...]:
    """Who sees whom where Z+ is worked out, and how the rows of the negative text attend.

    Args:
        image: which queries are the picture's.
        text, negative: the keys of the prompt and of the negative text.
        size: length of the sequence at a joint site; None at a cross site, where text is keys alone.
    """
    places = torch.arange(image.start, image.stop)
    if size is None:
        return (Group(places, text),)
    rest = _without(torch.arange(size), negative)
    return Group(rest, rest), Group(negative, joined(negative, _without(rest, text)))


def negative_keys(text: Tensor, negative: Tensor, size: int | None) -> Tensor:
    """The keys that the picture attends to for Z-: the negative text, and what is not text."""
    return negative if size is None else _without(torch.arange(size), text)


def _without(indices: Tensor, others: Tensor) -> Tensor:
    return indices[~torch.isin(indices, others)]


@dataclass(eq=False)
class Steering:
    """Row groups of one call after which the picture's conditional rows are steered.

    Attributes:
        prompt: all rows, none of which sees the negative text but that text itself.
        negative: the picture's rows alone, over the keys of Z-.
        batch: the conditional rows.
        image: which queries are the picture's.
        combine: (Z+, Z-) -> output.
    """

    prompt: RowGroups
    negative: RowGroups
    batch: slice
    image: slice
    combine: Callable[[Tensor, Tensor], Tensor]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, kernel: Kernel
    ) -> Tensor:
        """Attention with the picture's rows steered, (batch, heads, queries, head_dim)."""
        batch, image = self.batch, self.image
        own = self.prompt.attend(q, k, v, bias, scale, kernel)
        if bias is not None:
            bias = bias[(None,) * (4 - bias.ndim)]
            bias = bias if bias.shape[0] == 1 else bias[batch]
            bias = bias if bias.shape[2] == 1 else bias[:, :, image]
        away = self.negative.attend(q[batch, :, image], k[batch], v[batch], bias, scale, kernel)
        out = own.clone()  # gradients may need what attention gave
        out[batch, :, image] = self.combine(own[batch, :, image], away)
        return out

    def dense(self, batch: int, like: Tensor) -> Tensor:
        """Who sees whom for Z+: what is read of attention is read of the prompt's."""
        return self.prompt.dense(batch, like)


# --- the control ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Away:
    """What a `Nag` knows of one run.

    Attributes:
        rows: of the negative text, (rows, channels).
        sites: where to act, by name.
        asked, done: attention calls that should have been steered in the pipeline's own forwards, and that were.
        effects: step -> |out - Z+|_1 / |Z+|_1, the mean over places, images and sites.
    """

    rows: Tensor
    sites: frozenset[str]
    asked: int = 0
    done: int = 0
    moved: list[Tensor] = field(default_factory=list)
    effects: dict[int, float] = field(default_factory=dict)
    groups: dict[Any, tuple[RowGroups, RowGroups | None]] = field(default_factory=dict)

    @property
    def effect(self) -> float:
        """The mean over steps; NaN before the first."""
        return sum(self.effects.values()) / len(self.effects) if self.effects else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"effect": None if math.isnan(self.effect) else self.effect, "effects": self.effects}

    def __str__(self) -> str:
        return f"effect {self.effect:.2%} in {len(self.effects)} steps" if self.effects else "did not act"


@dataclass(frozen=True)
class Nag(Control):
    """A negative prompt without classifier-free guidance: attention is led away from what that text would bring.

    Settings:
        negative: what should not be in the picture, as a prompt; the same for all images.
        scale: s, how far the output of attention goes past the prompt's, from 1; 1 does nothing at all.
        tau: how many times as large as the prompt's it may get, above 0; inf sets no limit.
        alpha: share of the result in what attention gives, from 0 (nothing at all) to 1.
        window: part of the schedule to act in, from 0 (noise) to 1 (picture). Outside of it nothing is paid.
        where: sites to act at. None: all where the picture attends to text.

    The defaults are those of the authors' code for FLUX. Where the pipeline guides by a negative prompt of its own, it
    acts as ever, and this one on the conditional half. It costs attention to further keys, and at joint sites also
    the rows of the negative text in every block. `run.report` says how far attention was moved ("effect").

    Raises:
        ControlError: a setting is out of its range; at the pipeline call, if the negative text is an image's prompt,
            the window holds no step, the text carries a mask, another control adds text (`Couple`) or owns attention
            (one of the lane PROBS), or nothing moved.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if the negative text is too long.
    """

    negative: str
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    window: tuple[float, float] = (0.0, 1.0)
    where: Selection = None

    lane: ClassVar[Lane] = Lane.BIAS

    def __post_init__(self) -> None:
        if not isinstance(self.negative, str):
            raise ControlError(f"negative is one prompt, as text; not {self.negative!r}")
        for name, low, high in (("scale", 1, 1e6), ("alpha", 0, 1)):
            if not _number(getattr(self, name)) or not low <= getattr(self, name) <= high:
                raise ControlError(f"{name} is a number from {low} to {high:g}, not {getattr(self, name)!r}")
        if not _number(self.tau) or not self.tau > 0:
            raise ControlError(f"tau is a number above 0, not {self.tau!r}")
        check_window(self.window)

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        chosen = select(available, ("cross", "joint"))
        select(chosen, self.where)  # says what there is
        return chosen  # at those that are not selected the negative text is to be hidden

    def begin(self, run: Run) -> Away:
        if self._strong:
            check_window_in_run(self.window, run)
            chosen = select(select(discover(run.pipe), ("cross", "joint")), self.where)
            return Away(encoded(run, [self.negative])[0], frozenset(site.name for site in chosen))
        return Away(torch.empty(0, 0), frozenset())

    def inputs(self, step: Step) -> dict[str, Any]:
        check_neighbours(step)
        name = step.run.family.text
        text = step.arguments.get(name)
        if not self._acts(step) or not isinstance(text, Tensor):
            return {}
        if step.changed:
            raise ControlError("another control adds text already; Nag does not work beside a second one or Couple")
        for mask in ("attention_mask", "encoder_attention_mask", "encoder_hidden_states_mask"):
            if step.arguments.get(mask) is not None:
                raise ControlError(f"Nag does not work beside an {mask}")
        away: Away = step.run.state(self)
        own = away.rows.to(text)
        if not step.index:
            self._check_text(step, text[step.rows.cond], own)
        longer = text.new_zeros(text.shape[0], *own.shape)
        longer[step.rows.cond] = own
        changed: dict[str, Any] = {name: torch.cat([text, longer], 1)}
        ids = step.arguments.get("txt_ids")
        if isinstance(ids, Tensor):  # FLUX numbers all text alike
            more = ids[..., -1:, :].expand(*ids.shape[:-2], len(own), ids.shape[-1])
            changed["txt_ids"] = torch.cat([ids, more], -2)
        return changed

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        step = call.step
        if not self._acts(step):
            return proceed(call)
        away: Away = step.run.state(self)
        chosen = call.site.name in away.sites
        known = call.q.shape[2], call.k.shape[2], call.text.start, call.text.stop, str(step.rows), chosen
        if known not in away.groups:
            away.groups[known] = self._groups(call, len(away.rows), chosen)
        prompt, negative = away.groups[known]
        call = call.dense()  # groups of other controls, as a bias on all keys
        if negative is None:
            return proceed(call.add_groups(prompt))
        assert step.rows.cond is not None
        watched = step.pass_name == "main" and not torch.is_grad_enabled()
        away.asked += watched

        def combine(positive: Tensor, other: Tensor) -> Tensor:
            out = steered(positive, other, self.scale, self.tau, self.alpha)
            if watched:
                away.done += 1
                size = _size(positive).clamp_min(TINY)
                away.moved.append((_size(out - positive) / size).mean())
            return out

        return proceed(call.add_groups(Steering(prompt, negative, step.rows.cond, call.image, combine)))

    def after_denoise(self, step: Step, output: Tensor) -> None:
        """Keep the size of the effect; no effect at all is an error."""
        away: Away = step.run.state(self)
        asked, done, moved = away.asked, away.done, away.moved
        away.asked, away.done, away.moved = 0, 0, []
        if not self._acts(step) or not asked:
            return
        if done < asked:
            raise ControlError(f"another control took {asked - done} of {asked} attention calls from Nag; detach one")
        effect = float(torch.stack(moved).mean())
        if not effect > 0:  # NaN, too
            raise ControlError(f"Nag: {short(self.negative, 60)!r} changes nothing in this model (effect {effect:g})")
        away.effects[step.index] = effect

    @property
    def _strong(self) -> bool:
        return self.scale > 1 and self.alpha > 0

    def _acts(self, step: Step) -> bool:
        inside = self.window[0] <= step.fraction < self.window[1]
        return self._strong and inside and step.rows.cond is not None

    def _check_text(self, step: Step, text: Tensor, own: Tensor) -> None:
        for image, rows in zip(step.images, text, strict=True):
            if torch.allclose(rows[: len(own)].float(), own.float(), rtol=1e-3, atol=1e-4):
                who = step.run.describe(image) or "the picture"
                raise ControlError(f"Nag: the negative text {short(self.negative, 60)!r} is the prompt of {who} itself")

    def _groups(self, call: AttentionCall, count: int, chosen: bool) -> tuple[RowGroups, RowGroups | None]:
        """The row groups of Z+, and those of Z- if this site is one to act at."""
        size = call.q.shape[2] if call.site.kind == "joint" else None
        text = torch.arange(call.text.start, call.text.stop - count)
        negative = torch.arange(call.text.stop - count, call.text.stop)
        queries, keys = call.q.shape[2], call.k.shape[2]
        groups = prompt_groups(call.image, text, negative, size)
        rows = call.step.rows
        parts = [Part(batch, groups) for batch in (rows.uncond, rows.cond) if batch is not None]
        prompt = RowGroups(alike(parts, rows.total), queries, keys)
        if not chosen:
            return prompt, None
        cells = call.image.stop - call.image.start
        apart = Group(torch.arange(cells), negative_keys(text, negative, size))
        return prompt, RowGroups((Part(None, (apart,)),), cells, keys)


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
