"""What all methods share that move the latents down the gradient of losses on maps: settings and loop.

A method is a `Loss` (see `loss_terms`) and a `MapDescent` that names it. The loop is that of Attend-and-Excite (Chefer
et al., SIGGRAPH 2023, arXiv 2301.13826): before a denoising step, an extra forward reads the maps, and the latents go
down the gradient. Where we add to it, the setting says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, Signature
from math import inf
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

import torch

from attnctl.engine.control import Control, Lane, check_window, check_window_in_run
from attnctl.engine.families.registry import discover
from attnctl.engine.look_ahead import look_ahead
from attnctl.engine.run import Run, Step
from attnctl.engine.sites import Selection, Site, with_text
from attnctl.errors import ControlError, PhraseError, instead
from attnctl.processors.latents.loss_terms import Loss, View
from attnctl.processors.latents.map_gradient import (
    Preparation,
    coarsest,
    columns_of,
    default_sites,
    descend,
    gradients,
    lowest_peak,
    phrase_maps,
    phrase_tokens,
    read_maps,
    step_size,
)
from attnctl.processors.latents.trace import DescentTrace, Evaluation, Foreseen, Update
from attnctl.words.phrases import streams, tokens

ROUNDS = 20  # of refinement at most, as Attend-and-Excite has it
EARLY = 0.15  # part of its own steps that a run is guided in with window=None
C = TypeVar("C", bound=type)


def phrases_first(cls: C) -> C:
    """Make a class a frozen dataclass that is called `Name(*phrases, setting=value)`; `phrases` is its first field."""
    made: Any = dataclass(frozen=True, init=False)(cls)
    hints = get_type_hints(made)
    parameters = [Parameter("phrases", Parameter.VAR_POSITIONAL, annotation=get_args(hints["phrases"])[0])]
    parameters += [
        Parameter(one.name, Parameter.KEYWORD_ONLY, default=one.default, annotation=hints[one.name])
        for one in fields(made)
        if one.name != "phrases"
    ]
    made.__signature__ = Signature(parameters)
    return made


@dataclass(frozen=True, init=False)
class MapDescent(Control):
    """Before each step of the denoiser, the latents move down the gradient of this control's losses.

    An image of a batch uses the phrases that its own prompt has, and is treated as it would be alone. An update whose
    gradient is not finite is skipped for its image, and counted.

    Settings of every such control:
        strength: factor of the step; 0 does nothing at all.
        maps: how maps are prepared, see `phrase_maps`. "share" does not depend on how much attention words get at all,
            which differs between models, and leaves no word anything to win by fading.
        relative: length of an update as a share of the length of the latents; this too means the same in every model
            and sampler. None: Attend-and-Excite's step size, see `step_size`, which was made for SD 1.
        updates: how many updates at each step; each is an extra forward, as far as the last site, and its backward.
        loss_target, peak_target: targets (ours). An image that has met those there are is left out of what updates the
            step has left; with neither, every image gets all updates. `loss_target` is met when the loss, less the
            least it can be, is no more; `peak_target`, a probability, when every phrase has a place that looks at it
            with that much, in maps that are the mean over heads and sites; of several words the mean.
        look_ahead, reach: look where plain drawing leads before the first update (ours). Each image is drawn ahead in
            `look_ahead` large steps, over `reach` of what is left of the schedule. One that has met `peak_target` there
            is left alone for good; of any other, `peak_target` is not asked again. Costs look_ahead + 1 forwards, and
            what is complete is not touched. 0: no look ahead. The peaks of complete pictures differ from model to
            model: draw some with peak_target=1.0, and read `look_ahead` in the report.
        refine: Attend-and-Excite's refinement: pairs (position in the schedule, loss less the least it can be). At that
            position an image above that loss is updated until it is not, at most 20 times, before the ordinary update.
            As in their code, the update in which the target is found met is still made. Their thresholds for 50 steps
            are ((0, 0.95), (10, 0.5), (20, 0.2)) for `Excitation`. Also accepted as a dict.
        keep_norm: give the latents back their length after each update.
        checkpoint: gradient checkpointing in the extra forward: less memory, more time, the same gradient.
        bfloat16: the extra forward runs in bfloat16: faster where bfloat16 is, and hardly another gradient.
        images: which images of the batch to act on, by number from 0. None: all.
        window: part of the schedule to act in, from 0 (noise) to 1 (picture): a step at f counts if start <= f < end.
            None: the first 15 % of the run's own steps, wherever in the schedule it starts (ours): 3 of 20, 8 of 50.
        where: sites to read maps from. None: the cross sites of the coarsest grid with 192 cells; where there are no
            cross sites, the middle third of the joint ones.

    Raises:
        ControlError: a setting is out of its range.
        NoSiteError: no selected site has text keys.
        PhraseError: at the pipeline call, if no prompt has a phrase, or an image has nothing to act on.
    """

    phrases: tuple[Any, ...]
    strength: float = 1.0
    maps: Preparation = "share"
    relative: float | None = 0.02
    updates: int = 1
    loss_target: float | None = None
    peak_target: float | None = None
    look_ahead: int = 0
    reach: float = 1 / 3
    refine: tuple[tuple[int, float], ...] = ()
    keep_norm: bool = False
    checkpoint: bool = False
    bfloat16: bool = False
    images: tuple[int, ...] | None = None
    window: tuple[float, float] | None = (0.0, 1.0)
    where: Selection = None

    lane: ClassVar[Lane] = Lane.GRADIENT
    usual_peak: ClassVar[float | None] = None  # what a look ahead is to find where `peak_target` is not said
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # name -> settings, of a class that has the field `preset`

    def __init__(self, *phrases: Any, **settings: Any) -> None:
        known = {one.name: one for one in fields(self) if one.name != "phrases"}
        if unknown := [name for name in settings if name not in known]:
            raise ControlError(f"{type(self).__name__} has no setting {unknown[0]!r}; {instead(unknown[0], known)}")
        if (preset := settings.pop("preset", None)) is not None:
            if preset not in self.presets:
                raise ControlError(
                    f"a preset of {type(self).__name__} is one of {', '.join(self.presets)}; not {preset!r}"
                )
            settings = {**self.presets[preset], **settings}
        self._set(phrases=phrases)
        for name, one in known.items():
            assert one.default is not MISSING
            self._set(**{name: settings.get(name, one.default)})
        self.check()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """Raise unless every setting is in its range; bring settings to the form they are kept in."""
        if not 0 <= self.strength < inf or (self.relative is not None and not 0 < self.relative < inf):
            raise ControlError(
                "strength may not be negative and relative must be positive, both finite; "
                f"not {self.strength}, {self.relative}"
            )
        for name in ("updates", "look_ahead"):
            if type(getattr(self, name)) is not int:
                raise ControlError(f"{name} is a whole number, not {getattr(self, name)!r}")
        for name in ("keep_norm", "checkpoint", "bfloat16"):
            if type(getattr(self, name)) is not bool:
                raise ControlError(f"{name} is True or False, not {getattr(self, name)!r}")
        if self.loss_target is not None and not (
            isinstance(self.loss_target, (int, float)) and -inf < self.loss_target < inf
        ):
            raise ControlError(f"loss_target is a finite number, or None; not {self.loss_target!r}")
        if self.images is not None:
            images = (self.images,) if isinstance(self.images, int) else tuple(self.images)
            if not images or any(type(image) is not int or image < 0 for image in images):
                raise ControlError(f"images are numbers of images, from 0, or None for all; not {images!r}")
            self._set(
                images=tuple(sorted(set(images)))
            )  # in the order of the batch: all of them are its rows as they are
        if self.updates < 1:
            who = type(self).__name__
            raise ControlError(f"updates must be at least 1, not {self.updates}; strength=0 switches {who} off")
        if self.peak_target is not None and not 0 < self.peak_target <= 1:
            raise ControlError(f"peak_target is a probability, above 0 and up to 1, or None; not {self.peak_target}")
        if self.look_ahead < 0 or not 0 < self.reach <= 1:
            raise ControlError(
                "look_ahead is a number of steps, and reach a part of the schedule, above 0 and up to 1; "
                f"not {self.look_ahead}, {self.reach}"
            )
        if self.look_ahead and self.peak_target is None and self.usual_peak is None:
            raise ControlError("look_ahead needs to know what to look for, such as peak_target=0.2")
        if self.maps not in get_args(Preparation):
            raise ControlError(f"maps are prepared as one of {', '.join(get_args(Preparation))}; not {self.maps!r}")
        if self.window is not None:
            check_window(self.window)
        try:
            pairs = [(at, float(target)) for at, target in dict(self.refine).items()]
        except (TypeError, ValueError):
            raise ControlError(f"refine holds pairs (position, loss), not {self.refine!r}") from None
        if any(type(at) is not int or at < 0 or not -inf < target < inf for at, target in pairs):
            raise ControlError(f"refine holds pairs (position from 0, finite loss), not {self.refine!r}")
        self._set(refine=tuple(sorted(pairs)))

    def losses(self) -> list[Loss]:
        """The losses of one run, new ones at each call: they remember what they have read."""
        raise NotImplementedError

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return with_text(available, default_sites(available) if self.where is None else self.where)

    def begin(self, run: Run) -> DescentTrace:
        if self.strength and self.window is not None:
            check_window_in_run(self.window, run)
        sites = self.sites(discover(run.pipe))
        if self.where is None:
            sites = coarsest(sites, run.latent_size)
        texts = [streams(run, image) for image in range(run.images)]
        losses = self.losses()
        names = tuple(dict.fromkeys(phrase for loss in losses for phrase in loss.phrases))
        columns = columns_of(self.maps)
        if columns == "phrases" and any(loss.whole_prompt for loss in losses):
            columns = "prompt"
        found = phrase_tokens(texts, names, columns)
        useful, always = torch.zeros(2, run.images, dtype=torch.bool)
        for loss in losses:
            useful |= loss.begin(run, names, texts, found)
            always |= loss.always
        own = range(run.images) if self.images is None else self.images
        if max(own) >= run.images:
            raise ControlError(f"there is no image {max(own)} to act on: {run.images} are drawn")
        for image in own:
            if not useful[image]:
                for name, there in zip(names, found.present[image].tolist(), strict=True):
                    if not there:
                        tokens(run, name, image)  # raises, and says what the prompt has instead
                who, prompt = type(self).__name__, run.describe(image) or repr(run.prompts[image])
                raise PhraseError(f"{who} finds nothing to act on in {prompt} with {', '.join(map(repr, names))}")
        scale, skipped = 2.0**12 * torch.ones(run.images), torch.zeros(run.images, dtype=torch.long)
        return DescentTrace(sites, found, losses, tuple(own), always, scale, skipped)

    def acts(self, step: Step) -> bool:
        """Whether a step lies in the window."""
        if self.window is not None:
            return self.window[0] <= step.fraction < self.window[1]
        start = step.run.start / step.run.schedule if step.run.schedule else 0.0
        return step.fraction - start < EARLY * (1.0 - start)

    def before_denoise(self, step: Step) -> None:
        if self.strength and self.acts(step) and not step.corrector:  # there an update would be lost
            Descent(self, step, step.run.state(self)).go()


class Descent:
    """The updates of one step. `excess` is the loss less the least it can be, `gradient` its gradient at `z`."""

    def __init__(self, control: MapDescent, step: Step, trace: DescentTrace) -> None:
        self.control, self.step, self.trace = control, step, trace
        start = step.latents
        trace.to(start.device)
        for loss in trace.terms:
            loss.begin_step(step.index)
        self.z = start.detach().to(torch.promote_types(start.dtype, torch.float32))
        self.excess = torch.full((len(start),), torch.nan, device=start.device)
        self.gradient = torch.zeros_like(self.z)
        self.peak = torch.zeros_like(self.excess)

    def go(self) -> None:
        """All updates of the step; the latents are assigned if there were any."""
        control, every = self.control, self.to_guide()
        if not every:
            return
        self.evaluate(every)
        target = dict(control.refine).get(self.step.run.start + self.step.index)
        if target is not None:
            self.refine(target, every)
        images = self.unmet(every)
        for update in range(control.updates):
            if update:
                self.evaluate(images)
                images = self.unmet(images)
            if not images:
                break
            self.move(images)
        self.step.latents = self.z

    def to_guide(self) -> list[int]:
        """The images that the control is to act on: its own, but for those that a look ahead finds complete.

        Images with a region of the user are always updated: a look ahead sees phrases, not places.
        """
        control, trace = self.control, self.trace
        asked = [image for image in trace.images if control.look_ahead and not trace.always[image]]
        if not asked:
            return list(trace.images)
        target = control.peak_target if control.peak_target is not None else control.usual_peak
        assert target is not None
        if trace.foreseen is None:
            trace.foreseen = self.foresee(asked, target)
        return [image for image in trace.images if image not in trace.foreseen.alone]

    def foresee(self, images: list[int], target: float) -> Foreseen:
        """What a look ahead finds of some images.

        Nothing, if nobody said what to look for and there is no looking ahead here, as in a run of one step: then every
        image is guided.
        """
        control, trace = self.control, self.trace
        own, peaks = trace.phrase_tokens.pick(images), torch.full_like(self.peak, torch.nan)
        try:
            ahead = look_ahead(self.step, control.look_ahead, control.reach, images)
        except ControlError:
            if control.peak_target is not None:
                raise
            return Foreseen(self.step.index, peaks, 0, ())
        maps = read_maps(ahead, ahead.latents, trace.sites, own.tokens, None, False, control.bfloat16)
        peaks[images] = lowest_peak(maps, own).to(peaks.dtype)
        alone = tuple(image for image in images if peaks[image] >= target)
        return Foreseen(self.step.index, peaks, control.look_ahead + 1, alone)

    def refine(self, target: float, images: list[int]) -> None:
        """Update the images above a loss until they are not. What was read last belongs to the latents as they are."""
        running = self.above(target, images)
        for _ in range(ROUNDS):
            if not running:
                return
            again = self.above(target, running)
            self.move(running)
            self.evaluate(running)
            running = again

    def unmet(self, images: list[int]) -> list[int]:
        """Those of the images that have not met every target there is."""
        most, least = self.control.loss_target, None if self.control.look_ahead else self.control.peak_target
        if most is None and least is None:
            return images
        excess, peak, always = self.excess.tolist(), self.peak.tolist(), self.trace.always.tolist()
        return [
            image
            for image in images
            if (most is not None and excess[image] > most)
            or (least is not None and (peak[image] < least or always[image]))
        ]

    def above(self, target: float, images: list[int]) -> list[int]:
        """Those of the images whose loss is higher."""
        excess = self.excess.tolist()
        return [image for image in images if excess[image] > target]

    def evaluate(self, images: list[int]) -> None:
        """Read maps of some images at their latents, and work out their losses and gradients."""
        control, trace = self.control, self.trace
        every = len(images) == len(self.z)
        with torch.enable_grad():
            z = (self.z if every else self.z[images]).clone().requires_grad_()
            own = trace.phrase_tokens if every else trace.phrase_tokens.pick(images)
            tokens = read_maps(
                self.step, z, trace.sites, own.tokens, None if every else images, control.checkpoint, control.bfloat16
            )
            view = View(phrase_maps(tokens, own, control.maps), tokens, images, control.maps)
            read = {loss.name: loss.read(view) for loss in trace.terms}
            total = torch.stack([term.total for term in read.values()]).sum(0)
            gradient, finite = gradients(total, z, trace.scale[images])
        self.peak[images] = lowest_peak(tokens.detach(), own).to(self.peak.dtype)
        floor = torch.stack([term.floor for term in read.values()]).sum(0)
        self.excess[images], self.gradient[images] = (total.detach() - floor).to(self.excess.dtype), gradient
        trace.skipped[images] += ~finite
        trace.scale[images] /= torch.where(finite, 1.0, 16.0)  # half precision overflowed: be gentler
        parts = {name: term.parts for name, term in read.items()}
        told = self.excess[images], self.peak[images]
        trace.evaluations.append(Evaluation(self.step.index, tuple(images), parts, *told))

    def move(self, images: Sequence[int]) -> None:
        """One step down for some images."""
        control, step, numbers = self.control, self.step, list(images)
        before, gradient = self.z[numbers], self.gradient[numbers]
        if control.relative is not None:
            after = descend(before, gradient, control.strength * control.relative, True, control.keep_norm)
        else:
            size = control.strength * step_size(step.run.start + step.index, step.run.schedule) / step.scale**2
            after = descend(before, gradient, size, False, control.keep_norm)
        self.z = self.z.index_copy(0, torch.tensor(numbers, device=self.z.device), after)
        share = (after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        losses = torch.full_like(self.excess, torch.nan)
        losses[numbers] = self.excess[numbers]
        self.trace.updates.append(Update(step.index, tuple(numbers), losses, share))


def check_phrases(who: str, phrases: Sequence[Any], least: int, example: str) -> None:
    """Raise unless these are at least so many different phrases."""
    if (
        any(not isinstance(phrase, str) for phrase in phrases)
        or len(set(phrases)) != len(phrases)
        or len(phrases) < least
    ):
        many = "a phrase" if least == 1 else "two phrases"
        raise ControlError(
            f"{who} needs {many}, each once, such as {example}; not {', '.join(map(repr, phrases)) or 'none'}"
        )
