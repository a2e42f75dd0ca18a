"""Build what a plan says, on a model: the training step's graph, with its auxiliary networks and heads."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn

from glcan_fx.auxiliary.builder import Auxiliary
from glcan_fx.auxiliary.method import head_request, remainder_behind
from glcan_fx.auxiliary.network import auxiliary_network, readable
from glcan_fx.auxiliary.remainder import levels_of
from glcan_fx.capture.random_numbers import cuda_devices
from glcan_fx.capture.shadow import fake_copy, replicate
from glcan_fx.errors import PlanError
from glcan_fx.plans.plan import Plan
from glcan_fx.step.emit import Emitted, emit, emit_whole
from glcan_fx.step.local_loss import LocalLoss
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.output import shape_of
from glcan_fx.step.parts import ReadOnly
from glcan_fx.step.tail import why_not_sliced
from glcan_fx.structure.structure import Structure, Unit, once
from glcan_fx.structure.trunk import unit_at
from glcan_fx.tasks import Task
from glcan_fx.tasks.captured import Captured


def build(plan: Plan, captured: Captured) -> tuple[LocalModel, Emitted]:
    """The compiled model: auxiliary networks, the training step's graph, and both connected to the model.

    Raises PlanError where the plan does not fit the model.
    """
    model, task = captured.model, captured.task
    cuts = [_unit(captured, name) for name in plan.cuts]
    with torch.random.fork_rng(devices=cuda_devices(model)):  # building must not move the user's random state
        auxiliaries, heads = [], []
        for made, request in _networks(plan, captured, cuts, model):
            auxiliaries.append(made)
            heads.append(task.head(model, **request))
        return _connect(plan, captured, cuts, auxiliaries, heads, model)


def build_fake(plan: Plan, captured: Captured, task: Task, shadow: nn.Module) -> LocalModel:
    """The same on ``shadow``, a copy of the model with fake tensors, and a task of such: without memory."""
    fake = fake_copy(captured.structure.trace.mode)
    cuts = [_unit(captured, name) for name in plan.cuts]
    captured = replace(captured, task=task)
    with torch.random.fork_rng(devices=cuda_devices(captured.model)):
        auxiliaries, heads = [], []
        made_once: dict[str, nn.Module] = {}
        for made, request in _networks(plan, captured, cuts, None):
            auxiliaries.append(made)
            key = str(request)  # fake tensors print as their sizes
            if key not in made_once:
                made_once[key] = task.head(captured.model, **request)
            heads.append(replicate(made_once[key], fake))
        return _connect(plan, captured, cuts, auxiliaries, heads, shadow)[0]


def _unit(captured: Captured, name: str) -> Unit:
    unit = unit_at(captured.structure, name)
    if unit is None:
        raise PlanError(f"{type(captured.model).__name__} cannot be cut at '{name}'. Make a new plan.")
    return unit


def _networks(
    plan: Plan, captured: Captured, cuts: Sequence[Unit], model: nn.Module | None
) -> Iterator[tuple[Auxiliary, dict[str, Any]]]:
    """Every cut's auxiliary network, and what the task's head behind it is asked for; drafts without a ``model``."""
    method, structure = plan.method, captured.structure
    for unit, module in zip(cuts, plan.modules, strict=False):
        remainder = remainder_behind(structure, captured.task, unit, cuts, method, (module.levels, module.sigma))
        made = auxiliary_network(remainder, module.features, method, model)
        if method.predictors == "model":
            for path, source in readable(structure, made):
                made.network.set_submodule(path, ReadOnly(source))
        yield made, head_request(remainder, made, method)


def _connect(
    plan: Plan, captured: Captured, cuts: Sequence[Unit], auxiliaries: Sequence[Auxiliary], heads: Sequence[nn.Module],
    model: nn.Module,
) -> tuple[LocalModel, Emitted]:
    structure, task = captured.structure, captured.task
    ends = [cut.end for cut in cuts]
    aux = nn.Module()
    register(aux, structure, ends, auxiliaries, heads, task)
    emitted = _emitted(plan, captured, ends, auxiliaries)
    if model is captured.model:
        device = next((p.device for p in model.parameters()), None)
        aux.to(device=device)

    output = shape_of(structure.trace.output.meta["value"])
    for index, auxiliary in enumerate(auxiliaries):
        part: Any = aux.get_submodule(str(index))
        part.agrees = not task.network_is_part and shape_of(auxiliary.outputs) == output
    opened = {path: _read_by(structure, path) for path in emitted.opened}
    reads = tuple(_named(structure, cut, made.inputs) for cut, made in zip(cuts, auxiliaries, strict=True))
    local = LocalModel(model, aux, emitted.graph, replace(plan, reads=reads), task, emitted.parts, opened)
    return local, emitted


def register(
    aux: nn.Module, structure: Structure, cuts: Sequence[fx.Node], auxiliaries: Sequence[Auxiliary],
    heads: Sequence[nn.Module], task: Task,
) -> None:
    """Fill the ``aux`` module: per local module its network and head; what the task itself trains; constants."""
    for index, (auxiliary, head) in enumerate(zip(auxiliaries, heads, strict=True)):
        aux.add_module(str(index), LocalLoss(auxiliary, head))
    register_task(aux, task)
    if structure.trace.constants:
        part = nn.Module()
        for name, value in structure.trace.constants.items():
            part.register_buffer(name, value, persistent=False)
        aux.add_module("constants", part)


def register_task(aux: nn.Module, task: Task) -> None:
    """Register what the task itself trains, a learned criterion."""
    trained = {name: module for name, module in task.modules().items()
               if any(p.requires_grad for p in module.parameters())}
    if trained:
        aux.add_module("task", nn.ModuleDict(trained))


def _emitted(plan: Plan, captured: Captured, ends: list[fx.Node], auxiliaries: Sequence[Auxiliary]) -> Emitted:
    """The training step's graph. Raises PlanError where its end cannot run in slices."""
    structure, task = captured.structure, captured.task
    reason = why_not_sliced(structure, task) if plan.slices > 1 else None
    if reason:
        raise PlanError(f"slices={plan.slices}: {reason}. Use slices=1.")
    outputs = _outputs(structure, task)
    comments = [module.headline(index) for index, module in enumerate(plan.modules)]
    again = [module.recompute for module in plan.modules]
    if ends or any(again) or plan.slices > 1:
        return emit(structure, ends, auxiliaries, task, comments, outputs, slices=plan.slices, recomputed=again,
                    reaches=plan.reaches, agree=plan.method.agreement > 0)
    return emit_whole(structure, task, comments[0], outputs, isinstance(plan.inputs, dict), plan.network)


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
    """What an auxiliary network reads, by name: the cut, features, inputs, and what a module computes between."""
    between = {node: name for name, node in _operations(structure).items()}
    inputs_of_the_network = {node: str(node.target) for node in structure.trace.placeholders}
    names = {**between, **inputs_of_the_network, **{tap.node: tap.name for tap in structure.taps}, cut.end: cut.name}
    return tuple(names.get(node) for node in inputs)


@once
def _operations(structure: Structure) -> dict[str, fx.Node]:
    """The operations by a name that another recording has, too: of which module, what, which time."""
    found: dict[str, fx.Node] = {}
    times: Counter[tuple[str, str]] = Counter()
    for node in structure.trace.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            what = node.meta["module"], str(getattr(node.target, "__name__", node.target))
            found[f"{':'.join(what)}:{times[what]}"] = node
            times[what] += 1
    return found


def build_again(local: LocalModel, structure: Structure) -> Emitted:
    """The step of a compiled model as another recording of the model has it, with the same auxiliary networks. Raises
    PlanError where they do not fit."""
    plan, task = local.plan, local.task
    units = [unit_at(structure, name) for name in plan.cuts]
    known = _operations(structure) | {str(node.target): node for node in structure.trace.placeholders}
    known |= {tap.name: tap.node for tap in structure.taps}
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
                _outputs(structure, task), reaches=plan.reaches, agree=plan.method.agreement > 0)
