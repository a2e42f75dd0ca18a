"""Guards: what a compiled step took for granted of the modules whose forwards it writes out, checked at every step.

Modules that the step calls as a whole may change as they like. Of those that are written out, the attributes that their
forwards read, their classes, forwards, parts and hooks have to be what they were (compare TorchDynamo's guards).
"""

import enum
import types
from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glcan_fx.capture.modules import hooks_on, is_configuration
from glcan_fx.errors import ModelChangedError, PlanError
from glcan_fx.step.global_values import variables_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)
_MANY = 200  # values of one attribute
_MISSING = object()

Opened = Mapping[str, tuple[str, ...]]  # of every module that is written out, by path, the attributes it reads


class _Guard(NamedTuple):
    what: str
    now: Callable[[], Any]
    expected: Any
    same: bool  # the same object, not only an equal one


class Guards:
    """What has to stay as it is in ``model``.

    opened: the modules that are written out, with the names of the attributes that their forwards read
    ("training=True": with the mode that it was recorded in); called: paths of the modules that are called as a whole,
    which may be replaced.
    """

    def __init__(self, model: nn.Module, opened: Opened, called: Set[str]) -> None:
        self._hooked = [(path, module) for path, module in _modules(model, opened) if path]
        self._guards = [guard for path, module in _modules(model, opened)
                        for guard in _of_module(model, path, module, opened[path], called)]
        _refuse_hooks(self._hooked, PlanError)

    def __len__(self) -> int:
        return len(self._guards)

    def check(self) -> None:
        """Raise ModelChangedError where something has changed: what, from what to what, and what to do."""
        _refuse_hooks(self._hooked, ModelChangedError)
        for what, now, expected, same in self._guards:
            found = now()
            if found is not expected and (same or type(found) is not type(expected) or found != expected):
                before, after = _difference(expected, found)
                raise ModelChangedError(
                    f"{what} was {_short(before)} when the model was compiled, and is {_short(after)} now. The "
                    "training step was written for the former. Set it back, or compile again: "
                    "glcan_fx.transform(local.original, ...).")


def _modules(model: nn.Module, opened: Opened) -> Iterator[tuple[str, nn.Module]]:
    for path in opened:
        yield path, model.get_submodule(path)


def _refuse_hooks(modules: list[tuple[str, nn.Module]], error: type[Exception]) -> None:
    for path, module in modules:
        for kind in hooks_on(module):
            raise error(
                f"module '{path}' of class {type(module).__name__} has a hook ({kind}), but a local module ends inside "
                "it, so its forward is written out and never called. Put the hook on the modules inside it, remove it, "
                "or choose split points that leave the module whole.")


def _of_module(
    model: nn.Module, path: str, module: nn.Module, names: tuple[str, ...], called: Set[str]
) -> Iterator[_Guard]:
    shown = f"'{path}'" if path else f"the {type(module).__name__} itself"
    if path:
        owner, _, own = path.rpartition(".")
        yield _Guard(f"the module {shown}", partial(model.get_submodule(owner)._modules.get, own), module, True)
    yield _Guard(f"the class of {shown}", lambda: type(module), type(module), True)
    yield _Guard(f"the forward of {shown}", lambda: vars(module).get("forward"), vars(module).get("forward"), True)
    yield _Guard(f"the forward of the class of {shown}", lambda: type(module).forward, type(module).forward, True)
    yield _Guard(f"the parts of {shown}", lambda: list(module._modules), list(module._modules), False)
    for function in [module.forward, *(getattr(module, name, None) for name in names)]:
        if callable(function) and not isinstance(function, nn.Module):
            yield from _of_variables(function)
    for name in names:
        if "." in name:
            yield from _of_configuration(path, module, name)
        elif name == "*":
            yield from _of_attributes(path, module, [key for key in vars(module) if not key.startswith("_")], called)
        elif name.startswith("training="):
            yield _Guard(f"'{path}.training'" if path else "'training'", partial(getattr, module, "training"),
                         name == "training=True", False)
        elif not hasattr(nn.Module, name) and name not in vars(nn.Module()):
            if is_configuration(value := getattr(module, name, None)):  # its own attributes are read on their own
                yield _Guard(f"the class of '{path}.{name}'", _kind_of(module, name), type(value), True)
            else:
                yield from _of_attributes(path, module, [name], called)


def _of_variables(function: Callable[..., Any]) -> Iterator[_Guard]:
    """Numbers and text outside of a function that is written out, and in containers there."""
    for what, now in variables_of(function):
        value = now()
        if all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(value)):  # no cache of tensors, no logger
            yield _Guard(what, lambda now=now: _seen(now()), _seen(value), False)  # type: ignore[misc]


def _of_attributes(path: str, module: nn.Module, names: list[str], called: Set[str]) -> Iterator[_Guard]:
    for name in names:
        shown = f"'{path}.{name}'" if path else f"'{name}'"
        value = getattr(module, name, _MISSING)
        if isinstance(value, nn.Module):
            yield from _of_part(f"{path}.{name}" if path else name, module._modules, name, value, called)
        elif isinstance(value, Tensor):
            yield _Guard(f"the class of {shown}", _kind_of(module, name), _kind(value), True)
        elif isinstance(value, types.MethodType):
            yield _Guard(f"the method {shown}", _function_of(module, name), value.__func__, True)
        else:
            yield _Guard(shown, partial(_value_of, module, name), _seen(value), False)


def _of_configuration(path: str, module: nn.Module, name: str) -> Iterator[_Guard]:
    """What was read of an attribute that is there for its own attributes."""
    name, _, read = name.partition(".")
    shown = f"{path}.{name}" if path else name
    if read == "*":
        yield _Guard(f"'{shown}'", partial(_value_of, module, name), _seen(getattr(module, name, _MISSING)), False)
    else:
        def now() -> Any:
            return _value_of(getattr(module, name, _MISSING), read)
        yield _Guard(f"'{shown}.{read}'", now, now(), False)


def _of_part(
    path: str, table: dict[str, nn.Module | None], name: str, part: nn.Module, called: Set[str]
) -> Iterator[_Guard]:
    """A part that is called as a whole may be replaced; a container of such parts holds the same ones."""
    if name not in table or path in called or not any(other.startswith(path + ".") for other in called):
        return
    yield _Guard(f"the module '{path}'", partial(table.get, name), part, True)
    yield _Guard(f"the parts of '{path}'", lambda: list(part._modules), list(part._modules), False)
    for key, inner in part._modules.items():
        if inner is not None:
            yield from _of_part(f"{path}.{key}", part._modules, key, inner, called)


def _kind_of(module: nn.Module, name: str) -> Callable[[], Any]:
    return lambda: _kind(getattr(module, name, None))


def _kind(value: Any) -> type:
    """The class; a parameter remains one when it is sharded."""
    return nn.Parameter if isinstance(value, nn.Parameter) else type(value)


def _function_of(module: nn.Module, name: str) -> Callable[[], Any]:
    return lambda: getattr(getattr(module, name, None), "__func__", None)


def _value_of(module: Any, name: str) -> Any:
    return _seen(getattr(module, name, _MISSING))


class _Same:
    """Stands for an object of which only the identity is looked at."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"a {type(self.value).__name__}"


def _seen(value: Any, depth: int = 3) -> Any:
    """What can be compared of a value: numbers and text, in containers, and as public attributes of other objects (a
    configuration); the identity of anything else."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor | nn.Module | type | types.ModuleType) or callable(value) or depth == 0:
        return _Same(None if isinstance(value, Tensor) else getattr(value, "__func__", value))
    if isinstance(value, list | tuple | set | frozenset) and len(value) <= _MANY:
        return type(value).__name__, [_seen(item, depth - 1) for item in value]
    if isinstance(value, dict) and len(value) <= _MANY:
        return {key: _seen(item, depth - 1) for key, item in value.items()}
    public = {key: item for key, item in getattr(value, "__dict__", {}).items() if not key.startswith("_")}
    if 0 < len(public) <= _MANY:
        seen = {key: _seen(item, depth - 1) for key, item in public.items()}
        return type(value), {key: item for key, item in seen.items() if not isinstance(item, _Same)}
    return _Same(value)


def _difference(before: Any, after: Any) -> tuple[Any, Any]:
    """Where two values differ: of configurations, the entries that do."""
    if isinstance(before, tuple) and isinstance(after, tuple) and len(before) == len(after) == 2:
        before, after = (before[1], after[1]) if before[0] == after[0] else (before, after)
    if isinstance(before, dict) and isinstance(after, dict):
        keys = [key for key in {**before, **after} if key not in before or key not in after or not (
            before[key] is after[key] or before[key] == after[key])]
        return ({key: before[key] for key in keys if key in before}, {key: after[key] for key in keys if key in after})
    return before, after


def _short(value: Any) -> str:
    value = value.value if isinstance(value, _Same) else value
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    if isinstance(value, types.FunctionType | types.MethodType | type):
        return getattr(value, "__qualname__", repr(value))
    return repr(value)[:80]
