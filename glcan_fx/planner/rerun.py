"""Which blocks of a local module run again in backward, for the least compute within a memory limit.

A dynamic programme over the module's stages and the memory that is left (rotor: Beaumont et al., Optimal checkpointing
for heterogeneous chains, 2019, without offloading; Chen et al., arXiv 1604.06174, is the case of runs of equal length
without runs inside): the first stage keeps what its backward needs, or a run of stages keeps what passes its end, and
is processed again, in the same way, after all that follows.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from glcan_fx.devices import OPERATIONS, Device
from glcan_fx.planner.stages import Stages
from glcan_fx.plans.plan import Run

_SLOTS = 800
_TIE = 1e-3  # of a forward pass: what a run costs beside its operations, so that nothing runs again for nothing

Vector = NDArray[np.float64]


class Rerun:
    """Stages ``start`` to ``end`` (not included) of a network, which end with a loss.

    behind: bytes that the auxiliary network, or head, and loss need at most, beside what the stages keep for them.
    gradients: bytes of the gradients of what follows the stages in this local module. device: what running again costs.
    """

    def __init__(
        self, stages: Stages, start: int, end: int, behind: int, gradients: int = 0,
        device: Device = OPERATIONS,
    ) -> None:
        self.stages, self.start, self.end, self.behind, self.gradients = stages, start, end, max(0, behind), gradients
        mine = stages.stages[start:end]
        later = [gradients]
        for stage in reversed(mine):
            later.append(later[-1] + stage.gradients)
        later.reverse()
        self._saved = [stage.saved for stage in mine]
        self._needs = [stage.needs + stages.passing(start, start + i) + later[i + 1]
                       for i, stage in enumerate(mine)]
        self._costs_again = [device.seconds(stage.work) for stage in mine]
        self._tie = _TIE * (sum(self._costs_again) or 1.0) / max(1, len(mine))
        self._slot = max(1, self.kept_all // _SLOTS + 1)
        self._tables: dict[tuple[int, int, bool], Vector] = {}
        self._ways: dict[tuple[int, int, bool], NDArray[np.int64]] = {}

    @property
    def saved(self) -> int:
        """Bytes that the stages keep where nothing runs again."""
        return sum(self._saved)

    @cached_property
    def kept_all(self) -> int:
        """The most bytes that are live where nothing runs again."""
        so_far, most = 0, 0
        for saved, needs in zip(self._saved, self._needs, strict=True):
            most = max(most, so_far + needs)
            so_far += saved
        return max(most, so_far + self.behind)

    def least(self) -> int:
        """The fewest bytes with which there is a way."""
        costs = self._costs(0, len(self._saved), True)
        return int(np.argmax(np.isfinite(costs))) * self._slot if np.isfinite(costs[-1]) else self.kept_all

    def extra(self, limit: float) -> float:
        """Compute of what runs again so that no more than ``limit`` bytes are live; infinite where there is no way."""
        if limit >= self.kept_all:
            return 0.0
        slot = int(limit // self._slot)
        return float(self._costs(0, len(self._saved), True)[slot]) if slot >= 0 else np.inf

    def runs(self, limit: float) -> tuple[Run, ...]:
        """The blocks that run again for ``extra(limit)``."""
        if limit >= self.kept_all:
            return ()
        return tuple(self._runs(0, len(self._saved), True, int(limit // self._slot)))

    def _runs(self, start: int, end: int, last: bool, slot: int) -> Sequence[Run]:
        found: list[Run] = []
        while start < end:
            self._costs(start, end, last)
            way = int(self._ways[start, end, last][slot])
            if way == start:
                slot -= self._in_slots(self._saved[start])
                start += 1
                continue
            names = tuple(self.stages.names[self.start + index] for index in range(start, way))
            found.append(Run(names, tuple(self._runs(start, way, False, slot))))
            slot -= self._stored(start, way)
            start = way
        return found

    def _costs(self, start: int, end: int, last: bool) -> Vector:
        """Compute of running again while stages from ``start`` to ``end`` are processed, by the slots of memory that
        are left; last: whether the loss follows."""
        key = start, end, last
        if key in self._tables:
            return self._tables[key]
        size = _SLOTS + 1
        if start == end:
            costs = np.zeros(size)
            if last:
                costs[: self._in_slots(self.behind)] = np.inf
            self._tables[key], self._ways[key] = costs, np.full(size, end)
            return costs
        costs = _after(self._costs(start + 1, end, last), self._in_slots(self._saved[start]))
        costs[: self._in_slots(self._needs[start])] = np.inf
        ways = np.full(size, start)
        for way in range(start + 1, end + last):
            if not self.stages.may_run(self.start + start, self.start + way):
                continue
            again = sum(self._costs_again[start:way]) + self._tie
            found = (again + _after(self._costs(way, end, last), self._stored(start, way))
                     + self._costs(start, way, False))
            better = found < costs
            costs, ways = np.where(better, found, costs), np.where(better, way, ways)
        self._tables[key], self._ways[key] = costs, ways
        return costs

    def _stored(self, start: int, way: int) -> int:
        """Slots of what passes the end of a run."""
        return self._in_slots(self.stages.crossing(self.start + start, self.start + way))

    def _in_slots(self, size: int) -> int:
        return round(size / self._slot)


def _after(costs: Vector, slots: int) -> Vector:
    """Costs by the memory that there was before ``slots`` were taken."""
    if not slots:
        return costs.copy()
    taken = np.full(len(costs), np.inf)
    if slots < len(costs):
        taken[slots:] = costs[:-slots]
    return taken
