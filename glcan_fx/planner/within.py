"""The plan that keeps a memory budget: as close to exact gradients as it can be, then at the least compute."""

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from glcan_fx.errors import BudgetError
from glcan_fx.planner.search import ALIKE, COMPUTE, Search, in_words
from glcan_fx.plans.plan import Plan
from glcan_fx.units import size

if TYPE_CHECKING:
    from glcan_fx.planner.choose import Choice

log = logging.getLogger("glcan_fx")

_STEP, _FAR = 1.04, 1.3  # when the least memory was foretold too low


class WithinMemory:
    """Plans with a memory budget, of what a ``Choice`` offers."""

    def __init__(self, choice: "Choice") -> None:
        self.choice = choice

    def plan(self, budget: int | Literal["least"]) -> Plan:
        """The fewest local modules that a memory budget and the compute allow; where none do, the least compute that
        the memory allows."""
        asked = self.choice.request.k
        k = None if isinstance(asked, str) and asked != "natural" else asked
        self.choice.given = k
        choice = self.choice
        numbers = range(choice.least_k, len(choice.units) + 1) if k is None else [next(choice.candidates(k)).k]
        search = choice.search(numbers, choice.kinds(), choice.learn)
        if budget == "least":
            budget = self._least(search)
        found = search.within(budget)
        if found is not None and self._allow_others_as_much(search, found):
            found = search.within(budget) or found
        if found is None:
            found = self._leaner_than_foretold(search, budget)
        if found is not None:
            notes = [f"memory budget {size(budget)}; simulated: {search.note()}"]
            return replace(found, notes=(*found.notes, *notes, *self.choice.exactly(search, found, budget)))
        found = search.cheapest(budget)
        if found is None:
            found = search.leanest(budget, any_compute=True) or search.smallest()
            if self.choice.simulate(found).peak > budget:
                raise self._nothing_fits(found, budget)
        compute, most = self.choice.compute(found), self.choice.request.compute_budget
        limit = f"compute_budget={most:g}" if most is not None else f"{COMPUTE:g} of backpropagation's {choice.unit}"
        note = (f"memory budget {size(budget)}: nothing fits it and {limit}; this plan takes {compute:.2f}, the least "
                f"that was found; simulated: {search.note()}")
        if most is not None:
            log.warning("%s", note)
        return replace(found, notes=(*found.notes, note))

    def _leaner_than_foretold(self, search: Search, budget: int) -> Plan | None:
        """A plan that fits though no step was foretold to."""
        leanest = search.leanest(budget)
        return leanest if leanest is not None and self.choice.simulate(leanest).peak <= budget else None

    def _allow_others_as_much(self, search: Search, found: Plan) -> bool:
        """Where local modules are to take more compute than usual, for their auxiliary networks, a plan that is closer
        to exact gradients may, too. Whether that is so."""
        compute = self.choice.compute(found)
        if search.most is not None or found.k == 1 or compute <= 1.005 * COMPUTE:
            return False
        search.most = compute
        return True

    def _least(self, search: Search) -> int:
        """The fewest bytes that a plan takes with no more compute than it may; of one local module, with any."""
        if self.choice.given == 1 and search.most is None:
            search.most = math.inf
        budget, found = self._least_within(search)
        if found is not None and self._allow_others_as_much(search, found):
            budget = min(budget, self._least_within(search)[0])
        leanest = search.leanest()
        if leanest is not None:
            budget = min(budget, int(ALIKE * self.choice.simulate(leanest).peak))
        return budget

    def _least_within(self, search: Search) -> tuple[int, Plan | None]:
        """The same, of what may be taken now, and the plan where one was found."""
        budget = int(ALIKE * search.least())
        found = search.within(budget)
        if found is None:  # more than was foretold
            most = max(self.choice.simulate(search.smallest()).peak, int(_FAR * budget))
            while found is None and budget < most:
                budget = min(most, int(_STEP * budget))
                found = search.within(budget)
        return budget, found

    def _nothing_fits(self, smallest: Plan, budget: int) -> BudgetError:
        least = self.choice.simulate(smallest)
        parts = ", ".join(f"{name} {size(part)}" for name, part in sorted(least.parts.items(), key=lambda x: -x[1]))
        return BudgetError(
            f"no plan fits memory_budget {size(budget)}: the least found is {size(least.peak, up=True)} "
            f"({in_words(smallest)}), during {least.when}: {parts}. Use a smaller batch or smaller images, or "
            "give at least that budget.")
