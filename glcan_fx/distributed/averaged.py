"""Gradients averaged over ranks, in the background."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Averaged:
    """The mean over a group of each of some gradients. given: pairs of a parameter and its gradient; None, where this
    rank has none, counts as zeros."""

    def __init__(self, given: Sequence[tuple[Tensor, Tensor | None]], group: dist.ProcessGroup | None) -> None:
        self._count = len(given)
        self._sent: list[tuple[Any, list[tuple[int, torch.Size, bool]], Tensor]] = []
        kinds: dict[Any, list[int]] = {}
        for place, (parameter, _) in enumerate(given):
            kinds.setdefault((parameter.dtype, parameter.device), []).append(place)
        for places in kinds.values():
            grads = [torch.zeros_like(p) if grad is None else grad for p, grad in map(given.__getitem__, places)]
            own = [given[place][1] is not None for place in places]
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), torch.tensor(own).to(grads[0])])
            flat.div_(dist.get_world_size(group))
            work = dist.all_reduce(flat, group=group, async_op=True)
            self._sent.append((work, list(zip(places, [grad.shape for grad in grads], own, strict=True)), flat))

    def arrived(self) -> torch.futures.Future[Any]:
        """Is complete when ``averages()`` are, of gradients of one type on one device; what is done then is done behind
        them on a GPU, too (collect_all() of several futures would not wait there)."""
        [(work, _, _)] = self._sent
        return work.get_future()

    def wait(self) -> list[Tensor | None]:
        """Wait for the averages."""
        for work, _, _ in self._sent:
            work.wait()
        return self.averages()

    def averages(self) -> list[Tensor | None]:
        """Of each of the given gradients; None where no rank has one."""
        found: list[Tensor | None] = [None] * self._count
        for _, parts, flat in self._sent:
            *values, present = flat.split([*(shape.numel() for _, shape, _ in parts), len(parts)])
            for number, (place, shape, own) in enumerate(parts):
                found[place] = values[number].view(shape) if own or present[number].item() else None
        return found
