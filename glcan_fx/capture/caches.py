"""Caches of the user's functions (``functools.lru_cache``), which must not keep what a recording has made."""

import functools
import inspect
import sys
from collections.abc import Iterable
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

# they know of fake tensors, or never see them
_LIBRARIES = frozenset(("torch", "sympy", "networkx", "numpy", "glcan_fx")) | sys.stdlib_module_names


class Caches:
    """The caches that the code of a model can reach, a library's own left out, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = {id(found): found.cache_info() for found in _caches(model)}
        self._found: list[Any] = []  # with those that the first calls made

    def clear_used(self) -> bool:
        """Clear those that were used since: results stay the same, and what a recording left in them is of a graph that
        will be gone. Returns whether one has answered with what it kept before, numbers that the recording knows no
        origin of."""
        answered = False
        self._found = self._found or _caches(self._model)
        for found in self._found:
            before, after = self._before.get(id(found)), found.cache_info()
            read = before is not None and before.currsize > 0 and after.hits > before.hits
            if read or after.misses != (before.misses if before else 0):
                found.cache_clear()
            answered |= read
        return answered


def _caches(model: nn.Module) -> list[Any]:
    """What is found from the model's classes and attributes on, by way of functions, their modules and closures."""
    found: list[Any] = []
    seen: set[int] = set()
    waiting: list[Any] = list(model.modules())
    while waiting:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            waiting += _reached_from(value)
            if type(value) is functools._lru_cache_wrapper and not _is_librarys(value) and (
                    inspect.signature(value).parameters):
                found.append(value)
    return found


def _reached_from(value: Any) -> Iterable[Any]:
    """What may hold, or be, a cache, a step from something. By its type alone: attributes may be anything."""
    kind = type(value)
    if kind is FunctionType:
        if _is_librarys(value):
            return ()
        imported = [sys.modules[name] for name in value.__code__.co_names if name in sys.modules]  # inside of it
        return [*(cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)), *imported,
                sys.modules.get(str(value.__module__))]
    if issubclass(kind, ModuleType):
        return () if value.__name__.partition(".")[0] in _LIBRARIES else list(vars(value).values())
    if issubclass(kind, type):
        return () if _is_librarys(value) else [
            *value.__bases__, *vars(value).values(), sys.modules.get(str(value.__module__))]
    if kind in (staticmethod, classmethod, functools._lru_cache_wrapper):
        return [value.__wrapped__]
    if kind is MethodType:
        return [value.__func__, value.__self__]
    if kind is property:
        return [value.fget]
    if kind is functools.partial:
        return [value.func, *value.args]
    return [kind, *(vars(value).values() if issubclass(kind, nn.Module) else ())]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _is_librarys(value: Any) -> bool:
    return str(getattr(value, "__module__", None)).partition(".")[0] in _LIBRARIES
