"""What the benchmarks count with: rates and paired differences, each with a 95 % interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Rate:
    """`hits` of `n`: their part, with its 95 % interval by Wilson's formula; NaN for n = 0."""

    value: float
    low: float
    high: float
    n: int
    hits: int

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.1%}, {self.high:.1%}]" if self.n else "-"

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def rate(hits: Sequence[bool]) -> Rate:
    """How often `hits` is true."""
    n, z = len(hits), 1.96
    if not n:
        return Rate(float("nan"), float("nan"), float("nan"), 0, 0)
    many = sum(map(bool, hits))
    p = many / n
    centre, spread = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return Rate(p, (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n), n, many)


@dataclass(frozen=True)
class Paired:
    """What one condition changes against another on the same prompts and seeds.

    difference: in the rate, with a 95 % interval by bootstrap over prompts, whose seeds stay together. repaired: part
    of what was wrong before and is right now. broken: part of what was right before and is wrong now.
    """

    difference: float
    low: float
    high: float
    repaired: Rate
    broken: Rate

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def paired(before: Sequence[bool], after: Sequence[bool], groups: Sequence[int], draws: int = 2000) -> Paired:
    """Compares two conditions.

    before, after: right or not, of the same cases in the same order; at least one. groups: the prompt of each case.
    """
    was, now, group = (np.asarray(x) for x in (before, after, groups))
    gain = now.astype(float) - was.astype(float)
    names, where = np.unique(group, return_inverse=True)
    sums, counts = np.bincount(where, gain), np.bincount(where)
    picked = np.random.default_rng(0).integers(len(names), size=(draws, len(names)))
    low, high = np.quantile(sums[picked].sum(1) / counts[picked].sum(1), (0.025, 0.975))
    return Paired(float(gain.mean()), float(low), float(high), rate(now[~was].tolist()), rate((~now[was]).tolist()))
