"""Choose a plan for a captured model: what the user asks for, and the planner's choice of all that is left open."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from glcan_fx.auxiliary.method import Method
from glcan_fx.auxiliary.remainder import levels_of
from glcan_fx.auxiliary.tails import ending_of
from glcan_fx.capture.modules import hooks_on
from glcan_fx.config import K, kind_of_optimizer
from glcan_fx.devices import OPERATIONS, device_of
from glcan_fx.errors import BudgetError, PlanError
from glcan_fx.methods import DGL
from glcan_fx.planner.costs import CostTable
from glcan_fx.planner.frontier import Point, frontier
from glcan_fx.planner.partition import partition
from glcan_fx.planner.predict import Foretold, Predictor, Savings
from glcan_fx.planner.request import Request
from glcan_fx.planner.search import ALIKE, COMPUTE, EXTRA_MEMORY, Candidate, Search, allowances
from glcan_fx.planner.within import WithinMemory
from glcan_fx.plans.plan import Plan
from glcan_fx.replacement import kept_together
from glcan_fx.simulate.estimate import Estimate
from glcan_fx.simulate.simulator import Simulator
from glcan_fx.step.tail import sliced_tail, why_not_sliced
from glcan_fx.structure.missed import missed_blocks
from glcan_fx.structure.order import out_of_order
from glcan_fx.structure.structure import Structure, Unit
from glcan_fx.tasks.around import Around
from glcan_fx.tasks.captured import Captured
from glcan_fx.units import size

log = logging.getLogger("glcan_fx")

_SLICES = 4  # more would save little: other modules are then the peak
_MUCH = 1.5  # compute, relative to backpropagation's, which with exact gradients saves most memory
TOO_LARGE = "auxiliary networks are large"


class NothingToCut(PlanError):
    """No auxiliary network can be built behind any split point."""


def choose(captured: Captured, request: Request, simulator: Simulator) -> Plan:
    """The plan that keeps the budgets, with the local modules asked for; where no simplified copy of a remainder can be
    built, with auxiliary networks on each module's own output.

    Raises PlanError where there is none, NothingToCut where no auxiliary network can be built at all.
    """
    try:
        plan = Choice(captured, request, simulator).plan()
        for note in plan.notes:
            if note.startswith(TOO_LARGE):
                log.warning("%s: %s", plan.model, note)
        return plan
    except NothingToCut as error:
        try:
            plan = Choice(captured, replace(request, method=DGL()), simulator).plan()
        except PlanError:
            raise error from None
        note = f"auxiliary networks are decoupled greedy learning's, on each module's own output, since {error}"
        return replace(plan, notes=(*plan.notes, note))


def frontier_of(captured: Captured, request: Request, simulator: Simulator, chosen: Plan) -> tuple[Point, ...]:
    """The plans that no other is better than, with ``chosen``, backpropagation and activation checkpointing among them;
    request: for the fewest local modules, without budgets. Raises PlanError where a step cannot be simulated."""
    memory = simulator.memory(chosen, request.options.optimizer)
    peers = [(name, step) for name, step in memory.named() if step is not memory.plan]
    return frontier(Choice(captured, request, simulator).everything(), chosen, memory.plan, peers, memory.device)


class Choice:
    """One choice of a plan: what it chooses from, and what it has computed."""

    def __init__(self, captured: Captured, request: Request, simulator: Simulator) -> None:
        self.captured, self.request, self.simulator = captured, request, simulator
        self.structure = captured.structure
        self.table = CostTable(captured, device_of(request.options.device))
        ending = ending_of(self.structure, not captured.task.outputs_are_levels)
        self.choices = request.method.choices(ending)
        self.allowed: Mapping[Method, float] = allowances(
            self.choices, ending, request.compute_budget, request.memory_budget)
        self._allowed_on = OPERATIONS if request.compute_budget is None else self.table.device
        self.refused: dict[str, PlanError] = {}
        self.together: dict[str, PlanError] = {}
        if isinstance(request.k, int | str):  # the choice of cuts is ours
            self.together = _replaced(self.structure) | _reordered(self.structure)
            self.refused = (_hooked(self.structure, captured.model) | self.table.refused(self._plain())
                            | self.together)
        self.units = [*(unit for unit in self.table.offered(request.method) if unit.name not in self.refused),
                      self.structure.units[-1]]
        self._optimizer, states = kind_of_optimizer(request.options.optimizer)
        self.predictor = Predictor(self.table, self.simulate, states,
                                   bool(sliced_tail(self.structure, captured.task)))
        self._candidates: dict[tuple[str, Method, float], Candidate | None] = {}
        self.given: K | None = None  # the local modules that the user asked for

    def _plain(self) -> Method:
        """The richest method without hidden layers, to find out whether a network can be built at all."""
        return next((method for method in self.choices if not getattr(method, "hidden", 0)), self.choices[0])

    def plan(self) -> Plan:
        request = self.request
        if len(self.units) == 1 and self.refused.keys() - self.together.keys() and request.k != 1:
            first = next(iter(self.refused.values()))
            raise first if request.needs_graph else NothingToCut(str(first))
        if request.memory_budget is not None:
            return WithinMemory(self).plan(request.memory_budget)
        if request.k == "fewest":
            return self._fewest()
        return self._planned(self._richest(request.k), self._savings)

    def everything(self) -> Search:
        """All that there is to choose from."""
        return self.search(range(1, len(self.units) + 1), self.kinds(), self.learn)

    # ---- what is asked for

    def _richest(self, k: K) -> Candidate:
        """The richest local modules that may be had. Raises BudgetError where the compute budget allows none."""
        candidate = next(self.candidates(k))
        budget = self.request.compute_budget
        if budget is not None and candidate.compute > budget:
            raise BudgetError(
                f"compute_budget={budget:g}: with k={candidate.k} a step takes "
                f"{math.ceil(1000 * candidate.compute) / 1000:.3f} of backpropagation's {self.unit}. Give at least "
                "that, choose another k, or leave auxiliary networks to the planner.")
        return candidate

    def _most(self) -> Candidate:
        """One local module per block, or as many as the compute budget allows. Raises BudgetError where it allows
        none."""
        budget = self.request.compute_budget
        numbers = range(len(self.units) - 1, self.least_k, -1) if budget is not None else ()
        for k in ("natural", *numbers):
            candidate = next(self.candidates(k))
            if budget is None or candidate.compute <= budget:
                return candidate
        return self._richest(self.least_k)

    def _fewest(self) -> Plan:
        """As little memory as one local module per block takes, with as few as possible."""
        natural = self._most()
        plan = self._planned(natural, self._savings)
        if natural.k <= self.least_k:
            return plan
        try:
            least = self.predictor.learn(plan, natural.cuts).peak
        except PlanError as error:
            log.warning("k=%d, one local module per block: %s", plan.k, error)
            return replace(plan, notes=(*plan.notes, f"k={plan.k}, one local module per block: {error}"))
        self._learn_exact(self._savings)
        search = self.search(range(self.least_k, natural.k), [self._savings], lambda savings: None)
        search.most = self.request.compute_budget or max(COMPUTE, natural.compute)
        limit = int(ALIKE * least)
        found = search.within(limit) or plan
        beside = f"as little memory as k={plan.k}, to 2 %" if found is not plan else "no fewer need as little memory"
        tried = "; ".join(filter(None, [f"k={plan.k}: {size(least)}", search.note()]))
        same = math.ceil(ALIKE * self.simulate(found).peak)
        notes = [f"{_named(found)}: {beside}; simulated: {tried}"]
        exact = search.exact(same) if self._may_be_exact(found) else None
        if exact is not None and self.compute(exact) <= self.compute(found):
            return replace(exact, notes=(*exact.notes, f"exact gradients (k=1) at no more memory and "
                                         f"{self.unit} than k={found.k}; simulated: {tried}"))
        return replace(found, notes=(*found.notes, *notes, *self._exactly(search, found, same, exact)))

    def exactly(self, search: Search, found: Plan, limit: int) -> list[str]:
        """What backpropagation's own gradients would take within a limit of bytes, where the plan has others."""
        exact = search.exact(limit) if self._may_be_exact(found) else None
        return self._exactly(search, found, limit, exact)

    def _may_be_exact(self, found: Plan) -> bool:
        """Whether there is something to say of exact gradients beside a plan: it has others, as nobody asked for."""
        asked = isinstance(self.request.k, int | Sequence) and not isinstance(self.request.k, str)
        return found.k > 1 and self.least_k == 1 and not asked

    def _exactly(self, search: Search, found: Plan, limit: int, exact: Plan | None) -> list[str]:
        if not self._may_be_exact(found):
            return []
        if exact is None:
            smallest = search.smallest(1)
            return [f"exact gradients (k=1) need {size(self.simulate(smallest).peak)} at least, at "
                    f"{self.compute(smallest):.2f} of backpropagation's {self.unit}"]
        compute = self.compute(exact)
        return [f"exact gradients (k=1) fit the same memory at {compute:.2f} of backpropagation's {self.unit}: "
                f"memory_budget='{limit / 2**20:.0f}MiB', compute_budget={math.ceil(100 * compute) / 100:g}"]

    @property
    def unit(self) -> str:
        """What ``compute_budget`` is about."""
        device = self.table.device
        return "compute" if device is OPERATIONS else f"time on {device.name}"

    def compute(self, plan: Plan) -> float:
        """The compute of a plan's simulated step, relative to backpropagation's."""
        return self.relative(self.simulate(plan))

    def relative(self, step: Estimate) -> float:
        return step.relative_to(self.simulator.backpropagation(self.request.options.optimizer), self.table.device)

    # ---- what there is

    @property
    def _savings(self) -> Savings:
        options, task = self.request.options, self.captured.task
        return Savings(options.fused_loss and task.fuses_losses(self.captured.model), options.slices)

    def kinds(self) -> list[Savings]:
        """In the order in which they are tried."""
        kinds = [self._savings]
        if self._may_slice():
            kinds.append(Savings(self._savings.fused, max(self._savings.slices, _SLICES)))
        return kinds

    @property
    def least_k(self) -> int:
        return min(len(self.units), 1 + self.request.method.window) if self.request.wants_auxiliary else 1

    def _may_slice(self) -> bool:
        task = self.captured.task
        return task.averages_images(self.captured.model, levels_of(self.structure, task)) and not why_not_sliced(
            self.structure, task)

    def search(
        self, numbers: Sequence[int], kinds: Sequence[Savings], learn: Callable[[Savings], None]
    ) -> Search:
        return Search(self.predictor, self._numbered, numbers, kinds, self._planned, self.simulate, learn,
                      self.relative, self.request.compute_budget)

    def _numbered(self, k: int) -> Iterator[Candidate]:
        return self.candidates(k if self.given is None else self.given)

    def learn(self, savings: Savings) -> None:
        """Simulate steps to learn from, once for each kind of savings: one with many local modules, and, to be sure of
        it, the exact one."""
        *others, last = self.candidates("natural" if self.given is None else self.given)
        for candidate in (last, *others):  # with other auxiliary networks the same number may be cut elsewhere
            if not self.predictor.knows(candidate.cuts, savings):
                self.predictor.learn(self._planned(candidate, savings), candidate.cuts)
        if self.given is None:
            self._learn_exact(savings)

    def _learn_exact(self, savings: Savings) -> None:
        """Simulate the step of one local module, where there may be one, to learn from it."""
        if self.least_k == 1 and not self.predictor.knows((), savings):
            self.predictor.learn(self._planned(next(self.candidates(1)), savings), ())

    def simulate(self, plan: Plan) -> Estimate:
        return self.simulator.simulate(plan, self.request.options.optimizer)

    def candidates(self, k: K) -> Iterator[Candidate]:
        """The local modules that may be planned for ``k``: with auxiliary networks that add no more compute and memory
        than they may, the richest first; where none are, those that add the least. Raises PlanError where none can be
        built."""
        found = False
        errors: list[PlanError] = []
        for method in self.choices:
            try:
                candidate = self._candidate(k, method, self.allowed[method])
            except PlanError as error:  # a layer that cannot be made narrower
                log.debug("%s: %s", method, error)
                errors.append(error)
                continue
            if candidate is not None:
                found = True
                yield candidate
                if candidate.k == 1:
                    return
        if not found:
            if len(errors) == len(self.choices):
                raise errors[0]
            yield self._least_excess(k)

    def _candidate(self, k: K, method: Method, allowed: float) -> Candidate | None:
        """The local modules with a method's auxiliary networks, unless they add more than they may."""
        key = repr(k), method, allowed
        if key not in self._candidates:
            cuts = self._cuts(k, method)
            if cuts and method.window > len(cuts):
                raise PlanError(f"window={method.window} of k={len(cuts) + 1} local modules: every loss would train "
                                "all in front of it, which saves no memory. Use more local modules, or k=1.")
            if method.predictors == "model" and cuts and not self.table.reads_model(cuts, method):
                raise PlanError("predictors='model': no auxiliary network ends with a layer of the shape of the "
                                "model's last one. Remove it, or make them wider: width=1, head='light'.")
            chosen = method
            if self.request.compute_budget is None:  # what the method is in itself is not left to choose
                chosen = method.core
                allowed += self.table.reached(cuts, chosen, self._allowed_on)
            extra = self.table.extra(cuts, chosen, allowed, self._allowed_on) if cuts else 0.0
            heavy = extra < math.inf > allowed and self.table.weight(cuts, chosen) > EXTRA_MEMORY
            if extra < math.inf and not heavy:
                compute = 1 + (self.table.extra(cuts, method) if cuts else 0.0)
                self._candidates[key] = Candidate(tuple(cuts), method, compute)
            else:
                self._candidates[key] = None
        return self._candidates[key]

    def _least_excess(self, k: K) -> Candidate:
        found: list[tuple[float, int, Candidate]] = []
        for index, method in enumerate(self.choices):
            try:
                candidate = self._candidate(k, method, math.inf)
            except PlanError:
                continue
            assert candidate is not None
            reached = self.table.reached(candidate.cuts, method.core, self._allowed_on)
            extra = self.table.extra(candidate.cuts, method.core, device=self._allowed_on)
            weight = self.table.weight(candidate.cuts, method.core)
            excess = max(extra - reached - self.allowed[method], weight - EXTRA_MEMORY)
            found.append((excess, -index, candidate))
        least = min(found, key=lambda one: one[:2])[2]
        return replace(least, note=self._too_large(least))

    def _too_large(self, candidate: Candidate) -> str:
        """That auxiliary networks are larger than they should be, in figures; nothing where they are not by much."""
        cuts, method = candidate.cuts, candidate.method
        networks = candidate.compute - self.table.reached(cuts, method)
        weight, count = self.table.weight(cuts, method), sum(p.numel() for p in self.captured.model.parameters())
        own = sum(self.table.auxiliary(unit, method).parameters for unit in cuts)
        if weight <= EXTRA_MEMORY and networks <= _MUCH or len(self.choices) == 1 and own <= count:
            return ""
        smaller = "as was asked for" if len(self.choices) == 1 else "smaller ones cannot be built"
        return (f"{TOO_LARGE} for k={candidate.k}: {own:,} parameters beside the model's {count:,}, which with "
                f"gradients and momentum add {weight:.0%} to backpropagation's memory; compute "
                f"{candidate.compute:.2f}; {smaller}. Use fewer local modules.")

    def _cuts(self, k: K, method: Method) -> list[Unit]:
        return partition(self.structure, k, self.units, lambda unit: self.table.auxiliary(unit, method).saved,
                         lambda: self.table.tail.saved)

    def _planned(self, candidate: Candidate, savings: Savings, foretold: Foretold | None = None) -> Plan:
        """The plan with these local modules."""
        cuts, method = candidate.cuts, candidate.method
        modules = [*(self.table.module(unit, cuts, method) for unit in cuts), self.table.last(cuts)]
        runs = foretold.runs if foretold else ((),) * len(modules)
        task = self.captured.task
        return Plan(
            model=type(self.captured.model).__name__, task=task.name, network=task.network(self.captured.model),
            modules=tuple(replace(m, recompute=again) for m, again in zip(modules, runs, strict=True)),
            natural=tuple(unit.name for unit in self.units[:-1]), inputs=self.captured.inputs, method=method,
            fused_loss=savings.fused, slices=savings.slices,
            notes=(*self._notes(), *[candidate.note] * bool(candidate.note)),
            report=self.structure.trace.report, around=task.around if isinstance(task, Around) else None,
            optimizer=self._optimizer)

    def _notes(self) -> tuple[str, ...]:
        refused = (f"no cut behind '{name}': {str(error)[:200]}" for name, error in self.refused.items())
        return (*_facts(self.structure, self.captured.model), *refused)


def _hooked(structure: Structure, model: nn.Module) -> dict[str, PlanError]:
    """Units that end inside of a module that has hooks, the user's or the model's own: it is called as a whole."""
    refused: dict[str, PlanError] = {}
    for unit in structure.units[:-1]:
        for call in structure.divided([unit.end]):
            if call.path and any(hooks_on(m.get_submodule(call.path)) for m in (model, structure.trace.shadow)):
                refused[unit.name] = PlanError(f"'{call.path}', which goes on behind it, has a hook, so that it is "
                                               "called as a whole")
    return refused


def _reordered(structure: Structure) -> dict[str, PlanError]:
    """Units behind which a cut would change the order of what the model draws or counts."""
    return {unit.name: PlanError(f"behind it {what} would come in another order than the model's")
            for unit in structure.units[:-1] if (what := out_of_order(structure, unit.end))}


def _replaced(structure: Structure) -> dict[str, PlanError]:
    """Units that end between a block with replaced weights and its neighbours, which these are made of."""
    together = kept_together(structure.trace.shadow)
    refused: dict[str, PlanError] = {}
    for unit in structure.units[:-1] if together else ():
        users: dict[int, set[int]] = {}
        for node, owner in structure.assign([unit.end]).items():
            for parameter in structure.trace.parameters(node):
                users.setdefault(id(parameter), set()).add(owner)
        for path, parameters in together:
            if len(set().union(*(users.get(key, set()) for key in parameters))) > 1:
                refused[unit.name] = PlanError(f"the weights of '{path}' are made of its neighbours', and stay in one "
                                               "local module with them")
    return refused


def _named(plan: Plan) -> str:
    again = any(module.recompute for module in plan.modules)
    exact = ", plain backpropagation" if not again else ", backpropagation's gradients"
    return f"k={plan.k}{exact * (plan.k == 1)}"


def _facts(structure: Structure, model: nn.Module) -> list[str]:
    """What a user would want to know of how the model was captured."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    notes = [f"{len(frozen)} parameters are frozen, the first is {frozen[0]}"] if frozen else []
    constants = structure.trace.constants
    if constants:
        notes.append(f"{len(constants)} tensors that are neither parameters nor buffers were recorded as constants")
    streams = max(map(len, structure.groups.values()), default=1)
    if streams > 1:
        notes.append(f"{streams} streams are side by side: until they join, a local module ends with a value of each")
    return [*notes, *missed_blocks(structure), *structure.trace.report.lost]
