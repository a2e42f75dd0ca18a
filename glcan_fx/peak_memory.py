"""Count the live tensor bytes of a step, on any device, fake tensors included."""

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
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
from glcan_fx.repeats import Repeats

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
    them alone is exact; with ``repeats`` it is computed once for the same values, which are kept for that.
    """

    def __init__(self, *owners: nn.Module | Optimizer | Tensor, repeats: bool = False) -> None:
        super().__init__()
        self.bytes = 0
        self.live = 0
        self.log = Log()
        self._work = [0, 0, 0]
        self._known: dict[int, int] = {}  # storage -> block
        self._owners = owners
        self._storages: dict[int, Any] = {}  # weak references to what is live
        self._repeats = Repeats() if repeats else None
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
        self._storages.clear()

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
        if func is _DEVICE and type(args[0]) is FakeTensor:  # asked for more often than all operators
            return args[0].fake_device
        kwargs = kwargs or {}
        mode = fake_mode_of(args, kwargs)
        if mode is not None:
            out = _on_fake(mode, func, types, args, kwargs)
        else:
            out = self._repeats.run(func, args, kwargs) if self._repeats else func(*args, **kwargs)
        _count(self._work, func, args, kwargs, out)
        if isinstance(out, Tensor):
            self._add(out)
        else:
            for tensor in _tensors_in(out):
                self._add(tensor)
        return out

    @property
    def work(self) -> Work:
        """What operators have done so far."""
        return Work(*self._work)

    @property
    def flops(self) -> int:
        """Floating-point operations so far."""
        return self._work[0]

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
        if self.live > self.bytes:
            self.bytes = self.live
        self._storages[key] = weakref.ref(storage, partial(self._free, key, size))

    def _free(self, key: int, size: int, _: Any) -> None:
        self.log.events.append((self._known.pop(key), False))
        self.live -= size


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of one operator, where it is a convolution, a matrix product or attention."""
    count = _counter(func)
    if count is None:
        return 0
    if getattr(func, "overloadpacket", None) is _aten.convolution_backward and args[9] > 1:
        *before, (inputs, weight, bias) = args  # torch counts a grouped weight's gradient as a dense one
        parts = [int(count(*before, mask, **kwargs, out_val=out)) for mask in
                 ((inputs, False, False), (False, weight, bias))]
        return parts[0] + parts[1] // args[9]
    return int(count(*args, **kwargs, out_val=out))


@cache
def _counter(func: Any) -> Callable[..., Any] | None:
    """What counts an operator's floating-point operations."""
    return flop_registry.get(getattr(func, "overloadpacket", None))


@cache
def _works(func: Any) -> bool:
    """Whether an operator does anything but look at memory, or make some without values."""
    return not getattr(func, "is_view", False) and func not in _WITHOUT_VALUES


def _count(work: list[int], func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Add what one operator does."""
    if _works(func):
        work[0] += flops_of(func, args, kwargs, out)
        work[1] += _bytes(args) + (_bytes(kwargs) if kwargs else 0) + _bytes(out)
        work[2] += 1


_WITHOUT_VALUES = {_aten.detach.default, _aten.empty.memory_format, _aten.empty_strided.default,
                   _aten.empty_like.default, _aten.new_empty.default, _aten.new_empty_strided.default}


def _bytes(value: Any) -> int:
    """Bytes of the tensors among an operator's nested arguments, or results."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return 0
    total = 0
    for part in value:
        if isinstance(part, Tensor):
            total += part.numel() * part.element_size()
        elif isinstance(part, tuple | list):
            total += _bytes(part)
    return total


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors among an operator's nested results."""
    if isinstance(value, tuple | list):
        return [tensor for part in value for tensor in _tensors_in(part)]
    return [value] if isinstance(value, Tensor) else []


class Counting(TorchDispatchMode):
    """Counts what operators do; on fake tensors as ``PeakMemory``."""

    def __init__(self) -> None:
        super().__init__()
        self._work = [0, 0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs = kwargs or {}
        mode = fake_mode_of(args, kwargs)
        out = func(*args, **kwargs) if mode is None else _on_fake(mode, func, types, args, kwargs)
        _count(self._work, func, args, kwargs, out)
        return out

    @property
    def work(self) -> Work:
        """What operators have done so far."""
        return Work(*self._work)


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
    name = _by_value(func)
    try:
        if name in ("index", "index_put", "index_put_"):
            args = args[0], [part for index in args[1] for part in _whole(index, mode)], *args[2:]
        elif name is not None and not _is_exact(mode):
            return _LARGEST[name](*args)
        if isinstance(mode, Fakes):
            out = mode.dispatch(func, types, args, kwargs)  # as func would, with less around it
            if out is not NotImplemented:
                return out
        return func(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise PlanError(f"the memory of a step cannot be simulated: the shape of what {func} returns depends on "
                        "values") from error


@cache
def _by_value(func: Any) -> str | None:
    """The name of an operator whose result depends on values of its arguments, where we answer instead of it."""
    name = func.name().partition("::")[2].partition(".")[0]
    return name if name in _LARGEST or name in ("index", "index_put", "index_put_") else None


def _number(value: Tensor) -> bool | float:
    return False if value.dtype == torch.bool else 0.0 if value.dtype.is_floating_point else 0


def _one_kind(value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    one = torch.zeros(1, dtype=torch.int64)
    return one.to(value.dtype), torch.zeros_like(value, dtype=torch.int64), one


def _is_exact(mode: FakeTensorMode) -> bool:
    return isinstance(mode, Fakes) and mode.exact


def _whole(index: Tensor | None, mode: FakeTensorMode) -> list[Tensor | None]:
    """A mask as whole numbers, one tensor per axis: a real mask exactly, a fake one as if it selected everything."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    fake = isinstance(index, FakeTensor) and not _is_exact(mode)
    return list((_everywhere(index) if fake else index.nonzero()).unbind(1))


def _everywhere(like: Tensor) -> Tensor:
    """What ``nonzero`` returns where nothing is zero."""
    if math.prod(like.shape) == 0:
        return torch.empty(0, like.dim(), dtype=torch.int64)
    return torch.cartesian_prod(*map(torch.arange, like.shape)).reshape(-1, like.dim())


_LARGEST: dict[str, Callable[..., Any]] = {
    "nonzero": _everywhere, "_local_scalar_dense": _number, "_unique2": _one_kind,
    "masked_select": lambda value, mask: value.expand(torch.broadcast_shapes(value.shape, mask.shape)).reshape(-1),
    "nms": lambda boxes, *_: torch.arange(boxes.shape[0]),
}
