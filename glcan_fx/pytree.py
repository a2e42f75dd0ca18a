"""Tensors in nested values: tuples, lists, dicts, dataclasses, and whatever pytree knows."""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only


def parts_of(value: Any) -> list[tuple[tuple[Any, Any], Any]]:
    """((function, key), part) of a container, where ``function(container, key)`` gets the part."""
    if isinstance(value, tuple | list):
        return [((operator.getitem, index), part) for index, part in enumerate(value)]
    if isinstance(value, Mapping):
        return [((operator.getitem, key), part) for key, part in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [((getattr, f.name), getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    return []


def plain_data(value: Any) -> Any:
    """Dataclasses as dicts, so that pytree functions see the tensors in them."""
    if isinstance(value, Tensor | str | bytes):
        return value
    if isinstance(value, Mapping):
        return {key: plain_data(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [plain_data(part) for part in value] if isinstance(value, list) else tuple(map(plain_data, value))
    return {key: plain_data(part) for (_, key), part in parts_of(value)} if parts_of(value) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for _, part in parts_of(value):
            yield from tensors_in(part)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(part, function) for part in value))
    if type(value) in (list, tuple):
        return type(value)(map_tensors(part, function) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: map_tensors(getattr(value, f.name), function) for f in dataclasses.fields(value) if f.init}
        return type(value)(**changed)
    if isinstance(value, Mapping):
        items = [(key, map_tensors(part, function)) for key, part in value.items()]
        return type(value)(items) if type(value) is not dict else dict(items)  # type: ignore[call-arg]
    return tree_map_only(Tensor, function, value)
