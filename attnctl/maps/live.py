"""LiveMaps: maps of phrases with their gradient, for losses of a training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnctl.engine.control import AttentionCall, Control, Lane, Proceed
from attnctl.engine.model_state import in_backward
from attnctl.engine.run import Run
from attnctl.engine.sites import Selection, Site, with_text
from attnctl.errors import ControlError, PhraseError, of_image
from attnctl.maps.probabilities import call_maps
from attnctl.maps.reader import check_rows, join_grids
from attnctl.words.phrases import TextStream, positions, streams

Grid = tuple[int, int]


@dataclass(frozen=True, init=False)
class LiveMaps(Control):
    """Reads maps of phrases in a training batch (`Attachment.batch`), differentiable; what is predicted stays the same.

    A map is the probability that each place attends to any token of the phrase, under the softmax over all keys, mean
    over heads and over the selected sites, in float32. `batch.state(live).maps()` gives them.

    Args:
        phrases: rows whose caption lacks a phrase have zeros there, and False in `present`.
        where: which sites, see `attnctl.select`; those without text keys are passed over.

    Raises:
        ControlError: no phrase is given.
        NoSiteError: no selected site has text keys.
        PhraseError: at the forward, if no caption of the batch has a phrase, and `absent` is not allowed.
    """

    phrases: tuple[str, ...]
    where: Selection = None
    absent: bool = False

    lane: ClassVar[Lane] = Lane.MAPS

    def __init__(self, *phrases: str, where: Selection = None, absent: bool = False) -> None:
        if not phrases or not all(isinstance(one, str) for one in phrases):
            raise ControlError(f"LiveMaps takes phrases one after the other, as LiveMaps('cat', 'dog'); not {phrases}")
        for name, value in (("phrases", phrases), ("where", where), ("absent", absent)):
            object.__setattr__(self, name, value)

    def sites(self, available: tuple[Site, ...]) -> tuple[Site, ...]:
        return with_text(available, self.where)

    def begin(self, run: Run) -> Live:
        trouble: dict[str, PhraseError] = {}

        def rows_of(text: tuple[TextStream, ...]) -> list[list[int]]:
            found = list[list[int]]()
            for phrase in self.phrases:
                try:
                    found.append(positions(text, phrase))
                except PhraseError as error:
                    trouble.setdefault(phrase, error)
                    found.append([])
            return found

        texts = [streams(run, image) for image in range(run.images)]
        by_text = {text: rows_of(text) for text in dict.fromkeys(texts)}  # captions are often the same
        places = [by_text[text] for text in texts]  # row of the batch, phrase, text rows
        for column, phrase in enumerate(self.phrases):
            if not self.absent and not any(found[column] for found in places):
                raise of_image(trouble[phrase], 0, run.prompts, everywhere=True)
        return Live.of(places)

    def attend(self, call: AttentionCall, proceed: Proceed) -> Tensor:
        out = proceed(call)
        live: Live = call.step.run.state(self)
        maps = live.read(call)  # also where a checkpointed block runs again, which must do the same work
        if not in_backward():
            live.keep(call.grid, maps)
        return out


@dataclass
class Live:
    """The maps of one training batch.

    Attributes:
        present: (rows, phrases), whether the row's caption has the phrase.
    """

    present: Tensor
    tokens: Tensor  # (rows, tokens) text rows to read; short lists are filled up with row 0
    members: Tensor  # (rows, phrases, tokens), 1 where a token is part of a phrase
    last: int
    kept: dict[Grid, tuple[Tensor, int]] = field(default_factory=dict)  # (sum over sites, how many)

    @classmethod
    def of(cls, places: list[list[list[int]]]) -> Live:
        """Of the text rows of each phrase in each row of the batch."""
        rows = [sorted({token for found in phrases for token in found}) for phrases in places]
        most = max(1, *map(len, rows)) if rows else 1
        tokens = torch.tensor([one + [0] * (most - len(one)) for one in rows])
        members = torch.zeros(len(places), len(places[0]), most)
        for i, phrases in enumerate(places):
            for j, found in enumerate(phrases):
                members[i, j, [rows[i].index(token) for token in found]] = 1.0
        return cls(members.any(-1), tokens, members, max((one[-1] for one in rows if one), default=0))

    def read(self, call: AttentionCall) -> Tensor:
        """(rows, phrases, cells) of one attention call, mean over heads."""
        check_rows(call, self.last)
        if self.tokens.device != call.q.device:
            self.tokens, self.members = self.tokens.to(call.q.device), self.members.to(call.q.device)
            self.present = self.present.to(call.q.device)
        with torch.autocast(call.q.device.type, enabled=False):
            maps = call_maps(call, slice(0, call.q.shape[0]), self.tokens)  # (rows, heads, cells, tokens)
            return torch.einsum("rct,rpt->rpc", maps.mean(1), self.members.to(maps))

    def keep(self, grid: Grid, maps: Tensor) -> None:
        """Add what one site gave."""
        total, count = self.kept.get(grid, (0, 0))
        self.kept[grid] = total + maps, count + 1

    def maps(self) -> Tensor:
        """(rows, phrases, height, width), float32, with gradient; sites are averaged on the finest grid among them.

        Raises:
            ControlError: a gradient is wanted and there is none.
        """
        if not self.kept:
            raise ControlError("no map was read: call the denoiser inside the batch first")
        wanted: Any = {grid: total.unflatten(-1, grid) for grid, (total, _) in self.kept.items()}
        found = join_grids(wanted) / sum(count for _, count in self.kept.values())
        if torch.is_grad_enabled() and not found.requires_grad:
            raise ControlError(
                "maps have no gradient: nothing that they depend on is trained, or gradient checkpointing is reentrant"
            )
        return found
