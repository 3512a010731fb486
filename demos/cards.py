"""Cards: what the studio says of each control. All of it comes from the control's own signature and docstring."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from attnctl.app import asked
from attnctl.app.control_text import describe, summary, write_control


@dataclass(frozen=True)
class Card:
    """How one control is called, what it does, and how it is written with all its settings."""

    name: str
    says: str  # one sentence
    written: str  # with the default settings
    whole: str  # the whole docstring
    phrases: bool  # it takes phrases of the prompt
    masks: bool  # it needs a region for each phrase

    def text(self, things: Sequence[str]) -> str:
        """The control, to start from, for these things of the prompt."""
        if self.phrases:
            return write_control(self.name, *things)
        if not self.masks:
            return self.name
        share = 1 / max(1, len(things))  # a column for each thing
        columns = (f"[{it!r}, [{n * share:.2g}, 0, {(n + 1) * share:.2g}, 1]]" for n, it in enumerate(things))
        return f"{self.name}(masks=[{', '.join(columns)}])"


def cards() -> dict[str, Card]:
    """A card for each control there is, by name."""
    found = (_card(cls) for cls in asked.known_controls().values())
    return {card.name: card for card in found}


def _card(cls: type) -> Card:
    written = describe(cls)
    name, _, settings = written.partition("(")
    masks = inspect.signature(cls).parameters.get("masks")
    return Card(
        name=name,
        says=" ".join(summary(cls).split()),
        written=written,
        whole=inspect.cleandoc(summary(cls, whole=True)),
        phrases=settings.startswith("*"),
        masks=masks is not None and masks.default is masks.empty,
    )


@dataclass(frozen=True)
class Example:
    """A complaint, and a case on glyph-sd that shows it and mends it."""

    complaint: str
    prompt: str
    controls: str = ""
    regions: str = ""
    seed: int = 0
    guidance: float = 3.0


EXAMPLES = (
    Example("One of my two things is missing", "a cat and a dog", "astar(cat, dog)", seed=1),
    Example("A colour is on the wrong thing", "a blue car and a red crown", "binding(blue car, red crown)", seed=2),
    Example("It must be on the left", "a red car and a cat", "", "cat: 0,0,0.5,1\nred car: 0.5,0,1,1", seed=0),
    Example("It looks flat without guidance", "a red car and a cat", "perturb(heads=6 7, u=0.5)", seed=0, guidance=1.0),
)
