"""The cost of plans, from what their local modules cost: compute and weights, without simulating a step."""

import math
from collections.abc import Sequence
from functools import cached_property

from torch import fx

from glcan_fx.auxiliary.method import Method
from glcan_fx.auxiliary.remainder import blocks_ahead
from glcan_fx.devices import OPERATIONS, Device, Work
from glcan_fx.errors import PlanError
from glcan_fx.layers import Cost
from glcan_fx.planner.modules import Costs, auxiliary_cost, last_module, plan_module, reads_model, tail_cost
from glcan_fx.plans.plan import LocalModule, reaches_of
from glcan_fx.structure.structure import Unit, work_of
from glcan_fx.tasks.captured import Captured


class CostTable:
    """What local modules and training steps of a captured model would cost; every figure is computed once. device: on
    which compute is seconds, or ``OPERATIONS``."""

    def __init__(self, captured: Captured, device: Device = OPERATIONS) -> None:
        self.captured, self.device = captured, device
        self.structure = captured.structure
        self._costs = Costs(captured)
        self._units: dict[tuple[str, Method], Cost] = {}
        self._steps: dict[tuple[fx.Node, ...], Work] = {}

    def module(self, unit: Unit, cuts: Sequence[Unit], method: Method) -> LocalModule:
        """The local module that ends with ``unit``, one of ``cuts``."""
        return plan_module(self._costs, unit, cuts, method)

    def reads_model(self, cuts: Sequence[Unit], method: Method) -> bool:
        """Whether an auxiliary network may read the model's own last layer."""
        return reads_model(self._costs, cuts, method)

    def last(self, cuts: Sequence[Unit]) -> LocalModule:
        """The last local module."""
        return last_module(self.captured, cuts)

    def auxiliary(self, unit: Unit, method: Method) -> Cost:
        """The cost of the auxiliary network of a module that ends with ``unit``."""
        key = unit.name, method
        if key not in self._units:
            cuts = self.structure.units[:-1]
            self._units[key] = auxiliary_cost(self._costs, unit, cuts if unit in cuts else [unit], method)
        return self._units[key]

    @cached_property
    def tail(self) -> Cost:
        """The cost of the task's head in the last module."""
        return tail_cost(self.captured)

    def step(self, cuts: Sequence[Unit] = (), device: Device | None = None) -> float:
        """Compute of a training step without auxiliary networks; without cuts backpropagation's. device: this table's.

        Forward, and as much for the gradients of a layer's weights and of its input. Frozen layers have none of their
        weights, and no gradient is needed of what no trained layer of the same local module has made.
        """
        ends = tuple(unit.end for unit in cuts)
        if ends not in self._steps:
            owner = self.structure.assign(ends)
            total, trained = Work().plus(self.tail.work, 3), set[fx.Node]()
            for node in self.structure.trace.graph.nodes:
                passes = any(source in trained and owner.get(source) == owner.get(node)
                             for source in node.all_input_nodes)
                trains = any(p.requires_grad for p in self.structure.trace.parameters(node))
                if passes or trains:
                    trained.add(node)
                total = total.plus(work_of(self.structure, [node]), 1 + passes + trains)
            self._steps[ends] = total
        return (device or self.device).seconds(self._steps[ends]) or 1.0

    def extra(
        self, cuts: Sequence[Unit], method: Method, most: float = math.inf, device: Device | None = None
    ) -> float:
        """Compute of a training step beyond backpropagation's, relative to it: what auxiliary networks take (backward
        is twice forward), less the gradients that no longer pass a cut. Infinite above ``most``: those of further
        modules are not built then. device: this table's."""
        device = device or self.device
        whole = self.step(device=device)
        found = self.step(cuts, device) / whole - 1 + self.reached(cuts, method, device)
        for unit in cuts:
            found += 3 * device.seconds(self.auxiliary(unit, method).work) / whole
            if found > most:
                return math.inf
        return found

    def reached(self, cuts: Sequence[Unit], method: Method, device: Device | None = None) -> float:
        """Compute that local losses take beside their own modules, relative to a step of backpropagation: in those that
        they pass through, for gradients of inputs, in further ones that they train, for those of weights, too."""
        total = Work()
        if method.window == 1 and not method.ahead and not method.agreement:
            return 0.0
        structure = self.structure
        owner = structure.assign([unit.end for unit in cuts])
        nodes: list[list[fx.Node]] = [[] for _ in range(len(cuts) + 1)]
        for node in structure.trace.graph.nodes:
            if node in owner:
                nodes[owner[node]].append(node)
        ends = [blocks_ahead(structure, unit, method.ahead)[-1].end if method.ahead else unit.end for unit in cuts]
        for index, reach in enumerate(reaches_of(method.window, [owner[end] for end in ends])):
            if method.agreement and index:  # a gradient of its input, and that is differentiated once more
                total = total.plus(work_of(structure, nodes[index]), 3)
            for module in range(reach.first, reach.last):
                total = total.plus(work_of(structure, nodes[module]), 2)
            if index < len(ends):
                known = structure.above(ends[index])
                passed = [node for module in range(reach.last + 1, reach.until + 1) for node in nodes[module]]
                total = total.plus(work_of(structure, [node for node in passed if node in known]), 1)
        device = device or self.device
        return device.seconds(total) / self.step(device=device)

    def weight(self, cuts: Sequence[Unit], method: Method) -> float:
        """Memory of the auxiliary networks' weights, with gradients and momentum, relative to backpropagation's."""
        each = 3 * max((p.element_size() for p in self.structure.trace.shadow.parameters()), default=4)
        parameters, saved, _ = self.structure.uses([])[0]
        return (each * sum(self.auxiliary(unit, method).parameters for unit in cuts)
                / max(1, each * parameters + saved + self.tail.saved))

    def offered(self, method: Method) -> list[Unit]:
        """Units that a local module may end with: so many blocks follow that its loss can pass through them."""
        units = self.structure.units[:-1]
        return units[:max(0, len(units) - method.ahead)]

    def refused(self, method: Method) -> dict[str, PlanError]:
        """Units behind which no auxiliary network can be built, and why."""
        refused: dict[str, PlanError] = {}
        for unit in self.offered(method):
            try:
                self.auxiliary(unit, method)
            except PlanError as error:
                refused[unit.name] = error
        return refused
