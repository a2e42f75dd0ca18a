"""Choose a plan for a captured model: what the user asks for, and the planner's choice of all that is left open."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from glcan_fx.auxiliary.method import OPEN, Method
from glcan_fx.auxiliary.remainder import levels_of
from glcan_fx.auxiliary.tails import ending_of
from glcan_fx.config import K, Options
from glcan_fx.errors import BudgetError, PlanError
from glcan_fx.methods import DGL, GLCAN
from glcan_fx.planner.costs import CostTable
from glcan_fx.planner.partition import partition
from glcan_fx.planner.search import (
    EXTRA_MEMORY,
    Savings,
    allowances,
    fewest,
    richest,
    with_richest,
    within_budget,
    within_compute,
)
from glcan_fx.plans.plan import Plan
from glcan_fx.simulate.estimate import Estimate
from glcan_fx.simulate.simulator import Simulator
from glcan_fx.step.emit import why_not_sliced
from glcan_fx.structure.structure import Structure, Unit
from glcan_fx.tasks.around import Around
from glcan_fx.tasks.captured import Captured
from glcan_fx.units import in_bytes

log = logging.getLogger("glcan_fx")

_OF_GPU = 0.9  # the rest is for library workspaces and fragmentation
_SLICES = 4  # more would save little: other modules are then the peak


@dataclass(frozen=True)
class Request:
    """What the user asks for; memory_budget: in bytes, or None."""

    k: K
    method: Method
    memory_budget: int | None
    compute_budget: float | None
    options: Options

    @property
    def wants_auxiliary(self) -> bool:
        """Whether the user configured auxiliary networks, so that there must be some."""
        return self.method != GLCAN()

    @property
    def needs_graph(self) -> bool:
        """Whether the user asked for auxiliary networks that a model that runs as Python cannot have."""
        method = self.method
        plain = GLCAN(head=method.head, width=1.0, hidden=0, stride=getattr(method, "stride", OPEN))
        width = 1.0 if method.width is None else method.width
        hidden = getattr(method, "hidden", None) or 0
        return not isinstance(method, GLCAN) or replace(method, width=width, hidden=hidden) != plain


def request_for(
    model: nn.Module, k: K, method: Method, memory_budget: int | str | None, compute_budget: float | None,
    options: Options,
) -> Request:
    """The request, with the memory budget in bytes: the user's, or the GPU's with k="auto". Raises PlanError for what
    is not possible."""
    if compute_budget is not None and (
            isinstance(compute_budget, bool) or not isinstance(compute_budget, int | float) or not compute_budget > 0):
        raise PlanError(f"compute_budget={compute_budget!r}: give a training step's compute relative to "
                        "backpropagation's, such as 1.3")
    budget = None if memory_budget is None else in_bytes(memory_budget)
    if budget is None and k == "auto":
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if device.type != "cuda":
            raise PlanError("k='auto' takes the fewest local modules that fit: pass memory_budget=, or move the model "
                            "to the GPU first")
        budget = int(_OF_GPU * torch.cuda.get_device_properties(device).total_memory)
    return Request(k, method, budget, compute_budget, options)


class NothingToCut(PlanError):
    """No auxiliary network can be built behind any split point."""


def choose(captured: Captured, request: Request, simulator: Simulator) -> Plan:
    """The plan that keeps the budgets, with the local modules asked for; where no simplified copy of a remainder can be
    built, with auxiliary networks on each module's own output.

    Raises PlanError where there is none, NothingToCut where no auxiliary network can be built at all.
    """
    try:
        return _Choice(captured, request, simulator).plan()
    except NothingToCut as error:
        try:
            plan = _Choice(captured, replace(request, method=DGL()), simulator).plan()
        except PlanError:
            raise error from None
        note = f"auxiliary networks are decoupled greedy learning's, on each module's own output, since {error}"
        return replace(plan, notes=(*plan.notes, note))


class _Choice:
    """One choice of a plan: what it chooses from, and what it has computed."""

    def __init__(self, captured: Captured, request: Request, simulator: Simulator) -> None:
        self.captured, self.request, self.simulator = captured, request, simulator
        self.structure = captured.structure
        self.table = CostTable(captured)
        ending = ending_of(self.structure, not captured.task.outputs_are_levels)
        self.choices = request.method.choices(ending)
        self.allowed: Mapping[Method, float] = allowances(
            self.choices, ending, request.compute_budget, request.memory_budget)
        self.refused: dict[str, PlanError] = {}
        if isinstance(request.k, int | str):  # the choice of cuts is ours
            self.refused = self.table.refused(self._plain())
        self.units = [unit for unit in self.structure.units if unit.name not in self.refused]

    def _plain(self) -> Method:
        """The richest method without hidden layers, to find out whether a network can be built at all."""
        return next((method for method in self.choices if not getattr(method, "hidden", 0)), self.choices[0])

    def plan(self) -> Plan:
        request = self.request
        if len(self.units) == 1 and self.refused and request.k != 1:
            first = next(iter(self.refused.values()))
            raise first if request.needs_graph else NothingToCut(str(first))
        if request.compute_budget is None:
            return self._within_memory(self.choices)
        try:
            return within_compute(request.compute_budget, self.choices, self._within_memory, self._compute)
        except BudgetError:
            if request.k != "fewest" or request.memory_budget is not None:
                raise
            natural = partial(self._planned, k="natural", savings=self._savings)
            return within_compute(request.compute_budget, self.choices, natural, self._compute)

    @property
    def _savings(self) -> Savings:
        return Savings(self.request.options.fused_loss, self.request.options.slices)

    def _within_memory(self, choices: Sequence[Method]) -> Plan:
        """The plan that keeps the memory budget; without one, as little memory as the natural plan."""
        request, planned = self.request, partial(self._planned, choices)
        if request.memory_budget is not None:
            return self._within_budget(request.memory_budget, choices)
        if request.k == "fewest":
            return fewest(self._savings, planned, self._simulate, least_k=2 if request.wants_auxiliary else 1)
        return planned(request.k, self._savings)

    def _within_budget(self, budget: int, choices: Sequence[Method]) -> Plan:
        task, model = self.captured.task, self.captured.model
        averages = task.averages_images(model, levels_of(self.structure, task))
        slices = _SLICES if averages and not why_not_sliced(self.structure, task) else 1
        k = None if isinstance(self.request.k, str) else self.request.k
        return with_richest(choices, lambda left: within_budget(
            budget, len(self.units), slices, task.fuses_losses(model), partial(self._planned, left), self._simulate,
            k=k))

    def _simulate(self, plan: Plan) -> Estimate:
        return self.simulator.simulate(plan, self.request.options.optimizer)

    def _compute(self, plan: Plan) -> float:
        """Compute of a plan's step relative to backpropagation's, without activation checkpointing."""
        modules = tuple(replace(module, recompute=False) for module in plan.modules)
        plain = self.simulator.backpropagation(self.request.options.optimizer)
        return self._simulate(replace(plan, modules=modules)).flops / plain.flops

    def _cuts(self, k: K, method: Method) -> list[Unit]:
        return partition(self.structure, k, self.units, lambda unit: self.table.auxiliary(unit, method).saved,
                         lambda: self.table.tail.saved)

    def _planned(self, choices: Sequence[Method], k: K, savings: Savings) -> Plan:
        """The plan for a number of local modules."""
        def excess(method: Method) -> float:
            try:
                cuts = self._cuts(k, method)
                return max(self.table.extra(cuts, method) - self.allowed[method],
                           self.table.weight(cuts, method) - EXTRA_MEMORY)
            except PlanError as error:  # a layer that cannot be made narrower
                log.debug("%s: %s", method, error)
                return math.inf

        method = richest(choices, excess) if len(choices) > 1 else choices[0]
        cuts = self._cuts(k, method)
        if method.predictors == "model" and cuts and not self.table.reads_model(cuts, method):
            raise PlanError("predictors='model': no auxiliary network ends with a layer of the shape of the model's "
                            "last one. Remove it, or make them wider: width=1, head='light'.")
        modules = [*(self.table.module(unit, cuts, method) for unit in cuts), self.table.last(cuts)]
        task, optimizer = self.captured.task, self.request.options.optimizer
        return Plan(
            model=type(self.captured.model).__name__, task=task.name, network=task.network(self.captured.model),
            modules=tuple(replace(m, recompute=i in savings.recompute) for i, m in enumerate(modules)),
            natural=tuple(unit.name for unit in self.units[:-1]), inputs=self.captured.inputs, method=method,
            fused_loss=savings.fused, slices=savings.slices, notes=self._notes(),
            report=self.structure.trace.report, around=task.around if isinstance(task, Around) else None,
            optimizer="sgd" if callable(optimizer) else optimizer)  # a plan is data

    def _notes(self) -> tuple[str, ...]:
        refused = (f"no cut behind '{name}': {str(error)[:200]}" for name, error in self.refused.items())
        return (*_facts(self.structure, self.captured.model), *refused)


def _facts(structure: Structure, model: nn.Module) -> list[str]:
    """What a user would want to know of how the model was captured."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    notes = [f"{len(frozen)} parameters are frozen, the first is {frozen[0]}"] if frozen else []
    constants = structure.trace.constants
    if constants:
        notes.append(f"{len(constants)} tensors that are neither parameters nor buffers were recorded as constants")
    return [*notes, *structure.trace.report.lost]
