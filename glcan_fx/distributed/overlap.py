"""DistributedDataParallel that averages a local module's gradients while the next module computes.

A local loss is differentiated in the forward pass, so its gradients exist long before ``loss.backward()``, which is
when DistributedDataParallel begins to send. Here they are sent at once; in backward, its buckets find them averaged.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from glcan_fx.distributed.averaged import Averaged
from glcan_fx.errors import UnsupportedError
from glcan_fx.step.local_model import LocalModel


def overlap(parallel: DistributedDataParallel) -> DistributedDataParallel:
    """Let a wrapped compiled model send each local module's gradients as soon as they exist. Returns ``parallel``.

        parallel = glcan_fx.distributed.overlap(DistributedDataParallel(local))

    The loop stays as it is, and so do the gradients, but for rounding where they are sums over micro-batches
    (``no_sync()``). It takes the place of DistributedDataParallel's communication hook. Parameters that more than one
    local module trains, and the last module's, are averaged in backward, as always, and so are all of them in
    ``parallel.join()``.

    Raises UnsupportedError for what is not a compiled model in DistributedDataParallel.
    """
    if not isinstance(parallel, DistributedDataParallel) or not isinstance(parallel.module, LocalModel):
        raise UnsupportedError("overlap() takes a compiled model in DistributedDataParallel: "
                               "overlap(DistributedDataParallel(glcan_fx.transform(model, ...)))")
    local = parallel.module
    reducer = _Reducer(parallel)
    for part in local.trained():
        part.__dict__["reducer"] = reducer
    parallel.register_comm_hook(reducer, _average_the_rest)
    return parallel


class _Reducer:
    """Averages gradients over the ranks while the forward pass goes on. done: the parameters whose gradients are
    averaged when they arrive in this step; waiting: those that have gradients of steps that were not synchronised."""

    def __init__(self, parallel: DistributedDataParallel) -> None:
        self.parallel, self.group = parallel, parallel.process_group
        local: Any = parallel.module
        self.alone = {id(p) for own in local.trained_alone().values() for p in own}
        self.done: set[int] = set()
        self.waiting: set[int] = set()
        self._arrived = False  # whether a gradient of this step has

    def __deepcopy__(self, _: Any) -> "_Reducer":
        return self  # a copy of the wrapper (an average) does not train

    def start(self, parameters: Sequence[Tensor], stash: list[Tensor | None]) -> Callable[[Tensor], None] | None:
        """Begin to average some gradients, in place; what is returned waits for them."""
        if self._arrived:
            self.done.clear()
            self._arrived = False
        own = [(index, p) for index, p in enumerate(parameters) if id(p) in self.alone and _is_dense(stash[index])]
        keys = {id(p) for _, p in own}
        joining = self.parallel._join_config.enable
        if not self.parallel.require_backward_grad_sync or joining:
            self.done -= keys
            self.waiting |= keys
            return None
        before = [p for _, p in own if id(p) in self.waiting]
        self.waiting -= keys
        self.done |= keys
        averaged = Averaged([*((p, stash[index]) for index, p in own), *((p, p.grad) for p in before)], self.group)
        places = [index for index, _ in own]
        for index in places:
            stash[index] = None
        return partial(self._finish, averaged, places, stash, before)

    def _finish(
        self, averaged: Averaged, places: list[int], stash: list[Tensor | None], before: list[Tensor], factor: Tensor
    ) -> None:
        if not self._arrived:
            self._arrived = True
            self._compare(factor)
        averages = averaged.wait()
        for index, average in zip(places, averages[:len(places)], strict=True):
            stash[index] = average
        for parameter, average in zip(before, averages[len(places):], strict=False):
            if parameter.grad is not None and average is not None:
                parameter.grad.copy_(average)
            else:
                parameter.grad = average
        before.clear()  # not again, where a graph is retained

    def _compare(self, factor: Tensor) -> None:
        """Raise UnsupportedError where ranks weight their losses differently: gradients were averaged before."""
        found = torch.stack([factor.detach().float(), -factor.detach().float()])
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        most, least = found[0].item(), -found[1].item()
        if most != least:
            raise UnsupportedError(
                f"the loss is multiplied by {least:g} on one rank and by {most:g} on another, but overlap() averages "
                "gradients in the forward pass, before they are multiplied. Use DistributedDataParallel without "
                "overlap(), or the same factor on all ranks.")


def _is_dense(grad: Tensor | None) -> bool:
    return grad is None or grad.layout is torch.strided


def _average_the_rest(
    reducer: _Reducer, bucket: dist.GradBucket  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """DistributedDataParallel's communication hook: averages what of a ``GradBucket`` is not averaged yet."""
    left = [grad for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True) if id(p) not in reducer.done]
    if not left:
        nothing: torch.futures.Future[Tensor] = torch.futures.Future()
        nothing.set_result(bucket.buffer())
        return nothing
    averaged = Averaged([(grad, grad) for grad in left], reducer.group)

    def finished(_: Any) -> Tensor:
        for grad, average in zip(left, averaged.averages(), strict=True):
            grad.copy_(average)
        return bucket.buffer()

    return averaged.arrived().then(finished)
