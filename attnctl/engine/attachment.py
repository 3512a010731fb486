"""attach(): controls on a pipeline, and off again, leaving no trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from attnctl.engine import training
from attnctl.engine.control import Control
from attnctl.engine.installation import Installation
from attnctl.engine.run import Run
from attnctl.engine.sites import Site
from attnctl.engine.training import Batch
from attnctl.errors import ControlError


@dataclass(frozen=True)
class Report:
    """What an attachment does and has done, for people.

    Attributes:
        family: which record describes the denoiser.
        sites: for each control, the names of the sites it acts at.
        calls: conditional denoiser calls of the latest pipeline call.
        foreign: sites where somebody has set another processor since and no pipeline call has followed.
        passes: forwards of the denoiser for one picture of the latest pipeline call, by name; see `Run.passes`.
        traces: of the latest pipeline call, (name of the control, what it has to tell), for controls that keep a trace:
            anything with `to_dict` as their `run.state`.
    """

    family: str
    sites: tuple[tuple[str, tuple[str, ...]], ...]
    calls: int = 0
    foreign: tuple[str, ...] = field(default=())
    passes: dict[str, float] = field(default_factory=dict)
    traces: tuple[tuple[str, Any], ...] = ()

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "family": self.family,
            "calls": self.calls,
            "passes": self.passes,
            "sites": [{"control": name, "sites": list(sites)} for name, sites in self.sites],
            "foreign": list(self.foreign),
            "traces": [{"control": name} | trace.to_dict() for name, trace in self.traces],
        }

    def __str__(self) -> str:
        spent = ", ".join(f"{count:.1f} {name}" for name, count in self.passes.items())
        lines = [f"{self.family}, {self.calls} denoiser calls" + (f" (forwards: {spent})" if spent else "")]
        lines += [f"{name}: {len(sites)} sites" for name, sites in self.sites]
        lines += [f"{name}: {trace}" for name, trace in self.traces]
        if self.foreign:
            lines.append(f"another processor was set: {', '.join(self.foreign)}")
        return "\n".join(lines)


class Attachment:
    """Controls in place on one pipeline. A context manager; `release` may be called at any time, and again.

    Attributes:
        pipe: the pipeline.
        controls: in list order, outermost first.
    """

    def __init__(self, pipe: Any, controls: tuple[Control, ...], prompt: str | list[str] | None) -> None:
        self.pipe, self.controls, self.prompt = pipe, controls, prompt
        self.latest: Run | None = None  # the latest pipeline call; set as it begins
        self._installation: Installation | None = Installation.of(pipe)
        target = self._installation.target
        self.family = target.family.name
        available = tuple(target.sites.values())
        self.selected: tuple[tuple[Site, ...], ...] = tuple(control.sites(available) for control in controls)
        seen = {id(control) for control in target.controls()}
        for control in controls:
            if id(control) in seen:
                raise ControlError(f"this {type(control).__name__} object is attached already; make another one")
            seen.add(id(control))
        self._installation.add(self)

    def release(self) -> None:
        """Undo everything this attachment did to the pipeline. Results stay readable."""
        installation, self._installation = self._installation, None
        if installation is not None:
            installation.remove(self)

    def batch(
        self,
        prompts: Sequence[str],
        *,
        prompt_2: Sequence[str] | None = None,
        prompt_3: Sequence[str] | None = None,
        max_sequence_length: int | None = None,
    ) -> AbstractContextManager[Batch]:
        """A block of a training loop, in which the denoiser is called by hand and the controls act.

            live = LiveMaps("cat", "dog")
            with attach(pipe, live) as attached:
                for captions, noisy, timesteps, text in batches:
                    with attached.batch(captions) as batch:
                        prediction = pipe.unet(noisy, timesteps, text).sample
                    maps = batch.state(live).maps()  # (rows, phrases, height, width), with their gradient
                    (my_loss(prediction) + my_map_loss(maps)).backward()

        Every row is conditional. Nothing of a sampler is read: each row may have a timestep of its own, each batch its
        own captions, number of rows and size. Gradient checkpointing works if it is not reentrant (diffusers' is not):
        call `backward` of one batch before the next forward.

        Args:
            prompts: the caption of each row.
            prompt_2, prompt_3: what further text encoders read, if that is something else.
            max_sequence_length: rows of the text that T5 makes, as given to `encode_prompt` (SD 3, FLUX).

        Raises:
            ControlError: the rows of a forward are not as many as the prompts, a control acts on steps of a sampler, a
                pipeline is called inside the block, or the attachment is released.
            PhraseError: as the controls raise it at the first forward.
        """
        texts = {"prompt": prompts, "prompt_2": prompt_2, "prompt_3": prompt_3}
        given = {name: each for name, each in texts.items() if each is not None}
        if self._installation is None:
            raise ControlError("the attachment is released; attach again")
        return training.batch(self._installation.interception, given, max_sequence_length)

    def __repr__(self) -> str:
        names = ", ".join(type(control).__name__ for control in self.controls) or "no control"
        calls = "nothing drawn yet" if self.latest is None else f"{self.latest.calls} denoiser calls"
        released = ", released," if self._installation is None else ""
        return f"<Attachment{released} of {names} on {type(self.pipe).__name__}, {calls}>"

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.release()

    @property
    def run(self) -> Run:
        """The latest pipeline call while attached.

        Raises:
            ControlError: there was none.
        """
        if self.latest is None:
            raise ControlError("nothing was drawn yet: call the pipeline while the controls are attached")
        return self.latest

    @property
    def maps(self) -> Any:
        """The maps of the latest pipeline call, from the attached `TokenMaps`, the first if there are several.

        Raises:
            ControlError: no `TokenMaps` is attached, or the pipeline has not been called.
        """
        control = next((c for c in self.controls if c.gives_maps), None)
        if control is None:
            raise ControlError("there are no maps: attach a TokenMaps() control to record them")
        return self.run.state(control)

    @property
    def report(self) -> Report:
        """What this attachment does and has done."""
        seats = self._installation.target.seats if self._installation else {}
        states = self.latest.states(self.controls) if self.latest else ()
        return Report(
            family=self.family,
            sites=tuple(
                (type(control).__name__, tuple(site.name for site in sites))
                for control, sites in zip(self.controls, self.selected, strict=True)
            ),
            calls=self.latest.calls if self.latest else 0,
            passes=dict(self.latest.passes) if self.latest else {},
            foreign=tuple(name for name, seat in seats.items() if not seat.in_place()),
            traces=tuple((type(control).__name__, state) for control, state in states if hasattr(state, "to_dict")),
        )


def attach(pipe: Any, *controls: Control, prompt: str | list[str] | None = None) -> Attachment:
    """Put controls on a pipeline.

        with attach(pipe, Segregation("cat", "dog"), TokenMaps()) as run:
            picture = pipe("a cat and a dog").images[0]
        run.maps["cat"]

    Args:
        pipe: a diffusers pipeline of a family attnctl knows (SD 1/2, SDXL, SD 3/3.5, FLUX.1).
        controls: in this order they see each attention call, the first outermost.
        prompt: what the embeddings mean, for pipelines called with `prompt_embeds`; one text, or one per prompt.

    Returns:
        An `Attachment`: leave its `with` block, or call `release()`, and the pipeline is as it was.

    Raises:
        UnsupportedPipelineError: no family record describes the pipeline's denoiser.
        NoSiteError: a control selects no site.
        UnsupportedProcessorError: a selected site never calls fused attention (sliced, eager, xformers, linear); raised
            by the pipeline call if such a processor was set since.
        ControlError: two controls cannot be combined, or one is attached already.
    """
    for control in controls:
        if not isinstance(control, Control):
            raise ControlError(f"attach takes controls, such as TokenMaps(), one after the other; not {control!r}")
    return Attachment(pipe, controls, prompt)
