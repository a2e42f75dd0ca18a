"""A model as it was captured for a task: the value that all later passes begin with."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from glcan_fx.capture.ladder import trace
from glcan_fx.capture.modules import argument_names
from glcan_fx.capture.random_numbers import cuda_devices
from glcan_fx.capture.replay import Call, Surroundings, arguments_of, calls_of, surroundings
from glcan_fx.errors import GlcanFxError, TraceError
from glcan_fx.layers import weights_in
from glcan_fx.pytree import tensors_in
from glcan_fx.structure.structure import Structure
from glcan_fx.structure.trunk import analyze
from glcan_fx.tasks.around import Around
from glcan_fx.tasks.base import Spec, Task, specs

log = logging.getLogger("glcan_fx")

_TRIES = 8  # sub-modules, largest first


@dataclass(frozen=True)
class Captured:
    """A model, what is known of its structure, and the task it is trained for.

    inputs: ``Spec``s of the example inputs of the compiled part; arguments: of the whole model's.
    """

    model: nn.Module
    task: Task
    structure: Structure
    inputs: Any
    arguments: Any


@dataclass(frozen=True)
class Uncaptured:
    """A model that cannot be captured, and the calls of its sub-modules in one run; error: why."""

    model: nn.Module
    task: Task
    inputs: Any
    calls: Sequence[Call]
    error: TraceError

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the model's arguments."""
        return _names(self.model, self.inputs)


def capture(model: nn.Module, task: Task, inputs: Any, values: Any = None) -> Captured | Uncaptured:
    """Capture the part of a model that the task compiles, with ``Spec``s of example inputs; where the model's forward
    cannot be recorded, its largest sub-module that can (rung 4), or only the calls of sub-modules (rung 5).

    values: the user's example inputs, for a forward that asks about them (whether boxes are boxes).

    Raises TraceError where the model does not run, or does not allow that either.
    """
    try:
        return Captured(model, task, _structure(model, task, inputs), inputs, inputs)
    except TraceError as error:
        if task.network(model) or not error.replayable:
            raise
        calls = _calls(model, inputs, error, values)
        return _largest_part(model, task, inputs, calls, error)


def capture_calls(
    model: nn.Module, task: Task, inputs: Any, error: TraceError, values: Any = None
) -> Uncaptured:
    """The calls of sub-modules alone; raises ``error`` where the model does not run."""
    return Uncaptured(model, task, inputs, _calls(model, inputs, error, values), error)


def capture_part(model: nn.Module, task: Task, inputs: Any, around: Surroundings | None) -> Captured:
    """Capture again what was planned once: the same part of the model, ``around`` which the rest runs as Python."""
    made = task if around is None else Around(task, around)
    return Captured(model, made, _structure(model, made, inputs), inputs, inputs)


def _structure(model: nn.Module, task: Task, inputs: Any) -> Structure:
    """Record and analyze; where that fails without hooks, with those on the model: it may have installed them itself,
    as collectors of features do."""
    path = task.network(model)
    with torch.random.fork_rng(devices=cuda_devices(model)):
        try:
            return analyze(trace(model, _example(inputs), path=path))
        except GlcanFxError:
            if not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
                raise
        return analyze(trace(model, _example(inputs), path=path, hooks=True))


def _example(inputs: Any) -> Any:
    example = tree_map_only(Spec, Spec.empty, inputs)
    return example if isinstance(example, dict) else list(example)


def _names(model: nn.Module, inputs: Any) -> tuple[str, ...]:
    return tuple(argument_names(model, *(((), inputs) if isinstance(inputs, dict) else (inputs, {}))))


def _calls(model: nn.Module, inputs: Any, error: TraceError, values: Any = None) -> list[Call]:
    """The calls of a run on random values, or, where the model refuses those, on the user's."""
    def run(example: Any, *, random: bool) -> list[Call]:
        return calls_of(model, *(((), example) if isinstance(example, dict) else (example, {})), random=random)

    known = values is not None and not any(tensor.is_meta or isinstance(tensor, FakeTensor)
                                           for tensor in tensors_in(values))
    try:
        with suppress(Exception) if known else nullcontext():
            return run(_example(inputs), random=True)
        return run(values, random=False)
    except Exception as failure:  # noqa: BLE001 - whatever the user's forward raises
        raise error from failure


def _largest_part(
    model: nn.Module, task: Task, inputs: Any, calls: Sequence[Call], error: TraceError
) -> Captured | Uncaptured:
    """Rung 4: the largest sub-module that can be captured and cut, and holds half of the weights."""
    once = [call for call in calls if sum(other.path == call.path for other in calls) == 1]
    size = {call.path: weights_in(model.get_submodule(call.path)) for call in once}
    tried = []
    for call in sorted(once, key=lambda call: -size[call.path])[:_TRIES]:
        if 2 * size[call.path] < weights_in(model):
            break
        part = Around(task, surroundings(model, _names(model, inputs), calls, call))
        given = specs(arguments_of(model.get_submodule(call.path), call))
        try:
            structure = _structure(model, part, given)
        except GlcanFxError as failure:
            tried.append(f"'{call.path}': {str(failure).splitlines()[0]}")
            continue
        if len(structure.units) > 1:
            log.info("%s cannot be captured as a whole: '%s' is compiled", type(model).__name__, call.path)
            reason = f"'{call.path}' is compiled, the rest runs as Python: {error.reason}"
            report = replace(structure.trace.report, rung=4, lost=(*structure.trace.report.lost, reason))
            structure = replace(structure, trace=replace(structure.trace, report=report))
            return Captured(model, part, structure, given, inputs)
        tried.append(f"'{call.path}': it offers nowhere to cut")
    failed = TraceError(f"{error}\n  sub-modules tried: {'; '.join(tried) or 'none'}", error.reason)
    return Uncaptured(model, task, inputs, calls, failed)
