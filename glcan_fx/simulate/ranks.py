"""Local modules on several ranks: which may be apart, how they balance, and what each rank needs."""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from torch import nn

from glcan_fx.errors import UnsupportedError
from glcan_fx.step.averages import Averages
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.parts import ReadOnly
from glcan_fx.step.stages import Share

Link = tuple[int, int, str]
"""Two local modules that cannot be on different ranks, and why."""


class Load(NamedTuple):
    """What a local module costs: operations of a step, and the most bytes that are live while it runs."""

    flops: float
    peak: float


def divisible(local: LocalModel, ranks: int) -> list[Link]:
    """The local modules that must stay together. Raises UnsupportedError where those left cannot be divided among so
    many ranks."""
    links = links_of(local)
    bounds = [bound for bound in range(1, local.plan.k) if not any(first < bound <= last for first, last, _ in links)]
    if len(bounds) + 1 < ranks:
        why = f"; {links[0][2]}" if links else ""
        raise UnsupportedError(f"{ranks} ranks, but {local.plan.model} has {local.plan.k} local modules, of which "
                               f"{len(bounds) + 1} can be apart{why}. Compile it with a larger k, or use fewer ranks.")
    return links


def links_of(local: LocalModel) -> list[Link]:
    """Local modules that share something: a loss that trains several, a parameter, weights that are read."""
    plan, found = local.plan, []
    for index, reach in enumerate(plan.reaches):
        if reach.first < reach.until:
            found.append((reach.first, reach.until, f"with method='{plan.method.name}' the loss of "
                          f"'{plan.modules[index].name}' passes through several local modules"))
    if plan.method.agreement and plan.k > 1:
        found.append((0, plan.k - 1, f"method='{plan.method.name}' compares gradients on both sides of a cut"))
    owner: dict[int, int] = {}
    shares = []
    for index, paths in enumerate(local.paths_by_stage()):
        share = Share()
        share.hold(local, paths)
        shares.append(share)
        for name, parameter in share.named_parameters():
            first = owner.setdefault(id(parameter), index)
            if first != index:
                found.append((first, index, f"both train the parameter '{name}'"))
    if "task" in local.aux._modules and plan.k > 1:
        found.append((0, plan.k - 1, "the criterion has parameters, which every local loss trains"))
    for index, share in enumerate(shares):
        for part in share.modules():
            for path in _read_by(part):
                first, last = sorted((index, owner.get(id(local.original.get_parameter(path)), index)))
                if first != last:
                    found.append((first, last, f"an auxiliary network reads the weights of '{path}'"))
    return found


def _read_by(part: nn.Module) -> list[str]:
    """Paths of the model's parameters that a part of an auxiliary network reads."""
    if isinstance(part, Averages):
        return list(part.__dict__["follows"].values())
    if isinstance(part, ReadOnly) and part.__dict__["model"] is not None:
        path = part.__dict__["path"]
        layer = part.__dict__["model"].get_submodule(path)
        return [f"{path}.{name}" for name, _ in layer.named_parameters()]
    return []


def costs_of(local: LocalModel) -> list[Load]:
    """What each local module costs, by simulation. Raises UnsupportedError where that is not known."""
    simulate = getattr(local.plan, "simulate", None)
    if simulate is None:
        raise UnsupportedError("this compiled model was copied or loaded from a file, and no longer knows its costs: "
                               "say how many local modules each rank runs, stages=(...)")
    estimate = simulate()
    return [Load(sum(phase.flops for phase in estimate.timeline if phase.module == index),
                 max((phase.peak for phase in estimate.timeline if phase.module == index), default=0))
            for index in range(local.plan.k)]


def balanced(loads: Sequence[Load], links: Sequence[Link], ranks: int) -> tuple[int, ...]:
    """How many neighbouring local modules each rank runs, so that the busiest has the least to do; of equals, that with
    the least memory in one place."""
    k = len(loads)
    bounds = [bound for bound in range(1, k) if not any(first < bound <= last for first, last, _ in links)]
    work = [sum(load.flops for load in loads[:index]) for index in range(k + 1)]
    if math.comb(len(bounds), ranks - 1) > 50_000:  # a table of the best ends instead of all of them
        return _by_table(work, bounds, ranks)

    def worst(inner: tuple[int, ...]) -> tuple[float, float]:
        ends = [0, *inner, k]
        spans = list(zip(ends, ends[1:], strict=False))
        return (max(work[stop] - work[start] for start, stop in spans),
                max(sum(load.peak for load in loads[start:stop]) for start, stop in spans))

    best = min(combinations(bounds, ranks - 1), key=worst)
    return tuple(stop - start for start, stop in zip((0, *best), (*best, k), strict=True))


def _by_table(work: Sequence[float], bounds: Sequence[int], ranks: int) -> tuple[int, ...]:
    k = len(work) - 1
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for rank in range(1, ranks + 1):
        ends = bounds if rank < ranks else [k]
        best = {end: min((max(cost, work[end] - work[start]), (*sizes, end - start))
                         for start, (cost, sizes) in best.items() if start < end)
                for end in ends if any(start < end for start in best)}
    return best[k][1]
