"""Copies of modules that share nothing mutable with the user's, and random states left as they were."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def replicate(module: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """The same module tree with converted parameters and buffers and without hooks; shares nothing mutable."""
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def one(tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and id(tensor) not in tensors:
            tensors[id(tensor)] = convert(tensor)
        return None if tensor is None else tensors[id(tensor)]

    def copy(module: nn.Module) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        new: nn.Module = object.__new__(type(module))
        modules[id(module)] = new
        new.__dict__ = dict(vars(module))
        for name in ("_parameters", "_buffers"):
            vars(new)[name] = {key: one(tensor) for key, tensor in vars(module)[name].items()}
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                vars(new)[name] = type(value)()
            elif type(value) in (list, dict, set) and not name.startswith("_"):  # a forward pass may keep things there
                vars(new)[name] = value.copy()
            elif isinstance(value, Tensor) and value.grad_fn is not None:  # made of the user's parameters (weight_norm)
                vars(new)[name] = value.detach().requires_grad_()
        vars(new)["_modules"] = {k: None if m is None else copy(m) for k, m in vars(module)["_modules"].items()}
        return new

    return copy(module)


def fake_copy(mode: FakeTensorMode, floating: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """A converter for ``replicate``: fake tensors on the CPU; ``floating``: another type of the floating-point ones."""
    def convert(tensor: Tensor) -> Tensor:
        dtype = floating if floating is not None and tensor.is_floating_point() else tensor.dtype
        with mode:
            out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
        return nn.Parameter(out, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else out
    return convert


def real_copy(tensor: Tensor) -> Tensor:
    out = tensor.detach().to("cpu", copy=True)
    return nn.Parameter(out, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else out


def random_like(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        out = torch.randn(tensor.shape, dtype=tensor.dtype)
        return out.requires_grad_(tensor.requires_grad)
    return torch.ones(tensor.shape, dtype=torch.bool) if tensor.dtype == torch.bool else torch.zeros(
        tensor.shape, dtype=tensor.dtype)


def fake_like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


@contextmanager
def kept_python_random() -> Iterator[None]:
    """Leave the random states of Python and NumPy as they are."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numbers)


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """Devices whose random state building must not move."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
