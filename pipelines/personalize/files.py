"""What a training has learnt, in the form in which it is kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attnctl.concepts import Learnt
from attnctl.pipelines.personalize.trainer import Trainer


def learnt_of(trainer: Trainer, before: Mapping[str, Tensor]) -> Learnt:
    """What a finished training has learnt.

    Args:
        trainer: done.
        before: name -> the keys' and values' weights before it.
    """
    encoders = trainer.encoders.all
    words = {
        one.word: tuple(encoder.rows[k].detach().float().cpu().clone() for encoder in encoders)
        for k, one in enumerate(trainer.concepts)
    }
    if trainer.settings.trained == "lora":
        from attnctl.pipelines.personalize.adapters import adapters_of

        lora = adapters_of(trainer.model)
    else:
        change = {name: trainer.tuned[name].detach().cpu() - weight.cpu() for name, weight in before.items()}
        lora = factored(change, trainer.settings.rank)
    return Learnt(tuple(trainer.concepts), words, lora, trainer.settings.to_dict(), family=trainer.denoising.family)


def factored(changes: Mapping[str, Tensor], rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Changes of weights as products of two thin matrices, by singular values; exact without a rank.

    Args:
        changes: name of a weight -> (out, in).
        rank: how many singular values are kept; None: all. Smaller weights are filled up with zeros, so that all have
            one rank: loaders take a scale from it.
    """
    most = max(min(one.shape) for one in changes.values())
    rank = most if rank is None else min(rank, most)
    found = {}
    for name, change in changes.items():
        u, s, v = torch.linalg.svd(change.double(), full_matrices=False)
        kept = min(rank, len(s))
        root = s[:kept].sqrt()
        up, down = change.new_zeros(change.shape[0], rank), change.new_zeros(rank, change.shape[1])
        up[:, :kept], down[:kept] = u[:, :kept] * root, root[:, None] * v[:kept]
        found[name.removesuffix(".weight")] = down, up
    return found
