"""Gradients averaged over ranks, in the background."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Averaged:
    """The mean over a group of each of some gradients. given: pairs of a parameter and its gradient; None, where this
    rank has none, counts as zeros. averages: one for each, complete after ``wait()``."""

    def __init__(self, given: Sequence[tuple[Tensor, Tensor | None]], group: dist.ProcessGroup | None) -> None:
        ranks = dist.get_world_size(group)
        self.missing = [place for place, (_, grad) in enumerate(given) if grad is None]
        values = [torch.zeros_like(p) if grad is None else grad for p, grad in given]
        self.averages: list[Any] = [None] * len(values)
        self._sent: list[tuple[Any, Tensor]] = []
        self._present: dict[int, Tensor] = {}  # how many ranks had a gradient, relative
        order = sorted(range(len(values)), key=lambda place: (str(values[place].dtype), str(values[place].device)))
        for _, same in groupby(order, key=lambda place: (values[place].dtype, values[place].device)):
            places = list(same)
            present = torch.tensor([float(given[place][1] is not None) for place in places])
            flat = torch.cat([*(values[place].reshape(-1) for place in places),
                              present.to(values[places[0]])]).div_(ranks)
            self._sent.append((dist.all_reduce(flat, group=group, async_op=True), flat))
            parts = flat.split([*(values[place].numel() for place in places), len(places)])
            for number, place in enumerate(places):
                self.averages[place] = parts[number].view_as(values[place])
                self._present[place] = parts[-1][number]

    def wait(self) -> list[int]:
        """Wait for them; returns the places of those that no rank has."""
        for work, _ in self._sent:
            work.wait()
        return [place for place in self.missing if not self._present[place].item()]
