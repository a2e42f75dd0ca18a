"""Copies of modules that share nothing mutable with the user's, and random states left as they were."""

import copy
import random
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.jit._fuser import optimized_execution

from glcan_fx.capture.patches import recording
from glcan_fx.capture.source_lines import Uncapturable
from glcan_fx.fakes import Fakes

_HOOKS = frozenset(name for name in vars(nn.Module()) if "_hooks" in name)
_TABLES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_COMPILED = "_torchdynamo_orig_callable"  # where torch.compile keeps what it was given


def replicate(module: nn.Module, convert: Callable[[Tensor], Tensor], *, hooks: bool = False) -> nn.Module:
    """The same module tree with converted parameters and buffers; shares nothing mutable. ``hooks``: and with hooks.

    What instances keep beside their sub-modules (methods of modules, functions over them, lists and dicts of them)
    refers to the copies. What torch has compiled is called as it was written.
    """
    return _Copies(convert, hooks).tree(module)


class Scripted(nn.Module):
    """Stands in a copy for a scripted module, under the same names: one call, whose inside nobody can record.

    Its code runs on fake tensors once it holds them itself.
    """

    def __init__(self, module: nn.Module, convert: Callable[[Tensor | None], Tensor | None]) -> None:
        super().__init__()
        code = vars(module)["code"] if isinstance(module, Scripted) else module
        self.__dict__["code"] = code = copy.deepcopy(code)  # no sub-module of its own: it has the same tensors
        self._fill(module, code, convert)

    def _fill(self, module: nn.Module, code: Any, convert: Callable[[Tensor | None], Tensor | None]) -> None:
        for name in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, name).items():
                new = convert(tensor)
                if new is not None and name == "_parameters" and not isinstance(new, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)  # torch.jit.load makes plain tensors
                vars(self)[name][key] = new
                code._c.setattr(key, new)
        for name, child in module.named_children():
            self._modules[name] = part = Scripted.__new__(Scripted)
            nn.Module.__init__(part)
            part._fill(child, getattr(code, name), convert)
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if recording.now() is not None:
            raise Uncapturable("it is scripted, and does not run as Python")
        code = self.__dict__["code"]
        parts = dict(code.named_modules())
        for path, part in self.named_modules():
            parts[path].train(part.training)
        with optimized_execution(False):  # which would fuse what fake tensors are to see
            return code(*args, **kwargs)


class _Copies:
    """Copies of modules, of their tensors and of what refers to either; each is made once."""

    def __init__(self, convert: Callable[[Tensor], Tensor], hooks: bool) -> None:
        self.convert, self.hooks = convert, hooks
        self.fake = isinstance(convert(torch.empty(0)), FakeTensor)
        self.registered: set[int] = set()  # modules of the tree
        self.modules: dict[int, nn.Module] = {}
        self.tensors: dict[int, Tensor] = {}
        self.others: dict[int, Any] = {}  # containers and functions
        self.unfinished: list[nn.Module] = []  # what they refer to is not copied yet
        self.alive: list[Any] = []  # what is known by identity must stay alive

    def tree(self, root: nn.Module) -> nn.Module:
        self.registered = {id(module) for module in root.modules()}
        new = self.module(root)
        while self.unfinished:
            self.finish(self.unfinished.pop())
        return new

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) in self.modules:
            return self.modules[id(module)]
        convert = self.tensor if id(module) in self.registered else self.unregistered
        new: nn.Module
        if isinstance(module, torch.jit.ScriptModule | Scripted):
            new = self.modules[id(module)] = Scripted(module, convert)
            return new
        new = object.__new__(type(module))
        self.modules[id(module)] = new
        self.unfinished.append(module)
        for name in ("_parameters", "_buffers"):
            vars(new)[name] = {key: convert(tensor) for key, tensor in vars(module)[name].items()}
        children = vars(module)["_modules"]
        vars(new)["_modules"] = {key: None if child is None else self.module(child) for key, child in children.items()}
        return new

    def finish(self, module: nn.Module) -> None:
        """Copy the attributes of a module whose tensors and sub-modules are copied."""
        new = vars(self.modules[id(module)])
        weights = _weights_of_hooks(module)
        for name, value in vars(module).items():
            if name in _HOOKS:
                new[name] = type(value)()
                if self.hooks:
                    new[name].update({key: self.value(hook) for key, hook in value.items()})
            elif isinstance(value, Tensor) and (value.grad_fn is not None or name in weights):
                new[name] = self.weight(value)
            elif name not in _TABLES and name != "_compiled_call_impl":
                new[name] = self.value(value)
        if "forward" not in new and _is_compiled(type(module).forward):
            new["forward"] = types.MethodType(getattr(type(module).forward, _COMPILED), self.modules[id(module)])
        if self.fake and isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
            new["momentum"] = 0.1  # to average over all batches, it would ask for the number of batches, a value
        if isinstance(module, nn.SyncBatchNorm):  # a copy runs on this rank alone, whatever device it is on
            new["forward"] = types.MethodType(nn.BatchNorm2d.forward, self.modules[id(module)])

    # ---- tensors

    def tensor(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = self.convert(tensor)
            self.alive.append(tensor)
        return None if tensor is None else self.tensors[id(tensor)]

    def unregistered(self, tensor: Tensor | None) -> Tensor | None:
        """Neither parameter nor buffer of the tree: a constant for a graph. No operation on fake tensors changes it."""
        return self.tensors.get(id(tensor), tensor) if self.fake else self.tensor(tensor)

    def weight(self, value: Tensor) -> Tensor:
        """What a hook has made of parameters (weight_norm, pruning); in a copy no hook does."""
        new = self.tensor(value)
        assert new is not None
        return new.requires_grad_(value.requires_grad)

    # ---- everything else

    def value(self, value: Any) -> Any:
        """An attribute, or a part of one."""
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return self.unregistered(value)
        if isinstance(value, _RANDOM) or type(value).__module__.startswith("numpy.random"):
            return value.clone_state() if isinstance(value, torch.Generator) else copy.deepcopy(value)
        if id(value) not in self.others:
            self.others[id(value)] = value
            self.alive.append(value)
            if isinstance(value, _CONTAINERS) and (type(value) in _CONTAINERS or self.refers(value)):
                self.container(value)
            elif isinstance(value, tuple | frozenset):
                self.others[id(value)] = self.fixed(value)
            elif _is_compiled(value):
                self.others[id(value)] = self.value(getattr(value, _COMPILED))
            elif self.refers(value):
                self.others[id(value)] = self.reference(value)
        return self.others[id(value)]

    def container(self, value: Any) -> None:
        new = self.others[id(value)] = copy.copy(value)
        parts = list(value.items()) if isinstance(value, dict) else list(value)
        new.clear()
        for part in parts:
            if isinstance(value, dict):
                new[self.value(part[0])] = self.value(part[1])
            else:
                (new.add if isinstance(value, set) else new.append)(self.value(part))

    def fixed(self, value: Any) -> Any:
        parts = [self.value(part) for part in value]
        if all(new is part for new, part in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)

    def reference(self, value: Any) -> Any:
        """The same method, function or weak reference, to the copies."""
        if isinstance(value, weakref.ref):
            return weakref.ref(self.value(value()))
        if isinstance(value, types.MethodType):
            return types.MethodType(self.value(value.__func__), self.value(value.__self__))
        if isinstance(value, partial):
            new: Any = partial(self.value(value.func), *map(self.value, value.args),
                               **{key: self.value(part) for key, part in value.keywords.items()})
        else:
            cells = tuple(types.CellType() for _ in value.__closure__ or ())
            new = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
            self.others[id(value)] = new
            for cell, before in zip(cells, value.__closure__ or (), strict=True):
                if (content := _content(before)) is not _EMPTY:
                    cell.cell_contents = self.value(content)
            new.__defaults__, new.__kwdefaults__ = self.value(value.__defaults__), self.value(value.__kwdefaults__)
            new.__doc__, new.__module__, new.__qualname__ = value.__doc__, value.__module__, value.__qualname__
        vars(new).update({key: self.value(part) for key, part in vars(value).items()})
        return new

    def refers(self, value: Any) -> bool:
        """Whether a container or a function holds a module, or a tensor of the tree, at any depth."""
        seen: set[int] = set()
        stack = [value]
        while stack:
            part = stack.pop()
            if isinstance(part, nn.Module) or isinstance(part, Tensor) and id(part) in self.tensors:
                return True
            if id(part) in seen:
                continue
            seen.add(id(part))
            if isinstance(part, dict):
                stack += [*part.keys(), *part.values()]
            elif isinstance(part, list | tuple | set | frozenset | deque):
                stack += part
            elif type(part) is weakref.ref:
                stack.append(part())
            elif isinstance(part, types.MethodType):
                stack += [part.__func__, part.__self__]
            elif type(part) is partial:
                stack += [part.func, part.args, part.keywords, vars(part)]
            elif isinstance(part, types.FunctionType):
                stack += [part.__defaults__, part.__kwdefaults__, vars(part), *map(_content, part.__closure__ or ())]
        return False


_RANDOM = (torch.Generator, random.Random)
_EMPTY = object()


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _is_compiled(value: Any) -> bool:
    return isinstance(value, types.FunctionType) and hasattr(value, _COMPILED)


def _weights_of_hooks(module: nn.Module) -> set[str]:
    """Names of the attributes that hooks of torch's own make before each call: weight_norm, spectral_norm, pruning."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.utils")]
    return {getattr(hook, "name", getattr(hook, "_tensor_name", "")) for hook in hooks}


def fake_copy(mode: Fakes, floating: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """A converter for ``replicate``: fake tensors on the CPU; ``floating``: another type of the floating-point ones."""
    def convert(tensor: Tensor) -> Tensor:
        out = mode.empty(tensor, floating if tensor.is_floating_point() else None)
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
