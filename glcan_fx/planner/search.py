"""The planner: choose what the user leaves open, with the smallest loss of accuracy that fits.

Fewer local modules train more like backpropagation, so a memory budget is met in this order: what changes no gradient
and costs no compute (losses from class ids, the last module's end in slices), then as few local modules as fit, then
blocks that run again in backward.
"""

import logging
import math
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace

from glcan_fx.auxiliary.method import Method
from glcan_fx.auxiliary.tails import Ending
from glcan_fx.config import K
from glcan_fx.errors import BudgetError, PlanError
from glcan_fx.plans.plan import Plan
from glcan_fx.simulate.estimate import Estimate
from glcan_fx.units import size

log = logging.getLogger("glcan_fx")

EXTRA_MEMORY = 0.1
"""What the weights, gradients and momentum of auxiliary networks may add to a training step, relative to
backpropagation's memory."""

_EXTRA_COMPUTE: dict[Ending, float] = {"mean": 0.05, "decoder": 0.1, "maps": 0.0}
"""What auxiliary networks may add to a training step's floating-point operations, relative to backpropagation's: some
where that was found to buy accuracy. Nothing with a memory budget, but for the narrowest decoder."""

_RECOMPUTATION = 1 / 3
"""What running every block again adds, and the narrowest decoder may: without one, a U-Net's early modules are linear
classifiers of edges."""

def allowances(
    choices: Sequence[Method], ending: Ending, compute_budget: float | None, memory_budget: int | None
) -> dict[Method, float]:
    """What each of ``choices`` may add to a training step's compute, relative to backpropagation's."""
    if compute_budget is not None:
        return dict.fromkeys(choices, compute_budget - 1)
    allowed = dict.fromkeys(choices, _EXTRA_COMPUTE[ending] if memory_budget is None else 0.0)
    decoders = [method for method in choices if ending == "decoder" and method.head != "lean"]
    return allowed | dict.fromkeys(decoders[-1:], _RECOMPUTATION)


def richest(choices: Sequence[Method], excess: Callable[[Method], float]) -> Method:
    """The first method that takes no more than it may (``excess`` 0 or less), else the leanest of those that take the
    least; the first of all where none can be built (infinity)."""
    found: list[tuple[float, Method]] = []
    for method in choices:
        found.append((excess(method), method))
        if found[-1][0] <= 0:
            return method
    least, leanest = min(reversed(found), key=lambda one: one[0])
    return leanest if math.isfinite(least) else choices[0]


def with_richest(choices: Sequence[Method], plan: Callable[[Sequence[Method]], Plan]) -> Plan:
    """The plan that ``plan`` makes with all of ``choices``, a list from the richest on, else with its leaner half, its
    leanest quarter, or the leanest. Raises PlanError where none can be made."""
    try:
        return plan(choices)
    except BudgetError as error:
        first = error
    lists = list(dict.fromkeys(tuple(choices[quarters * len(choices) // 4:]) for quarters in (2, 3)))
    leanest: Plan | None = None
    try:
        leanest = plan(choices[-1:])
    except BudgetError:
        raise  # what is richer needs more
    except PlanError as error:  # it cannot be built
        log.debug("%s: %s", choices[-1], error)
    for left in lists:
        try:
            return plan(left)
        except PlanError as error:
            log.debug("with %d of %d kinds of auxiliary networks: %s", len(left), len(choices), error)
    if leanest is None:
        raise first
    return leanest


def within_compute(
    budget: float, choices: Sequence[Method], plan: Callable[[Sequence[Method]], Plan],
    compute: Callable[[Plan], float],
) -> Plan:
    """The plan with the richest of ``choices``, a list from the richest on, whose simulated step takes no more compute,
    relative to backpropagation's, than ``budget``. Raises BudgetError where none does."""
    left = list(choices)
    found: list[tuple[float, int]] = []
    while left:
        try:
            chosen = plan(left)
        except PlanError:
            if not found:
                raise
            break
        found.append((compute(chosen), chosen.k))
        if found[-1][0] <= budget:
            return chosen
        left = left[left.index(chosen.method) + 1:]
    least, k = min(found)
    raise BudgetError(
        f"compute_budget={budget:g}: with k={k} a step takes {math.ceil(1000 * least) / 1000:.3f} of backpropagation's "
        "compute. Give at least that, choose another k, or leave auxiliary networks to the planner.")


@dataclass(frozen=True)
class Savings:
    """What changes no gradient. fused, slices: see ``config.Options``; recompute: local modules whose blocks run
    again."""

    fused: bool = False
    slices: int = 1
    recompute: Set[int] = frozenset()


def _hopeless(plan: Plan, most: float) -> bool:
    """Whether the blocks of a local module alone keep more for backward than a step may take, by more than an estimate
    can be off: a simulation, which takes seconds, would say nothing new. Not for blocks that run again."""
    return max(sum(block.saved for block in module.blocks) for module in plan.modules) > 1.25 * most


@dataclass
class _Search:
    """Looks for a plan within a budget; remembers what it simulated, by k and savings."""

    budget: int
    plan: Callable[[K, Savings], Plan]
    simulate: Callable[[Plan], Estimate]
    plans: dict[tuple[str, Savings], Plan] = field(default_factory=dict)
    tried: dict[tuple[str, Savings], Estimate] = field(default_factory=dict)

    def planned(self, k: K, savings: Savings) -> Plan:
        key = str(k), savings
        if key not in self.plans:
            self.plans[key] = self.plan(k, savings)
        return self.plans[key]

    def attempt(self, k: K, savings: Savings) -> Estimate:
        """The step that the plan with this k and these savings takes."""
        key = str(k), savings
        if key not in self.tried:
            self.tried[key] = self.simulate(self.planned(k, savings))
        return self.tried[key]

    def fits(self, k: K, savings: Savings) -> Plan | None:
        plan = self.planned(k, savings)
        if not savings.recompute and _hopeless(plan, self.budget):
            return None
        return plan if self.attempt(k, savings).peak <= self.budget else None

    def over(self, k: K, savings: Savings) -> frozenset[int]:
        """The local modules that need more than the budget."""
        step = self.attempt(k, savings)
        return frozenset(phase.module for phase in step.timeline
                         if phase.peak > self.budget and phase.module is not None)

    def steps(self) -> list[tuple[str, Estimate]]:
        """What was tried, in words, and the step it takes."""
        return [(_in_words(self.plans[key].k, key[1]), step) for key, step in self.tried.items()]

    def note(self) -> str:
        tries = "; ".join(f"{what}: {size(step.peak)}" for what, step in self.steps())
        return f"memory budget {size(self.budget)}; simulated: {tries}"


def _in_words(k: int, savings: Savings) -> str:
    what = [f"k={k}"] + ["losses from class ids"] * savings.fused
    what += [f"{savings.slices} slices"] * (savings.slices > 1)
    return ", ".join(what + [f"{len(savings.recompute)} of them recomputed"] * bool(savings.recompute))


_ALIKE = 1.02  # memory that is the same to a user


def fewest(
    savings: Savings, plan: Callable[[K, Savings], Plan], simulate: Callable[[Plan], Estimate], least_k: int = 1
) -> Plan:
    """The plan with the fewest local modules, ``least_k`` or more, whose simulated step takes at most 2 % more memory
    than the natural one's.

    The largest local module decides the peak, often the first or the last: splitting the others saves nothing more.
    Auxiliary networks become richer as there are fewer, so memory may fall and rise: every number up to 8 is looked at,
    above that steps of a quarter, and what lies between the last two by bisection. The natural plan where no step can
    be simulated.
    """
    natural = plan("natural", savings)
    if natural.k <= least_k:
        return natural
    try:
        least = simulate(natural).peak
    except PlanError as error:
        log.warning("k=%d, one local module per block: %s", natural.k, error)
        return replace(natural, notes=(*natural.notes, f"k={natural.k}, one local module per block: {error}"))
    tried = [f"k={natural.k}: {size(least)}"]

    def saving(k: int) -> Plan | None:
        try:
            fewer = plan(k, savings)
            if _hopeless(fewer, _ALIKE * least):
                return None
            peak = simulate(fewer).peak
        except PlanError as error:
            log.debug("k=%d: %s", k, error)
            return None
        tried.append(f"k={k}: {size(peak)}")
        return fewer if peak <= _ALIKE * least else None

    found, below, k = natural, least_k - 1, least_k
    while k < natural.k:
        if fewer := saving(k):
            found = fewer
            break
        below, k = k, k + max(1, k // 4)
    while found.k - below > 1:
        middle = (below + found.k) // 2
        if fewer := saving(middle):
            found = fewer
        else:
            below = middle
    beside = f"as little memory as k={natural.k}, to 2 %" if found is not natural else "no fewer need as little memory"
    what = f"k={found.k}" + ", plain backpropagation" * (found.k == 1)
    note = f"{what}: {beside}; simulated: {'; '.join(tried)}"
    return replace(found, notes=(*found.notes, note))


def within_budget(
    budget: int, most: int, slices: int, fused: bool, plan: Callable[[K, Savings], Plan],
    simulate: Callable[[Plan], Estimate], *, k: K | None,
) -> Plan:
    """The plan with the fewest local modules, and then the least extra compute, whose simulated step stays within
    ``budget`` bytes.

    most: the natural k; k: the user's, or None where it is to be found; slices: how many slices the last module's end
    may run in, 1 for none; fused: whether there are losses from class ids. Raises PlanError, with the least that would
    do and the reason, where nothing fits.
    """
    search = _Search(budget, plan, simulate)
    kinds = list(dict.fromkeys([Savings(), Savings(fused=fused), Savings(fused=fused, slices=slices)]))
    best = kinds[-1]
    found = None
    # more modules need less, but for what their auxiliary networks add: also try fewer than most
    finest = [min(most, max(2, most * share // 4)) for share in (4, 3, 2, 1)]
    numbers: list[K] = [1, *dict.fromkeys(finest)] if k is None else [k]
    for number in numbers:
        for savings in kinds if number == numbers[0] else [best]:
            found = found or search.fits(number, savings)
        if found is not None:
            break
    if found is not None and k is None and found.k > 1:
        low, high = 2, found.k
        while low < high:  # the fewest
            middle = (low + high) // 2
            better = search.fits(middle, best)
            low, high, found = (low, middle, better) if better else (middle + 1, high, found)
        for savings in kinds[:-1]:  # without what is not needed
            found = search.fits(found.k, savings) or found
            if found.slices == 1:
                break
    for number in dict.fromkeys(finest) if k is None else [k]:
        savings = best
        while found is None:
            over = search.over(number, savings)
            if over <= savings.recompute:
                break
            savings = replace(savings, recompute=savings.recompute | over)
            found = search.fits(number, savings)
    if found is None:
        what, least = min(search.steps(), key=lambda one: one[1].peak)
        parts = ", ".join(f"{name} {size(part)}" for name, part in sorted(least.parts.items(), key=lambda x: -x[1]))
        raise BudgetError(
            f"no plan fits memory_budget {size(budget)}: the least found is {size(least.peak)} ({what}), during "
            f"{least.when}: {parts}. Use a smaller batch or smaller images, or give at least that budget.")
    return replace(found, notes=(*found.notes, search.note()))
