"""Which batch rows of a denoiser call are conditional: told by what was encoded, not guessed from the kind of model.

A pipeline's `encode_prompt` returns embeddings of the prompt and of the negative prompt, or is called once for each.
The text that the denoiser is given is matched with them: by identity, then by value. A Modular Diffusers pipeline has a
guider instead, which names the batches it prepares. Where neither tells anything, the pipeline's `cache_context` does,
and last the order of the family, [unconditional; conditional].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from attnctl.engine.run import Rows, Run
from attnctl.errors import UnsupportedPipelineError

Branch = Literal["cond", "uncond", "extra"]


class Branches:
    """What is known of the pipeline call under way.

    Attributes:
        told: the name of the `cache_context` that the pipeline is in, if any.
    """

    def __init__(self) -> None:
        self.told: str | None = None
        self._positive: list[Tensor] = []  # embeddings that encode_prompt returned
        self._negative: list[Tensor] = []
        self._prepared: list[tuple[Branch, list[Tensor]]] = []  # by a guider, for this step
        self._latest: list[tuple[Tensor, int, Rows]] = []  # of the latest calls: text, batch size, answer

    def clear(self) -> None:
        """A pipeline call begins, or ends."""
        self._positive, self._negative, self._latest = [], [], []

    def encoded(self, returned: Any) -> None:
        """Keep what `encode_prompt` returned: the prompt first, then the negative one, in one call or in two."""
        parts = returned if isinstance(returned, tuple) else (returned,)
        texts = [part for part in parts if isinstance(part, Tensor) and part.ndim == 3]
        if not self._positive:
            self._positive, self._negative = texts[:1], texts[1:2]
        elif not self._negative:
            self._negative = texts[:1]

    def prepared(self, batches: Any) -> None:
        """Keep the batches that a guider has prepared for the calls of a step."""
        names: dict[str, Branch] = {"pred_cond": "cond", "pred_uncond": "uncond"}
        self._prepared = [
            (
                names.get(getattr(one, "__guidance_identifier__", ""), "extra"),
                [value for value in vars(one).values() if isinstance(value, Tensor)],
            )
            for one in batches
        ]

    def guider(self, text: Any) -> Branch | None:
        """What a guider calls the denoiser call that is made now with this text; None if there is no guider.

        Several of its batches may have the same text; they are called in order, so each is taken once.
        """
        for number, (branch, tensors) in enumerate(self._prepared):
            if any(text is one for one in tensors):
                del self._prepared[number]
                return branch
        return None

    def _of(self, text: Any) -> Branch | None:
        """The branch whose text was encoded so; None if nothing tells."""
        if not isinstance(text, Tensor):
            return None
        positive, negative = (any(same_text(text, one) for one in own) for own in (self._positive, self._negative))
        return None if positive == negative else "cond" if positive else "uncond"

    def rows(self, run: Run, total: int, text: Any, extra: bool, guider: Branch | None = None) -> Rows:
        """Which rows of a denoiser call are what.

        Args:
            run: the pipeline call.
            total: batch size of the denoiser call.
            text: its text input.
            extra: it is a further pass over conditional rows.
            guider: what a guider calls it, see `guider`.

        Raises:
            UnsupportedPipelineError: it has more parts than an unconditional and a conditional one, or nothing tells
                which is which.
        """
        if extra:
            return Rows(slice(0, total), None, total)
        if guider is not None and total == run.images:
            own = slice(0, total)
            return Rows(None, own, total) if guider == "uncond" else Rows(own, None, total)
        for known, size, rows in self._latest:  # pipelines give the same tensor at each step
            if known is text and size == total:
                return rows
        rows = self._rows(run, total, text)
        if isinstance(text, Tensor):
            self._latest = [*self._latest[-3:], (text, total, rows)]
        return rows

    def _rows(self, run: Run, total: int, text: Any) -> Rows:
        images, everything = run.images, slice(0, total)
        if total == images or (run.family.branches == "sequential" and total != 2 * images):
            branch = self._of(text) or self.told
            return Rows(None, everything, total) if branch == "uncond" else Rows(everything, None, total)
        if total == 2 * images:
            first, second = slice(0, images), slice(images, total)
            halves = (self._of(text[first]), self._of(text[second])) if isinstance(text, Tensor) else (None, None)
            if halves == ("cond", "uncond"):
                return Rows(first, second, total)
            if halves == ("uncond", "cond") or (run.guided and run.family.branches == "batched"):
                return Rows(second, first, total)
        raise UnsupportedPipelineError(
            f"{type(run.pipe).__name__} calls its denoiser with {total} rows for {images} images; "
            "attnctl knows one row per image, or an unconditional and a conditional one"
        )


def same_text(one: Tensor, other: Tensor) -> bool:
    """Whether two embeddings are the same: one tensor, or the same numbers."""
    return one is other or (one.shape == other.shape and torch.equal(one, other.to(one)))
