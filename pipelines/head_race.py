"""Searching among attention heads: the order in which sets of heads are measured, and when one is given up.

Only numbers pass here: a `Bench` measures. A gain is a score minus that of the picture drawn from the same prompt and
seed without perturbation, so what a seed does to all sets alike cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from attnctl.errors import ControlError

Floats = NDArray[np.float64]

SHARES = {"prune": 0.08, "screen": 0.14, "race": 0.34, "final": 0.24, "confirm": 0.2}  # of the budget; ours
LEAST = {"prune": 1, "screen": 4, "race": 2, "final": 4, "confirm": 8}  # pictures of each set; ours
MOST_PRUNE = 8  # sizes of effects hardly differ between pictures
INERT = 5e-3  # of the prediction; what moves it less cannot be seen in the picture
FINALISTS = 3
STAY = 1 / 3  # of the sets in a race, after each of its rounds
GOOD = 1 / 4  # of the sites, after the screening; at least two
UNSEEN = 1_000_003  # the seeds of the confirmation begin here


class Case(NamedTuple):
    """A prompt, by number, and a seed."""

    prompt: int
    seed: int


class Bench(Protocol):
    """What measures sets of heads, and counts the forward passes."""

    prompts: Sequence[str]
    spent: int

    def price(self, heads: str, steps: int) -> int:
        """Forward passes of one picture; heads "" is the picture without perturbation."""

    def effect_price(self) -> int:
        """Forward passes of one size of an effect."""

    def effects(self, heads: Sequence[str], cases: Sequence[Case]) -> Floats:
        """|c - p| / |c| at one timestep, (sets, cases)."""

    def gains(self, heads: Sequence[str], cases: Sequence[Case], steps: int, stage: str) -> Floats:
        """Score minus that without perturbation, (sets, cases)."""


@dataclass(frozen=True)
class Rank:
    """What is known of one set of heads.

    Attributes:
        heads: as text, see `attnctl.engine.heads`.
        stage: the last that it was measured in: prune, screen, race, final or confirm; greedy 1, greedy 2, ...
        gain: mean over pictures of the score minus that without perturbation; in stage prune, the size of the effect.
        error: the standard error of that mean; NaN of a single picture.
        pictures: how many.
    """

    heads: str
    stage: str
    gain: float
    error: float
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data; an error that is not known is None."""
        return asdict(self) | {"error": None if math.isnan(self.error) else self.error}

    def __str__(self) -> str:
        what = "effect" if self.stage == "prune" else "gain"
        return (
            f"{self.heads:24s} {what:6s} {self.gain:+.4f} +- {self.error:.4f} {self.pictures:5d} pictures, {self.stage}"
        )


def rank(heads: str, stage: str, values: Floats) -> Rank:
    """Mean and standard error of (pictures,)."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Rank(heads, stage, float(values.mean()), error, len(values))


def cases(prompts: int, count: int, first: int = 0, seed: int = 0) -> list[Case]:
    """So many different ones: the prompts in turn, each picture with a seed of its own."""
    return [Case(k % prompts, seed + k) for k in range(first, first + count)]


def race(
    bench: Bench, sites: Mapping[str, Sequence[str]], budget: int, steps: int, quick: int, sure: float
) -> tuple[str, list[Rank]]:
    """Prune, screen, race, confirm.

    Args:
        bench: what measures.
        sites: the heads of each site, as text.
        budget: forward passes; never exceeded.
        steps: of a picture.
        quick: steps of a picture where sites are screened.
        sure: how many standard errors behind the leader a set cannot win any more.

    Returns:
        The chosen set, and all that were measured, best known first.

    Raises:
        ControlError: the budget is too small for the least number of pictures in every stage.
    """
    heads = [head for own in sites.values() for head in own]
    one, plain = bench.price(heads[0], steps), bench.price("", steps)
    screened = len(sites) * bench.price(heads[0], quick) + bench.price("", quick)
    arms = _most_arms([len(own) for own in sites.values()])
    least = {
        "prune": len(heads) * bench.effect_price(),
        "screen": screened,
        "race": _rounds(arms) * (arms * one + plain),
        "final": 2 * FINALISTS * one + plain,
        "confirm": 2 * one + plain,
    }
    wanted = max(math.ceil(LEAST[stage] * cost / SHARES[stage]) for stage, cost in least.items())
    if budget < wanted:
        raise ControlError(f"a budget of {budget} forward passes is too small; here the least is {wanted}")
    found: dict[str, Rank] = {}
    pairs = len(bench.prompts)

    # 1: the smaller half of all heads, by the size of their effect, and all that nobody would see
    count = min(MOST_PRUNE, int(SHARES["prune"] * budget / least["prune"]))
    effects = bench.effects(heads, cases(pairs, count))
    sizes = effects.mean(1)
    found |= {head: rank(head, "prune", effects[k]) for k, head in enumerate(heads)}
    order = np.argsort(-sizes, kind="stable")[: math.ceil(len(heads) / 2)]
    kept = {heads[k] for k in order if sizes[k] >= INERT} or {heads[k] for k in order}

    # 2: sites that kept a head, by quick pictures
    alive = {site: [head for head in own if head in kept] for site, own in sites.items() if kept & set(own)}
    count = int(SHARES["screen"] * budget / screened)
    seen = bench.gains(list(alive), cases(pairs, count), quick, "screen")
    found |= {site: rank(site, "screen", seen[k]) for k, site in enumerate(alive)}
    best = seen.mean(1).argsort(kind="stable")[::-1]
    stay = best[: _good(len(alive))]
    good = [list(alive)[k] for k in sorted(stay) if k == best[0] or not _lost(seen[k], seen[best[0]], sure)]

    # 3: heads of good sites, and these sites whole; in the order of the sites, so that batches share their beginning
    racing = list(dict.fromkeys(arm for site in good for arm in (site, *alive[site])))
    site_of = {arm: site for site in good for arm in (site, *alive[site])}
    rounds, done = _rounds(len(racing)), 0
    gains = np.zeros((len(racing), 0))
    for _ in range(rounds):
        count = int(SHARES["race"] * budget / rounds / (len(racing) * one + plain))
        gains = np.hstack([gains, bench.gains(racing, cases(pairs, count, done), steps, "race")])
        done += count
        found |= {arm: rank(arm, "race", gains[k]) for k, arm in enumerate(racing)}
        best = gains.mean(1).argsort(kind="stable")[::-1]
        most = max(min(FINALISTS, len(racing)), math.ceil(STAY * len(racing)))
        keep = sorted(k for k in best[:most] if k == best[0] or not _lost(gains[k], gains[best[0]], sure))
        racing, gains = [racing[k] for k in keep], gains[keep]

    # 4: the last ones, alone and together, on pictures that chose none of them
    last = sorted(racing, key=lambda arm: -found[arm].gain)[:FINALISTS]
    others = sorted((arm for arm in site_of if found[arm].stage == "race"), key=lambda arm: -found[arm].gain)
    finals = [*last, *together(last[0], others, site_of)]
    count = int(SHARES["final"] * budget / least["final"])
    gains = bench.gains(finals, cases(pairs, count, done), steps, "final")
    found |= {arm: rank(arm, "final", gains[k]) for k, arm in enumerate(finals)}
    chosen = [finals[k] for k in gains.mean(1).argsort(kind="stable")[::-1][:2]]

    found |= {one.heads: one for one in confirm(bench, chosen, budget, steps)}
    return chosen[0], ordered(found, chosen[0])


def together(first: str, others: Sequence[str], site_of: Mapping[str, str]) -> list[str]:
    """The best set with the best of a second site, with those of a second and third, and the two best heads there are.

    Args:
        first: the best set.
        others: sets, best first; it may be among them.
        site_of: the site of each, in the order in which they are written.
    """
    beside: dict[str, str] = {}
    for arm in others:
        if site_of[arm] != site_of[first]:
            beside.setdefault(site_of[arm], arm)
    second = list(beside.values())[:2]
    heads = [arm for arm in others if arm != site_of[arm]][:2]
    sets = [[first, *second[:1]], [first, *second], heads]
    return list(dict.fromkeys(" ".join(arm for arm in site_of if arm in one) for one in sets if len(one) > 1))


def confirm(bench: Bench, sets: Sequence[str], budget: int, steps: int) -> list[Rank]:
    """Measure sets on seeds that nothing was chosen by, with all that is left of the budget."""
    each = sum(bench.price(one, steps) for one in sets) + bench.price("", steps)
    count = (budget - bench.spent) // each
    gains = bench.gains(sets, cases(len(bench.prompts), count, seed=UNSEEN), steps, "confirm")
    return [rank(one, "confirm", gains[k]) for k, one in enumerate(sets)]


def greedy(
    bench: Bench, heads: Sequence[str], budget: int, steps: int, rounds: int, each: int
) -> tuple[str, list[Rank]]:
    """The paper's search (arXiv 2506.10978, algorithm 1): in each round all heads, on top of those already chosen.

    Args:
        bench: what measures.
        heads: all of them, as text.
        budget: forward passes; what the confirmation leaves decides how many prompt-seed pairs (M) there are.
        steps: of a picture.
        rounds: R.
        each: k, how many heads a round adds.

    Raises:
        ControlError: the budget is too small, or there are not so many heads.
    """
    if rounds * each > len(heads):
        raise ControlError(f"{rounds} rounds of {each} heads are more than the {len(heads)} heads there are")
    one, plain = bench.price(heads[0], steps), bench.price("", steps)
    cost = sum(len(heads) - each * k for k in range(rounds)) * one + plain
    wanted = max(
        math.ceil(2 * cost / (1 - SHARES["confirm"])), math.ceil(LEAST["confirm"] * (one + plain) / SHARES["confirm"])
    )
    if budget < wanted:
        raise ControlError(f"a budget of {budget} forward passes is too small; here the least is {wanted}")
    count = int((1 - SHARES["confirm"]) * budget / cost)
    found: dict[str, Rank] = {}
    chosen: list[str] = []
    for number in range(rounds):
        pool = [head for head in heads if head not in chosen]
        sets = [" ".join([*chosen, head]) for head in pool]
        stage = f"greedy {number + 1}"
        gains = bench.gains(sets, cases(len(bench.prompts), count), steps, stage)
        found |= {one: rank(one, stage, gains[k]) for k, one in enumerate(sets)}
        chosen += [pool[k] for k in gains.mean(1).argsort(kind="stable")[::-1][:each]]
    text = " ".join(chosen)
    found |= {one.heads: one for one in confirm(bench, [text], budget, steps)}
    return text, ordered(found, text)


def ordered(found: Mapping[str, Rank], chosen: str) -> list[Rank]:
    """The chosen set, then the others: those measured longest first, among these by their gain."""
    stages = [*SHARES]

    def place(one: Rank) -> tuple[bool, int, float]:
        number = stages.index(one.stage) if one.stage in stages else int(one.stage.split()[-1])
        return one.heads != chosen, -number, -one.gain

    return sorted(found.values(), key=place)


def _most_arms(heads: Sequence[int]) -> int:
    """How many sets may race at most, of sites with so many heads: half of all heads stay, and the good sites."""
    kept, largest, most = math.ceil(sum(heads) / 2), sorted(heads, reverse=True), 0
    for alive in range(1, min(len(heads), kept) + 1):
        good = _good(alive)
        most = max(most, good + min(kept - (alive - good), sum(largest[:good])))
    return most


def _good(sites: int) -> int:
    return min(sites, max(2, math.ceil(GOOD * sites)))


def _rounds(arms: int) -> int:
    return max(1, math.ceil(math.log(arms / FINALISTS) / math.log(1 / STAY) - 1e-9))


def _lost(gains: Floats, leader: Floats, sure: float) -> bool:
    """Paired, picture by picture, it is behind by more than chance would have it."""
    behind = leader - gains
    if len(behind) < 8:  # the standard error of so few is itself a guess
        return False
    return float(behind.mean()) > sure * float(behind.std(ddof=1)) / math.sqrt(len(behind))
