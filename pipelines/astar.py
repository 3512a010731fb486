"""A-STAR as a pipeline of its own, around a pipeline of any family.

    pipe = AStarPipeline.from_pretrained("glyph-sd")
    picture = pipe("a red car and a cat", subjects=["car", "cat"], modifiers={"car": "red"}).images[0]

A-STAR: Test-time Attention Segregation and Retention (Agarwal et al., ICCV 2023, arXiv 2306.14544).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from attnctl.attachment import Attachment, attach
from attnctl.control import Control
from attnctl.errors import ControlError
from attnctl.loading import load
from attnctl.maps import TokenMaps
from attnctl.processors.astar import AStar
from attnctl.subjects import read_subjects


class AStarPipeline:
    """A diffusers pipeline whose calls name the things of the picture; between calls it is the pipeline it was.

    Attributes:
        pipe: the diffusers pipeline. Whatever is done to it (LoRA, schedulers, offload, devices) holds here.
        settings: of the control, see `AStar`.
        attachment: of the latest call, None before there was one; its `report` and `maps` stay readable.
    """

    def __init__(self, pipe: Any, **settings: Any) -> None:
        AStar("one", "other", **settings)  # a wrong setting fails here, not at the first call
        self.pipe, self.settings = pipe, settings
        self.attachment: Attachment | None = None

    @classmethod
    def from_pipe(cls, pipe: Any, **settings: Any) -> AStarPipeline:
        """Around a pipeline that is there; it is not copied.

        Args:
            pipe: a diffusers pipeline of a family attnctl knows.
            settings: of the control, see `AStar`.
        """
        return cls(pipe, **settings)

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> AStarPipeline:
        """Around a pipeline by its embedded name, folder or hub id.

        Args:
            model: the name, folder or id.
            options: settings of the control, as for `from_pipe`; the others as for `attnctl.load`.
        """
        known = {one.name for one in fields(AStar)} - {"phrases"}
        settings = {name: options.pop(name) for name in known.intersection(options)}
        AStar("one", "other", **settings)  # before anything is loaded
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
            prompt: what to draw. In a list, each picture goes by the subjects that its own prompt has.
            subjects: the things to keep apart and in place, two phrases or more of the prompt, best with their colours,
                as "red car". "auto" reads them and their modifiers from the prompt, see `attnctl.subjects`; that needs
                the extra "subjects".
            modifiers: noun -> its modifier or modifiers: binds them, see `Binding`. None: those that "auto" reads.
            masks: subject -> region it is to be in, see `Retention`.
            maps: record the maps of the prompt's words, for `maps` of what is returned.
            controls: further ones, which see each attention call first.
            arguments: of the pipeline.

        Returns:
            What the pipeline returns. Unless that is a tuple (return_dict=False), it has three attributes more:
            `report`, what A-STAR did (`report.to_json()` is plain data), `maps`, None unless asked for, and `subjects`,
            the phrases that were kept apart.

        Raises:
            AttnctlError: as `attach`, `AStar` and the resolution of phrases raise it.
        """
        if subjects == "auto":
            read = [one for text in ([prompt] if isinstance(prompt, str) else prompt) for one in read_subjects(text)]
            subjects = tuple(dict.fromkeys(one.whole for one in read))
            if modifiers is None:
                modifiers = {
                    noun: [m for one in read if one.phrase == noun for m in one.modifiers]
                    for noun in {one.phrase: None for one in read}
                }
        elif isinstance(subjects, str):
            raise ControlError(f"subjects are several phrases, or 'auto'; not {subjects!r}")
        bonds = dict.fromkeys(
            (modifier, noun)
            for noun, named in (modifiers or {}).items()
            for modifier in ([named] if isinstance(named, str) else named)
        )
        settings = {"bonds": tuple(bonds), "masks": masks or {}} | self.settings
        recorders = [TokenMaps()] if maps else []
        with attach(self.pipe, *controls, AStar(*subjects, **settings), *recorders) as attachment:
            self.attachment = attachment
            output = self.pipe(prompt, **arguments)
        if not isinstance(output, tuple):
            output.report, output.maps = attachment.report, attachment.maps if maps else None
            output.subjects = tuple(subjects)
        return output
