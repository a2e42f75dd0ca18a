"""The last rung: no graph at all. Local modules are runs of sub-module calls, seen in one run of the model.

Each local module is the model's own forward in which earlier calls are answered, detached, from a record, its own calls
happen, and the first later call stops it. Its auxiliary network is a copy of the forward behind it in which calls that
keep their input's shape are left out and calls that change it leave one convolution. Whatever runs can be compiled; the
record of all calls' results is kept until the step ends.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from glcan_fx.capture.random_numbers import cuda_devices
from glcan_fx.capture.replay import Absent, Answered, Call, Record, Segments, detach_record
from glcan_fx.capture.trace import within
from glcan_fx.capture.views import empty_stand_ins, substituted
from glcan_fx.errors import PlanError
from glcan_fx.fx_utils import with_headlines
from glcan_fx.initialization import freshen, moments, unhooked_copy
from glcan_fx.layers import inner_activation, is_norm, set_width, weights_in
from glcan_fx.plans.plan import Plan
from glcan_fx.pytree import map_tensors
from glcan_fx.step.build import register_task
from glcan_fx.step.local_loss import LocalLoss
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.output import collect
from glcan_fx.step.unstepped import warn_of_unstepped
from glcan_fx.tasks.around import InSegments
from glcan_fx.tasks.base import LossHead
from glcan_fx.tasks.captured import Uncaptured


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
    calls = [call for call in calls if "parametrizations" not in call.path.split(".")]  # what makes a layer's weight

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


def emit_segments(
    segments: Segments, comments: Sequence[str], trains: Sequence[Sequence[str]], takes_targets: bool
) -> fx.Graph:
    """The graph of a training step."""
    graph = fx.Graph()
    inputs = [graph.placeholder(name) for name in segments.inputs]
    targets = (graph.placeholder("targets", default_value=None),) if takes_targets else ()
    record = graph.call_function(dict)
    losses = []
    for index, comment in enumerate(comments[:-1]):
        ran = graph.create_node("call_module", f"aux.segment_{index}", (record, *inputs), name=f"record_{index}")
        ran.meta.update(headline=comment, local_module=index, trains=list(trains[index]))
        given = {"inputs": tuple(inputs)} if index == 0 else {}
        losses.append(graph.create_node(
            "call_module", f"aux.{index}", (ran,), {"context": (*inputs, *targets), **given}, name=f"loss_{index}"))
        record = graph.create_node("call_function", detach_record, (ran,), name=f"detached_{index}")
    outputs = graph.create_node("call_module", "aux.rest", (record, *inputs), name="outputs")
    outputs.meta.update(headline=comments[-1], local_module=len(losses), trains=list(trains[-1]))
    loss = graph.create_node(
        "call_module", "aux.last", (outputs,), {"context": targets}, name=f"loss_{len(losses)}")
    graph.output(graph.create_node("call_function", collect, ([*losses, loss], outputs), name="result"))
    with_headlines(graph)
    graph.lint()
    return graph


def build_segments(chosen: Plan, uncaptured: Uncaptured) -> LocalModel:
    """Build what ``plan_segments`` planned, on a model that made these calls.

    Raises PlanError where it does not fit."""
    segments, model, task = chosen.around, uncaptured.model, uncaptured.task
    assert isinstance(segments, Segments)
    if any(module.recompute for module in chosen.modules):
        raise PlanError("recompute: this model runs as Python, so its blocks cannot run again. Remove it.")
    units = {unit.path: unit for unit in units_of(model, uncaptured.calls)}
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
    graph = emit_segments(segments, [m.headline(i) for i, m in enumerate(chosen.modules)], trains,
                          task.takes_targets)
    local = LocalModel(model, aux, graph, chosen, InSegments(task, segments))
    warn_of_unstepped(local)
    return local


class SegmentHead(nn.Module):
    """(record, *inputs, targets) -> loss of a local module, by a simplified copy of what follows it."""

    def __init__(self, task: Any, network: "Remainder") -> None:
        super().__init__()
        self.network = network
        self.loss = LossHead(task, repeated=True)
        self.__dict__["divided"] = task.divided

    def forward(self, record: Record, *context: Any) -> Any:
        inputs, targets = self.__dict__["divided"](context)
        return self.loss(self.network(record, *inputs), *targets)


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
        given = Answered(record, inputs)
        parts = dict(zip(self.paths, self.parts, strict=True))

        def own(value: Any) -> Any:  # later modules read it, too, and the model's own forward may write into it
            return map_tensors(value, Tensor.clone)

        def answer(path: str, module: nn.Module) -> Callable[..., Any] | None:
            if path in parts or path in given:
                return lambda *args, **kwargs: (
                    own(given.take(path)) if path in given else parts[path](*args, **kwargs))
            return module if "_stands_in" in vars(module) else None

        return substituted(self.model, answer).forward(**dict(zip(self.inputs, own(inputs), strict=True)))


class _Simplified(nn.Module):
    """Stands for a call of a sub-module: ``layers`` on its main argument, the others are ignored; without layers a copy
    of that argument, as what follows may overwrite it. key: the argument's position or name."""

    def __init__(self, key: int | str, layers: nn.Module | None) -> None:
        super().__init__()
        self.key = key
        self.layers = layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        value = args[self.key] if isinstance(self.key, int) else kwargs[self.key]
        return value.clone() if self.layers is None else self.layers(value)


def _lean(module: nn.Module, unit: CallUnit, final: bool) -> nn.Module:
    """What stands for a later sub-module: nothing, where it keeps the shape; one convolution, where it changes it."""
    call = unit.calls[0]
    key, source = _main_argument(call)
    result = call.result
    if key is not None and not final and unit.weights:
        if source.shape == result.shape:
            return _Simplified(key, None)
        if source.dim() == result.dim() > 2 and all(
                b <= a for a, b in zip(source.shape[2:], result.shape[2:], strict=True)):
            return _Simplified(key, _stage(module, source, result))
    new = unhooked_copy(module)
    freshen(new, moments(module))
    return new


def _main_argument(call: Call) -> tuple[int | str | None, Any]:
    """The argument that a call transforms, by position or name: the only tensor, or the only one of the result's shape.
    None where there is none, or the result is not a tensor."""
    result = call.result
    given: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    tensors = [(key, value) for key, value in given if isinstance(value, Tensor)]
    if isinstance(result, Tensor):
        alike = [(key, value) for key, value in tensors if value.shape == result.shape]
        for found in (tensors, alike):
            if len(found) == 1:
                return found[0]
    return None, None


def _stage(module: nn.Module, source: Tensor, result: Tensor) -> nn.Module:
    kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[source.dim()]
    stride = tuple(max(1, math.ceil(a / b)) for a, b in zip(source.shape[2:], result.shape[2:], strict=True))
    kernel = tuple(2 * (s // 2) + 1 for s in stride)
    conv: nn.Module = kind(source.shape[1], result.shape[1], kernel, stride, tuple(k // 2 for k in kernel))
    norm = next((part for part in module.modules() if is_norm(part)), None)
    layers = [conv.to(next(module.parameters()))]
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):  # of tokens, whose channels come last
        layers.append(nn.GroupNorm(1, result.shape[1]).to(next(module.parameters())))
    elif norm is not None:
        before = moments(norm)
        norm = unhooked_copy(norm)
        set_width(norm, result.shape[1])
        freshen(norm, before)
        layers.append(norm)
    if norm is None or inner_activation(norm) is None:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)
