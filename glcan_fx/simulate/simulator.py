"""Simulated training steps of a captured model: of plans, and of what they replace; every step is simulated once."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from glcan_fx.capture.shadow import fake_copy, replicate
from glcan_fx.capture.trace import hasattr_path, within
from glcan_fx.config import OptimizerLike
from glcan_fx.devices import Device, device_of
from glcan_fx.errors import PlanError, UnsupportedError
from glcan_fx.plans.plan import Plan
from glcan_fx.pytree import map_tensors
from glcan_fx.simulate.estimate import Estimate, Memory, backpropagated, simulate_local, simulate_plain
from glcan_fx.simulate.ranks import Rank, balanced, divisible, loads_of, simulate_ranks
from glcan_fx.step.build import build_fake
from glcan_fx.step.local_model import LocalModel
from glcan_fx.structure.structure import Unit
from glcan_fx.tasks import AnyLoss, Spec, Task
from glcan_fx.tasks.around import Around
from glcan_fx.tasks.captured import Captured
from glcan_fx.units import size

log = logging.getLogger("glcan_fx")


class Simulator:
    """Runs training steps of a captured model on fake tensors. given_targets: the user's example targets, or None;
    device: on which a plan is to be fast."""

    def __init__(self, captured: Captured, given_targets: Any = None, device: str | Device | None = None) -> None:
        self.captured, self.given_targets, self.device = captured, given_targets, device_of(device)
        self.structure, self.model, self.task = captured.structure, captured.model, captured.task
        self._steps: dict[Any, Estimate] = {}

    def memory(self, plan: Plan, optimizer: OptimizerLike, in_forward: bool = False) -> Memory:
        """A step of the plan, of backpropagation, and of backpropagation with recomputed blocks, where that is possible
        (not for blocks that change their inputs)."""
        again = None
        try:
            again = self.backpropagation(optimizer, recompute=True) if self.blocks[1] else None
        except PlanError as error:
            log.info("activation checkpointing, every block: %s", error)
        return Memory(self.simulate(plan, optimizer, in_forward), self.backpropagation(optimizer), again, self.device)

    def backpropagation(self, optimizer: OptimizerLike, *, recompute: bool = False) -> Estimate:
        """A step of backpropagation; ``recompute``: with activation checkpointing on every block. It is the same for
        every plan, so it is simulated once."""
        key = optimizer, recompute
        if key not in self._steps:
            units, blocks = self.blocks
            self._steps[key] = simulate_plain(
                self.shadow(), self.inputs, self.backpropagated, optimizer, units, blocks if recompute else ())
        return self._steps[key]

    def simulate(self, plan: Plan, optimizer: OptimizerLike, in_forward: bool = False) -> Estimate:
        """A step of the plan; the same step is simulated once, so a function that makes an optimizer should always make
        the same."""
        decisions = repr(plan.modules), plan.method, plan.fused_loss, plan.slices  # an edited plan may hold lists
        key = decisions, optimizer, in_forward
        if key not in self._steps:
            try:
                found = simulate_local(self.local(plan), self.inputs, self.targets, optimizer, in_forward)
            finally:
                self.structure.trace.clear_caches()
            log.info("simulated a step, k=%d: %s", plan.k, size(found.peak))
            self._steps[key] = found
        return self._steps[key]

    def ranks(self, plan: Plan, optimizer: OptimizerLike, micro_batches: int) -> tuple[Rank, ...]:
        """What each rank of a pipeline needs for the plan."""
        try:
            return simulate_ranks(self.local(plan), plan.ranks, self.inputs, self.targets, optimizer, micro_batches)
        finally:
            self.structure.trace.clear_caches()

    def on_devices(self, plan: Plan, devices: int, optimizer: OptimizerLike) -> Plan:
        """The plan, with its local modules divided among so many ranks. Raises PlanError where that is not possible."""
        try:
            links = divisible(self.local(plan), devices)
        except UnsupportedError as error:
            raise PlanError(f"devices={devices}: {error}") from error
        return replace(plan, ranks=balanced(loads_of(self.simulate(plan, optimizer)), links, devices))

    def local(self, plan: Plan) -> LocalModel:
        """What the plan says, compiled on fake tensors."""
        task = Around(self.loss, self.task.around) if isinstance(self.task, Around) else self.loss
        return build_fake(plan, self.captured, task, self.shadow())

    def shadow(self) -> nn.Module:
        """A copy of the model with fake tensors."""
        return replicate(self.structure.trace.shadow, self.fake, hooks=True)  # those that its forward installs

    @cached_property
    def fake(self) -> Callable[[Tensor], Tensor]:
        """Makes fake tensors like those of the trace."""
        return fake_copy(self.structure.trace.mode)

    def backpropagated(self, model: nn.Module) -> Any:
        """The loss, or losses, of an ordinary training step."""
        arguments = self.arguments if isinstance(self.arguments, dict) else self.inputs
        return backpropagated(self.loss, model, arguments, self.targets)

    @cached_property
    def arguments(self) -> Any:
        """Fake example inputs of the whole model."""
        return tree_map_only(Spec, lambda spec: self.fake(spec.empty()), self.captured.arguments)

    @cached_property
    def inputs(self) -> list[Any]:
        """The same, as a training step of the compiled model takes them."""
        if self.task.result() == "dict":
            return [list(self.arguments[0])]
        return list(self.arguments.values() if isinstance(self.arguments, dict) else self.arguments)

    @cached_property
    def targets(self) -> Any:
        if self.given_targets is not None:
            return map_tensors(self.given_targets, lambda t: self.fake(t) if t.is_meta else t.detach().cpu())
        return self.task.example_targets(self.model, self.captured.arguments, self.structure.trace.output.meta["value"])

    @cached_property
    def loss(self) -> Task:
        """The task, or what stands for it where its targets are not known."""
        if self.targets is None and self.task.takes_targets:
            return AnyLoss()
        tensors = [t for module in self.task.modules().values() for t in [*module.parameters(), *module.buffers()]]
        memo: dict[int, Any] = {id(tensor): self.fake(tensor) for tensor in tensors}
        try:
            return copy.deepcopy(self.task, memo)  # a criterion's state is the user's
        except Exception as error:  # a lock, an open file
            raise PlanError(f"the memory of a step cannot be simulated: the task or criterion cannot be copied: {error}"
                            ) from error

    @cached_property
    def blocks(self) -> tuple[dict[str, str], list[str]]:
        """Of every layer's path the unit it belongs to; and the paths of the modules with parts whose calls are units,
        or hold some of them."""
        ends = [unit.end for unit in self.structure.units]
        owner = self.structure.assign(ends)
        names = [*(unit.name for unit in self.structure.units), "neck, head, loss"]
        units: dict[str, str] = {}
        for node, index in owner.items():
            if node.op == "call_module":
                units.setdefault(str(node.target), names[index])
        return units, list(dict.fromkeys(filter(None, map(self._block, self.structure.units))))

    def _block(self, unit: Unit) -> str | None:
        """The module that one would put under activation checkpointing for a unit: its own, or the one around it where
        that is called as a whole and holds no large part of the trunk."""
        shadow = self.structure.trace.shadow
        if ":" in unit.name or not hasattr_path(shadow, unit.name):
            return None
        if any(True for _ in shadow.get_submodule(unit.name).children()):
            return unit.name
        around = unit.name.rpartition(".")[0]
        inside = sum(within(other.name, around) for other in self.structure.units)
        called = around in self.structure.trace.returns
        return around if called and 3 * inside <= len(self.structure.units) else None
