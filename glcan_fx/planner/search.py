"""The search: the fewest local modules that fit, exact gradients first.

Fewer local modules train more like backpropagation, and one is backpropagation. So numbers of local modules are looked
at from one on, each with the runs of blocks that cost the least operations to fit the memory; steps are foretold
(``predict``), and simulated only where they seem to fit.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from glcan_fx.auxiliary.method import Method
from glcan_fx.auxiliary.tails import Ending
from glcan_fx.errors import PlanError
from glcan_fx.planner.predict import Foretold, Predictor, Savings
from glcan_fx.plans.plan import Plan
from glcan_fx.simulate.estimate import Estimate
from glcan_fx.structure.structure import Unit
from glcan_fx.units import size

log = logging.getLogger("glcan_fx")

EXTRA_MEMORY = 0.1
"""What the weights, gradients and momentum of auxiliary networks may add to a training step, relative to
backpropagation's memory."""

COMPUTE = 1.05
"""What a training step may take, relative to backpropagation's, where the user gives no ``compute_budget``."""

_EXTRA_COMPUTE: dict[Ending, float] = {"mean": 0.05, "decoder": 0.1, "maps": 0.0}
"""What auxiliary networks may add to a training step's floating-point operations, relative to backpropagation's: some
where that was found to buy accuracy. Nothing with a memory budget, but for the narrowest decoder."""

_NARROWEST_DECODER = 1 / 3
"""What the narrowest decoder may add: without one, a U-Net's early modules are linear classifiers of edges."""

ALIKE = 1.02
"""Memory that is the same to a user, relative."""

_SAME = 0.005  # of compute: how well it is foretold
_MOST_ABOVE = 1.05  # more says nothing of other steps
_SLACK = 1.07  # steps may take less than is foretold: of the exact one we want to be sure
_HOPELESS = 8  # times the least memory: more compute than a plan may take
_TRIES = 3  # simulated steps for one number of local modules, whose foretold memory is off by a few per cent


def allowances(
    choices: Sequence[Method], ending: Ending, compute_budget: float | None, memory_budget: int | str | None
) -> dict[Method, float]:
    """What each of ``choices`` may add to a training step's compute, relative to backpropagation's."""
    if compute_budget is not None:
        return dict.fromkeys(choices, compute_budget - 1)
    allowed = dict.fromkeys(choices, _EXTRA_COMPUTE[ending] if memory_budget is None else 0.0)
    decoders = [method for method in choices if ending == "decoder" and method.head != "lean"]
    return allowed | dict.fromkeys(decoders[-1:], _NARROWEST_DECODER)


@dataclass(frozen=True)
class Candidate:
    """Local modules that could be planned: where they end, their auxiliary networks, and compute without blocks that
    run again, relative to backpropagation's. note: for the plan."""

    cuts: tuple[Unit, ...]
    method: Method
    compute: float
    note: str = ""

    @property
    def k(self) -> int:
        """Number of local modules."""
        return len(self.cuts) + 1


@dataclass
class Search:
    """What there is to choose from, and what was tried.

    candidates: for a number of local modules, those with auxiliary networks that may be taken, the richest first.
    numbers: of local modules, in order. kinds: of savings, in the order in which they are tried. plan: makes a plan.
    compute: of a step, relative to backpropagation's. most: compute that a step may take, or None for ``COMPUTE``, or
    more where auxiliary networks alone need it. above: by how much simulated steps in which blocks run again were above
    what was foretold, at most; relative.
    """

    predictor: Predictor
    candidates: Callable[[int], Iterator[Candidate]]
    numbers: Sequence[int]
    kinds: Sequence[Savings]
    plan: Callable[[Candidate, Savings, Foretold], Plan]
    simulate: Callable[[Plan], Estimate]
    learn: Callable[[Savings], None]
    compute: Callable[[Estimate], float]
    most: float | None
    tried: dict[str, Estimate] = field(default_factory=dict)
    above: float = 1.0

    def within(self, limit: float) -> Plan | None:
        """The plan with the fewest local modules that takes at most ``limit`` bytes, and no more compute than it may;
        None where there is none."""
        for k in self._numbers(limit):
            for slack in (_SLACK, 1.0) if k == 1 else (1.0,):
                fitting: Iterable[tuple[Candidate, Savings, Foretold]] = self._fitting(k, slack * limit, self._may)
                if k == 1:  # where no auxiliary networks are to be chosen: what costs least
                    fitting = sorted(fitting, key=lambda one: round(one[2].compute, 2))
                for candidate, savings, _ in fitting:
                    if found := self._confirmed(candidate, savings, limit, self._may(candidate), slack):
                        return found
        return None

    def cheapest(self, limit: float) -> Plan | None:
        """The plan that takes the least compute of those that take at most ``limit`` bytes; None where there is none.
        """
        every = [(foretold.compute, candidate.k, index, candidate, savings)
                 for k in self.numbers
                 for index, (candidate, savings, foretold) in enumerate(self._fitting(k, limit, lambda _: math.inf))]
        for _, _, _, candidate, savings in sorted(every, key=lambda one: one[:3]):
            if found := self._confirmed(candidate, savings, limit, math.inf):
                return found
        return None

    def exact(self, limit: float) -> Plan | None:
        """The plan of one local module, with backpropagation's gradients, that takes at most ``limit`` bytes and, of
        those, the least compute."""
        for slack in (1.0, _SLACK):
            every = list(self._fitting(1, slack * limit, lambda _: math.inf))
            for candidate, savings, _ in sorted(every, key=lambda one: one[2].compute):
                if found := self._confirmed(candidate, savings, limit, math.inf, slack):
                    return found
        return None

    def least(self) -> int:
        """The fewest bytes that a plan takes with no more compute than it may, as foretold."""
        return self._least_limit(self.numbers, self._may, math.inf)

    def leanest(self, limit: float = 0, any_compute: bool = False) -> Plan | None:
        """Of plans that take as little memory as they can, one for each number of local modules, the first whose
        simulated step takes at most ``limit`` bytes and no more compute than it may, or with ``any_compute`` the one
        of these that takes the least; else the one that takes the least memory. For steps that take less than was
        foretold. None where none can be simulated."""
        may = (lambda _: math.inf) if any_compute else self._may
        found: list[tuple[int, float, Plan]] = []
        for k in self.rising():
            least = self._least_limit([k], may, _HOPELESS)
            for candidate, savings, foretold in itertools.islice(self._fitting(k, least, may), 1):
                plan = self.plan(candidate, savings, foretold)
                try:
                    step = self.simulate(plan)
                except PlanError as error:
                    log.debug("k=%d: %s", k, error)
                    continue
                self.tried[in_words(plan)] = step
                if (compute := self.compute(step)) <= may(candidate) + _SAME:
                    found.append((step.peak, compute, plan))
                    if step.peak <= limit and not any_compute:
                        return plan
        fitting = [one for one in found if one[0] <= limit]
        best = min(fitting, key=lambda one: one[1]) if fitting else min(found, key=lambda one: one[0], default=None)
        return best[2] if best else None

    def _least_limit(self, numbers: Sequence[int], may: Callable[[Candidate], float], most: float) -> int:
        """The fewest bytes that seem to do for some number of local modules; at most so many times what they take with
        any compute."""
        low = least = min(self._least(k) for k in numbers)
        high = 2 * low
        while high < most * least and not any(True for k in numbers for _ in self._fitting(k, high, may)):
            high *= 2
        for _ in range(8):
            middle = (low + high) // 2
            fits = any(True for k in numbers for _ in self._fitting(k, middle, may))
            low, high = (low, middle) if fits else (middle, high)
        return high

    def smallest(self, k: int | None = None) -> Plan:
        """The plan, with so many local modules, that takes the least memory, as foretold, with any compute."""
        k = min(self.numbers, key=self._least) if k is None else k
        (*_, candidate), savings = self.candidates(k), self.kinds[-1]
        self.learn(savings)
        least = self.predictor.least(candidate.cuts, candidate.method, savings)
        for slack in (1.0, 1.01, 1.03, 1.1):
            foretold = self.predictor.foretell(candidate.cuts, candidate.method, savings, slack * least)
            if foretold:
                return self.plan(candidate, savings, foretold)
        return self.plan(candidate, savings, Foretold(candidate.compute, ((),) * k))

    def note(self) -> str:
        """What was tried, in words."""
        return "; ".join(f"{what}: {size(step.peak)}" for what, step in self.tried.items())

    def _least(self, k: int) -> int:
        savings = self.kinds[-1]
        self.learn(savings)
        *_, leanest = self.candidates(k)
        return self.predictor.least(leanest.cuts, leanest.method, savings)

    def _may(self, candidate: Candidate) -> float:
        return self.most if self.most is not None else max(COMPUTE, candidate.compute)

    def rising(self) -> Iterator[int]:
        """Numbers of local modules from the fewest on; above 8 in steps of a quarter."""
        below = 0
        for index, k in enumerate(self.numbers):
            if k <= 8 or k >= below + below // 4 or index == len(self.numbers) - 1:
                yield k
                below = k

    def _numbers(self, limit: float) -> Iterator[int]:
        """The same, with what lies between where one seems to fit."""
        below = 0
        for k in self.rising():
            if k > below + 1 and any(True for _ in self._fitting(k, limit, self._may)):
                yield from (between for between in self.numbers if below < between < k)
            yield k
            below = k

    def _fitting(
        self, k: int, limit: float, may: Callable[[Candidate], float]
    ) -> Iterator[tuple[Candidate, Savings, Foretold]]:
        """What seems to fit, of one number of local modules: with the first savings, the richest networks first."""
        for savings in self.kinds:
            for candidate in self.candidates(k):
                if candidate.compute > may(candidate):
                    continue
                self.learn(savings)
                foretold = self.predictor.foretell(candidate.cuts, candidate.method, savings, limit)
                if foretold and foretold.compute <= may(candidate):
                    yield candidate, savings, foretold

    def _confirmed(
        self, candidate: Candidate, savings: Savings, limit: float, may: float, slack: float = 1.0
    ) -> Plan | None:
        """The plan whose simulated step takes at most ``limit`` bytes; asks for less where one takes more. slack: by
        how much the first step may be above the limit, as foretold."""
        asked = slack * limit
        for _ in range(_TRIES):
            foretold = self.predictor.foretell(candidate.cuts, candidate.method, savings, asked)
            if foretold and asked == limit and any(foretold.runs):
                asked = limit / self.above
                foretold = self.predictor.foretell(candidate.cuts, candidate.method, savings, asked)
            if foretold is None or foretold.compute > may:
                return None
            plan = self.plan(candidate, savings, foretold)
            try:
                step = self.simulate(plan)
            except PlanError as error:
                log.debug("k=%d: %s", candidate.k, error)
                return None
            self.tried[in_words(plan)] = step
            if step.peak <= limit:
                return plan if self.compute(step) <= may + _SAME else None
            if any(foretold.runs):
                self.above = min(_MOST_ABOVE, max(self.above, step.peak / asked))
            asked -= 1.1 * (step.peak - limit)
        return None


def in_words(plan: Plan) -> str:
    """A plan, in a few words."""
    again = sum(len(module.again) for module in plan.modules)
    slices = [f"{plan.slices} slices"] * (plan.slices > 1)
    return ", ".join([f"k={plan.k}", *slices, *[f"{again} block{'s' * (again > 1)} again"] * bool(again)])
