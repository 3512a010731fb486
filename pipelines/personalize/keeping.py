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

from attnctl.pipelines.personalize.denoising import Denoising

LEVELS = 2


def spreads(denoising: Denoising, captions: Sequence[str], latents: Tensor, seed: int) -> dict[str, Tensor]:
    """name of a weight -> C, (width, width), before training.

    Cross-attention reads the text as the encoders give it. In joint attention each block changes the text, by what it
    reads in the picture; so the states are gathered where they enter each weight, in forwards without gradient, in
    which the captions go with views of the picture. That stands for what they meet in other pictures.

    Args:
        denoising: of a pipeline before it is trained.
        captions: without new words.
        latents: (examples, channels, height, width), of the views.
        seed: of the noise.
    """
    captions = ["", *dict.fromkeys(captions)]
    if denoising.reads == "joint":
        return gathered(denoising, captions, latents, seed)
    return dict.fromkeys(denoising.keys_and_values, covariance(denoising, captions, denoising.picture_size(latents)))


@torch.no_grad()
def gathered(denoising: Denoising, captions: Sequence[str], latents: Tensor, seed: int) -> dict[str, Tensor]:
    """See `spreads`: each caption at `LEVELS` noise levels."""
    dice, count = torch.Generator().manual_seed(seed), LEVELS * len(captions)
    shares = (torch.randperm(count, generator=dice) + 0.5) / count
    modules = dict(denoising.model.named_modules())
    sums = {name: [torch.zeros(()), torch.zeros(())] for name in denoising.keys_and_values}  # of words, of padding
    counts, masks = [0, 0], list[Tensor]()

    def add(name: str, states: Tensor) -> None:
        for kind, mask in enumerate(masks):
            x = states.float()[mask.to(states.device)]
            sums[name][kind] = sums[name][kind] + (x.T @ x).cpu()

    handles = [
        modules[name.removesuffix(".weight")].register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
        for name in sums
    ]
    try:
        for at in range(0, count, 4):
            some = [captions[k % len(captions)] for k in range(at, min(at + 4, count))]
            rows = latents[torch.randint(len(latents), (len(some),), generator=dice)]
            padding = denoising.padding(some)
            masks = [~padding, padding]
            counts = [total + int(mask.sum()) for total, mask in zip(counts, masks, strict=True)]
            text = denoising.text(some, denoising.picture_size(latents))
            denoising.predict(rows, denoising.times(shares[at : at + len(some)]), dice, text)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: torch.stack([total / number for total, number in zip(both, counts, strict=True) if number]).mean(0)
        for name, both in sums.items()
    }


@torch.no_grad()
def covariance(denoising: Denoising, captions: Sequence[str], size: tuple[int, int]) -> Tensor:
    """(width, width): mean of x x^T over text states; words and padding weigh the same.

    Args:
        denoising: of a pipeline before it is trained.
        captions: without new words.
        size: (height, width) of pictures in pixels.
    """
    states = denoising.text(captions, size)["encoder_hidden_states"].float()  # (captions, tokens, width)
    padding = denoising.padding(captions)  # (captions, tokens)
    parts = [states[kind.to(states.device)] for kind in (~padding, padding)]
    return torch.stack([x.T @ x / len(x) for x in parts if len(x)]).mean(0)


def kept(changes: Mapping[str, Tensor], before: Mapping[str, Tensor], spread: Mapping[str, Tensor]) -> Tensor:
    """The loss, from 0: the mean share by which keys and values of such text have changed, squared.

    Args:
        changes: name -> change of a weight, (out, width), with its gradient.
        before: name -> the weight before training.
        spread: name -> (width, width), see `spreads`.
    """
    shares = [
        ((change @ spread[name]) * change).sum() / ((before[name] @ spread[name]) * before[name]).sum().clamp_min(1e-12)
        for name, change in changes.items()
    ]
    return torch.stack(shares).mean()
