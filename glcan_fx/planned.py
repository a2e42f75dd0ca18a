"""A plan and the model that it is for."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from glcan_fx.auxiliary.method import Method
from glcan_fx.config import OptimizerLike, Options
from glcan_fx.errors import PlanError
from glcan_fx.files import write
from glcan_fx.planner.choose import frontier_of
from glcan_fx.planner.frontier import Point
from glcan_fx.planner.modules import check_plan
from glcan_fx.planner.request import Request
from glcan_fx.plans.plan import Plan
from glcan_fx.progress import progress
from glcan_fx.report.dot import PICTURES, picture, plan_dot
from glcan_fx.report.page import plan_fragment, plan_report
from glcan_fx.report.table import plan_text
from glcan_fx.simulate.estimate import Estimate, Memory
from glcan_fx.simulate.ranks import Rank
from glcan_fx.simulate.simulator import Simulator
from glcan_fx.step.build import build
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.saving import remember_plan
from glcan_fx.step.segments import build_segments
from glcan_fx.step.unstepped import warn_of_unstepped
from glcan_fx.step.verify import verify as verify_step
from glcan_fx.step.verify import verify_around
from glcan_fx.tasks import Task
from glcan_fx.tasks.around import Around
from glcan_fx.tasks.captured import Captured, Uncaptured


class PlannedModel:
    """A plan and the model that it is for: what it costs, what it looks like, and the model that it builds.

    plan: the decisions, as plain data; its attributes are also attributes of this object.

    Prints as a table; with the memory of a training step after ``simulated()``, as printing simulates nothing.
    """

    def __init__(
        self, plan: Plan, captured: Captured | Uncaptured, options: Options, simulator: Simulator | None = None,
        method: Method | None = None
    ) -> None:
        self.plan = plan
        self.captured, self._options, self._method = captured, options, method
        if simulator is None and isinstance(captured, Captured):
            simulator = Simulator(captured, options.example_targets, options.device)
        self._simulator = simulator

    def __getattr__(self, name: str) -> Any:
        """What the plan says: ``k``, ``cuts``, ``modules``, ``notes``, ``report`` and so on."""
        if name.startswith("_") or name == "plan":
            raise AttributeError(name)
        return getattr(self.plan, name)

    def __eq__(self, other: object) -> bool:
        return self.plan == (other.plan if isinstance(other, PlannedModel) else other)

    def __hash__(self) -> int:
        return id(self)

    def __reduce__(self) -> Any:
        """A copy, or what is read from a file, is the plan alone: it no longer knows the model."""
        return _plan_alone, (self.plan,)

    @cached_property
    def memory(self) -> Memory:
        """Simulated memory and compute of a training step with the options' optimizer: of this plan, of
        backpropagation, and of activation checkpointing on every block. Takes seconds, once.

        Raises PlanError where a step cannot be simulated (for a model that runs as Python, on rung 5).
        """
        return self.estimate(self._options.optimizer)

    def estimate(self, optimizer: OptimizerLike = "sgd", *, in_forward: bool = False) -> Memory:
        """As ``memory``, with another optimizer: "sgd", "adam", a function of the parameters, or None; in_forward: the
        plan's step with ``optimizer_in_forward``."""
        return self.simulator.memory(self.plan, optimizer, in_forward)

    @cached_property
    def frontier(self) -> tuple[Point, ...]:
        """What can be had: plans that no other is better than, in the order of exactness, then of compute, with this
        plan, backpropagation and activation checkpointing among them. ``transform(model, plan=point.plan)`` takes one.

        Every one is simulated, once, which takes seconds, for a large detector minutes. Raises PlanError where a step
        cannot be simulated.
        """
        if not isinstance(self.captured, Captured):
            raise PlanError(f"no frontier: {self.plan.model} runs as Python, and its steps cannot be simulated.")
        method = self._method or type(self.plan.method)()
        request = Request("fewest", method, None, None, self._options)
        with progress(f"simulating what else {self.plan.model} can have"):
            return frontier_of(self.captured, request, self.simulator, self.plan)

    def simulated(self) -> "PlannedModel":
        """The same, after its memory was simulated, so that it prints: ``print(plan.simulated())``. Where it cannot be
        simulated, the notes say why."""
        try:
            self.memory  # noqa: B018 - kept
        except PlanError as error:
            plan = replace(self.plan, notes=(*self.plan.notes, str(error)))
            return PlannedModel(plan, self.captured, self._options, self._simulator, self._method)
        return self

    def simulate(self, optimizer: OptimizerLike = "sgd", *, in_forward: bool = False) -> Estimate:
        """The plan's own step alone."""
        return self.simulator.simulate(self.plan, optimizer, in_forward)

    def backpropagation(self, optimizer: OptimizerLike = "sgd", *, recompute: bool = False) -> Estimate:
        """A step of the model as it is; recompute: with activation checkpointing on every block."""
        return self.simulator.backpropagation(optimizer, recompute=recompute)

    def on_ranks(self, micro_batches: int = 8, optimizer: OptimizerLike = "sgd") -> tuple[Rank, ...]:
        """What each rank of a pipeline needs, for a plan with ``devices=``, by simulation: its local modules, its
        memory with a batch in so many micro-batches, its part of the work, and what it sends. Raises PlanError for a
        plan without, TargetError for a batch that cannot be cut into so many."""
        if not self.plan.ranks:
            raise PlanError("this plan is for one device: pass devices= to glcan_fx.plan()")
        return self.simulator.ranks(self.plan, optimizer, micro_batches)

    @property
    def simulator(self) -> Simulator:
        """What simulates training steps of this model. Raises PlanError for a model that runs as Python."""
        if self._simulator is None:
            raise PlanError("the memory of a step cannot be simulated: this model's local modules run as Python.")
        return self._simulator

    def replace(self, **changes: Any) -> "PlannedModel":
        """The same with changes to the plan (``dataclasses.replace``), checked against the model. Raises PlanError."""
        plan = replace(self.plan, **changes)
        if isinstance(self.captured, Captured):
            plan = check_plan(plan, self.captured)
        return PlannedModel(plan, self.captured, self._options, self._simulator, self._method)

    @property
    def task_object(self) -> Task:
        """What the model is trained for, with its criterion."""
        task = self.captured.task
        return task.task if isinstance(task, Around) else task

    def build(self, *, verify: bool | None = None) -> LocalModel:
        """Build the compiled module; it shares the model's parameters, and the model itself is not changed.

        verify: see ``Options``, whose value is taken where this is None. Raises PlanError where the plan does not fit
        the model, TraceError where the compiled step computes something else than the model, NotLearningError where a
        local module gets no gradient.
        """
        verify = self._options.verify if verify is None else verify
        if isinstance(self.captured, Uncaptured):
            local = build_segments(self.plan, self.captured)
            self._attach(local)
            remember_plan(local)
            if verify:
                verify_around(local, self.captured.inputs)
            return local
        local, emitted = build(self.plan, self.captured)
        self._attach(local)
        remember_plan(local)
        self.captured.structure.trace.clear_caches()
        if verify:
            if self.plan.around is not None:
                verify_around(local, self.captured.arguments)
            verify_step(local, emitted, self.captured.structure, self._options.example_targets)
        warn_of_unstepped(local)
        return local

    def _attach(self, local: LocalModel) -> None:
        """Let a compiled model's plan know the model, too."""
        known = PlannedModel(local.plan, self.captured, self._options, self._simulator, self._method)
        known.__dict__.update({key: value for key, value in vars(self).items() if key == "memory"})
        local.__dict__["plan"] = known

    def __str__(self) -> str:
        return plan_text(self.plan, self.__dict__.get("memory"))

    def __repr__(self) -> str:
        return f"<PlannedModel: {self.plan.model}, {self.plan.k} local modules>"

    @property
    def blocks(self) -> list[str]:
        """Paths of the blocks that one would put under activation checkpointing."""
        if self._simulator is not None:
            return self._simulator.blocks[1]
        paths = dict(self.captured.model.named_modules())
        return [block.name for module in self.plan.modules for block in module.blocks
                if block.name in paths and any(True for _ in paths[block.name].children())]

    def to_json(self) -> str:
        """The plan as JSON text; ``Plan.from_json`` reads it back."""
        return self.plan.to_json()

    def to_dot(self, depth: str | None = None) -> str:
        """The partition graph in Graphviz's DOT language. depth: "stages" (identical local modules as one),
        "modules", "blocks" or "operators"; None: stages for more than 20 local modules, else modules."""
        structure = self.captured.structure if isinstance(self.captured, Captured) else None
        return plan_dot(self.plan, self._simulated(), depth, structure)

    def to_html(self, depth: str | None = None) -> str:
        """A report as one HTML page, which needs nothing else: the graph, memory over a step, the table, the code; with
        the frontier where that was computed before."""
        structure = self.captured.structure if isinstance(self.captured, Captured) else None
        local = self._simulator.local(self.plan) if self._simulator else None
        return plan_report(self.plan, self._simulated(), depth, structure, local, self.__dict__.get("frontier", ()))

    def save(self, path: str | Path, *, depth: str | None = None) -> None:
        """Write the plan, as the file's ending says: .html (``to_html``), .json (``to_json``), .txt (the table), .dot,
        or a picture, .svg, .png or .pdf, for which Graphviz's program ``dot`` must be installed.

        Raises PlanError for another ending, UnsupportedError where ``dot`` is missing. A file that was there stays
        as it was where writing fails.
        """
        path = Path(path)
        texts: dict[str, Callable[[], str]] = {
            ".html": lambda: self.to_html(depth), ".json": self.to_json,
            ".txt": lambda: f"{plan_text(self.plan, self._simulated())}\n", ".dot": lambda: self.to_dot(depth)}
        ending = path.suffix.lower()
        if ending not in (*texts, *PICTURES):
            raise PlanError(f"'{path}': a file that ends in {', '.join((*texts, *PICTURES))}")
        content = picture(self.to_dot(depth), ending) if ending in PICTURES else texts[ending]().encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)

    def _repr_html_(self) -> str:
        """For notebooks: the table, and the picture where Graphviz's program ``dot`` is installed."""
        return plan_fragment(self.plan, self.__dict__.get("memory"))

    def _simulated(self) -> Memory | None:
        """The simulated memory, where it can be simulated."""
        try:
            return self.memory
        except PlanError:
            return None


def _plan_alone(plan: Plan) -> Plan:
    return plan
