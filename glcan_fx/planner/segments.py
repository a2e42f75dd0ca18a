"""Plan local modules as runs of sub-module calls, for models that cannot be captured (rung 5)."""

import logging
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from glcan_fx.capture.random_numbers import cuda_devices
from glcan_fx.capture.replay import Segments
from glcan_fx.capture.trace import Report
from glcan_fx.errors import PlanError
from glcan_fx.layers import weights_in
from glcan_fx.planner.partition import ModuleCost, merge
from glcan_fx.planner.request import Request
from glcan_fx.plans.plan import Block, LocalModule, Plan
from glcan_fx.pytree import tensors_in
from glcan_fx.step.segments import CallUnit, Groups, Remainder, units_of
from glcan_fx.tasks.captured import Uncaptured

log = logging.getLogger("glcan_fx")


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


def plan_segments(uncaptured: Uncaptured, request: Request) -> Plan:
    """Plan local modules as runs of sub-module calls. Raises the error of the capture where there are fewer than two to
    run, PlanError for what such a plan cannot have."""
    model, error = uncaptured.model, uncaptured.error
    budgets = request.memory_budget is not None or request.compute_budget is not None
    if budgets or request.options.slices > 1 or request.needs_graph:
        raise PlanError("memory_budget, compute_budget, slices and method need a model that can be captured: "
                        f"{error.reason}. Remove them.")
    units = units_of(model, uncaptured.calls)
    if len(ends_of(units)) < 2:
        raise error
    k = "natural" if request.k == "fewest" else request.k  # no step of it can be simulated
    groups = partition_calls(units, k)
    report = Report(5, lost=(f"the model runs as Python, cut at calls of sub-modules: {error.reason}",))
    log.warning("%s cannot be captured: it is cut at calls of sub-modules, since %s. What a step then takes cannot be "
                "simulated, and may be more than by backpropagation: measure both before you train.",
                type(model).__name__, error.reason)
    names = uncaptured.names
    with torch.random.fork_rng(devices=cuda_devices(model)):
        modules = local_modules(model, names, groups)
    around = Segments(names, tuple(tuple(unit.path for unit in group) for group in groups))
    return Plan(
        model=type(model).__name__, task=uncaptured.task.name, network="", modules=modules,
        natural=tuple(units[end].path for end in ends_of(units)[:-1]), inputs=uncaptured.inputs,
        method=request.method.choices("maps")[0], notes=report.lost, report=report, around=around)
