"""Measure the live tensor bytes of a step, on any device, fake tensors included."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_GRANULE = 512  # the CUDA caching allocator rounds every block up to 512 bytes


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all live tensor storages while it is entered.

    What exists before (parameters, buffers, gradients, optimiser state) is counted from the start when its owner is
    given; everything that an operator allocates inside is counted until Python and autograd let go of it. This is
    what ``torch.cuda.max_memory_allocated`` shows, minus library workspaces and operator-internal temporaries.

        with PeakMemory(model, optimizer) as memory:
            training_step()
        memory.bytes        # peak, in bytes
    """

    def __init__(self, *owners: nn.Module | Optimizer | Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self.live = 0
        self._known: set[int] = set()
        self._owners = owners

    def __enter__(self) -> "PeakMemory":
        for owner in self._owners:
            for tensor in _tensors(owner):
                self._add(tensor)
        self.bytes = self.live
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // _GRANULE) * _GRANULE
        self._known.add(key)
        self.live += size
        self.bytes = max(self.bytes, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(owner: nn.Module | Optimizer | Tensor) -> Iterable[Tensor]:
    if isinstance(owner, Tensor):
        yield owner
    elif isinstance(owner, Optimizer):
        yield from (v for state in owner.state.values() for v in state.values() if isinstance(v, Tensor))
    else:
        for parameter in owner.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from owner.buffers()
