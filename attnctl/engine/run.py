"""Run: one pipeline call while attached. Step: one of its denoiser calls, with latents a control may read and edit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from attnctl.engine.families.record import Family
from attnctl.engine.latents import Sample
from attnctl.engine.sites import Site
from attnctl.errors import ControlError, PhraseError, name_of, short

Texts = dict[str, list[str]]  # encode_prompt argument -> one text per image

NO_WORDS = "the pipeline was given embeddings, not words; say what they mean: attach(..., prompt=...)"


class Begins(Protocol):
    """What a run asks of a control."""

    def begin(self, run: Run) -> Any: ...

    def end(self, run: Run) -> None: ...


@dataclass(eq=False)
class Run:
    """One pipeline call.

    Attributes:
        family: the record of the pipeline's denoiser.
        images: how many pictures are drawn together.
        guided: the pipeline runs classifier-free guidance, if it does so in one batch.
        latent_size: (height, width) in latent cells, unpacked.
        steps: conditional denoiser calls this pipeline call will make; 0 if the scheduler does not say.
        calls: how many it has made.
        passes: forwards of the denoiser for one picture so far, by the name of the pass: "main" is the pipeline's own,
            with both halves of classifier-free guidance. A pass that shares its first blocks counts in part.
    """

    family: Family
    pipe: Any
    images: int
    guided: bool
    latent_size: tuple[int, int]
    steps: int
    texts: Texts
    negatives: Texts = field(default_factory=dict)  # the same of the negative prompt; empty where there is none
    max_sequence_length: int | None = None
    text_rows: int | None = None  # length of the text sequence at the first denoiser call
    calls: int = 0
    told_guidance: float | None = None  # what the pipeline call was given as its guidance scale
    start: int = 0  # position of the first step in the scheduler's timesteps
    schedule: int = 0  # how many timesteps the scheduler has
    passes: dict[str, float] = field(default_factory=dict)
    view: tuple[float, float, float, float] = (
        0.0,
        0.0,
        1.0,
        1.0,
    )  # what is drawn of the whole picture, in shares of it
    uncropped: tuple[int, int] | None = None  # (height, width) of the whole picture in pixels, where `view` is a part
    streams: dict[Any, Any] = field(default_factory=dict)  # what `words.phrases.streams` has made, by text
    _states: dict[int, tuple[Begins, Any]] = field(default_factory=dict)

    def __repr__(self) -> str:
        texts = dict.fromkeys(self.texts.get("prompt", ()))
        first = next((repr(short(text, 60)) for text in texts), "no words")
        said = f"{self.images} image{'s' * (self.images != 1)}, {self.calls} of {self.steps or '?'} denoiser calls"
        return f"<Run of {type(self.pipe).__name__}, {said}, {first}{' ...' * (len(texts) > 1)}>"

    @property
    def prompts(self) -> list[str]:
        """The prompt of each image, repeated as `num_images_per_prompt` says.

        Raises:
            PhraseError: the pipeline was given embeddings and nobody said what they mean.
        """
        if "prompt" not in self.texts:
            raise PhraseError(NO_WORDS)
        return self.texts["prompt"]

    @property
    def picture(self) -> tuple[int, int]:
        """(height, width) of the pictures in pixels."""
        factor = int(getattr(self.pipe, "vae_scale_factor", 8))
        return self.latent_size[0] * factor, self.latent_size[1] * factor

    @property
    def guidance_scale(self) -> float:
        """The scale of classifier-free guidance: what the pipeline says now, else what its call was given.

        Raises:
            ControlError: neither is known.
        """
        scale = getattr(self.pipe, "guidance_scale", None)
        scale = self.told_guidance if scale is None else scale
        if scale is None:
            raise ControlError(f"{type(self.pipe).__name__} does not tell its guidance scale")
        return float(scale)

    @property
    def fractions(self) -> list[float]:
        """Where its steps lie in the whole schedule, from 0 (noise) towards 1; empty if the scheduler does not say."""
        return [min((self.start + i) / self.schedule, 1.0) for i in range(self.steps)] if self.schedule else []

    @property
    def whole(self) -> tuple[int, int]:
        """(height, width) in pixels of the whole picture, of which inpainting with `padding_mask_crop` draws a part."""
        return self.uncropped or self.picture

    def describe(self, image: int) -> str:
        """ "image 1 ('a dog')" for messages; "" if there is only one picture, or nobody said what it is of."""
        if self.images == 1 or "prompt" not in self.texts:
            return ""
        return name_of(image, self.prompts[image])

    def state(self, control: Begins) -> Any:
        """What the control's `begin` returned for this run."""
        try:
            return self._states[id(control)][1]
        except KeyError:
            raise ControlError(f"{type(control).__name__} has not begun in this run; is it attached?") from None

    def states(self, controls: Iterable[Begins]) -> list[tuple[Begins, Any]]:
        """The controls that have begun in this run, with their states."""
        return [(control, self.state(control)) for control in controls if id(control) in self._states]

    def begin(self, control: Begins) -> None:
        """Let a control begin, once."""
        if id(control) not in self._states:
            self._states[id(control)] = control, control.begin(self)

    def end(self) -> None:
        """Let every control that began end, also if one of them raises; the first error is raised at the end."""
        trouble: BaseException | None = None
        for control, _ in self._states.values():
            try:
                control.end(self)
            except BaseException as error:
                trouble = trouble or error
        if trouble is not None:
            raise trouble


@dataclass(frozen=True)
class Rows:
    """Which batch rows of one denoiser call are what. Contiguous; None where this call has no such rows."""

    cond: slice | None
    uncond: slice | None
    total: int


Watcher = Callable[[Any], None]  # takes an `AttentionCall`
Edit = Callable[[Tensor], Tensor | None]  # of the picture's tokens that enter a block; None: the block is skipped


class Passes(Protocol):
    """Every forward of the denoiser of our own; see `attnctl.engine.passes`."""

    def probe(
        self,
        step: Step,
        latents: Tensor,
        watch: Mapping[Site, Watcher],
        images: Sequence[int] | None,
        checkpoint: bool,
        bfloat16: bool,
    ) -> None: ...

    def share(self, step: Step, site: str) -> None: ...

    def forward(self, step: Step, name: str, start: str | None, blocks: Mapping[str, Edit] | None) -> Tensor: ...

    def plain(self, step: Step, name: str, arguments: dict[str, Any]) -> Tensor: ...


@dataclass(eq=False)
class Step:
    """One denoiser call.

    Attributes:
        run: the pipeline call it is part of.
        index: conditional denoiser calls of the run before this one (Heun makes two per solver step).
        timestep: as the denoiser is given it.
        rows: which batch rows are what.
        extra: a further pass over conditional rows within the same step (skip-layer guidance); it counts for nothing.
        corrector: the second call of a solver step of Heun or KDPM2. The solver steps from the latents of the first, so
            edits made here reach the prediction alone.
        text_rows: length of the text sequence, if this call has one.
        scale: factor the scheduler puts on latents before the denoiser sees them (Euler: (sigma^2 + 1) ** -0.5).
        sigma: noise level, where the scheduler has one.
        fraction: position in the whole schedule, from 0 (noise) towards 1; image-to-image starts further on.
        images: the number of the image of each conditional row; a pass of our own may have but some of them.
        pass_name: "main" in the pipeline's own forward, else what `forward` was told.
        prediction: what the denoiser predicted, before any control had its say; from `after_denoise` on.
    """

    run: Run
    index: int
    timestep: Any
    rows: Rows
    scale: float
    sigma: float | None
    fraction: float
    sample: Sample
    passes: Passes
    arguments: dict[str, Any]  # of this denoiser call by name, before edits
    extra: bool = False
    corrector: bool = False
    text_rows: int | None = None
    images: tuple[int, ...] = ()
    pass_name: str = "main"
    changed: bool = False  # whether controls gave other arguments than the pipeline
    positional: int = 0  # so many of the arguments were given without their names
    prediction: Tensor | None = None
    term: Tensor | None = None  # of guidance, see `guide`
    prefix: Any = None  # what a further pass may share with the pipeline's own

    @property
    def latents(self) -> Tensor:
        """The conditional latents, unscaled: (images, channels, height, width), FLUX (images, tokens, channels).

        Assigning edits the sample for every branch of this step and for `scheduler.step`.
        """
        return self.sample.base if self.sample.edited is None else self.sample.edited

    @latents.setter
    def latents(self, value: Tensor) -> None:
        base = self.sample.base
        if value.shape != base.shape:
            raise ControlError(f"latents of this step have shape {tuple(base.shape)}, not {tuple(value.shape)}")
        self.sample.edited = value.detach().to(base)

    def probe(
        self,
        latents: Tensor,
        watch: Mapping[Site, Watcher],
        images: Sequence[int] | None = None,
        checkpoint: bool = False,
        bfloat16: bool = False,
    ) -> None:
        """Run the denoiser on the conditional rows with these latents, to read attention; autograd is recorded.

        Controls that change attention act in it as they do in what is drawn; those that record do not. Its output is
        dropped: it stops right after the last watched site.
        Parameters are frozen meanwhile, so `torch.autograd.grad(loss, latents)` is all there is to differentiate.

        Args:
            latents: unscaled, shaped like `step.latents`, or like its rows of `images`.
            watch: called with the first attention call of each of these sites, as controls have edited it; the sites
                must be among those the control selects. In `call.step.rows` every row is conditional.
            images: which of the step's images to run, by number; the others cost nothing. None: all.
            checkpoint: keep only what enters each block of the model, and compute the rest again in the backward; less
                memory, more time, the same gradient. Then `watch` may only take from a call what is there: whatever is
                computed inside it would be missing when the block runs again.
            bfloat16: under autocast to bfloat16, which is faster; maps are worked out in float32 all the same.

        Raises:
            ControlError: a site is not under control, or this forward never reached it; or the model has no gradient
                checkpointing.
        """
        self.passes.probe(self, latents, watch, images, checkpoint, bfloat16)

    def change(self, inputs: Mapping[str, Any]) -> None:
        """Use these arguments in this denoiser call and in all further passes of the step."""
        if inputs:
            self.arguments = self.arguments | dict(inputs)
            text = self.arguments.get(self.run.family.text)
            self.text_rows, self.changed = text.shape[1] if isinstance(text, Tensor) else None, True

    def share(self, site: str) -> None:
        """Announce, in `before_denoise`, a `forward` that is the same as the pipeline's own before this module.

        What the stages before it give is then kept, and that pass costs only the rest. Where it cannot be kept
        (compiled models, step caches, group offload), the pass runs as a whole.
        """
        self.passes.share(self, site)

    def forward(self, name: str, start: str | None = None, blocks: Mapping[str, Edit] | None = None) -> Tensor:
        """Run the denoiser once more on the conditional rows, with the edited latents. For `after_denoise`.

        All controls act in it but those that only record. `call.step.pass_name` tells them which pass they are in.

        Args:
            name: of the pass.
            start: a module; whoever asks promises that nothing before it differs from the pipeline's own forward.
            blocks: transformer blocks by module name, with a function that edits the picture's tokens as they enter,
                (images, tokens, channels), or returns None to skip the block.

        Returns:
            The prediction, (images, ...).

        Raises:
            ControlError: this denoiser call has no conditional rows.
        """
        return self.passes.forward(self, name, start, blocks)

    def guide(self, term: Tensor) -> None:
        """Add a term to the guided prediction of this step. For `after_denoise`.

        It is added to the conditional and the unconditional prediction, also where the pipeline makes two calls. So
        u + s (c - u) becomes u + s (c - u) + term, at any guidance scale s. Terms of several controls add up.

        Args:
            term: (images, ...), shaped like the conditional rows of the prediction.

        Raises:
            ControlError: it has another shape, or this is not the place.
        """
        if self.prediction is None or self.rows.cond is None:
            raise ControlError("step.guide is for after_denoise of a call with conditional rows")
        if term.shape != self.prediction[self.rows.cond].shape:
            shape = tuple(self.prediction[self.rows.cond].shape)
            raise ControlError(f"a term of guidance has the shape of the prediction, {shape}, not {tuple(term.shape)}")
        self.term = term if self.term is None else self.term + term
