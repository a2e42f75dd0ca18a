"""Modules while they are recorded: arguments, which stay whole, which attributes are read, a run on real values."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from glcan_fx.capture.shadow import fake_like, random_like, real_copy, replicate
from glcan_fx.capture.symbolic import plain
from glcan_fx.pytree import map_tensors, tensors_in

_READS = "_glcan_fx_reads"


def argument_names(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """A name for every argument of a call of ``root``: the parameter's; those of *args are numbered."""
    names: list[str] = []
    for parameter in inspect.signature(root.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(len(names), len(args))]
    names += [f"argument_{index}" for index in range(len(names), len(args))]
    return [*names[: len(args)], *kwargs]


def holds_containers(args: Any, kwargs: Any) -> bool:
    """Called with lists or dicts of values: a module without children is plumbing then, and entered."""
    return any(isinstance(value, list | tuple | dict) for value in [*args, *kwargs.values()])


def is_torch_own(module: nn.Module) -> bool:
    """One of torch.nn's own layers, which stay whole; its containers, and stacks of layers, are entered."""
    parametrized = "parametrizations" in module._modules
    own = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    holds = isinstance(module, nn.Sequential) or any(isinstance(part, nn.ModuleList) for part in module.modules())
    return (own and not holds) or parametrized


@contextmanager
def reads_noted(
    module: nn.Module, noting: type, reads: set[str], configurations: dict[int, tuple[Any, dict[str, Any]]]
) -> Iterator[None]:
    """Add the names of the attributes that are read of a module to ``reads``; "*" where its class cannot be replaced.
    Of a configuration among them, those that are read of it: "config.scale", "config.*" for all.

    noting: the ``noting_class`` of its class, which it has meanwhile. configurations: those of the recording, and their
    attributes, to which a forward may write.
    """
    kind, before = type(module), vars(module).get(_READS)
    noted = module.__dict__[_READS] = _Noted(reads, configurations)
    try:
        module.__class__ = noting
    except TypeError:  # a class of another layout
        reads.add("*")
    try:
        yield
    finally:
        reads -= noted.written()
        module.__class__ = kind
        if before is None:
            del module.__dict__[_READS]
        else:
            module.__dict__[_READS] = before


class _Noted:
    """What is read of a module, and copies of configurations that note what is read of them."""

    def __init__(self, reads: set[str], configurations: dict[int, tuple[Any, dict[str, Any]]]) -> None:
        self.reads, self.configurations = reads, configurations
        self.copies: dict[int, tuple[str, Any, Any]] = {}

    def noting(self, name: str, value: Any) -> Any:
        """A copy that notes its reads, of a configuration; anything else as it is."""
        if not is_configuration(value):
            return value
        if id(value) not in self.copies:
            try:
                kind = _noting_configuration(type(value), name, self.reads)
                copy = kind.__new__(kind)  # type: ignore[call-overload]
                attributes = self.configurations.setdefault(id(value), (value, dict(vars(value))))[1]
                try:
                    object.__setattr__(copy, "__dict__", attributes)
                except AttributeError:  # SimpleNamespace
                    object.__getattribute__(copy, "__dict__").update(attributes)
            except TypeError:  # of a layout that cannot be made anew
                self.reads.add(f"{name}.*")
                copy = value
            self.copies[id(value)] = name, value, copy
        return self.copies[id(value)][-1]

    def written(self) -> set[str]:
        """What the forward itself has set of them."""
        return {f"{name}.{key}" for name, value, copy in self.copies.values() if copy is not value
                for key, now in object.__getattribute__(copy, "__dict__").items()
                if key not in vars(value) or vars(value)[key] is not now}


def is_configuration(value: Any) -> bool:
    """Whether a value is an object that is there for its attributes: options of a network."""
    if isinstance(value, Tensor | nn.Module | type | ModuleType | list | tuple | dict | set | frozenset | Enum) or (
            callable(value)):
        return False
    return any(not key.startswith("_") for key in getattr(value, "__dict__", ()))


def _noting_configuration(kind: type, path: str, reads: set[str]) -> type:
    def read(self: Any, name: str) -> Any:
        if name == "__dict__":
            reads.add(f"{path}.*")
        elif not name.startswith("_"):
            reads.add(f"{path}.{name}")
        return kind.__getattribute__(self, name)  # type: ignore[call-arg]

    return _like(kind, read)


def noting_class(kind: type) -> type:
    """A class like ``kind`` whose instances note which of their attributes are read."""
    def read(self: Any, name: str) -> Any:
        noted = None if name.startswith("__") else object.__getattribute__(self, "__dict__").get(_READS)
        if noted is not None:
            noted.reads.add(name)  # even where there is none
        value = kind.__getattribute__(self, name)  # type: ignore[call-arg]
        return value if noted is None else noted.noting(name, value)

    return _like(kind, read)


def _like(kind: type, read: Callable[[Any, str], Any]) -> type:
    return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__,
                                         "__qualname__": kind.__qualname__})


def run_really(original: nn.Module, shadow: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a copy of ``original`` on random values of the arguments' shapes; returns fake outputs, which autograd ties
    to the arguments and to the parameters of ``shadow``."""
    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
        module = replicate(original, real_copy)
        module.train(shadow.training)
        values = [map_tensors(plain(value), random_like) for value in args]
        named = {key: map_tensors(plain(value), random_like) for key, value in kwargs.items()}
        out = module(*values, **named)
    flat = [t for t in tensors_in(out) if t.is_floating_point() and t.requires_grad]
    real_ids = {id(t): index for index, t in enumerate(flat)}
    inputs = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
    inputs += [p for p in shadow.parameters() if p.requires_grad]
    shapes = [(tuple(t.shape), t.stride(), t.dtype) for t in flat]
    linked = _Link.apply(shapes, *inputs) if flat else ()
    return map_tensors(out, lambda t: linked[real_ids[id(t)]] if id(t) in real_ids else fake_like(t))


class _Link(torch.autograd.Function):
    """Fake outputs of a module that ran on real values, tied to its inputs in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, shapes: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*(t for t in inputs if not isinstance(t, nn.Parameter)))
        return tuple(torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("sizes only")


def hooks_on(module: nn.Module) -> list[str]:
    """The kinds of hooks that a module has, which run where it is called."""
    kinds = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return [kind for kind in kinds if vars(module).get(f"_{kind}")]
