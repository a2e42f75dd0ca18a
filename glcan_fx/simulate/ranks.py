"""Local modules on several ranks: which may be apart, how they balance, and what each rank needs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glcan_fx.capture.random_numbers import kept_python_random
from glcan_fx.capture.trace import quiet
from glcan_fx.config import OptimizerLike, check_count
from glcan_fx.errors import TargetError, UnsupportedError
from glcan_fx.peak_memory import PeakMemory
from glcan_fx.pytree import map_tensors, tensors_in
from glcan_fx.simulate.estimate import Estimate, optimizers_of
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.sharing import Link, links_of
from glcan_fx.step.stages import Share, Step
from glcan_fx.tasks import Task


class Rank(NamedTuple):
    """What one rank of a pipeline needs: the local modules that it runs, bytes of live tensors at most, its part of the
    step's operations, from 0 to 1, and the bytes that it sends to the next rank for every batch."""

    modules: range
    peak: int
    share: float
    sent: int


def bubble(ranks: Sequence[Rank]) -> float:
    """The part of the time that ranks wait for the busiest one, once every rank has work; from 0 to 1."""
    return 1 - 1 / (len(ranks) * max(rank.share for rank in ranks))


class Load(NamedTuple):
    """What a local module costs: operations of a step, and the most bytes that are live while it runs."""

    flops: float
    peak: float


def simulate_ranks(
    local: LocalModel, sizes: Sequence[int], inputs: Sequence[Any], targets: Any, optimizer: OptimizerLike,
    micro_batches: int,
) -> tuple[Rank, ...]:
    """Run what each rank of a pipeline runs, on fake tensors: the first and the last two micro-batches, while what the
    one before has made is still being sent and what the next one needs arrives; and a step of the optimizer."""
    step: Step = local.__dict__["_step"]
    given = local.arguments((*inputs, targets) if local.task.takes_targets else tuple(inputs), {})
    local.train()
    _, part = next(parts_of_batch(local.task, given, micro_batches))
    values, paths, start = step.values(part), local.paths_by_stage(), 0
    found: list[Rank] = []
    for size in sizes:
        which, start = range(start, start + size), start + size
        share = Share.of(local, [path for index in which for path in paths[index]])
        parameters = [p for p in share.parameters() if p.requires_grad]
        made = optimizers_of(optimizer, parameters)
        if which.start:  # of its own memory, not a part of the first rank's batch
            values = map_tensors(values, torch.clone)
        memory = PeakMemory(share, *made, *tensors_in(values))
        message = values
        sent: list[Any] = []  # what is still on its way
        with torch.random.fork_rng(devices=[]), kept_python_random(), quiet(), torch.enable_grad(), memory:
            outputs: list[list[Tensor]] = []  # of the parts before
            for number in sorted({0, max(0, micro_batches - 2), micro_batches - 1}):  # others take as much as these
                last = number == micro_batches - 1
                values = message
                message = {} if last else map_tensors(values, torch.clone) if which.start else dict(values)
                outputs += [[torch.empty_like(tensor) for tensor in outputs[0]] for _ in range(number - len(outputs))]
                for index in which:
                    local.differentiate_stage(step, values, index, 1 / micro_batches, {})
                outputs.append(list(tensors_in(step.outputs(values))) if which.stop == local.plan.k else [])
                values = {name: values[name] for name in step.passed_on(which.stop)}
                sent[:] = [values]
            for one in made:
                one.step()
        local.zero_grad()
        size_of = {id(t): t.numel() * t.element_size() for t in tensors_in(values)}
        found.append(Rank(which, memory.bytes, memory.flops, micro_batches * sum(size_of.values())))
    whole = max(1, sum(rank.share for rank in found))
    return tuple(rank._replace(share=rank.share / whole) for rank in found)


def parts_of_batch(task: Task, given: Mapping[str, Any], count: int) -> Iterator[tuple[float, dict[str, Any]]]:
    """A batch's arguments in so many parts, each with its weight in the mean over the batch. Raises TargetError for a
    batch that is too small."""
    check_count("micro_batches", count)
    first = next(iter(given.values()))
    images = len(first if isinstance(first, list) else next(tensors_in(first)))
    if images < count:
        raise TargetError(f"a batch of {images} cannot be cut into micro_batches={count} parts: pass fewer, or drop "
                          "the last batch of an epoch (DataLoader(drop_last=True))")
    if count > 1 and _stays_whole(given.get("targets"), images):
        raise TargetError(f"targets have a tensor whose first dimension is not the batch's {images}: it cannot be cut "
                          "into micro-batches. Make it one row for each image, or a list with one item for each.")
    ends = [round(index * images / count) for index in range(count + 1)]
    for start, stop in pairwise(ends):
        yield (stop - start) / images, task.part(dict(given), start, stop, images)


def _stays_whole(value: Any, images: int) -> bool:
    """Whether some tensor in targets is neither a row nor an item for each image, so that every part gets all of it."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and len(value) != images
    if isinstance(value, dict):
        return any(_stays_whole(item, images) for item in value.values())
    if isinstance(value, list) and len(value) == images:
        return False
    return isinstance(value, list | tuple) and any(_stays_whole(item, images) for item in value)


def divisible(local: LocalModel, ranks: int) -> list[Link]:
    """The local modules that must stay together. Raises UnsupportedError where those left cannot be divided among so
    many ranks."""
    links = links_of(local)
    bounds = _bounds(local.plan.k, links)
    if len(bounds) + 1 < ranks:
        raise UnsupportedError(
            f"{ranks} ranks, but {local.plan.model} has {local.plan.k} local modules, of which {len(bounds) + 1} can "
            "be apart" + (f": {links[0][2]}. Use fewer ranks, or leave that out." if links else
                       ". Compile it with a larger k, or use fewer ranks."))
    return links


def _bounds(k: int, links: Sequence[Link]) -> list[int]:
    """The local modules that another rank may begin with."""
    return [bound for bound in range(1, k) if not any(first < bound <= last for first, last, _ in links)]


def loads_of(estimate: Estimate) -> list[Load]:
    """What each local module costs in a simulated step."""
    k = 1 + max(phase.module or 0 for phase in estimate.timeline)
    return [Load(sum(phase.flops for phase in estimate.timeline if phase.module == index),
                 max((phase.peak for phase in estimate.timeline if phase.module == index), default=0))
            for index in range(k)]


def balanced(loads: Sequence[Load], links: Sequence[Link], ranks: int) -> tuple[int, ...]:
    """How many neighbouring local modules each rank runs, so that the busiest has the least to do; of equals, that with
    the least memory in one place."""
    k = len(loads)
    ends = [*_bounds(k, links), k]
    work, peak = ([0, *accumulate(column)] for column in zip(*loads, strict=True))

    def divided(cost: Callable[[int, int], float]) -> tuple[float, tuple[int, ...]]:
        """The division whose costliest part, from one local module to another, costs least; and that cost."""
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # of the first so many local modules
        for _ in range(ranks):
            best = {end: min((max(most, cost(start, end)), (*sizes, end - start))
                             for start, (most, sizes) in best.items() if start < end)
                    for end in ends if end > min(best)}
        return best[k]

    busiest, _ = divided(lambda start, stop: work[stop] - work[start])
    return divided(lambda start, stop: peak[stop] - peak[start] if work[stop] - work[start] <= busiest else math.inf)[1]
