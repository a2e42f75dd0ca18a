"""Watch, in the first steps, whether every local module gets gradients."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from glcan_fx.errors import NotLearningError

if TYPE_CHECKING:
    pass


_STEPS = 3


_PATIENCE = 20  # steps: a module that is dropped at random, with stochastic depth, waits for its turn


class Watch:
    """Looks, in the first steps, whether what a local loss trains gets gradients at all.

    drew: whether the local module drew random numbers in this step, and so may have dropped itself.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = 0
        self.on = True
        self.drew = False
        self._learned: set[str] = set()
        self._waiting: list[str] = []

    @torch.no_grad()
    def look(self, loss: Tensor, groups: dict[str, list[int]], grads: dict[int, Tensor | None]) -> None:
        """Raise NotLearningError where gradients are not finite though the loss is, or were all zero in the first
        steps. One synchronisation per group, until it has learned."""
        if isinstance(loss, FakeTensor) or is_half(loss.device.type):  # no values; a scale that is still to be found
            return
        if not torch.isfinite(loss):
            return
        self.steps += 1
        waiting = {kind: keys for kind, keys in groups.items() if keys and kind not in self._learned}
        for kind, keys in waiting.items():
            present = [grad for key in keys if (grad := grads[key]) is not None]
            norm = sum(float(torch.linalg.vector_norm(g.to_dense() if g.is_sparse else g)) for g in present)
            if not math.isfinite(norm):
                raise NotLearningError(
                    f"gradients of {kind} '{self.name}' are not finite, though its loss is ({float(loss):.6g}). Look "
                    "for a division by zero, a square root or a logarithm of zero in the model or the criterion.")
            if norm > 0:
                self._learned.add(kind)
            elif self.steps >= (_PATIENCE if self.drew else _STEPS):
                raise NotLearningError(
                    f"{kind} '{self.name}' does not learn: all of its gradients were exactly zero in the first steps. "
                    "Either its local loss does not depend on it (choose other split points, k or method), or "
                    "something in front of the loss gives no gradient (a scale of zero, a dead activation, targets "
                    "without labels). Freeze it with requires_grad_(False) if it is not to be trained.")
        self._waiting = [kind for kind in waiting if kind not in self._learned]
        self.on = bool(self._waiting)

    def idle(self) -> list[str]:
        """What has had no gradient that was not zero, though nothing was drawn at random."""
        return [] if self.drew else self._waiting


def is_half(device: str) -> bool:
    """Whether float16 autocast is on, which needs loss scaling."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
