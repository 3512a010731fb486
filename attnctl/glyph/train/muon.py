"""Muon: momentum whose update is made orthogonal, so that all directions of a matrix learn at one speed.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). torch's own takes matrices only; this
one takes convolutions too, as (output, everything else). On the autoencoder it reaches in 120 steps what Adam needs 600
for: there, Adam leaves the weak colour axes to the last.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's coefficients: singular values land near 1 in five rounds


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly (singular values 0.7 to 1.2), by Newton and Schulz's iteration.

    All rounds but the first and last product run on the smaller Gram matrix, with which every factor commutes.

    matrix: (rows, columns), any scale.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    gram, factor = x @ x.mT, None
    a, b, c = _QUINTIC
    for _ in range(5):
        once = b * gram + c * gram @ gram
        once.diagonal().add_(a)
        factor = once if factor is None else once @ factor
        gram = once @ once @ gram
    x = factor @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For parameters of two and more dimensions; give embeddings and vectors to Adam.

    lr: about the change of a unit input's image per step. decay: decoupled weight decay, relative to lr.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(average, group["momentum"]).flatten(1))  # Nesterov's look-ahead
                update *= max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["decay"]).add_(update.view_as(p), alpha=-group["lr"])
