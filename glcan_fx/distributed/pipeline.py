"""Local modules on several ranks. No gradient passes from one local module to the one before it, so every rank runs
forward, differentiates its own losses, and goes on: nothing comes back, and nobody waits after the first fill.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from glcan_fx.distributed.channel import Channel, check_backend
from glcan_fx.errors import TargetError, UnsupportedError
from glcan_fx.simulate.ranks import balanced, costs_of, divisible
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.output import total
from glcan_fx.step.stages import Share, Step


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
) -> "Pipeline":
    """This rank's local modules of a compiled model, to be trained with those of the other ranks.

        local = glcan_fx.transform(model, k=4, task="classification", example_inputs=images)
        pipe = glcan_fx.distributed.pipeline(local, micro_batches=8)
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
        for images, labels in loader:                # the first rank's are trained on
            optimizer.zero_grad()
            out = pipe.step(images, labels)          # forward and backward
            optimizer.step()

    Every rank compiles the same model (with the same seed: auxiliary networks begin at random), and calls this.

    Args:
        local: the compiled model, with at least as many local modules as ranks.
        micro_batches: how many parts a batch is cut into; ranks work on different parts. Batch norm has the statistics
            of a part, as in any pipeline.
        stages: how many local modules each rank runs, in order. None: balanced by operations, then by memory.
        device: this rank's; its own parts move there. None: where the model is.
        group: the ranks; None: all.

    Raises UnsupportedError where the local modules cannot be divided so.
    """
    check_backend(group)
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    links = divisible(local, ranks)
    sizes = tuple(balanced(costs_of(local), links, ranks) if stages is None else stages)
    _check_sizes(local, sizes, ranks, links)
    return Pipeline(local, sizes, rank, micro_batches, device, group)


class Pipeline(Share):
    """One rank's local modules; ``pipeline()`` makes it. Its parameters, buffers and state dict are theirs, under the
    plain model's names, so that distributed checkpoints of all ranks together hold one model."""

    def __init__(
        self, local: LocalModel, sizes: tuple[int, ...], rank: int, micro_batches: int,
        device: str | torch.device | None, group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        paths = local.paths_by_stage()
        bounds = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        self._which = range(bounds[rank], bounds[rank + 1])
        own = [path for index in self._which for path in paths[index]]
        self.hold(local, own)
        self.__dict__.update(local=local, sizes=sizes, rank=rank, group=group)
        self._paths = [[path for index in range(*bounds[r:r + 2]) for path in paths[index]] for r in range(len(sizes))]
        self.micro_batches = micro_batches
        if device is not None:
            self.to(device)
        at = next((t.device for t in [*self.parameters(), *self.buffers()]), torch.device("cpu"))
        self._before = Channel(rank - 1, group, at) if rank else None
        self._behind = Channel(rank + 1, group, at) if rank + 1 < len(sizes) else None
        self._device = at

    @property
    def is_first(self) -> bool:
        """Whether this rank is given the batches."""
        return self._before is None

    @property
    def is_last(self) -> bool:
        """Whether this rank has the model's output."""
        return self._behind is None

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
        local = self.local
        step = self._ready()
        parts = self._parts(step, args, kwargs) if self._before is None else None
        losses: dict[str, Tensor] = {}
        outputs = []
        for index in range(self.micro_batches):
            weight, values = self._before.receive() if parts is None else next(parts)  # type: ignore[union-attr]
            run_and_differentiate(local, step, values, self._which, weight, losses)
            if self._behind is not None:
                read = step.passed_on(self._which.stop)
                self._behind.send((weight, {name: values[name] for name in read}))
            else:
                outputs.append(step.outputs(values))
            del values, index
        if self._behind is not None:
            self._behind.flush()
        local.aux.get_submodule("scale").update()  # type: ignore[operator]
        names = [module.name for module in local.plan.modules]
        return PipelineOutput({names[step.losses.index(name)]: loss for name, loss in losses.items()},
                              _joined(outputs) if self.is_last else None)

    def gather(self) -> LocalModel:
        """Bring the weights and buffers of all ranks to every rank, and return the compiled model: to evaluate, to
        save. Every rank must call it."""
        for rank, paths in enumerate(self._paths):
            share = Share()
            share.hold(self.local, paths)
            source = rank if self.group is None else dist.get_global_rank(self.group, rank)
            for _, tensor in sorted({**dict(share.named_parameters()), **dict(share.named_buffers())}.items()):
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
        if not local.training:
            raise UnsupportedError("the compiled model is in evaluation mode: call local.train() on every rank")
        local.check_guards()
        step: Step = local.__dict__["_step"]
        return step

    def _parts(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The batch's parts, each with its weight in the mean."""
        local = self.local
        given = local.arguments(args, kwargs)
        if local.step_for(given) is not step:
            raise UnsupportedError(
                f"{local.plan.model} asks about sizes, and takes another way for these than for example_inputs=: only "
                "the first rank would notice. Train on sizes that go the same way, or in one process.")
        first = next(iter(given.values()))
        first = next((leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor)), first) if not isinstance(
            first, list) else first
        images = len(first)
        if images < self.micro_batches:
            raise TargetError(f"a batch of {images} cannot be cut into micro_batches={self.micro_batches} parts: pass "
                              "fewer, or drop the last batch of an epoch (DataLoader(drop_last=True))")
        ends = [round(index * images / self.micro_batches) for index in range(self.micro_batches + 1)]
        for start, stop in zip(ends, ends[1:], strict=False):
            part = local.task.part({name: given[name] for name in given}, start, stop, images)
            yield (stop - start) / images, step.values(
                tree_map(lambda t: t.to(self._device) if isinstance(t, Tensor) else t, part))


def run_and_differentiate(
    local: LocalModel, step: Step, values: dict[str, Any], which: range, weight: float, losses: dict[str, Tensor]
) -> None:
    """Run some local modules on values, in place; differentiate each loss, times ``weight``, as soon as it exists, and
    add it to ``losses``, by the name of its value."""
    def behind(index: int) -> None:
        for name in set(step.pieces[index].makes) & set(step.losses):
            loss = values.pop(name)
            scalar = total(loss[0] if isinstance(loss, tuple) else loss) * weight
            if scalar.requires_grad:
                scalar.backward()
            losses[name] = losses.get(name, 0) + scalar.detach()

    local.run_stages(step, values, which, behind)


def _joined(outputs: list[Any]) -> Any:
    """The outputs of a batch's parts as those of the batch: tensors one behind the other."""
    return tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0],
                    *outputs)


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
