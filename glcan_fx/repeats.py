"""Operators on real tensors, each run once for the same values.

In a simulated step targets and anchors are real, and every local loss matches them anew, image by image.
"""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from glcan_fx.fakes import kind_of
from glcan_fx.pytree import map_tensors

_SMALL = 1024  # elements: computed faster than looked up, and known by their values
_ROOM = 2**28  # bytes of results


class Repeats:
    """Runs operators on real CPU tensors; hands out the results that it knows as copies, which are made when either is
    written to. All that runs meanwhile must pass through it, so that it knows what was written to."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}
        self._known: dict[int, tuple[Any, int, int, int]] = {}  # of a tensor: itself, its storage, writes, what it is
        self._writes: dict[int, int] = {}  # to storages
        self._names: dict[Any, int] = {}  # what was computed, by number
        self._bytes = 0

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What ``func`` returns."""
        written, leaves = _writes(func), _tensors(args)
        if kwargs:
            leaves += _tensors(kwargs.values())
        large = any(leaf.numel() > _SMALL for leaf in leaves)
        key = self._key(func, args, kwargs) if large and _is_function(func) else None
        if key is not None and not written and key in self._results:
            out = map_tensors(self._results[key], torch._lazy_clone)
            return self._named(key, out, _tensors((out,)))
        out = func(*args, **kwargs)
        if written:
            for storage in {leaf.untyped_storage()._cdata for leaf in leaves}:
                self._writes[storage] = self._writes.get(storage, 0) + 1
        made = _tensors((out,))
        if not large and not written and any(part.numel() > _SMALL for part in made) and _is_function(func):
            key = self._key(func, args, kwargs)
        if key is None:
            return out
        if not written and isinstance(out, Tensor | tuple) and len(made) == (len(out) if isinstance(out, tuple) else 1):
            self._keep(key, out, made, leaves)
        return self._named(key, out, made)

    def _keep(self, key: Any, out: Any, made: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
        """Remember results with memory of their own."""
        own = {part.untyped_storage()._cdata for part in made}
        plain = all(part.layout is torch.strided and part.device.type == "cpu" for part in made)
        if len(own) < len(made) or not plain or not own.isdisjoint(leaf.untyped_storage()._cdata for leaf in leaves):
            return
        self._bytes += sum(part.untyped_storage().nbytes() for part in made)
        if self._bytes > _ROOM:
            self._results.clear()
            self._bytes = 0
        else:
            self._results[key] = map_tensors(out, torch._lazy_clone)

    def _named(self, key: Any, out: Any, made: Sequence[Tensor]) -> Any:
        """The results, of which it is known from now on what they are."""
        for index, part in enumerate(made):
            storage = part.untyped_storage()._cdata
            number = self._names.setdefault((key, index), len(self._names))
            self._known[id(part)] = weakref.ref(part), storage, self._writes.get(storage, 0), number
        return out

    def _key(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """What a result depends on; None where that is not known."""
        key: list[Any] = [func, torch.get_default_dtype(), *kwargs]
        return tuple(key) if self._add(key, args) and self._add(key, kwargs.values()) else None

    def _add(self, key: list[Any], values: Any) -> bool:
        for value in values:
            if isinstance(value, tuple | list):
                key.append(len(value))
                if not self._add(key, value):
                    return False
            elif isinstance(value, Tensor):
                name = self._name_of(value)
                if name is None:
                    return False
                key.append(name)
            else:
                key += (type(value), value)  # 1 and 1.0 are equal, and do not make the same
        return True

    def _name_of(self, tensor: Tensor) -> Any:
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[2] == self._writes.get(known[1], 0):
            return known[3]
        if tensor.numel() > _SMALL or tensor.requires_grad or tensor.device.type != "cpu" or (
                tensor.dtype in _NOT_NUMPYS or tensor.layout is not torch.strided):
            return None
        return tensor.dtype, tensor.shape, tensor.stride(), tensor.numpy().tobytes()


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among nested arguments or results."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found


_NOT_NUMPYS = (torch.bfloat16, torch.complex32)


@cache
def _writes(func: Any) -> bool:
    return bool(func._schema.is_mutable)


@cache
def _is_function(func: Any) -> bool:
    """Whether an operator's results, or what it has written to its first argument, depend on its arguments alone."""
    known = kind_of(func) is not None or torch.Tag.dynamic_output_shape in func.tags
    chance = torch.Tag.nondeterministic_seeded in func.tags or str(func).startswith(("aten.empty", "aten.new_empty"))
    return known and not chance
