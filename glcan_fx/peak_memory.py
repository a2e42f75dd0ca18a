"""Count the live tensor bytes of a step, on any device, fake tensors included."""

import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from glcan_fx.devices import Work
from glcan_fx.errors import PlanError
from glcan_fx.fakes import Fakes, fake_mode_of

_DEVICE = torch.ops.prim.device.default
_aten = torch.ops.aten
_GRANULE = 512  # the CUDA caching allocator rounds every block up to 512 bytes


@dataclass
class Block:
    """A piece of memory: its bytes, and what it was allocated for."""

    size: int
    tag: str


@dataclass
class Log:
    """Every allocation and release of a step, in order: ``(index into blocks, whether it was allocated)``."""

    blocks: list[Block] = field(default_factory=list)
    events: list[tuple[int, bool]] = field(default_factory=list)
    phases: list[tuple[int, str, int]] = field(default_factory=list)  # from which event and operations on, what ran

    def live(self) -> list[int]:
        """Live bytes after every event."""
        return list(accumulate(self.blocks[i].size if new else -self.blocks[i].size for i, new in self.events))

    def at(self, events: Sequence[int]) -> list[dict[str, int]]:
        """Bytes by tag of what is live after each of these events, which are in order."""
        found: list[dict[str, int]] = []
        parts: dict[str, int] = {}
        done = 0
        for event in events:
            for index, new in self.events[done: event + 1]:
                block = self.blocks[index]
                parts[block.tag] = parts.get(block.tag, 0) + (block.size if new else -block.size)
            done = max(done, event + 1)
            found.append({tag: size for tag, size in parts.items() if size})
        return found

    def phase_at(self, event: int) -> str:
        """What ran when an event happened."""
        return next((name for start, name, _ in reversed(self.phases) if start <= event), "")


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all live tensor storages while it is entered, and the floating-point operations.

    What exists before (parameters, buffers, gradients, optimizer state) is counted from the start when its owner is
    given; everything that an operator allocates inside is counted until Python and autograd let go of it. This is
    what ``torch.cuda.max_memory_allocated`` shows, minus library workspaces and operator-internal temporaries.

        with PeakMemory(model, optimizer) as memory:
            training_step()
        memory.bytes        # peak, in bytes
        memory.flops        # of convolutions, matrix products and attention; a multiplication and an addition are two
        memory.work         # the same, with the bytes that operators read and write, and how many there are

    On fake tensors, results that depend on values are answered for the largest case: every element is selected, every
    box survives suppression, a number is 0, all elements are of one kind. Real tensors may be mixed in; what depends on
    them alone is exact.
    """

    def __init__(self, *owners: nn.Module | Optimizer | Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self.live = 0
        self.work = Work()
        self.log = Log()
        self._known: dict[int, int] = {}  # storage -> block
        self._owners = owners
        self._finalizers: list[Any] = []
        self._tag = ""

    def __enter__(self) -> "PeakMemory":
        for owner in self._owners:
            for tag, tensor in _tensors(owner):
                self._tag = tag
                self._add(tensor)
        self._tag = ""
        self._owners = ()
        self.bytes = self.live
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for finalizer in self._finalizers:  # they would keep this object as long as what it counted
            finalizer.detach()

    def enter_phase(self, name: str) -> None:
        """From now on, ``name`` runs, and what is allocated is for it."""
        if name != self._tag:
            self._tag = name
            self.log.phases.append((len(self.log.events), name, self.flops))

    def retag(self, tensors: Iterable[Tensor], tag: str) -> None:
        """Say what these live tensors are for."""
        for tensor in tensors:
            index = self._known.get(tensor.untyped_storage()._cdata)
            if index is not None:
                self.log.blocks[index].tag = tag

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mode = fake_mode_of(args, kwargs)
        if func is _DEVICE:
            return func(*args) if mode is None else args[0].fake_device
        out = func(*args, **kwargs) if mode is None else _on_fake(mode, func, types, args, kwargs)
        made = [out] if isinstance(out, Tensor) else _tensors_in(out)
        self.work = self.work.plus(_work_of(func, args, kwargs, out))
        for tensor in made:
            self._add(tensor)
        return out

    @property
    def flops(self) -> int:
        """Floating-point operations so far."""
        return int(self.work.flops)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // _GRANULE) * _GRANULE
        self._known[key] = len(self.log.blocks)
        self.log.events.append((len(self.log.blocks), True))
        self.log.blocks.append(Block(size, self._tag))
        self.live += size
        self.bytes = max(self.bytes, self.live)
        self._finalizers.append(weakref.finalize(storage, self._free, key, size))

    def _free(self, key: int, size: int) -> None:
        index = self._known.pop(key, None)
        if index is not None:
            self.log.events.append((index, False))
        self.live -= size


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of one operator, where it is a convolution, a matrix product or attention."""
    packet = getattr(func, "overloadpacket", None)
    count = flop_registry.get(packet)
    if count is None:
        return 0
    if packet is _aten.convolution_backward and args[9] > 1:  # torch counts a grouped weight's gradient as a dense one
        *before, (inputs, weight, bias) = args
        parts = [int(count(*before, mask, **kwargs, out_val=out)) for mask in
                 ((inputs, False, False), (False, weight, bias))]
        return parts[0] + parts[1] // args[9]
    return int(count(*args, **kwargs, out_val=out))


def _work_of(func: Any, args: Any, kwargs: Any, out: Any) -> Work:
    """What one operator does; nothing where it only looks at memory, or makes some without values."""
    if getattr(func, "is_view", False) or func in _WITHOUT_VALUES:
        return Work()
    return Work(flops_of(func, args, kwargs, out), _bytes(args) + _bytes(kwargs) + _bytes(out), 1)


_WITHOUT_VALUES = {_aten.detach.default, _aten.empty.memory_format, _aten.empty_strided.default,
                   _aten.empty_like.default, _aten.new_empty.default, _aten.new_empty_strided.default}


def _bytes(value: Any) -> int:
    """Bytes of the tensors among an operator's nested arguments, or results."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, tuple | list):
        return sum(map(_bytes, value))
    return sum(map(_bytes, value.values())) if isinstance(value, dict) else 0


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors among an operator's nested results."""
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors_in(part)]
    return [value] if isinstance(value, Tensor) else []


class Counting(TorchDispatchMode):
    """Counts what operators do; on fake tensors as ``PeakMemory``."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mode = fake_mode_of(args, kwargs)
        out = func(*args, **kwargs) if mode is None else _on_fake(mode, func, types, args, kwargs)
        self.work = self.work.plus(_work_of(func, args, kwargs, out))
        return out


def _tensors(owner: nn.Module | Optimizer | Tensor) -> Iterable[tuple[str, Tensor]]:
    if isinstance(owner, Tensor):
        yield "input", owner
    elif isinstance(owner, Optimizer):
        yield from (("optimizer state", v) for state in owner.state.values() for v in state.values()
                    if isinstance(v, Tensor))
    else:
        for parameter in owner.parameters():
            yield "parameters", parameter
            if parameter.grad is not None:
                yield "gradients", parameter.grad
        yield from (("parameters", buffer) for buffer in owner.buffers())


# ---------------------------------------------------------------------------------------------- fake tensors


def _on_fake(mode: FakeTensorMode, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator of which some arguments are fake; where its result depends on values, see ``PeakMemory``."""
    if func in (_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default):
        indices = [part for index in args[1] for part in _whole(index)]
        return func(args[0], indices, *args[2:], **kwargs)
    if func is _aten.nonzero.default:
        return _everywhere(args[0])
    if func is _aten.masked_select.default:
        return args[0].expand(torch.broadcast_shapes(args[0].shape, args[1].shape)).reshape(-1)
    if func is _aten._local_scalar_dense.default:
        kind = args[0].dtype
        return False if kind == torch.bool else 0.0 if kind.is_floating_point else 0
    if func is _aten._unique2.default:
        one = torch.zeros(1, dtype=torch.int64)
        return one.to(args[0].dtype), torch.zeros_like(args[0], dtype=torch.int64), one
    if func.name() == "torchvision::nms":
        return torch.arange(args[0].shape[0])
    try:
        if isinstance(mode, Fakes):
            out = mode.dispatch(func, types, args, kwargs)  # as func would, with less around it
            if out is not NotImplemented:
                return out
        return func(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise PlanError(f"the memory of a step cannot be simulated: the shape of what {func} returns depends on "
                        "values") from error


def _whole(index: Tensor | None) -> list[Tensor | None]:
    """A mask as whole numbers, one tensor per axis: a real mask exactly, a fake one as if it selected everything."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    return list((_everywhere(index) if isinstance(index, FakeTensor) else index.nonzero()).unbind(1))


def _everywhere(like: Tensor) -> Tensor:
    """What ``nonzero`` returns where nothing is zero."""
    if math.prod(like.shape) == 0:
        return torch.empty(0, like.dim(), dtype=torch.int64)
    return torch.cartesian_prod(*map(torch.arange, like.shape)).reshape(-1, like.dim())
