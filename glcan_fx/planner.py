"""The planner: choose what the user leaves open, with the smallest loss of accuracy that fits.

Fewer local modules train more like backpropagation, so a memory budget is met in this order: what changes no gradient
and costs no compute (losses from class ids, the last module's end in slices), then as few local modules as fit, then
blocks that run again in backward.
"""

import math
import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import PlanError
from .estimate import Estimate
from .plan import Plan
from .show import size
from .synthesize import Options

EXTRA_COMPUTE = 0.0
"""Floating-point operations of a training step beyond backpropagation's, relative to it."""

# From the richest to the leanest. A narrower network costs less accuracy than fewer predictions or fewer levels.
_CANDIDATES = (
    Options(head="light", width=1.0), Options(head="light", width=0.5), Options(head="light", width=0.25),
    Options(head="lean", width=0.25), Options(head="lean", width=0.25, stride=16),
    Options(head="lean", width=0.125, stride=16), Options(head="lean", width=0.125, stride=32),
)


def candidates(**given: Any) -> list[Options]:
    """Options for auxiliary networks from the richest to the leanest; what is given, and not None, is decided."""
    decided = {name: value for name, value in given.items() if value is not None}
    return list(dict.fromkeys(replace(options, **decided) for options in _CANDIDATES))


def richest(choices: Sequence[Options], extra: Callable[[Options], float]) -> Options:
    """The richest options whose ``extra`` compute stays within ``EXTRA_COMPUTE``; the
    leanest where none does, and the first where those cannot be built."""
    low, high = 0, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        if extra(choices[middle]) <= EXTRA_COMPUTE:
            high = middle
        else:
            low = middle + 1
    return choices[low] if math.isfinite(extra(choices[low])) else choices[0]


@dataclass(frozen=True)
class Savings:
    """What changes no gradient. fused, slices: see ``Options``; recompute: local modules whose blocks run again."""

    fused: bool = False
    slices: int = 1
    recompute: Set[int] = frozenset()


_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def in_bytes(budget: int | float | str) -> int:
    """A memory budget in bytes, given as a number or as text ("6GiB", "500 MB"). Raises PlanError for anything else."""
    if not isinstance(budget, bool) and isinstance(budget, int | float) and budget > 0:
        return int(budget)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", budget.lower()) if isinstance(budget, str) else None
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise PlanError(f"memory_budget={budget!r}: give bytes, or text such as '6GiB'")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass
class _Search:
    """Looks for a plan within a budget; remembers what it tried."""

    budget: int
    plan: Callable[[int | None, Savings], Plan]  # None: the user's own k
    simulate: Callable[[Plan], Estimate]
    tried: list[tuple[str, Plan, Estimate]] = field(default_factory=list)

    def fits(self, k: int | None, savings: Savings) -> Plan | None:
        plan = self.plan(k, savings)
        found = next((e for _, p, e in self.tried if p == plan), None)
        if found is None:
            found = self.simulate(plan)
            what = [f"k={plan.k}"] + ["losses from class ids"] * savings.fused
            what += [f"{savings.slices} slices"] * (savings.slices > 1)
            what += [f"{len(savings.recompute)} modules recomputed"] * bool(savings.recompute)
            self.tried.append((", ".join(what), plan, found))
        return plan if found.peak <= self.budget else None

    def over(self, k: int | None, savings: Savings) -> frozenset[int]:
        """The local modules that need more than the budget, in the last try with these savings."""
        plan = self.plan(k, savings)
        peaks = next(e for _, p, e in self.tried if p == plan).timeline
        names = {module.name: index for index, module in enumerate(plan.modules)}
        over = {names[what.split(" of ", 1)[1]] for what, peak in peaks
                if peak > self.budget and " of " in what and what.split(" of ", 1)[1] in names}
        last = {plan.k - 1} if any(what == "backward" and peak > self.budget for what, peak in peaks) else set()
        return frozenset(over | last)

    def notes(self) -> list[str]:
        tries = "; ".join(f"{what}: {size(e.peak)}" for what, _, e in self.tried)
        return [f"memory budget {size(self.budget)}; simulated: {tries}"]


def within_budget(
    budget: int, most: int, slices: int, fused: bool, plan: Callable[[int | None, Savings], Plan],
    simulate: Callable[[Plan], Estimate], *, fixed: bool,
) -> Plan:
    """The plan with the fewest local modules, and then the least extra compute, whose simulated step stays within
    ``budget`` bytes.

    most: the natural k; fixed: whether k is the user's, and stays; slices: how many slices the last module's end may
    run in, 1 for none; fused: whether there are losses from class ids. Raises PlanError, with the least that would do
    and the reason, where nothing fits.
    """
    search = _Search(budget, plan, simulate)
    kinds = list(dict.fromkeys([Savings(), Savings(fused=fused), Savings(fused=fused, slices=slices)]))
    best = kinds[-1]
    found = None
    # more modules need less, but for what their auxiliary networks add: also try fewer than most
    numbers: list[int | None] = [None] if fixed else [1, *dict.fromkeys(min(most, max(2, most * share // 4))
                                                                  for share in (4, 3, 2, 1))]
    for number in numbers:
        for savings in kinds if number in (None, 1) else [best]:
            found = found or search.fits(number, savings)
        if found is not None:
            break
    if found is not None and not fixed and found.k > 1:
        low, high = 2, found.k
        while low < high:  # the fewest
            middle = (low + high) // 2
            better = search.fits(middle, best)
            low, high, found = (low, middle, better) if better else (middle + 1, high, found)
        for savings in kinds[:-1]:  # without what is not needed
            found = search.fits(found.k, savings) or found
            if found.options.slices == 1:
                break
    number = None if fixed else most
    while found is None:
        over = search.over(number, best)
        if over <= best.recompute:
            break
        best = replace(best, recompute=best.recompute | over)
        found = search.fits(number, best)
    if found is None:
        what, _, least = min(search.tried, key=lambda one: one[2].peak)
        parts = ", ".join(f"{name} {size(part)}" for name, part in sorted(least.parts.items(), key=lambda x: -x[1]))
        raise PlanError(
            f"no plan fits memory_budget {size(budget)}: the least found is {size(least.peak)} ({what}), during "
            f"{least.when}: {parts}. Use a smaller batch or smaller images, or give at least that budget.")
    return replace(found, notes=(*found.notes, *search.notes()))
