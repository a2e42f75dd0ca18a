"""The frontier: what a training step takes at least, by exactness and compute, so that a user sees what can be had."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from glcan_fx.devices import OPERATIONS, Device
from glcan_fx.errors import PlanError
from glcan_fx.planner.predict import Savings
from glcan_fx.planner.search import Candidate, Search, in_words
from glcan_fx.plans.plan import Plan
from glcan_fx.simulate.estimate import Estimate

COMPUTES = (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5)
"""Compute that is looked at, relative to backpropagation's, beside that of the peers."""

_WORTH, _CLEARLY = 0.94, 0.97
"""Memory of a point relative to that of each more exact or cheaper one: of one that is looked at, as foretold, and of
one that is shown, as simulated."""
_LOCAL = 0.9  # of local modules, this much less: there are many
_SAME = 0.004  # of compute
_PART = 0.01  # of memory, to which limits are found


@dataclass(frozen=True)
class Point:
    """A plan of the frontier, or what it replaces.

    name: in words. k: local modules. exact: whether gradients are backpropagation's. peak: bytes of a training step,
    and compute relative to backpropagation's, both simulated. chosen: whether it is the plan at hand. plan: to pass to
    ``transform(plan=...)``; None for backpropagation and activation checkpointing. time: estimated for
    ``Options.device``, relative to backpropagation's; None without one.
    """

    name: str
    k: int
    exact: bool
    peak: int
    compute: float
    chosen: bool = False
    plan: Plan | None = field(default=None, repr=False)
    time: float | None = None

    @property
    def cost(self) -> float:
        """What ``compute_budget`` is about: time where it is known, else compute."""
        return self.compute if self.time is None else self.time


class _Wanted(NamedTuple):
    """A step to look at, as foretold; in the order in which one is preferred."""

    k: int
    slices: int
    compute: float
    peak: float
    candidate: Candidate
    savings: Savings


def frontier(
    search: Search, chosen: Plan, step: Estimate, peers: Sequence[tuple[str, Estimate]], device: Device = OPERATIONS
) -> tuple[Point, ...]:
    """Plans that no other is better than: none with fewer local modules and as little compute takes as little memory,
    to some per cent. peers: backpropagation first, and what else there is to compare with. step: the chosen plan's.

    Every point is simulated, which takes seconds. Points are in the order of exactness, then of compute.
    """
    plain = peers[0][1]

    def point(name: str, plan: Plan | None, found: Estimate) -> Point:
        k = 1 if plan is None else plan.k
        time = None if device is OPERATIONS else found.relative_to(plain, device)
        return Point(name, k, k == 1, found.peak, found.relative_to(plain), plan is chosen, plan, time)

    points = [*(point(name, None, peer) for name, peer in peers), point(in_words(chosen), chosen, step)]
    computes = sorted({*COMPUTES, *(point.cost for point in points)})
    for wanted in _worth(sorted(_wanted(search, computes), key=lambda one: one[:4])):
        plan = _plan(search, wanted)
        if plan is None or plan.modules == chosen.modules and plan.slices == chosen.slices:
            continue
        try:
            found = search.simulate(plan)
        except PlanError:
            continue
        points.append(point(in_words(plan), plan, found))
    kept: list[Point] = []
    for one in sorted(points, key=lambda one: (one.k, one.cost, one.peak)):
        clearly = _CLEARLY * (_LOCAL if one.k > 1 else 1)
        cheaper = [other.peak for other in kept if other.cost <= one.cost + _SAME]
        if one.plan is None or one.chosen or one.peak < clearly * min(cheaper, default=math.inf):
            kept.append(one)
    return tuple(kept)


def _wanted(search: Search, computes: Sequence[float]) -> Iterator[_Wanted]:
    for savings in search.kinds:
        for k in search.rising():
            search.learn(savings)
            candidates = list(search.candidates(k))
            for candidate in (candidates[0], *candidates[1:][-1:]):  # the richest auxiliary networks, and the leanest
                for compute in computes:
                    peak = _least_peak(search, candidate, savings, compute)
                    if peak < math.inf:
                        yield _Wanted(candidate.k, savings.slices, max(compute, candidate.compute), peak, candidate,
                                      savings)


def _least_peak(search: Search, candidate: Candidate, savings: Savings, compute: float) -> float:
    """The fewest bytes, to a per cent, with which a step takes no more than ``compute``."""
    predictor, cuts, method = search.predictor, candidate.cuts, candidate.method
    low = predictor.least(cuts, method, savings)
    high = predictor.most(cuts, method, savings)
    if predictor.compute(cuts, method, savings, high) > compute + _SAME:
        return math.inf
    while high > (1 + _PART) * low:
        middle = (low + high) // 2
        fits = predictor.compute(cuts, method, savings, middle) <= compute + _SAME
        low, high = (low, middle) if fits else (middle, high)
    return high


def _worth(wanted: Sequence[_Wanted]) -> list[_Wanted]:
    """Those that take clearly less memory than every more exact one that takes no more compute."""
    kept: list[_Wanted] = []
    for one in wanted:
        worth = _WORTH * (_LOCAL if one.k > 1 else 1)
        if all(one.peak < worth * other.peak for other in kept if other.compute <= one.compute + _SAME):
            kept.append(one)
    return kept


def _plan(search: Search, wanted: _Wanted) -> Plan | None:
    foretold = search.predictor.foretell(wanted.candidate.cuts, wanted.candidate.method, wanted.savings, wanted.peak)
    return None if foretold is None else search.plan(wanted.candidate, wanted.savings, foretold)
