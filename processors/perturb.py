"""Perturbation guidance: the prediction is pushed away from that of the same model with broken attention.

    e = u0 + s (c - u0) + w (c - p)

with the unconditional, conditional and perturbed predictions u0, c, p; s is the pipeline's guidance scale, w ours. The
weak prediction p is a further forward on the conditional rows in which chosen heads attend badly. With the queries,
keys and values q, k, v of a head, its logits S, its map A = softmax(S) and its output O = A v, that output becomes

    O' = (1 - u) O + u P        (heads are (batch, heads, queries, head_dim))

where P depends on the kind; no map is ever made:

    identity     P = v: each place sees itself only. PAG (Ahn et al., ECCV 2024, arXiv 2403.17377) at u = 1, SoftPAG
                 (Ahn et al., NeurIPS 2025, arXiv 2506.10978, equation 7) below
    uniform      P = mean of v: each place sees everything alike (arXiv 2506.10978, appendix C.1)
    blur         P = softmax of S with queries blurred over the picture (SEG, Hong, NeurIPS 2024, arXiv 2408.00760); at
                 sigma = inf all queries are their mean
    temperature  P = softmax(S / tau) v (arXiv 2506.10978, appendix C.3)
    skip         the whole block is left out (skip-layer guidance, as Stability AI published it with SD 3.5)
    shuffle      the picture's tokens enter the block in random order (TPG, arXiv 2506.10036)

Joint attention holds text (T) and picture (I). The scope says what is broken there:

    whole            rows of both: P as above (the code of arXiv 2506.10978)
    image            rows of the picture only
    image-masked     identity only. To a place of the picture all others of the picture are closed, before the softmax:
                     P_i = g v_i + (1 - g) O_T with g = sigmoid(S_ii - l_T)          (diffusers' PAG of SD 3)
    image-diagonal   identity only. What a place gives to the picture it gives to itself, what it gives to text stays:
                     P_i = a v_i + (1 - a) O_T with a = sigmoid(l_I - l_T)

with l_T, l_I the log-sum-exp of a row's logits over text and picture, and O_T the attention to text alone.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from attnctl.engine.control import AttentionCall, Control, Lane, Proceed, check_window, check_window_in_run
from attnctl.engine.families.registry import discover
from attnctl.engine.heads import Heads, pick_heads, write_heads
from attnctl.engine.run import Run, Step
from attnctl.engine.sites import Site
from attnctl.errors import AttnctlWarning, ControlError

from .perturb_presets import SETTINGS, Preset, UsualNumber, UsualText, read_preset
from .perturbed_attention import Scope, blur, kept_by_text, mix, own_values, queries_of, temperature, uniform

Kind = Literal["identity", "uniform", "blur", "temperature", "skip", "shuffle"]
Rescale = Literal["full", "partial"]

WHOLE_BLOCKS: tuple[Kind, ...] = ("skip", "shuffle")
INERT = 5e-3  # of the prediction; what moves it less cannot be seen in the picture (glyph-sd; the limit is ours)

# --- the control ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Weak:
    """What a `Perturb` does in one run, and what it has done.

    Attributes:
        name: of its pass.
        heads: the chosen heads, as text, for each set of them.
        strengths: site name -> (images, heads), u of each head, 0 where it is not chosen.
        blocks: module names of the blocks that a kind of whole blocks edits, in execution order.
        start: the first module that differs from the pipeline's own forward.
        broken: which images have a broken head.
        effects: step -> |c - p| / |c| of each image.
    """

    name: str
    heads: tuple[str, ...]
    strengths: dict[str, Tensor]
    blocks: tuple[str, ...]
    start: str
    broken: tuple[bool, ...]
    effects: dict[int, list[float]] = field(default_factory=dict)

    @property
    def effect(self) -> float:
        """|c - p| / |c|, mean over steps and images with a broken head; NaN before the first step."""
        each = (zip(step, self.broken, strict=True) for step in self.effects.values())
        values = [value for step in each for value, broken in step if broken]
        return sum(values) / len(values) if values else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        effect = None if math.isnan(self.effect) else self.effect
        return {"pass": self.name, "heads": list(self.heads), "effect": effect, "effects": self.effects}

    def __str__(self) -> str:
        done = f"effect {self.effect:.2%} in {len(self.effects)} steps" if self.effects else "did not act"
        return f"heads {'; '.join(self.heads)}, {done}"


@dataclass(frozen=True)
class Perturb(Control):
    """Guides away from what the model draws when chosen attention heads are broken: adds `scale` (c - p).

    Settings:
        heads: which heads (`attnctl.engine.heads.pick_heads`): "7:3 12:9" (block:head), "7-10" (whole blocks), "mid",
            "all", a glob of names, or a file that holds such a list. `attnctl sites` lists the blocks.
        u: how far they are broken, in (0, 1]; 1 is PAG. One number, or one for each image of the batch.
        scale: weight w of the difference, from 0; 0 does nothing at all. Papers' convention: e + w (c - p).
        kind: identity, uniform, blur, temperature, skip or shuffle; the last two take whole blocks and u = 1.
        scope: what is broken where text and picture attend together: whole, image, image-masked, image-diagonal.
        sigma: of kind blur, in cells of the grid; inf is the mean query. The kernel ends where the grid does, so a
            large sigma is not yet inf. In scope whole, inf is the mean of text and picture.
        tau: of kind temperature; above 1 flattens maps, below 1 sharpens them. The default is ours.
        adaptive: how fast the scale falls with the timestep t: max(0, scale - adaptive (1000 - t)); diffusers' PAG.
        window: part of the schedule to act in, from 0 (noise) to 1 (picture): a step at f counts if start <= f < end.
            Outside of it nothing is paid.
        rescale: 0 to 1, against too much contrast: the term is times 1 - rescale + rescale std(c) / std(guided).
        rescale_mode: what "guided" is: "full", with classifier-free guidance, or "partial", c and this term alone.
            Where guidance takes two calls (FLUX), both are partial.
        candidates: sets of heads, one for each image of the batch, drawn together; then `heads` is not read. For
            Python: the command line draws one picture at a time.
        seed: of kind shuffle.
        preset: heads that were found for a model, with u, scale, kind and scope: a name, as "glyph-sd", or a .json file
            that `attnctl search heads` wrote. What is said beside it comes first.

    Costs one forward of the conditional rows at each step; where it can, it starts at the first perturbed block.
    `run.report` says how many forwards were spent, and how far apart c and p were ("effect").

    Raises:
        ControlError: a setting is out of its range; there is no such preset; at the pipeline call, if the window holds
            no step, if candidates or values of u do not fit the images, or if the heads change nothing at all.
        NoSiteError: heads that do not exist.
    """

    heads: Heads = UsualText("mid")
    u: float | tuple[float, ...] = UsualNumber(1.0)
    scale: float = UsualNumber(3.0)
    kind: Kind = UsualText("identity")  # type: ignore[assignment]
    scope: Scope = UsualText("whole")  # type: ignore[assignment]
    sigma: float = math.inf
    tau: float = 4.0
    adaptive: float = 0.0
    window: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    rescale_mode: Rescale = "full"
    candidates: tuple[Heads, ...] | None = None
    seed: int = 0
    preset: str | None = None

    _found: ClassVar[Preset]  # of an instance with a preset
    lane: ClassVar[Lane] = Lane.OUTPUT
    innermost: ClassVar[bool] = True

    def __post_init__(self) -> None:
        who = type(self).__name__
        self._settle()
        for name, kinds in (("kind", Kind), ("scope", Scope), ("rescale_mode", Rescale)):
            if getattr(self, name) not in get_args(kinds):
                raise ControlError(f"{name} is one of {', '.join(get_args(kinds))}; not {getattr(self, name)!r}")
        for name, low, high in (("scale", 0, math.inf), ("adaptive", 0, math.inf), ("rescale", 0, 1)):
            if not _number(getattr(self, name)) or not low <= getattr(self, name) <= min(high, 1e6):
                raise ControlError(f"{name} is a number from {low} to {min(high, 1e6):g}, not {getattr(self, name)!r}")
        for name in ("sigma", "tau"):
            if not _number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ControlError(f"{name} is a number above 0, not {getattr(self, name)!r}")
        if math.isinf(self.tau):
            raise ControlError("tau is finite; kind='uniform' is its limit")
        if not all(_number(u) and 0 <= u <= 1 for u in self._each_u()) or not self._each_u():
            raise ControlError(f"u is a number from 0 to 1, or one for each image; not {self.u!r}")
        if self.scale and not any(self._each_u()):
            raise ControlError(f"{who} with u = 0 breaks nothing, so it cannot guide; scale = 0 switches it off")
        if self.kind in WHOLE_BLOCKS and (self.candidates is not None or set(self._each_u()) != {1}):
            raise ControlError(f"kind {self.kind!r} takes whole blocks in all images: u = 1, and no candidates")
        if self.scope.startswith("image-") and self.kind != "identity":
            raise ControlError(f"scope {self.scope!r} is for kind 'identity'; {self.kind!r} has whole and image")
        if self.candidates is not None and not (isinstance(self.candidates, (tuple, list)) and self.candidates):
            raise ControlError("candidates are sets of heads, one for each image, such as ('7:3', '12:9')")
        if not isinstance(self.seed, Integral) or isinstance(self.seed, bool):
            raise ControlError(f"seed is a whole number, not {self.seed!r}")
        check_window(self.window)

    def _settle(self) -> None:
        """Where the user said nothing, the preset counts, and without one the default."""
        own = {name: getattr(self, name) for name in ("heads", *SETTINGS)}
        if self.preset is not None:
            found = read_preset(self.preset)
            told = {"heads": found.heads, **found.settings}
            if not isinstance(self.heads, UsualText) and self.heads != found.heads:
                raise ControlError(
                    f"heads {self.heads!r} and preset {self.preset!r} both choose heads; give one of them"
                )
            own |= {name: told[name] for name in told if isinstance(own[name], (UsualNumber, UsualText))}
            object.__setattr__(self, "_found", found)
        for name, value in own.items():
            plain = {UsualNumber: float, UsualText: str}.get(type(value))
            object.__setattr__(self, name, plain(value) if plain else value)

    def _each_u(self) -> tuple[float, ...]:
        return tuple(self.u) if isinstance(self.u, (tuple, list)) else (self.u,)

    def _picked(self, available: tuple[Site, ...]) -> list[dict[Site, tuple[int, ...]]]:
        """The chosen heads: of all images, or of each."""
        if self.preset is not None:
            self._found.check_shape(available)
        found = [pick_heads(available, one) for one in (self.candidates or (self.heads,))]
        if self.kind in WHOLE_BLOCKS:
            for site, heads in found[0].items():
                if len(heads) < site.heads:
                    raise ControlError(f"kind {self.kind!r} takes whole blocks; {self.heads!r} names heads")
        return found

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        chosen = {site for one in self._picked(available) for site in one}
        return tuple(site for site in available if site in chosen)

    def begin(self, run: Run) -> Weak:
        found = self._picked(discover(run.pipe))
        if self.preset is not None:
            self._found.check_model(run.pipe)
        each = self._each_u()
        for name, count in (("candidates", len(found)), ("values of u", len(each))):
            if count not in (1, run.images) or (
                count == 1 and name == "candidates" and self.candidates and run.images > 1
            ):
                raise ControlError(
                    f"{count} {name} do not fit {run.images} images; draw as many together, as pipe([prompt] * {count})"
                )
        if self.scale:
            check_window_in_run(self.window, run)
        if self.scale and run.fractions and not any(self._weights(run)):
            raise ControlError(
                f"adaptive={self.adaptive:g} brings scale={self.scale:g} down to 0 at every step; choose a smaller one"
            )
        strengths: dict[str, Tensor] = {}
        for image in range(run.images):
            for site, heads in found[image % len(found)].items():
                own = strengths.setdefault(site.name, torch.zeros(run.images, site.heads, dtype=torch.float64))
                own[image, list(heads)] = float(each[image % len(each)])
        first = next(site.name for site in discover(run.pipe) if site.name in strengths)
        blocks = dict.fromkeys(name.rpartition(".")[0] for name in strengths)
        name = type(self).__name__.lower()
        number = sum(one.split()[0] == name for one in run.passes) + 1
        name = name if number == 1 else f"{name} {number}"
        run.passes[name] = 0.0
        broken = torch.stack([own.any(1) for own in strengths.values()]).any(0).tolist()
        return Weak(name, tuple(map(write_heads, found)), strengths, tuple(blocks), first, tuple(broken))

    def weight(self, step: Step) -> float:
        """w at a step, 0 outside the window."""
        now = float(torch.as_tensor(step.timestep, dtype=torch.float32).flatten()[0]) * step.run.family.time
        return self._weight(step.fraction, now)

    def _weight(self, fraction: float, timestep: float) -> float:
        inside = self.window[0] <= fraction < self.window[1]
        return max(0.0, self.scale - self.adaptive * (1000 - timestep)) if inside else 0.0

    def _weights(self, run: Run) -> list[float]:
        """w at the steps of a run, as far as the scheduler tells its timesteps."""
        places = range(run.start, min(run.start + run.steps, run.schedule))
        return [self._weight(i / run.schedule, float(run.pipe.scheduler.timesteps[i])) for i in places]

    def before_denoise(self, step: Step) -> None:
        if self.weight(step):
            step.share(step.run.state(self).start)

    def after_denoise(self, step: Step, output: Tensor) -> None:
        weight = self.weight(step)
        if step.rows.cond is None or not weight:
            return
        weak: Weak = step.run.state(self)
        edit = {"skip": self._skip, "shuffle": self._shuffled(step)}.get(self.kind)
        own = step.forward(weak.name, weak.start, dict.fromkeys(weak.blocks, edit) if edit else None)
        assert step.prediction is not None
        strong = step.prediction[step.rows.cond].float()
        gap = strong - own.float()
        self._note(step, weak, strong, gap, output.dtype)
        step.guide(self._rescaled(step, weight * gap, strong))

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        weak: Weak = call.step.run.state(self)
        if call.step.pass_name != weak.name or self.kind in WHOLE_BLOCKS:
            return proceed(call)
        u = weak.strengths[call.site.name].to(call.q)[:, :, None, None]
        joint = call.site.kind == "joint"
        if joint and self.scope != "whole":
            return self._attend_image(call, proceed, u)
        broken = self._broken(call, proceed)
        return broken if bool((u == 1).all()) else mix(proceed(call), broken, u)

    def _attend_image(self, call: AttentionCall, proceed: Proceed, u: Tensor) -> Tensor:
        """Only the picture's rows are broken; the others attend as ever."""
        image = call.image
        if self.scope == "image":
            broken = self._broken(call, proceed)[:, :, image]
        else:
            broken = kept_by_text(call, proceed, self.scope)
        if bool((u == 1).all()):  # then the picture's rows need not be worked out
            rest = [slice(0, image.start), slice(image.stop, call.q.shape[2])]
            first, last = (
                proceed(queries_of(call, rows)) if rows.stop > rows.start else broken[:, :, :0] for rows in rest
            )
            return torch.cat([first, broken, last], dim=2)
        out = proceed(call).clone()
        out[:, :, image] = mix(out[:, :, image], broken, u)
        return out

    def _broken(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        """P for all rows."""
        if self.kind == "uniform":
            return uniform(call, proceed)
        if self.kind == "blur":
            return blur(call, proceed, self.sigma, self.scope)
        if self.kind == "temperature":
            return temperature(call, proceed, self.tau)
        return own_values(call)

    @staticmethod
    def _skip(hidden: Tensor) -> None:
        return None

    def _shuffled(self, step: Step) -> Any:
        """A new order at each block and step, the same for all images: each is drawn as it would be alone."""
        order = torch.Generator().manual_seed((int(self.seed) * 1_000_003 + step.index) % 2**63)

        def edit(hidden: Tensor) -> Tensor:
            return hidden[:, torch.randperm(hidden.shape[1], generator=order).to(hidden.device)]

        return edit

    def _rescaled(self, step: Step, term: Tensor, strong: Tensor) -> Tensor:
        if not self.rescale:
            return term
        base = strong
        if self.rescale_mode == "full" and step.rows.uncond is not None:
            assert step.prediction is not None
            plain = step.prediction[step.rows.uncond].float()
            base = plain + step.run.guidance_scale * (strong - plain)
        every = tuple(range(1, term.ndim))
        ratio = strong.std(every, keepdim=True) / (base + term).std(every, keepdim=True)
        return term * (self.rescale * ratio + 1 - self.rescale)

    def _note(self, step: Step, weak: Weak, strong: Tensor, gap: Tensor, dtype: torch.dtype) -> None:
        """Keep the size of the effect; a perturbation that changes nothing is an error."""
        who = type(self).__name__
        effect = gap.flatten(1).norm(dim=1) / strong.flatten(1).norm(dim=1).clamp_min(1e-12)
        least = 16 * torch.finfo(dtype).eps if dtype in (torch.float32, torch.float64) else 0.0  # rounding
        before = dict(weak.effects)
        weak.effects[step.index] = effect.tolist()
        for image, value in enumerate(weak.effects[step.index]):
            if not math.isfinite(value):
                weak.effects.clear()
                raise ControlError(
                    f"{who}: the prediction of image {image} is not finite; try a smaller scale than {self.scale:g}"
                )
            if weak.broken[image] and value <= least:
                weak.effects.clear()
                heads = weak.heads[image % len(weak.heads)]
                remedy = "try a smaller scale" if before else "choose other heads, or break them more"
                raise ControlError(
                    f"{who} changes nothing at step {step.index}: the prediction is the same with heads {heads} "
                    f"broken by kind {self.kind!r}; {remedy}"
                )

    def end(self, run: Run) -> None:
        weak: Weak = run.state(self)
        if weak.effects and weak.effect < INERT:
            warnings.warn(
                f"{type(self).__name__} hardly does anything: breaking heads {'; '.join(weak.heads)} moves the "
                f"prediction by {weak.effect:.3%}; other heads may do more",
                AttnctlWarning,
                stacklevel=2,
            )


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(value == value)
