"""Settings of a personalisation, and the two presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from attnctl.errors import ControlError
from attnctl.pipelines.presets import preset_with
from attnctl.processors.calibration import Calibration

Trained = Literal["full", "lora"]
Start = Literal["noun", "rare"]
Views = Literal["ours", "paper", "none"]
Precision = Literal["no", "bf16", "fp16"]
CHOICES = {
    "trained": ("full", "lora"),
    "start": ("noun", "rare"),
    "views": ("ours", "paper", "none"),
    "masks": ("ours", "paper", "none"),
    "subsets": ("all", "uniform", "loss"),
    "counted": ("view", "union", "rest"),
    "guidance": ("jsd", "mse"),
    "precision": ("no", "bf16", "fp16"),
    "levels": ("uniform", "logit-normal"),
}
THINGS = (
    "red clock", "blue chair", "balloon", "green suitcase", "dog", "yellow backpack", "crown", "purple bench", "horse",
    "brown monkey", "green apple", "blue car", "bird", "white bow",
)  # fmt: skip
"""What most models know: they need not be in the picture."""


@dataclass(frozen=True)
class Settings:
    """How concepts are learnt.

    Args:
        steps: of the optimiser.
        rows: views of the picture in each pass through the model.
        accumulate: passes in each step, whose gradients add up: rows=2 with accumulate=2 learns as rows=4 does, in less
            memory.
        precision: "bf16" or "fp16" narrows what autocast may; weights, losses and maps stay in float32. "no": nothing.
        regular_rows: pictures of the class nouns in each pass, drawn by the model before training (prior preservation).
        regular: how many such pictures are drawn.
        regular_weight: of their loss, against that of the views.
        keep: weight of the loss that holds keys and values of all other words and of the padding as they are, see
            `attnctl.pipelines.personalize.keeping` (ours).
        kv_rate, word_rate: learning rates of keys and values, and of the new words.
        ease: both rates fall in a straight line to a twentieth at the last step; False: they stay.
        decay: weight decay of keys and values; the words have none.
        trained: "full" tunes the key and value projections of cross-attention themselves, "lora" adapters on them.
        rank: of the adapters; None is 16 for "lora", and for "full" whatever keeps the files exact.
        start: the new words begin as their "noun", or as "rare" pieces of the vocabulary.
        bind, separate, power, smooth, detach, pairs: see `attnctl.processors.calibration.Calibration`.
        factor: latent cells per cell of the maps that are calibrated; None is what comes nearest to 16 x 16.
        snr: min-SNR weight of the denoising loss (5 is usual); None is none. For models that predict velocity the
            weight all but silences the noisiest steps, in which colours and shapes are chosen.
        levels: how often each noise level is met: all as often ("uniform"), or those in the middle more often
            ("logit-normal", as SD 3 was trained: Esser et al., ICML 2024, arXiv 2403.03206). Flow-matching models are
            then shifted towards noise as their scheduler says.
        views: "ours" enlarges, shrinks, moves and mirrors the picture, its rim repeated outwards; "paper" is what
            Custom Diffusion does, with grey around small pictures and words about the size; "none" leaves it.
        view_count: how many views are made, of each subset of the things.
        others: things beside the nouns that regular pictures show: prompts that name more than the learnt things keep
            working.
        masks: how the places of the things are found where the caller gives none: "ours" and "paper" by the model's
            attention, see `masks.look`; "none": not at all. All settings below need masks.
        subsets: views and their captions have "all" things; or, by chance, any subset of them: each as often
            ("uniform", AttenCraft), or in the proportion of how much is still to be learnt, the running mean of its
            denoising loss ("loss", our stand-in for their adaptive sampling).
        zoom: a view of some of the things shows them large, with the others painted out. False: it is as any other.
        counted: where the denoising loss is taken: the whole "view", the "union" of the things that the caption names
            (AttenCraft), or the "rest" when the other things are taken away. Always the mean over what counts.
        refresh: after every so many steps masks are looked for again, with the weights as they are by then; they are
            taken if each is like the former (`masks.renewed`, AttenCraft). 0: never. Masks of the caller's stay.
        contrast, temperature: weight and sharpness of the loss that keeps the new words' text states from the other
            concepts, see `attnctl.processors.contrast` (ours). It compares the rows of a pass, so it needs two.
        guide: weight of the guidance of the new words' maps to the masks.
        guidance: "jsd" (AttenCraft) or "mse", see `attnctl.processors.attencraft.guidance`.
        lead, article: captions are lead + article + "<v1> cat" + " and " + article + "<v2> car".
        seed: of everything random.

    Raises:
        ControlError: a setting is out of its range.
    """

    steps: int = 200
    rows: int = 4
    accumulate: int = 1
    precision: Precision = "no"
    regular_rows: int = 0
    regular: int = 24
    regular_weight: float = 1.0
    keep: float = 30.0
    kv_rate: float = 2e-3
    word_rate: float = 1e-2
    ease: bool = True
    decay: float = 0.01
    trained: Trained = "full"
    rank: int | None = None
    start: Start = "noun"
    bind: float = 0.003
    separate: float = 0.0005
    power: int = 2
    smooth: bool = True
    detach: bool = True
    pairs: Literal["mean", "sum"] = "mean"
    factor: int | None = None
    snr: float | None = None
    levels: Literal["uniform", "logit-normal"] = "uniform"
    views: Views = "ours"
    view_count: int = 24
    others: tuple[str, ...] = THINGS
    masks: Literal["ours", "paper", "none"] = "ours"
    subsets: Literal["all", "uniform", "loss"] = "uniform"
    zoom: bool = True
    counted: Literal["view", "union", "rest"] = "rest"
    refresh: int = 0
    contrast: float = 0.0
    temperature: float = 0.1
    guide: float = 0.0
    guidance: Literal["jsd", "mse"] = "jsd"
    lead: str = ""
    article: str = "a "
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "accumulate", "view_count"):
            self._whole(name, 1)
        for name in ("regular_rows", "regular", "refresh", "seed"):
            self._whole(name, 0)
        for name in ("rank", "factor"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        for name in ("regular_weight", "kv_rate", "word_rate", "decay", "contrast", "guide", "keep", "snr"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ControlError(f"{name} is a number from 0 up, not {value!r}")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ControlError(f"{name} is one of {', '.join(choices)}; not {getattr(self, name)!r}")
        if self.regular_rows and not self.regular:
            raise ControlError("regular_rows needs regular pictures; set regular as well, or regular_rows to 0")
        if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
            raise ControlError(f"temperature is a number above 0, not {self.temperature!r}")
        if self.contrast and self.rows < 2:
            raise ControlError("contrast compares the rows of a pass; set rows to 2 or more, or contrast to 0")
        if self.refresh and self.masks == "none":
            raise ControlError("refresh renews masks, and masks=none has none; set masks as well, or refresh to 0")
        for name in ("zoom", "ease"):
            if not isinstance(getattr(self, name), bool):
                raise ControlError(f"{name} is True or False, not {getattr(self, name)!r}")
        others = self.others.split(",") if isinstance(self.others, str) else self.others
        object.__setattr__(self, "others", tuple(" ".join(str(one).split()) for one in others if str(one).strip()))
        self.calibration  # noqa: B018  # checks its own

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ControlError(f"{name} is a whole number from {least} up, not {value!r}")

    @property
    def calibration(self) -> Calibration:
        """The losses on maps."""
        return Calibration(self.bind, self.separate, self.power, self.smooth, self.detach, self.pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


PAPER = Settings(
    steps=250, rows=4, regular_rows=4, regular=200, kv_rate=8e-5, word_rate=8e-5, start="rare",
    bind=0.01, separate=0.01, snr=None, views="paper", view_count=200, lead="photo of a ", article="", seed=1,
    ease=False, keep=0.0, others=(), masks="none", subsets="all", zoom=False, counted="view",
)  # fmt: skip
"""DisenDiff's settings (specification of the paper and its code): effective batch 8, half of it regular pictures."""

PRESETS = {"ours": Settings(), "paper": PAPER}
"""`ours` was found on glyph-sd; its learning rates are far too high for SD 1.5, for which there is `paper`."""


def settings_of(preset: str = "ours", **changes: Any) -> Settings:
    """A preset with changes.

    Raises:
        ControlError: there is no such preset or setting, or one is out of its range.
    """
    return preset_with(PRESETS, preset, changes)
