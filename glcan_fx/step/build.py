"""Passes 5 and 6 together, synthesize and emit: what a plan says, on a model, or on fake tensors to simulate a step."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from glcan_fx.auxiliary.synthesize import readable, share
from glcan_fx.capture.shadow import cuda_devices, fake_copy, replicate
from glcan_fx.capture.trace import hasattr_path, within
from glcan_fx.errors import PlanError
from glcan_fx.planner.costs import last_module, levels_of, local_module, tail_cost
from glcan_fx.plans.plan import Plan
from glcan_fx.pytree import map_tensors
from glcan_fx.report.table import size
from glcan_fx.simulate.estimate import (
    AnyLoss,
    Estimate,
    Memory,
    OptimizerLike,
    backpropagated,
    simulate_local,
    simulate_plain,
)
from glcan_fx.step.emit import Emitted, emit, emit_whole, register, why_not_sliced
from glcan_fx.step.local_model import LocalModel, assemble
from glcan_fx.step.runtime import ReadOnly, shape_of
from glcan_fx.structure.structure import Structure, Unit
from glcan_fx.structure.trunk import unit_at
from glcan_fx.tasks import Spec, Task
from glcan_fx.tasks.around import Around

log = logging.getLogger("glcan_fx")


def connect(
    chosen: Plan, structure: Structure, model: nn.Module, task: Task, shadow: nn.Module | None = None
) -> tuple[LocalModel, Emitted]:
    """Synthesize and emit what a plan says; with ``shadow``, a copy of the model with fake tensors, on that, without
    memory."""
    cuts = []
    for name in chosen.cuts:
        unit = unit_at(structure, name)
        if unit is None:
            raise PlanError(f"the plan cuts at '{name}', which this {type(model).__name__} does not have: it was made "
                            f"for another model ({chosen.model}). Make a new plan.")
        cuts.append(unit)
    fake = fake_copy(structure.trace.mode)
    drafts: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=cuda_devices(model)):  # building must not move the user's random state
        modules, auxiliaries, heads, requests = [], [], [], []
        for unit, info in zip(cuts, chosen.modules, strict=False):
            module, auxiliary, request = local_module(
                structure, model, task, chosen.options, unit, cuts, info, draft=shadow is not None)
            assert auxiliary is not None
            modules.append(module)
            auxiliaries.append(auxiliary)
            requests.append(request)
            if shadow is None:
                heads.append(task.head(model, **request))
            else:
                key = str(request)  # fake tensors print as their sizes
                drafts[key] = drafts.get(key) or task.head(model, **request)
                heads.append(replicate(drafts[key], fake))
        if chosen.options.predictors == "model":
            for auxiliary in auxiliaries:
                for path, source in readable(structure, auxiliary):
                    auxiliary.network.set_submodule(path, ReadOnly(source))
        if chosen.options.predictors == "shared":
            share(auxiliaries, heads, requests, [module.levels for module in chosen.modules[:-1]],
                  tails=not task.outputs_are_levels)
        aux = nn.Module()
        register(aux, structure, [cut.end for cut in cuts], auxiliaries, heads, task)
    last = last_module(structure, model, task, cuts, tail_cost(structure, model, task))
    modules.append(replace(last, recompute=chosen.modules[-1].recompute))
    if chosen.options.predictors == "own":  # a plan may have been edited: its figures are the model's
        chosen = replace(chosen, modules=tuple(modules))
    outputs = _outputs(structure, task)
    reason = why_not_sliced(structure, task) if chosen.options.slices > 1 else None
    if reason:
        raise PlanError(f"slices={chosen.options.slices}: {reason}. Use slices=1.")
    again = {index for index, module in enumerate(chosen.modules) if module.recompute}
    comments = [module.headline(index) for index, module in enumerate(chosen.modules)]
    if cuts or again or chosen.options.slices > 1:
        emitted = emit(structure, [cut.end for cut in cuts], auxiliaries, task, comments, outputs,
                       slices=chosen.options.slices, recomputed=again)
    else:
        emitted = emit_whole(structure, task, comments[0], outputs, isinstance(chosen.inputs, dict), chosen.network)
    example = next((p for p in model.parameters()), None)
    if shadow is None and example is not None:
        aux.to(device=example.device)
    output = shape_of(structure.trace.output.meta["value"])
    for index, auxiliary in enumerate(auxiliaries):
        part: Any = aux.get_submodule(str(index))
        part.agrees = not task.network_is_part and shape_of(auxiliary.outputs) == output
    opened = {path: _read_by(structure, path) for path in emitted.opened}
    chosen = replace(chosen, reads=tuple(_named(structure, cut, auxiliary.inputs)
                                         for cut, auxiliary in zip(cuts, auxiliaries, strict=True)))
    whole = model if shadow is None else shadow
    return assemble(whole, aux, emitted.graph, chosen, task, emitted.parts, opened), emitted


def _read_by(structure: Structure, path: str) -> tuple[str, ...]:
    """The attributes that the forward of a module read; its mode with the value that it had."""
    names = structure.trace.reads.get(path, ())
    mode = structure.trace.shadow.get_submodule(path).training
    return tuple(sorted(f"training={mode}" if name == "training" else name for name in names))


def _outputs(structure: Structure, task: Task) -> Callable[[Any], Any]:
    """What the compiled part returns, as the last head is given it."""
    keys = list(levels_of(structure, task) or {})
    return lambda values: {keys[0]: values} if task.outputs_are_levels and isinstance(values, fx.Node) else values


def _named(structure: Structure, cut: Unit, inputs: Sequence[fx.Node]) -> tuple[str | None, ...]:
    """What an auxiliary network reads, by name: the cut, features, inputs; None for what has no name."""
    names = {**{tap.node: tap.name for tap in structure.taps}, cut.end: cut.name}
    return tuple(names.get(node) for node in inputs)


def connect_again(local: LocalModel, structure: Structure) -> Emitted:
    """The step of a compiled model as another recording of the model has it, with the same auxiliary networks. Raises
    PlanError where they do not fit."""
    plan, task = local.plan, local.task
    units = [unit_at(structure, name) for name in plan.cuts]
    known = {tap.name: tap.node for tap in structure.taps}
    inputs = []
    for unit, names in zip(units, plan.reads, strict=True):
        if unit is None:
            raise PlanError("it does not make the values that the local modules end with")
        nodes = [{**known, unit.name: unit.end}.get(name) if name else None for name in names]
        if None in nodes:
            raise PlanError("it does not make what an auxiliary network reads")
        inputs.append(nodes)
    auxiliaries: Any = [SimpleNamespace(inputs=nodes) for nodes in inputs]
    comments = [module.headline(index) for index, module in enumerate(plan.modules)]
    return emit(structure, [unit.end for unit in units if unit], auxiliaries, task, comments,
                _outputs(structure, task))


@dataclass(frozen=True)
class Draft:
    """What planning knows, and a plan does not say: enough to simulate a step."""

    structure: Structure
    model: nn.Module  # the user's
    task: Task
    sizes: Any  # of the whole model's inputs
    given_targets: Any  # the user's example targets

    def memory(self, plan: Plan, optimizer: OptimizerLike, in_forward: bool = False) -> Memory:
        """A step of the plan, of backpropagation, and of backpropagation with recomputed blocks, where that is possible
        (not for blocks that change their inputs)."""
        again = None
        try:
            again = self.backpropagation(optimizer, recompute=True) if self.blocks[1] else None
        except PlanError as error:
            log.info("with every block recomputed: %s", error)
        return Memory(self.simulate(plan, optimizer, in_forward), self.backpropagation(optimizer), again)

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
        """A step of the plan; the same step is simulated once, so a function that makes an optimiser should always make
        the same."""
        key = repr(plan.modules), plan.options, optimizer, in_forward  # an edited plan may hold lists
        if key not in self._steps:
            found = simulate_local(self.local(plan), self.inputs, self.targets, optimizer, in_forward)
            log.info("simulated a step, k=%d: %s", plan.k, size(found.peak))
            self._steps[key] = found
        return self._steps[key]

    @cached_property
    def _steps(self) -> dict[Any, Estimate]:
        return {}

    def local(self, plan: Plan) -> LocalModel:
        """What the plan says, compiled on fake tensors."""
        task = Around(self.loss, self.task.around) if isinstance(self.task, Around) else self.loss
        return connect(plan, self.structure, self.model, task, self.shadow())[0]

    def operators(self, plan: Plan) -> tuple[dict[fx.Node, int], list[fx.Node]]:
        """The local module of every recorded operation, and the operations that local modules end with."""
        ends = [unit.end for name in plan.cuts if (unit := unit_at(self.structure, name)) is not None]
        return {node: index for node, index in self.structure.assign(ends).items() if node.op != "placeholder"}, ends

    def shadow(self) -> nn.Module:
        """A copy of the model with fake tensors."""
        return replicate(self.structure.trace.shadow, self.fake)

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
        return tree_map_only(Spec, lambda spec: self.fake(spec.empty()), self.sizes)

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
        return self.task.example_targets(self.model, self.sizes, self.structure.trace.output.meta["value"])

    @cached_property
    def loss(self) -> Task:
        """The task, or what stands for it where its targets are not known."""
        if self.targets is None:
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
