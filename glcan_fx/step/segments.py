"""The last rung: no graph at all. Local modules are runs of sub-module calls, seen in one run of the model.

Each local module is the model's own forward in which earlier calls are answered, detached, from a record, its own calls
happen, and the first later call stops it. Its auxiliary network is a copy of the forward behind it in which calls that
keep their input's shape are left out and calls that change it leave one convolution. Whatever runs can be compiled; the
record of all calls' results is kept until the step ends.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from glcan_fx.auxiliary.builder import Options
from glcan_fx.capture.replay import Absent, Call, Record, Segments, detach_record, empty_stand_ins, substituted
from glcan_fx.capture.shadow import cuda_devices
from glcan_fx.capture.trace import Report, within
from glcan_fx.errors import PlanError, TraceError
from glcan_fx.fx_utils import with_headlines
from glcan_fx.layers import freshen, inner_activation, is_norm, moments, set_width, unhooked_copy, weights_in
from glcan_fx.planner.partition import K, ModuleCost, merge
from glcan_fx.plans.plan import Block, LocalModule, Plan
from glcan_fx.pytree import map_tensors, tensors_in
from glcan_fx.step.emit import register_task
from glcan_fx.step.local_model import LocalModel, assemble, warn_of_unstepped
from glcan_fx.step.runtime import LocalLoss, collect
from glcan_fx.tasks import Task
from glcan_fx.tasks.around import InSegments
from glcan_fx.tasks.base import LossHead

log = logging.getLogger("glcan_fx")


@dataclass(frozen=True)
class CallUnit:
    """A sub-module as it was called: its path, its calls, the bytes that they keep for backward, its number of
    parameters, and whether it has weights enough to be a local module."""

    path: str
    calls: tuple[Call, ...]
    saved: int
    weights: int
    splits: bool


Groups = Sequence[Sequence[CallUnit]]


def units_of(model: nn.Module, calls: Sequence[Call]) -> list[CallUnit]:
    """The sub-modules whose calls are looked at, in order of their first call: blocks, not the stages they are in."""
    def inner(path: str) -> list[str]:
        below = {c.path for c in calls if within(c.path, path) and c.path != path} if path else {
            c.path for c in calls}
        return [p for p in below if not any(within(p, q) and p != q for q in below)]

    def is_stage(path: str) -> bool:
        parts = [model.get_submodule(p) for p in inner(path)]
        blocks = [type(part) for part in parts if any(True for _ in part.children()) and not is_norm(part)]
        weighted = [part for part in parts if _has_weights(part)]
        return (isinstance(model.get_submodule(path), nn.Sequential) and len(weighted) > 1
                or any(blocks.count(kind) > 1 for kind in blocks) or len(weighted) == 1 == len(blocks))

    found: list[str] = []
    stack = inner("")
    while stack:
        path = stack.pop()
        if is_stage(path):
            stack += inner(path)
        else:
            found.append(path)
    own = {path: tuple(call for call in calls if call.path == path) for path in found}
    ordered = sorted(found, key=lambda path: own[path][0].first)
    return [CallUnit(p, own[p], sum(c.saved for c in own[p]), weights_in(model.get_submodule(p)),
                     _has_weights(model.get_submodule(p))) for p in ordered]


def _has_weights(module: nn.Module) -> bool:
    return any(p.requires_grad and p.dim() >= 2 for p in module.parameters())


def ends_of(units: Sequence[CallUnit]) -> list[int]:
    """Which units may end a local module: those with weights that return a map; the last one stands for the tail."""
    ends = [index for index, unit in enumerate(units) if unit.splits]
    maps = [index for index in ends if any(t.dim() > 2 for t in tensors_in(units[index].calls[-1].result))]
    return maps if len(maps) > 1 else ends


def partition_calls(units: Sequence[CallUnit], k: Any) -> list[list[CallUnit]]:
    """Groups of neighbouring units, one per local module. Raises PlanError for a k that the model does not offer."""
    ends = ends_of(units)
    names = [units[index].path for index in ends[:-1]]
    if isinstance(k, str) and k == "natural":
        cuts = ends[:-1]
    elif isinstance(k, int) and not isinstance(k, bool) and 1 <= k <= len(ends):
        firsts = [0, *(end + 1 for end in ends)]
        saved = [0, *accumulate(sum(u.saved for u in units[a:b]) for a, b in pairwise(firsts))]
        costs = [[ModuleCost(last - first, last - first) for last in saved] for first in saved[:-1]]
        cuts = [ends[end - 1] for end in merge(costs, k)]
    elif isinstance(k, Sequence) and not isinstance(k, str) and all(name in names for name in k):
        cuts = sorted(ends[names.index(name)] for name in k)
    else:
        raise PlanError(f"k={k!r} is not possible: this model offers 1 to {len(ends)} local modules, split at calls of "
                        f"sub-modules: {', '.join(names) or 'none'}.")
    starts = [0, *(cut + 1 for cut in cuts)]
    return [list(units[a:b]) for a, b in zip(starts, [*starts[1:], len(units)], strict=True)]


def calls_within(groups: Groups, start: int, stop: int | None = None) -> dict[str, CallUnit]:
    """The units that local modules ``start`` up to ``stop`` call, by path, with their calls there: a unit may be called
    again later. A local module ends before the first call of the first unit of the next one."""
    first = groups[start][0].calls[0].first if start else 0
    end = math.inf if stop is None or stop >= len(groups) else groups[stop][0].calls[0].first
    found = {}
    for unit in chain.from_iterable(groups):
        if calls := tuple(call for call in unit.calls if first <= call.first < end):
            found[unit.path] = replace(unit, calls=calls)
    return found


def local_modules(model: nn.Module, inputs: tuple[str, ...], groups: Groups) -> tuple[LocalModule, ...]:
    """What a plan says of each group."""
    modules = []
    for index, group in enumerate(groups):
        last = ([unit for unit in group if unit.splits] or list(group))[-1]
        last_module = index == len(groups) - 1
        blocks = tuple(_block(unit) for unit in group if unit.splits) or (_block(last),)
        names = [block.name for block in blocks]
        aux = 0 if last_module else weights_in(Remainder(model, inputs, groups, index))
        modules.append(LocalModule(
            name=names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}", cut=None if last_module else last.path,
            blocks=blocks, shape=blocks[-1].shape, stride=0, channels=blocks[-1].channels, makes=(),
            parameters=sum(u.weights for u in group), aux_parameters=aux, saved=sum(u.saved for u in group),
            aux_saved=0, aux_flops=0, features=(), levels=(), sigma=()))
    return tuple(modules)


def _block(unit: CallUnit) -> Block:
    out = next(tensors_in(unit.calls[-1].result), None)
    shape = () if out is None else tuple(out.shape)
    return Block(unit.path, shape, 0, shape[1] if len(shape) > 1 else 0, unit.weights, unit.saved)


def emit_segments(segments: Segments, comments: Sequence[str], trains: Sequence[Sequence[str]]) -> fx.Graph:
    """The graph of a training step."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in segments.inputs]
    targets = graph.placeholder("targets", default_value=None)
    record = graph.call_function(dict)
    losses = []
    for index, comment in enumerate(comments[:-1]):
        ran = graph.create_node("call_module", f"aux.segment_{index}", (record, *inputs), name=f"record_{index}")
        ran.meta.update(headline=comment, local_module=index, trains=list(trains[index]))
        given = {"inputs": tuple(inputs)} if index == 0 else {}
        losses.append(graph.create_node(
            "call_module", f"aux.{index}", (ran,), {"context": (*inputs, targets), **given}, name=f"loss_{index}"))
        record = graph.create_node("call_function", detach_record, (ran,), name=f"detached_{index}")
    outputs = graph.create_node("call_module", "aux.rest", (record, *inputs), name="outputs")
    outputs.meta.update(headline=comments[-1], local_module=len(losses), trains=list(trains[-1]))
    loss = graph.create_node(
        "call_module", "aux.last", (outputs,), {"context": (targets,)}, name=f"loss_{len(losses)}")
    graph.output(graph.create_node("call_function", collect, ([*losses, loss], outputs), name="result"))
    with_headlines(graph)
    graph.lint()
    return graph


def plan_segments(
    model: nn.Module, k: K, task: Task, inputs: Any, names: tuple[str, ...], calls: Sequence[Call], options: Options,
    error: TraceError,
) -> Plan:
    """Plan local modules as runs of sub-module calls; raises ``error`` where there are fewer than two to run."""
    units = units_of(model, calls)
    if len(ends_of(units)) < 2:
        raise error
    groups = partition_calls(units, k)
    report = Report(5, lost=(f"the model runs as Python, cut at calls of sub-modules: {error.reason}",))
    log.warning("%s cannot be captured: it is cut at calls of sub-modules, since %s. What a step then takes cannot be "
                "simulated, and may be more than by backpropagation: measure both before you train.",
                type(model).__name__, error.reason)
    with torch.random.fork_rng(devices=cuda_devices(model)):
        modules = local_modules(model, names, groups)
    return Plan(
        model=type(model).__name__, task=task.name, network="", modules=modules,
        natural=tuple(units[end].path for end in ends_of(units)[:-1]), inputs=inputs, options=options,
        notes=report.lost, report=report, task_object=task,
        around=Segments(names, tuple(tuple(unit.path for unit in group) for group in groups)),
    )


def build_segments(chosen: Plan, model: nn.Module, task: Task, calls: Sequence[Call]) -> LocalModel:
    """Build what ``plan_segments`` planned, on a model that made these calls."""
    segments = chosen.around
    assert isinstance(segments, Segments)
    units = {unit.path: unit for unit in units_of(model, calls)}
    missing = [path for group in segments.paths for path in group if path not in units]
    if missing:
        raise PlanError(f"the plan cuts at calls of '{missing[0]}', which this {type(model).__name__} did not make: "
                        f"it was made for another model ({chosen.model}). Make a new plan.")
    groups = [[units[path] for path in group] for group in segments.paths]
    aux = nn.Module()
    with torch.random.fork_rng(devices=cuda_devices(model)):
        for index in range(len(groups) - 1):
            head = SegmentHead(task, Remainder(model, segments.inputs, groups, index))
            aux.add_module(str(index), LocalLoss(None, head))
    register_task(aux, task)
    glue = [name for name, _ in model.named_parameters()
            if not any(within(name, path) for group in segments.paths for path in group)]
    trains = [[*calls_within(groups, index, index + 1), *glue] for index in range(len(groups))]
    graph = emit_segments(segments, [m.headline(i) for i, m in enumerate(chosen.modules)], trains)
    local = assemble(model, aux, graph, chosen, InSegments(task, segments))
    warn_of_unstepped(local)
    return local


class SegmentHead(nn.Module):
    """(record, *inputs, targets) -> loss of a local module, by a simplified copy of what follows it."""

    def __init__(self, task: Any, network: "Remainder") -> None:
        super().__init__()
        self.network = network
        self.loss = LossHead(task, repeated=True)

    def forward(self, record: Record, *context: Any) -> Any:
        *inputs, targets = context
        return self.loss(self.network(record, *inputs), targets)


class Remainder(nn.Module):
    """(record, *inputs) -> outputs: the model's forward behind a local module, with lean copies of what it calls."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], groups: Groups, index: int) -> None:
        super().__init__()
        self.inputs = inputs
        own = calls_within(groups, index + 1)
        final = next((unit.path for group in reversed(groups) for unit in reversed(group) if unit.weights), "")
        units = {unit.path for group in groups for unit in group}

        def answer(path: str, module: nn.Module) -> Callable[..., Any] | None:
            if path in units:
                return Absent(path)
            return None if any(within(unit, path) for unit in units) else Absent(path)

        view = substituted(model, answer)
        empty_stand_ins(view)
        self.model = unhooked_copy(view)
        freshen(self.model, moments(view))
        self.paths = list(own)
        self.parts = nn.ModuleList(_lean(model.get_submodule(path), unit, path == final) for path, unit in own.items())

    def forward(self, record: Record, *inputs: Any) -> Any:
        given = {path: list(values) for path, values in record.items()}
        parts = dict(zip(self.paths, self.parts, strict=True))

        def own(value: Any) -> Any:  # later modules read it, too, and the model's own forward may write into it
            return map_tensors(value, Tensor.clone)

        def answer(path: str, module: nn.Module) -> Callable[..., Any] | None:
            if path in parts or path in given:
                return lambda *args, **kwargs: (
                    own(given[path].pop(0)) if given.get(path) else parts[path](*args, **kwargs))
            return module if "_stands_in" in vars(module) else None

        return substituted(self.model, answer).forward(**dict(zip(self.inputs, own(inputs), strict=True)))


class _Kept(nn.Module):
    """Stands for a sub-module that is left out. It returns a tensor of its own, as that did: what follows may overwrite
    it."""

    def forward(self, value: Tensor) -> Tensor:
        return value.clone()


def _lean(module: nn.Module, unit: CallUnit, final: bool) -> nn.Module:
    """What stands for a later sub-module: nothing, where it keeps the shape; one convolution, where it changes it."""
    call = unit.calls[0]
    values = [value for value in (*call.args, *call.kwargs.values()) if value is not None]
    source, result = values[0] if len(values) == 1 else None, call.result
    if isinstance(source, Tensor) and isinstance(result, Tensor) and not final and unit.weights:
        if source.shape == result.shape:
            return _Kept()
        if source.dim() == result.dim() > 2 and all(
                b <= a for a, b in zip(source.shape[2:], result.shape[2:], strict=True)):
            return _stage(module, source, result)
    new = unhooked_copy(module)
    freshen(new, moments(module))
    return new


def _stage(module: nn.Module, source: Tensor, result: Tensor) -> nn.Module:
    kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[source.dim()]
    stride = tuple(max(1, math.ceil(a / b)) for a, b in zip(source.shape[2:], result.shape[2:], strict=True))
    kernel = tuple(2 * (s // 2) + 1 for s in stride)
    conv: nn.Module = kind(source.shape[1], result.shape[1], kernel, stride, tuple(k // 2 for k in kernel))
    norm = next((part for part in module.modules() if is_norm(part)), None)
    layers = [conv.to(next(module.parameters()))]
    if norm is not None:
        before = moments(norm)
        norm = unhooked_copy(norm)
        set_width(norm, result.shape[1])
        freshen(norm, before)
        layers.append(norm)
    if norm is None or inner_activation(norm) is None:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)
