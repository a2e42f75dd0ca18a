"""Local modules on several ranks. No gradient passes from one local module to the one before it, so every rank runs
forward, differentiates its own losses, and goes on: nothing comes back, and nobody waits after the first fill.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from glcan_fx.capture.modules import hooks_on
from glcan_fx.config import check_count
from glcan_fx.distributed.averaged import Averaged
from glcan_fx.distributed.channel import Channel, check_backend
from glcan_fx.errors import ModelChangedError, RankError, UnsupportedError
from glcan_fx.pytree import map_tensors
from glcan_fx.simulate.ranks import Load, balanced, divisible, loads_of, parts_of_batch
from glcan_fx.step.learning import is_half
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.stages import Share, Stage, Step


class PipelineOutput(NamedTuple):
    """What a rank knows of a step.

    losses: of its own local modules by name, each the mean over the batch, already differentiated; output: on the last
    rank the model's own training output, detached (None for a detector).
    """

    losses: dict[str, Tensor]
    output: Any


def pipeline(
    local: LocalModel, *, micro_batches: int = 8, stages: Sequence[int] | None = None,
    device: str | torch.device | None = None, group: dist.ProcessGroup | None = None,
    data_group: dist.ProcessGroup | None = None,
) -> "Pipeline":
    """This rank's local modules of a compiled model, to be trained with those of the other ranks.

        local = glcan_fx.transform(model, k=4, task="classification", example_inputs=images)
        pipe = glcan_fx.distributed.pipeline(local, micro_batches=8)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
        for images, labels in loader:                # the first rank's are trained on
            optimizer.zero_grad()
            out = pipe.step(images, labels)          # forward and backward
            optimizer.step()

    Every rank compiles the same model, and calls this.

    Args:
        local: the compiled model, with at least as many local modules as ranks.
        micro_batches: how many parts a batch is cut into; ranks work on different parts. Batch norm has the statistics
            of a part, as in any pipeline.
        stages: how many local modules each rank runs, in order. None: as the plan says (``devices=``), else balanced
            by operations, then by memory.
        device: this rank's; its own parts move there. None: where the model is.
        group: the ranks; None: all.
        data_group: the ranks that run the same local modules on other batches, with which gradients are averaged:
            ``mesh["data"].get_group()`` beside ``group=mesh["pipeline"].get_group()``.

    Raises UnsupportedError where the local modules cannot be divided so.
    """
    check_backend(group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    links = divisible(local, ranks)
    if stages is None:
        stages = local.plan.ranks if len(local.plan.ranks) == ranks else balanced(_loads(local), links, ranks)
    sizes = tuple(stages)
    _check_sizes(local, sizes, ranks, links)
    _check_alike(local, sizes, micro_batches, group)
    return Pipeline(local, sizes, rank, micro_batches, device, group, data_group)


class Pipeline(Share):
    """One rank's local modules; ``pipeline()`` makes it. Its parameters, buffers and state dict are theirs, under the
    plain model's names, so that distributed checkpoints of all ranks together hold one model."""

    local: LocalModel
    sizes: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None
    data_group: dist.ProcessGroup | None
    _stages: list[Stage]

    def __init__(
        self, local: LocalModel, sizes: tuple[int, ...], rank: int, micro_batches: int,
        device: str | torch.device | None, group: dist.ProcessGroup | None, data_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.__dict__.update(local=local, sizes=sizes, rank=rank, group=group, data_group=data_group,
                             _stages=local.own_stages())
        ends = list(accumulate(sizes, initial=0))
        self._which = range(ends[rank], ends[rank + 1])
        paths = local.paths_by_stage()
        self._paths = [list(chain.from_iterable(paths[start:stop])) for start, stop in pairwise(ends)]
        self.hold(local, self._paths[rank])
        self.micro_batches = micro_batches
        if device is not None:
            self.to(device)
        self._broken = False
        self._device = next((t.device for t in [*self.parameters(), *self.buffers()]), torch.device("cpu"))
        self._before = Channel(rank - 1, group, self._device) if rank else None
        self._behind = Channel(rank + 1, group, self._device) if rank + 1 < len(sizes) else None
        if data_group is not None:
            with torch.no_grad():
                for tensor in [*self.parameters(), *self.buffers()]:
                    dist.broadcast(tensor, dist.get_global_rank(data_group, 0), data_group)

    @property
    def stages(self) -> list[Stage]:
        """This rank's local modules, to be sharded among the ranks of ``data_group``, or given hooks."""
        return self._stages[self._which.start:self._which.stop]

    def extra_repr(self) -> str:
        names = [self.local.plan.modules[index].name for index in self._which]
        return f"rank {self.rank} of {len(self.sizes)}: {', '.join(names)}"

    def step(self, *args: Any, **kwargs: Any) -> PipelineOutput:
        """One batch: forward and backward through this rank's local modules; then call ``optimizer.step()``.

        The arguments are those of a training step of the compiled model, targets included. Only the first rank's are
        looked at, other ranks may pass anything. Gradients are those of the mean over the batch, and are added to
        ``.grad``.

        Raises RankError where another rank has ended.
        """
        local, count = self.local, self.micro_batches
        step = self._ready()
        parts = self._parts(step, args, kwargs) if self._before is None else self._before.messages(count)
        losses: dict[str, Tensor] = {}
        weights, outputs = [], []
        sent: list[tuple[list[nn.Parameter], Averaged]] = []
        for number, (weight, values) in enumerate(parts, 1):
            self._broken = True  # until the step is done: other ranks go on with what they were sent
            for index in self._which:
                local.differentiate_stage(step, values, index, weight, losses)
                if number == count and self.data_group is not None:
                    parameters = [p for p in self._stages[index].parameters() if p.requires_grad and not isinstance(
                        p, DTensor)]  # those FSDP2 averages
                    sent.append((parameters, Averaged([(p, p.grad) for p in parameters], self.data_group)))
            if self._behind is not None:
                read = step.passed_on(self._which.stop)
                self._behind.send((weight, {name: values[name] for name in read}))
            else:
                outputs.append(step.outputs(values))
                weights.append(weight)
            del values
        if self._behind is not None:
            self._behind.flush()
        for parameters, averaged in sent:
            for parameter, average in zip(parameters, averaged.wait(), strict=True):
                parameter.grad = average
        local.aux.get_submodule("scale").update()  # type: ignore[operator]
        self._broken = False
        names = [module.name for module in local.plan.modules]
        return PipelineOutput({names[step.losses.index(name)]: loss for name, loss in losses.items()},
                              _joined(outputs, weights) if self._behind is None else None)

    def train(self, mode: bool = True) -> "Pipeline":
        """Set the mode of the whole compiled model."""
        self.local.train(mode)
        self.__dict__["training"] = mode
        return self

    def gather(self) -> LocalModel:
        """Bring the weights and buffers of all ranks to every rank, and return the compiled model: to evaluate, to
        save. Every rank must call it."""
        if any(isinstance(p, DTensor) for p in self.parameters()):
            raise UnsupportedError("gather() cannot bring together local modules that fully_shard() divides among "
                                   "ranks: save them by torch.distributed.checkpoint, and load that in one process.")
        for rank, paths in enumerate(self._paths):
            share = Share.of(self.local, paths)
            source = rank if self.group is None else dist.get_global_rank(self.group, rank)
            for tensor in [*share.parameters(), *share.buffers()]:
                with torch.no_grad():
                    moved = tensor.detach().to(self._device).contiguous()
                    dist.broadcast(moved, source, self.group)
                    if rank != self.rank:
                        tensor.copy_(moved)
        return self.local

    def _ready(self) -> Step:
        """The training step, checked as before each one."""
        local = self.local
        if not torch.is_grad_enabled():
            raise UnsupportedError("a pipeline's step differentiates: call it outside of torch.no_grad(). To evaluate, "
                                   "call pipe.gather().eval() on every rank, and use what it returns.")
        if self._broken:
            raise RankError(f"an exception ended a step of rank {self.rank} half-way, and other ranks went on: they "
                            "are no longer at the same step. Start all ranks again, from the last checkpoint.")
        if is_half(self._device.type):
            raise UnsupportedError("float16 needs a GradScaler, which skips a step where gradients overflow, on all "
                                   "ranks together: a pipeline has none. Use torch.autocast with bfloat16.")
        if not local.training:
            raise UnsupportedError("the compiled model is in evaluation mode: call local.train() on every rank")
        for part in (local, local.original):
            if hooks_on(part):
                raise UnsupportedError(f"{type(part).__name__} as a whole has a hook, but no rank runs it as a whole. "
                                       "Put the hook on modules inside it, or on local.stages.")
        local.check_guards()
        self._check_parts()
        step: Step = local.__dict__["_step"]
        return step

    def _check_parts(self) -> None:
        """Raise where this rank's parts of the model are others than when ``pipeline()`` was called, or synchronise
        with ranks that run others."""
        now = Share.of(self.local, self._paths[self.rank])
        own = dict(self.named_parameters())
        for name, parameter in now.named_parameters():
            if own.get(name) is not parameter:
                raise ModelChangedError(f"parameter '{name}' is another one than when pipeline() was called, whose "
                                        "parameters() do not have it. Call pipeline() again, and make the optimizer of "
                                        "what it returns.")
        copies = [dist.get_rank()] if self.data_group is None else dist.get_process_group_ranks(self.data_group)
        for name, part in now.named_modules():
            if isinstance(part, nn.SyncBatchNorm) and dist.get_process_group_ranks(part.process_group) != copies:
                raise UnsupportedError(
                    f"module '{name}' of class SyncBatchNorm synchronises with ranks that run other local modules, and "
                    "would wait for ever. Convert with the group of those that run the same ones, "
                    "torch.nn.SyncBatchNorm.convert_sync_batchnorm(local, data_group), or not at all.")

    def _parts(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[float, Any]]:
        """The batch's parts, each with its weight in the mean, and what a step begins with."""
        local = self.local
        given = local.arguments(args, kwargs)
        local.task.check(next(iter(given.values()), None), given.get("targets"))
        if local.step_for(given) is not step:
            raise UnsupportedError(
                f"{local.plan.model} asks about sizes, and takes another way for these than for example_inputs=: only "
                "the first rank would notice. Train on sizes that go the same way, or in one process.")
        for weight, part in parts_of_batch(local.task, given, self.micro_batches):
            yield weight, step.values(map_tensors(part, lambda tensor: tensor.to(self._device)))


def _joined(outputs: list[Any], weights: list[float]) -> Any:
    """The outputs of a batch's parts as those of the batch: tensors one behind the other, single numbers as their mean,
    anything else as a list where parts differ."""
    def joined(*parts: Any) -> Any:
        if not isinstance(parts[0], Tensor):
            return parts[0] if all(part == parts[0] for part in parts) else list(parts)
        if parts[0].dim():
            return torch.cat(parts)
        mean = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        return mean if parts[0].is_floating_point() else torch.stack(parts)

    return tree_map(joined, *outputs)


def _loads(local: LocalModel) -> list[Load]:
    """What the local modules cost, by simulation. Raises UnsupportedError where that is not known."""
    simulate = getattr(local.plan, "simulate", None)
    if simulate is None:
        raise UnsupportedError("this compiled model was copied or loaded from a file, and no longer knows its costs: "
                               "say how many local modules each rank runs, stages=(...)")
    return loads_of(simulate())


def _check_alike(local: LocalModel, sizes: tuple[int, ...], micro_batches: int, group: Any) -> None:
    """Raise UnsupportedError where ranks were given different things, which would wait for each other for ever."""
    check_count("micro_batches", micro_batches, UnsupportedError)
    own = {"plan": local.plan.to_json(), "stages": sizes, "micro_batches": micro_batches}
    found: list[Any] = [None] * len(sizes)
    dist.all_gather_object(found, own, group)
    for name in own:
        if any(other[name] != own[name] for other in found):
            raise UnsupportedError(f"the ranks were given different {name}: compile the same model with the same "
                                   "options on every rank, and pass the same to pipeline()")


def _check_sizes(local: LocalModel, sizes: tuple[int, ...], ranks: int, links: Sequence[tuple[int, int, str]]) -> None:
    """Raise UnsupportedError for a division that is not possible."""
    if len(sizes) != ranks or sum(sizes) != local.plan.k or any(size < 1 for size in sizes):
        raise UnsupportedError(f"stages={sizes}: {ranks} numbers, one for each rank, that add up to the plan's "
                               f"{local.plan.k} local modules")
    for bound in [sum(sizes[:index]) for index in range(1, ranks)]:
        for first, last, why in links:
            if first < bound <= last:
                names = [local.plan.modules[index].name for index in (first, last)]
                raise UnsupportedError(f"stages={sizes}: local modules '{names[0]}' and '{names[1]}' must be on one "
                                       f"rank: {why}")
