"""Maps: which places of the picture look at which word, by phrase."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnctl.engine.control import AttentionCall
from attnctl.engine.run import NO_WORDS
from attnctl.errors import ControlError, NoSiteError, PhraseError, of_image, short
from attnctl.maps.probabilities import call_maps
from attnctl.words.phrases import TextStream, of_negative, positions, text_rows
from attnctl.words.spelling import words

if TYPE_CHECKING:
    from PIL.Image import Image

Grid = tuple[int, int]
Kept = Literal["step", "layer", "head"]
KEEP: tuple[Kept, ...] = ("step", "layer", "head")


@dataclass
class _Sum:
    total: Tensor  # (images, heads, cells, tokens); heads is 1 where they are averaged
    count: int


class Maps:
    """The maps of one pipeline call, by phrase: `maps["cat"]`. Readable while the pipeline runs and ever after.

    Attributes:
        images: how many pictures there are.
        words: what may be asked for: the phrases that were recorded, or the words of the prompts. When all words were
            recorded, any phrase made of them ("red car") may be asked for too.
        negative: the maps of the negative prompt's words, if any were asked for; `maps["negative:blurry"]` reads them.
    """

    def __init__(
        self,
        texts: Sequence[tuple[TextStream, ...]],
        phrases: tuple[str, ...] | None,
        keep: tuple[Kept, ...],
        negatives: Sequence[tuple[TextStream, ...]] | None = None,
    ):
        self.images, self.keep = len(texts), keep
        self.negative: Maps | None = None
        self._texts, self._asked, self._phrases = texts, phrases, phrases
        if phrases is not None and negatives is not None:
            self.negative = _of_negative(negatives, phrases, keep)
            phrases = self._phrases = tuple(phrase for phrase in phrases if of_negative(phrase) is None)
        found = _once_each(_all_rows if phrases is None else lambda text: _rows_of(text, phrases), texts)
        self._rows: list[list[int]] = found
        for phrase in phrases or ():
            self._find(phrase)
        most = max(map(len, found))
        filled = [rows + [0] * (most - len(rows)) for rows in found]
        alike = all(rows == filled[0] for rows in filled)
        self._tokens = torch.tensor(filled[0] if alike else filled)  # (tokens,) or (images, tokens)
        self._last = max((rows[-1] for rows in found if rows), default=-1)  # -1: no prompt has a word
        self._sums: dict[tuple[int | None, int | None, Grid], _Sum] = {}
        self._names: dict[str, int] = {}

    def __repr__(self) -> str:
        what = f"{len(self.layers)} sites, words: {short(', '.join(self.words), 120)}"
        images = f"{self.images} image{'s' * (self.images != 1)}"
        return f"<Maps of {images}, {what if self.layers else 'nothing recorded yet'}>"

    # --- recording ----------------------------------------------------------------------------------------------------

    def add(self, call: AttentionCall, rows: slice, lse: Tensor | None) -> None:
        """Add one attention call.

        Args:
            call: the call.
            rows: its conditional rows, one per image.
            lse: (batch, heads, queries), see `token_maps`.
        """
        if self._last < 0:
            return
        check_rows(call, self._last)
        if self._tokens.device != call.q.device:
            self._tokens = self._tokens.to(call.q.device)
        maps = call_maps(call, rows, self._tokens, lse)  # (images, heads, cells, tokens)
        apart = "head" in self.keep
        maps = maps if apart else maps.mean(dim=1, keepdim=True)
        layer = call.site.layer if apart or "layer" in self.keep else None
        key = (call.step.index if "step" in self.keep else None, layer, call.grid)
        if (entry := self._sums.get(key)) is None:
            self._sums[key] = _Sum(maps, 1)
        else:
            entry.total += maps.to(entry.total.device)
            entry.count += 1
        self._names[call.site.name] = call.site.layer

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def words(self) -> tuple[str, ...]:
        """What may be asked for, in order."""
        if self._asked is not None:
            return self._asked
        every = dict.fromkeys(w for text in dict.fromkeys(self._texts) for stream in text for w in words(stream.prompt))
        return tuple(word for word in every if any(_try(text, word) for text in dict.fromkeys(self._texts)))

    @property
    def _prompts(self) -> list[str]:
        return [text[0].prompt if text else "" for text in self._texts]

    @property
    def steps(self) -> tuple[int, ...]:
        """Denoiser calls that were kept apart, from 0."""
        own = {step for step, _, _ in self._sums if step is not None}
        return tuple(sorted(own | set(self.negative.steps if self.negative else ())))

    @property
    def layers(self) -> tuple[int, ...]:
        """`Site.layer` of the sites that were recorded."""
        return tuple(sorted({*self._names.values(), *(self.negative.layers if self.negative else ())}))

    def __getitem__(self, phrase: str) -> Tensor:
        """`get(phrase)`."""
        return self.get(phrase)

    def get(
        self,
        phrase: str,
        normalise: Literal["max", "sum"] | None = None,
        step: int | None = None,
        layer: int | str | None = None,
        head: int | None = None,
    ) -> Tensor:
        """The map of a phrase.

        The tokens of a phrase are summed: it is the probability that a place attends to any of them. Sites are averaged
        on the finest grid among them. An image whose prompt does not have the phrase gets zeros.

        Args:
            phrase: one of `words`, or, if all words were recorded, any phrase of a prompt.
            normalise: "max" divides each image's map by its highest value, "sum" by its sum; None leaves probabilities.
            step: one denoiser call instead of the mean over all; needs keep=("step",).
            layer: one site, by `Site.layer` or name; needs keep=("layer",).
            head: one head, from 0; needs keep=("head",).

        Returns:
            (images, height, width), float32, on the CPU.

        Raises:
            PhraseError: no prompt has the phrase, or it was not recorded.
            ControlError: nothing was recorded, or not kept apart that way.
        """
        if (own := of_negative(phrase)) is not None:
            if self.negative is None:
                raise PhraseError(f"{phrase!r} was not recorded: name it, as TokenMaps({phrase!r})")
            return self.negative.get(own, normalise, step, layer, head)
        columns = self._columns(phrase)  # (images, tokens)
        chosen = self._chosen(step, layer, head)
        by_grid: dict[Grid, Tensor] = {}
        for (_, _, grid), entry in chosen:
            total = entry.total[:, head : head + 1] if head is not None else entry.total
            one = torch.einsum("ihct,it->ic", total, columns.to(total)) / total.shape[1]  # (images, cells)
            by_grid[grid] = by_grid.get(grid, 0) + one.unflatten(1, grid).cpu()
        found = join_grids(by_grid) / sum(entry.count for _, entry in chosen)
        if normalise is None:
            return found
        if normalise not in ("max", "sum"):
            raise ControlError(f"maps are normalised by 'max' or 'sum', not {normalise!r}")
        return found / (found.amax((1, 2), True) if normalise == "max" else found.sum((1, 2), True)).clamp_min(1e-12)

    def overlay(self, phrase: str, picture: Image, image: int = 0) -> Image:
        """A phrase's map as heat over the picture it belongs to."""
        from attnctl.maps.pictures import overlay

        return overlay(picture, self.get(phrase)[image])

    def picture(self, pictures: Image | Sequence[Image], phrases: Iterable[str] | None = None) -> Image:
        """One row per image: the picture, then each phrase's map over it, under its name.

        Args:
            pictures: what the pipeline drew, in order.
            phrases: which, in order; None for all of `words`, in each row those of its own prompt.
        """
        from attnctl.maps.pictures import cells
        from attnctl.sheets import grid

        pictures = list(pictures) if isinstance(pictures, Sequence) else [pictures]
        maps = {phrase: self.get(phrase) for phrase in (self.words if phrases is None else phrases)}
        rows = [
            cells(picture, {word: found[i] for word, found in maps.items() if found[i].any()}, self._prompts[i])
            for i, picture in enumerate(pictures)
        ]
        return grid(rows, points=max(14, min(rows[0][0][1].height // 12, 28)))  # type: ignore[union-attr]

    def _find(self, phrase: str) -> list[list[int]]:
        """Text rows of a phrase per image; empty where the image's prompt does not have it."""
        if not any(self._texts):
            raise PhraseError(NO_WORDS)
        found = _once_each(lambda text: _try(text, phrase), self._texts)
        if not any(found):
            try:
                positions(self._texts[0], phrase)  # raises and says why
            except PhraseError as error:
                raise of_image(error, 0, self._prompts, everywhere=True) from None
        return found

    def _columns(self, phrase: str) -> Tensor:
        """(images, tokens): 1 where a recorded token is part of the phrase."""
        columns = torch.zeros(self.images, self._tokens.shape[-1])
        for image, rows in enumerate(self._find(phrase)):
            if not set(rows) <= set(self._rows[image]):
                raise PhraseError(f"{phrase!r} was not recorded; recorded are: {', '.join(self.words)}")
            columns[image, [self._rows[image].index(row) for row in rows]] = 1.0
        return columns

    def _chosen(self, step: int | None, layer: int | str | None, head: int | None) -> list[tuple[Any, _Sum]]:
        for name, value in (("step", step), ("layer", layer), ("head", head)):
            if value is not None and name not in self.keep and not (name == "layer" and "head" in self.keep):
                raise ControlError(f"maps were averaged over every {name}; record with TokenMaps(keep=({name!r},))")
        if not self._sums:
            raise ControlError("no map was recorded: the pipeline has not run, or no step was inside the window")
        if step is not None and step not in self.steps:
            raise ControlError(f"step {step} was not recorded; there are {_spell(self.steps)}")
        number = self._names.get(layer) if isinstance(layer, str) else layer
        if layer is not None and number not in self.layers:
            raise NoSiteError(f"site {layer!r} was not recorded; there are layers {_spell(self.layers)}")
        chosen = [
            (key, entry) for key, entry in self._sums.items() if step in (None, key[0]) and number in (None, key[1])
        ]
        heads = [entry.total.shape[1] for _, entry in chosen]
        if head is not None:
            if not 0 <= head < max(heads):
                raise ControlError(f"head {head} is out of range: there are heads 0 to {max(heads) - 1}")
            chosen = [pair for pair, count in zip(chosen, heads, strict=True) if head < count]
        return chosen


def _of_negative(texts: Sequence[tuple[TextStream, ...]], phrases: tuple[str, ...], keep: tuple[Kept, ...]) -> Maps:
    """The maps of those of the phrases that are of the negative prompt."""
    try:
        return Maps(texts, tuple(own for phrase in phrases if (own := of_negative(phrase)) is not None), keep)
    except PhraseError as error:
        raise PhraseError(f"negative prompt: {error}") from None


def join_grids(maps: dict[Grid, Tensor]) -> Tensor:
    """The sum of maps of several grids, on the finest of them.

    Args:
        maps: grid -> (images, height, width) or (images, tokens, height, width).
    """
    finest = max(maps, key=lambda grid: grid[0] * grid[1])
    fitted = []
    for grid, one in maps.items():
        if grid != finest:
            four = one if one.ndim == 4 else one[:, None]
            one = F.interpolate(four, finest, mode="bilinear", align_corners=False).view(*one.shape[:-2], *finest)
        fitted.append(one)
    return torch.stack(fitted).sum(0)


def check_rows(call: AttentionCall, last: int) -> None:
    """Raise if the text rows of a call end before this one: the prompt was encoded shorter than we were told."""
    count = call.text.stop - call.text.start
    if last >= count:
        raise PhraseError(
            f"{call.site.name} has {count} text rows, but a word of the prompt was looked for in row {last}"
        )


def _all_rows(text: tuple[TextStream, ...]) -> list[int]:
    return text_rows(text)


def _rows_of(text: tuple[TextStream, ...], phrases: tuple[str, ...]) -> list[int]:
    return sorted({row for phrase in phrases for row in _try(text, phrase)})


def _try(text: tuple[TextStream, ...], phrase: str) -> list[int]:
    try:
        return positions(text, phrase)
    except PhraseError:
        return []


def _once_each(work: Any, texts: Sequence[tuple[TextStream, ...]]) -> list[list[int]]:
    """work(text) for each image, done once for images with the same prompt."""
    done = {text: work(text) for text in dict.fromkeys(texts)}
    return [done[text] for text in texts]


def _spell(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers)) or "none kept apart"
