"""What a composition can be set to, and the presets: `paper`, as PrimeComposer's figure and scripts, and `ours`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from attnctl.errors import ControlError
from attnctl.pipelines.inversion import Method
from attnctl.pipelines.pasting import Fit
from attnctl.pipelines.presets import preset_with
from attnctl.processors.composition import Rows


@dataclass(frozen=True)
class Settings:
    """Of a composition. The defaults are the preset `ours`.

    Attributes:
        steps: of the whole schedule.
        solver: "dpm", DPM-Solver++(2M); "ddim", which is Euler for flow matching; "auto": dpm where it can be.
        rounds: of the fixed-point iteration that puts ddim backwards right.
        start: the share of the steps that is left out. 0 harmonises more, 0.5 is truer to the object and half the cost.
        guidance: classifier-free guidance while drawing.
        invert: "pasted": the object's latents are those of the picture that it is pasted into; "alone": on black.
        rim: where the box is not the object, the start has the "background" latents or fresh "noise".
        infuse: the part of the schedule, from its beginning, in which self-attention is infused; the paper's tau_a.
        rows: how, see `attnctl.processors.composition.infused`.
        words: "object": the object's words act in its cells only (RCA); "both": those of the background only outside
            of them, too; "none".
        blend: the part of the schedule after whose steps everything outside of the box is the background's inversion;
            the paper's tau_b.
        paste: the part of the schedule after whose steps the object's cells are their inversion's; the release's tau_c.
        extended: the paper's extended guidance, for one pass more a step while infusing.
        least: a latent cell belongs to the object if it covers more of it than this.
        margin: latent cells by which the drawn box is larger than the one that was asked for, on each side.
        fit: the object keeps its shape "inside" the box, or is made to "stretch" over it.
    """

    steps: int = 20
    solver: Method = "auto"
    rounds: int = 3
    start: float = 0.5
    guidance: float = 1.5
    invert: Literal["pasted", "alone"] = "pasted"
    rim: Literal["background", "noise"] = "background"
    infuse: float = 1.0
    rows: Rows = "own"
    words: Literal["both", "object", "none"] = "both"
    blend: float = 1.0
    paste: float = 0.0
    extended: bool = False
    least: float = 0.1
    margin: int = 1
    fit: Fit = "inside"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if (known := get_args(kind)) and str(getattr(self, name)) not in known:
                raise ControlError(f"{name} is one of {', '.join(known)}; not {getattr(self, name)!r}")
        for name in ("start", "infuse", "blend", "paste", "least"):
            if not (_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise ControlError(f"{name} is a share, from 0 to 1; not {getattr(self, name)!r}")
        for name, least in (("steps", 1), ("rounds", 0), ("margin", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ControlError(f"{name} is a whole number from {least} up; not {value!r}")
        if not isinstance(self.extended, bool):
            raise ControlError(f"extended is true or false; not {self.extended!r}")
        if not (_number(self.guidance) and 0 <= self.guidance < float("inf")):
            raise ControlError(f"guidance is a number from 0 up; not {self.guidance!r}")
        if self.first() >= self.steps:
            raise ControlError(f"start {self.start} leaves none of {self.steps} steps")

    def first(self) -> int:
        """The node of the schedule to start from."""
        return round(self.start * self.steps)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# Guidance and tau_a of the paper's scripts, by the domain of the background.
DOMAINS = {"photo": (2.0, 0.3), "painting": (2.5, 0.3), "sketch": (2.5, 0.6), "cartoon": (3.0, 0.4)}


def _paper(domain: str) -> Settings:
    guidance, infuse = DOMAINS[domain]
    return Settings(
        start=0.0, guidance=guidance, invert="pasted" if domain == "photo" else "alone", rim="noise", infuse=infuse,
        rows="columns", words="object", blend=0.8, extended=True, least=0.5, margin=0,
    )  # fmt: skip


PRESETS = {"ours": Settings(), "paper": _paper("photo")} | {f"paper-{domain}": _paper(domain) for domain in DOMAINS}


def settings_of(preset: str = "ours", **changes: Any) -> Settings:
    """A preset with some settings changed.

    Raises:
        ControlError: there is no such preset or setting, or one is out of its range.
    """
    return preset_with(PRESETS, preset, changes)
