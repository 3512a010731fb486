"""Which controls keep the contracts. A new control joins with one line in `CASES`; every rule is then checked on it.

The rules are those of tests/contracts: identity and restoration, refusals, independent rows, sizes and dtypes,
neighbours (LoRA, IP-Adapter, ControlNet, compile, ...), threads. Every control is checked on every family of
`tiny.MODELS` for the first rule: not a bit changes at zero strength, and something does at a strength that shows. The
other rules are about what the engine hands out. Small controls that use each part of it are checked on every family; a
method built on them on one family with cross-attention and one with joint attention, which differ from case to case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from toys import Bias, Descend, Guide, Identity, Output, Push

from attnctl.engine.control import Control
from attnctl.processors import (
    AStar,
    Binding,
    Calibrate,
    Couple,
    DenseRegions,
    Excitation,
    Isolation,
    Nag,
    Pag,
    Perturb,
    Placement,
    Regions,
    Retention,
    Segregation,
    TokenMaps,
    Tpg,
)


@dataclass(frozen=True)
class Case:
    """How to make one control for the prompt `tiny.TEXT`, "a cat and a dog".

    Attributes:
        acting: at a strength that shows.
        still: at zero strength; the picture must not change by a single bit.
        moves: False if the control only watches, so that `acting` must not change the picture either.
        families: where it can be used.
    """

    acting: Callable[[], Control]
    still: Callable[[], Control]
    moves: bool = True
    families: tuple[str, ...] = tuple(tiny.MODELS)


LEFT = (0, 0, 0.5, 1)

CASES = {
    "identity": Case(Identity, Identity, moves=False),
    "bias": Case(Bias, lambda: Bias(strength=0.0)),
    "output": Case(Output, lambda: Output(strength=0.0)),
    "latents": Case(Push, lambda: Push(strength=0.0)),
    "guide": Case(Guide, lambda: Guide(strength=0.0)),
    "gradient": Case(Descend, lambda: Descend(strength=0.0)),
    "maps": Case(TokenMaps, TokenMaps, moves=False),
    "segregation": Case(
        lambda: Segregation("cat", "dog", relative=0.1), lambda: Segregation("cat", "dog", strength=0.0)
    ),
    "excitation": Case(lambda: Excitation("cat", "dog", relative=0.1), lambda: Excitation("cat", "dog", strength=0.0)),
    "retention": Case(
        lambda: Retention("dog", masks={"cat": LEFT}, relative=0.1),
        lambda: Retention("dog", masks={"cat": LEFT}, strength=0.0),
    ),
    "binding": Case(lambda: Binding(("and", "dog"), relative=0.1), lambda: Binding(("and", "dog"), strength=0.0)),
    "calibrate": Case(
        lambda: Calibrate(("and", "dog"), ("a", "cat"), relative=0.1),
        lambda: Calibrate(("and", "dog"), strength=0.0),
    ),
    "astar": Case(
        lambda: AStar("cat", "dog", bonds=(("and", "cat"),), updates=2, loss_target=0.1, relative=0.1),
        lambda: AStar("cat", "dog", strength=0.0),
    ),
    "perturb": Case(lambda: Perturb("1:0 2", u=0.7, scale=6.0), lambda: Perturb("1:0 2", scale=0.0)),
    "blur": Case(
        lambda: Perturb("1", kind="blur", scale=60.0, sigma=2.0), lambda: Perturb("1", kind="blur", scale=0.0)
    ),
    "pag": Case(lambda: Pag("1", scale=20.0), lambda: Pag("1", scale=0.0), families=("sd1", "sd3")),
    "uniform": Case(
        lambda: Perturb("1", kind="uniform", scale=60.0), lambda: Perturb("1", kind="uniform", scale=0.0),
        families=("sd1", "sd3"),
    ),
    "temperature": Case(
        lambda: Perturb("1", kind="temperature", scale=60.0), lambda: Perturb("1", kind="temperature", scale=0.0),
        families=("sd1", "sd3"),
    ),
    "skip": Case(
        lambda: Perturb("1", kind="skip"), lambda: Perturb("1", kind="skip", scale=0.0), families=("sd1", "sd3")
    ),
    "regions": Case(
        lambda: Regions({"cat": LEFT, "dog": (0.5, 0, 1, 1)}, inside=4.0),
        lambda: Regions({"cat": LEFT}, inside=0.0, strength=0.0),
    ),
    "isolation": Case(
        lambda: Isolation({"one": LEFT, "other": (0.5, 0, 1, 1)}, window=(0, 1)),
        lambda: Isolation({"one": (0, 0, 1, 1), "other": (0, 0, 1, 1)}),
        families=("sd1", "sdxl", "sd3", "sd35", "flux"),
    ),
    "placement": Case(
        lambda: Placement(masks={"cat": LEFT, "dog": (0.5, 0, 1, 1)}, relative=0.1),
        lambda: Placement(masks={"cat": LEFT}, strength=0.0),
    ),
    "dense": Case(
        lambda: DenseRegions({"cat": LEFT, "dog": (0.5, 0, 1, 1)}, window=(0, 1)),
        lambda: DenseRegions({"cat": LEFT}, strength=0.0, self_strength=0.0),
    ),
    "couple": Case(
        lambda: Couple({"a red dog": LEFT, "a blue cat": (0.5, 0, 1, 1)}, base=0.1, negatives={"a red dog": "and"}),
        lambda: Couple({"a red dog": LEFT}, base=1.0),
    ),
    "nag": Case(lambda: Nag("a red dog"), lambda: Nag("a red dog", scale=1.0)),
    "shuffle": Case(lambda: Tpg("1"), lambda: Tpg("1", scale=0.0), families=("sd1", "sd3")),
}  # fmt: skip

PARTS = ("identity", "bias", "output", "latents", "guide", "gradient", "maps")  # each uses one part of the engine
KINDS = (("sd1", "sdxl", "glyph-sd"), ("sd3", "sd35", "flux"))  # cross-attention, joint attention


def two_kinds(label: str) -> list[str]:
    """One family of each kind; the next case has the next of them."""
    turn = list(CASES).index(label)
    found = [[name for name in kind if name in CASES[label].families] for kind in KINDS]
    return [kind[turn % len(kind)] for kind in found]


def pairs(families: Callable[[str], Iterable[str]]) -> list[Any]:
    return [pytest.param(CASES[label], name, id=f"{label}-{name}") for label in CASES for name in families(label)]


PAIRS = pairs(lambda label: CASES[label].families)
FEWER_PAIRS = pairs(lambda label: CASES[label].families if label in PARTS else two_kinds(label))
every_pair = pytest.mark.parametrize(("case", "family"), PAIRS)
fewer_pairs = pytest.mark.parametrize(("case", "family"), FEWER_PAIRS)
on_unet = pytest.mark.parametrize(
    "case", [pytest.param(case, id=label) for label, case in CASES.items() if "sd1" in case.families]
)


def trace(pipe: Any) -> dict[str, Any]:
    """All that an attachment could leave behind on a pipeline; equal before and after, or the contract is broken."""
    model = getattr(tiny.denoiser(pipe), "_orig_mod", tiny.denoiser(pipe))
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return {
        "pipeline": sorted(vars(pipe)),
        "scheduler": sorted(vars(pipe.scheduler)),
        "modules": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "outer": sorted(vars(tiny.denoiser(pipe))),
        "hooks": {name: [len(getattr(m, hook)) for hook in hooks] for name, m in model.named_modules()},
        "processors": {name: (id(p), sorted(vars(p))) for name, p in model.attn_processors.items()},
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "training": model.training,
        "encode_prompt": getattr(pipe.encode_prompt, "__func__", None),
        "step": getattr(pipe.scheduler.step, "__func__", None),
    }


def weights(pipe: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tiny.denoiser(pipe).state_dict().items()}


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> bool:
    """Equal up to what another batch size does to the order of sums."""
    return bool((got.float() - want.float()).abs().max() <= tolerance * want.float().abs().max())


def differs(got: Tensor, want: Tensor) -> bool:
    """Different by more than that."""
    return not close(got, want, 1e-3)
