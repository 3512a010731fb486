"""A-STAR as a pipeline of its own, around a pipeline of any family.

    pipe = AStarPipeline.from_pretrained("glyph-sd")
    picture = pipe("a red car and a cat", subjects=["car", "cat"], modifiers={"car": "red"}).images[0]

A-STAR: Test-time Attention Segregation and Retention (Agarwal et al., ICCV 2023, arXiv 2306.14544).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from attnctl.engine.attachment import Attachment, attach
from attnctl.engine.control import Control
from attnctl.engine.families.registry import family_of
from attnctl.errors import ControlError
from attnctl.loading import load
from attnctl.maps.recorder import TokenMaps
from attnctl.processors.astar import AStar
from attnctl.processors.binding import bonds_of
from attnctl.words.spelling import occurrences
from attnctl.words.subjects import read_subjects

Bonds = tuple[tuple[str, str], ...]  # (modifier, noun)
SETTINGS = tuple(one.name for one in fields(AStar) if one.name != "phrases")
OWN = ("pipe", "settings", "attachment")


class AStarPipeline:
    """A diffusers pipeline whose calls name the things of the picture; between calls it is the pipeline it was.

    Everything else is the pipeline's: `astar.enable_model_cpu_offload()`, `astar.set_progress_bar_config(...)`,
    `astar.scheduler = other` and the like read and change `pipe`.

    Attributes:
        pipe: the diffusers pipeline. Whatever is done to it (LoRA, schedulers, offload, devices) holds here.
        settings: of the control, see `AStar`.
        attachment: of the latest call, None before there was one; its `report` and `maps` stay readable.
    """

    pipe: Any
    settings: dict[str, Any]
    attachment: Attachment | None

    def __init__(self, pipe: Any, **settings: Any) -> None:
        _check_settings(settings)  # a wrong one fails here, not at the first call
        self.pipe, self.settings, self.attachment = pipe, settings, None

    def __getattr__(self, name: str) -> Any:
        if name in OWN or name.startswith("__"):  # not there yet, as while it is copied
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return getattr(self.pipe, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.pipe, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.pipe)})

    def to(self, *args: Any, **options: Any) -> AStarPipeline:
        """Move the pipeline, see its own `to`.

        Returns:
            This pipeline.
        """
        self.pipe.to(*args, **options)
        return self

    @classmethod
    def from_pipe(cls, pipe: Any, **settings: Any) -> AStarPipeline:
        """Around a pipeline that is there; it is not copied.

        Args:
            pipe: a diffusers pipeline of a family attnctl knows.
            settings: of the control, see `AStar`.

        Raises:
            UnsupportedPipelineError: it is of none.
        """
        family_of(pipe)
        return cls(pipe, **settings)

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> AStarPipeline:
        """Around a pipeline by its embedded name, folder or hub id.

        Args:
            model: the name, folder or id.
            options: settings of the control, as for `from_pipe`; the others as for `attnctl.load`.

        Raises:
            ControlError: a setting is out of its range, or nearly one that there is.
        """
        settings = {name: options.pop(name) for name in SETTINGS if name in options}
        for name in options:  # diffusers only logs what it does not know
            if meant := get_close_matches(name, SETTINGS, 1, 0.8):
                raise ControlError(f"there is no setting {name!r}; did you mean {meant[0]!r}?")
        _check_settings(settings)  # before anything is loaded
        return cls(load(model, **options), **settings)

    def __call__(
        self,
        prompt: str | list[str],
        subjects: Sequence[str] | Literal["auto"] = "auto",
        modifiers: Mapping[str, str | Sequence[str]] | None = None,
        masks: Mapping[str, Any] | None = None,
        maps: bool = False,
        controls: Sequence[Control] = (),
        **arguments: Any,
    ) -> Any:
        """Draw.

        Args:
            prompt: what to draw, one text or several. In a list, each picture goes by what its own prompt has. With
                `prompt_embeds` among the arguments, what they mean.
            subjects: the things to keep apart and in place, two phrases or more of the prompt, best with their colours,
                as "red car". "auto" reads them and their modifiers from each prompt, see `attnctl.words.subjects`; for
                that the extra "subjects" is needed.
            modifiers: noun -> its modifier or modifiers: binds them, see `Binding`. None: those that "auto" reads. In a
                list of prompts, a modifier that stands before one of its nouns is that one's alone.
            masks: subject -> region it is to be in, see `Retention`; besides those of the settings, and before them.
            maps: record the maps of the prompt's words, for `maps` of what is returned.
            controls: further ones, which see each attention call first.
            arguments: of the pipeline, callbacks among them; or settings of the control for this call alone, such as
                placing=3. What both have, such as `strength` of an image-to-image pipeline, is the pipeline's.

        Returns:
            What the pipeline returns. Unless that is a tuple (return_dict=False), it has three attributes more:
            `report`, what A-STAR did (`report.to_dict()` is plain data; prompts that differ in what is bound have a
            trace each), `maps`, None unless asked for, and `subjects`, the phrases that were kept apart.

        Raises:
            ControlError: an argument is none of the pipeline's and no setting; the message has the nearest name.
            AttnctlError: as `attach`, `AStar` and the resolution of phrases raise it.
        """
        texts = _texts(prompt)
        _check(subjects, modifiers, masks, maps, controls)
        of_call = self._settings_among(arguments)
        if "preset" in of_call:  # before what the pipeline was made with
            of_call = {**AStar.presets.get(of_call["preset"], {}), **of_call}
        settings = self.settings | of_call
        plans = [_plan(text, subjects, modifiers, several=len(texts) > 1) for text in texts]
        settings["masks"] = {**dict(settings.get("masks", ())), **(masks or {})}
        own: dict[tuple[tuple[str, ...], Bonds], list[int]] = {}
        each = int(arguments.get("num_images_per_prompt") or 1)
        for number, plan in enumerate(plans):
            own.setdefault(plan, []).extend(range(number * each, (number + 1) * each))
        stars = []
        chosen = AStar("one", "other", images=settings.get("images")).images
        for (phrases, bonds), images in own.items():
            more: dict[str, Any] = {"bonds": (*bonds_of(settings.get("bonds", ())), *bonds)}
            if len(own) > 1:
                more["images"] = tuple(image for image in images if chosen is None or image in chosen)
                if not more["images"]:
                    continue
            stars.append(AStar(*phrases, **settings | more))
        recorders = [TokenMaps()] if maps else []
        embedded = arguments.get("prompt_embeds") is not None
        with attach(self.pipe, *controls, *stars, *recorders, prompt=prompt if embedded else None) as attachment:
            self.attachment = attachment
            output = self.pipe(**arguments) if embedded else self.pipe(prompt=prompt, **arguments)
        if not isinstance(output, tuple):
            output.report, output.maps = attachment.report, attachment.maps if maps else None
            output.subjects = tuple(dict.fromkeys(phrase for phrases, _ in plans for phrase in phrases))
        return output

    def _settings_among(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Take the control's settings out of the arguments of a call, and return them.

        Raises:
            ControlError: an argument is neither a setting nor one of the pipeline's.
        """
        kind = type(self.pipe)
        found = inspect.signature(kind.__call__).parameters
        parameters = [name for name, one in found.items() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        anything = len(parameters) < len(found)
        if anything and kind.__module__.startswith("diffusers."):  # theirs take two old names, and drop all others
            parameters, anything = [*parameters, "callback", "callback_steps"], False
        own = [name for name in SETTINGS if name in arguments and name not in parameters]
        known = [name for name in (*parameters, *CALL, *SETTINGS) if name != "self"]
        for name in arguments:
            if name in own or name in parameters:
                continue
            meant = get_close_matches(name, known, 1, 0.8 if anything else 0.5)
            if meant or not anything:
                hint = f"did you mean {meant[0]!r}?" if meant else "help(AStar) lists the settings"
                raise ControlError(f"{name!r} is neither an argument of {kind.__name__} nor a setting of AStar; {hint}")
        return {name: arguments.pop(name) for name in own}


CALL = tuple(name for name in inspect.signature(AStarPipeline.__call__).parameters if name not in ("self", "arguments"))


def _plan(
    text: str, subjects: Any, modifiers: Mapping[str, str | Sequence[str]] | None, several: bool
) -> tuple[tuple[str, ...], Bonds]:
    """What to keep apart in a prompt, and what to bind."""
    if subjects == "auto":
        read = read_subjects(text)
        subjects = tuple(dict.fromkeys(one.whole for one in read))
        if modifiers is None:
            return subjects, tuple((modifier, one.phrase) for one in read for modifier in one.modifiers)
    bonds = tuple(
        dict.fromkeys(
            (modifier, noun)
            for noun, named in (modifiers or {}).items()
            for modifier in ([named] if isinstance(named, str) else named)
        )
    )
    return tuple(subjects), _of_prompt(text, bonds) if several else bonds


def _of_prompt(text: str, bonds: Bonds) -> Bonds:
    """The bonds that a prompt has: a modifier before one of its nouns is that noun's alone."""
    near = {(modifier, noun) for modifier, noun in bonds if occurrences(text, f"{modifier} {noun}")}
    taken = {modifier for modifier, _ in near}
    return tuple(bond for bond in bonds if bond in near or bond[0] not in taken)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise unless there is a call that they are right for: one that names a modifier may bind and do no more."""
    AStar("one", "other", **{"bonds": (("a", "one"),), **settings})


def _texts(prompt: Any) -> list[str]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise ControlError(f"prompt is a text or a list of texts, which prompt_embeds need too; not {prompt!r}")
    return list(texts)


def _check(subjects: Any, modifiers: Any, masks: Any, maps: Any, controls: Any) -> None:
    """Raise unless these are of the kinds that a call takes."""
    if not isinstance(maps, bool):
        raise ControlError(
            f"maps of a call is True, to record them, or False; not {maps!r}. How the control prepares its maps is a "
            "setting of the pipeline: AStarPipeline.from_pipe(pipe, maps=...)"
        )
    if isinstance(subjects, str) and subjects != "auto" or not isinstance(subjects, Sequence):
        raise ControlError(f"subjects are several phrases, or 'auto'; not {subjects!r}")
    for what, given, example in (
        ("modifiers", modifiers, "{'car': 'red'}"),
        ("masks", masks, "{'cat': (0, 0, 0.5, 1)}"),
    ):
        if given is not None and not isinstance(given, Mapping):
            raise ControlError(f"{what} are a dict, such as {example}; not {given!r}")
    for noun, named in (modifiers or {}).items():
        if not isinstance(named, str) and not (
            isinstance(named, Sequence) and all(isinstance(one, str) for one in named)
        ):
            raise ControlError(f"the modifiers of {noun!r} are a word or several, not {named!r}")
    if isinstance(controls, Control) or not isinstance(controls, Sequence):
        raise ControlError(f"controls are a list, such as [TokenMaps()]; not {controls!r}")
