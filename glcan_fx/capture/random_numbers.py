"""Random numbers: who draws them, and random states that are left as they were."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from glcan_fx.pytree import tensors_in


class Seeded(TorchDispatchMode):
    """Whether an operation draws random numbers."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def python_random() -> Any:
    """The random states of Python and NumPy."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()[1:3][0].tobytes() + bytes(
        str(numpy.random.get_state()[2]), "ascii")


@contextmanager
def kept_python_random() -> Iterator[None]:
    """Leave the random states of Python and NumPy as they are."""
    restore = _python_random_restored()
    try:
        yield
    finally:
        restore()


def _python_random_restored() -> Callable[[], None]:
    """Sets the random states of Python and NumPy to what they are now."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None

    def restore() -> None:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numbers)

    return restore


def random_state(values: Any) -> tuple[torch.device, Tensor] | None:
    """The random state of the device that values are on; None where nothing is drawn (on fake tensors)."""
    tensor = next(tensors_in(values), None)
    if tensor is None or isinstance(tensor, FakeTensor):
        return None
    if tensor.device.type == "cpu":
        return tensor.device, torch.get_rng_state()
    if tensor.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return tensor.device, torch.cuda.get_rng_state(tensor.device)
    return None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


class RandomState:
    """The random states of Python, of NumPy, and of torch on the device that values are on, as they are now."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __init__(self, values: Any) -> None:
        self._restore, self._torch = _python_random_restored(), random_state(values)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def restore(self) -> None:
        self._restore()
        if self._torch is not None:
            set_random_state(*self._torch)


def seed(devices: Sequence[torch.device] = ()) -> None:
    """Let the random numbers of the CPU, and of these GPUs, begin as always. ``torch.manual_seed`` would do that on all
    GPUs, and all ranks of a distributed run would draw the same numbers from then on."""
    torch.default_generator.manual_seed(0)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(0)


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """Devices whose random state building must not move."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
