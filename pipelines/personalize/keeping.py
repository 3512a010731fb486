"""Keeping: what keys and values make of other words than the learnt ones stays as it is.

Keys and values are linear in the text: k = W x. For text states x of captions without the new words, the change of W is
held small where such states are (ours; Perfusion, Tewel et al., SIGGRAPH 2023, arXiv 2305.01644, weighs its edits by
the same covariance):

    loss = mean over weights W of  tr(D C D^T) / tr(W C W^T),   D = W now - W before,   C = mean of x x^T

It is what drawing pictures for prior preservation is for, at no cost in time. It matters most for the padding: models
may look at it more than at the words, and the prompt that guidance subtracts is nothing but padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnctl.pipelines.personalize.denoising import Denoising, ids_of


@torch.no_grad()
def covariance(denoising: Denoising, captions: Sequence[str], size: tuple[int, int]) -> Tensor:
    """(width, width): mean of x x^T over text states; words and padding weigh the same.

    Args:
        denoising: of a pipeline before it is trained.
        captions: without new words.
        size: (height, width) of pictures in pixels.
    """
    tokenizer = denoising.encoders[0][0]
    captions = ["", *dict.fromkeys(captions)]
    states = denoising.text(captions, size)["encoder_hidden_states"].float()  # (captions, tokens, width)
    length = states.shape[1]
    ids = ids_of(tokenizer, captions, length)
    ends = (ids == tokenizer.eos_token_id).int().argmax(1, keepdim=True)
    padding = torch.arange(length) > ends  # (captions, tokens)
    parts = [states[kind.to(states.device)] for kind in (~padding, padding)]
    return torch.stack([x.T @ x / len(x) for x in parts if len(x)]).mean(0)


def kept(changes: Mapping[str, Tensor], before: Mapping[str, Tensor], spread: Tensor) -> Tensor:
    """The loss, from 0: the mean share by which keys and values of such text have changed, squared.

    Args:
        changes: name -> change of a weight, (out, width), with its gradient.
        before: name -> the weight before training.
        spread: (width, width), see `covariance`.
    """
    shares = [
        ((change @ spread) * change).sum() / ((before[name] @ spread) * before[name]).sum().clamp_min(1e-12)
        for name, change in changes.items()
    ]
    return torch.stack(shares).mean()
