"""What a plan's training step takes, foretold from one simulated step of the same model, and what would run again."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from glcan_fx.auxiliary.method import Method
from glcan_fx.planner.costs import CostTable
from glcan_fx.planner.rerun import Rerun
from glcan_fx.planner.stages import Stages
from glcan_fx.plans.plan import Plan, Run
from glcan_fx.simulate.estimate import Estimate
from glcan_fx.structure.structure import Unit


class Savings(NamedTuple):
    """What changes no gradient and costs no operations. fused, slices: see ``config.Options``."""

    fused: bool = False
    slices: int = 1


class Foretold(NamedTuple):
    """A step: its compute relative to backpropagation's, and the blocks that run again in each local module."""

    compute: float
    runs: tuple[tuple[Run, ...], ...]


@dataclass(frozen=True)
class _Ending:
    """What was learned of a local module, or of those with one end. behind: bytes that the auxiliary network, or head,
    and loss need; off: by how much a simulated step was above what is foretold; saved: what the auxiliary network
    keeps."""

    behind: int
    off: int
    saved: int


class _Part(NamedTuple):
    """A local module: its stages, what it ends with, bytes that are live beside it, its auxiliary network's weights."""

    rerun: Rerun
    beside: int
    start: int
    end: int
    unit: Unit | None


class Predictor:
    """Foretells steps of a model. simulate: a plan's step; states: of the optimizer, for each parameter; cut_tail:
    whether neck and head run in slices, where there are slices."""

    def __init__(
        self, table: CostTable, simulate: Callable[[Plan], Estimate], states: int, cut_tail: bool
    ) -> None:
        self.table, self.structure = table, table.structure
        self.stages = Stages(table.structure)
        self._simulate, self._cut_tail = simulate, cut_tail
        self._element = max((p.element_size() for p in table.structure.trace.shadow.parameters()), default=4)
        self._each = self._element * (1 + states)
        self._endings: dict[tuple[int | None, str | None, Savings], _Ending] = {}  # by start, where it is known
        self._reruns: dict[tuple[int, int, int, int], Rerun] = {}
        self._fixed = self._floor = 0
        self._order = {node: index for index, node in enumerate(self.structure.chain)}

    def learn(self, plan: Plan, cuts: Sequence[Unit]) -> Estimate:
        """Simulate a step of a plan in which nothing runs again, with ``cuts``, and learn from it. Raises PlanError
        where it cannot be simulated."""
        step, savings = self._simulate(plan), Savings(plan.fused_loss, plan.slices)
        weights = sum(module.aux_parameters for module in plan.modules)
        self._fixed = step.start - self._each * weights
        self._floor = max((phase.peak for phase in step.timeline if phase.module is None), default=0) - step.start
        for index, part in enumerate(self._parts(cuts, plan.method, savings, learned=False)):
            name = part.unit.name if part.unit else None
            rerun = part.rerun
            phases = [phase for phase in step.timeline if phase.module == index]
            later = max((phase.peak for phase in phases if not phase.name.startswith("forward")), default=0)
            behind = later - step.start - part.beside - rerun.saved
            rerun = self._rerun(part.start, part.end, behind, rerun.gradients)
            most = max((phase.peak for phase in phases), default=0)
            ending = _Ending(
                max(0, behind), most - step.start - part.beside - rerun.kept_all, plan.modules[index].aux_saved)
            self._endings[part.start, name, savings] = ending
            self._endings.setdefault((None, name, savings), ending)
        return step

    def knows(self, cuts: Sequence[Unit], savings: Savings) -> bool:
        """Whether a step with these cuts was learned from."""
        starts = [0, *map(self._stages_up_to, cuts)]
        return all((start, name, savings) in self._endings
                   for start, name in zip(starts, (*(unit.name for unit in cuts), None), strict=True))

    def foretell(self, cuts: Sequence[Unit], method: Method, savings: Savings, limit: float) -> Foretold | None:
        """The step with the least compute that takes no more than ``limit`` bytes; None where there is none."""
        compute = self.compute(cuts, method, savings, limit)
        if compute == math.inf:
            return None
        rooms = self._rooms(cuts, method, savings, limit)
        return Foretold(compute, tuple(rerun.runs(room) for rerun, room in rooms))

    def compute(self, cuts: Sequence[Unit], method: Method, savings: Savings, limit: float) -> float:
        """The compute of that step, relative to backpropagation's; infinite where there is none."""
        if self._start(cuts, method) + self._floor > limit:
            return math.inf
        again = sum(rerun.extra(room) for rerun, room in self._rooms(cuts, method, savings, limit))
        if again == math.inf:
            return math.inf
        return 1 + (self.table.extra(cuts, method) if cuts else 0.0) + again / self.table.step()

    def most(self, cuts: Sequence[Unit], method: Method, savings: Savings) -> int:
        """The bytes with which nothing runs again."""
        return self._start(cuts, method) + max(self._floor, *(
            part.beside + part.rerun.kept_all + self._off(part, savings)
            for part in self._parts(cuts, method, savings)))

    def least(self, cuts: Sequence[Unit], method: Method, savings: Savings) -> int:
        """The fewest bytes with which there is a step."""
        fixed = self._start(cuts, method)
        return fixed + max(self._floor, *(part.beside + part.rerun.least() + self._off(part, savings)
                                          for part in self._parts(cuts, method, savings)))

    def _rooms(
        self, cuts: Sequence[Unit], method: Method, savings: Savings, limit: float
    ) -> Iterator[tuple[Rerun, float]]:
        """The local modules, and the bytes that each may take."""
        fixed = self._start(cuts, method)
        for part in self._parts(cuts, method, savings):
            yield part.rerun, limit - fixed - part.beside - self._off(part, savings)

    def _off(self, part: _Part, savings: Savings) -> int:
        return self._ending(part.start, part.unit, savings).off

    def _ending(self, start: int, unit: Unit | None, savings: Savings) -> _Ending:
        name = unit.name if unit else None
        return self._endings.get((start, name, savings)) or self._endings[None, name, savings]

    def _start(self, cuts: Sequence[Unit], method: Method) -> int:
        return self._fixed + self._each * sum(self.table.auxiliary(unit, method).parameters for unit in cuts)

    def _parts(
        self, cuts: Sequence[Unit], method: Method, savings: Savings, learned: bool = True
    ) -> list[_Part]:
        """The local modules; what their auxiliary networks need is left out unless it was ``learned``."""
        tail = self.stages.trunk if self._cut_tail and savings.slices > 1 else len(self.stages.names)
        bounds = [0, *(self._stages_up_to(unit) for unit in cuts), tail]
        found, done = [], 0
        for (start, end), unit in zip(pairwise(bounds), (*cuts, None), strict=True):
            cost = self.table.auxiliary(unit, method) if unit else None
            gradients = self._element * cost.parameters if cost else 0
            behind = 0
            if learned:
                ending = self._ending(start, unit, savings)
                behind = max(0, ending.behind + (cost.saved - ending.saved if cost else 0))
            found.append(_Part(self._rerun(start, end, behind, gradients), self.stages.crossing(0, start) + done,
                               start, end, unit))
            done += gradients + sum(stage.gradients for stage in self.stages.stages[start:end])
        return found

    def _rerun(self, start: int, end: int, behind: int, gradients: int) -> Rerun:
        key = start, end, behind, gradients
        if key not in self._reruns:
            self._reruns[key] = Rerun(self.stages, *key, self.table.device)
        return self._reruns[key]

    def _stages_up_to(self, unit: Unit) -> int:
        return sum(self._order[other.end] <= self._order[unit.end] for other in self.structure.units)
