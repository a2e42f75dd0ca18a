"""Sizes that are recorded: numbers that remember the graph's node which computes them."""

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx


class Records(Protocol):
    """Who records arithmetic on sizes, and is told of questions about them."""

    def number(self, function: Callable[..., Any], *args: Any) -> Any: ...
    def ask(self, answer: Any) -> None: ...
    def watch_caches(self) -> None: ...


class Number:
    """A size, or a number computed from sizes: its value, and the node that computes it at run time."""

    def __init__(self, value: Any, node: fx.Node, recorder: "Records") -> None:
        self.value, self.fx_node, self.recorder = value, node, recorder

    @property  # type: ignore[misc]  # code that asks isinstance(n, int) goes the way that it goes with real sizes
    def __class__(self) -> Any:
        return type(self.value)

    def _asked(self) -> Any:
        self.recorder.ask(self.value)
        return self.value

    def __hash__(self) -> int:
        self.recorder.watch_caches()
        return hash(self._asked())

    def __repr__(self) -> str:
        return repr(self.value)

    def __str__(self) -> str:  # text decides nothing: messages of assertions are full of sizes
        return str(self.value)

    def __format__(self, form: str) -> str:
        return format(self.value, form)

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __bool__(self) -> bool:
        return bool(self._asked())

    def __int__(self) -> int:
        return int(self._asked())

    def __float__(self) -> float:
        return float(self._asked())

    def __index__(self) -> int:
        return operator.index(self._asked())


class Size(Number, torch.SymInt):  # the base class makes torch accept it wherever it takes a size
    __hash__ = Number.__hash__


class Ratio(Number, torch.SymFloat):
    __hash__ = Number.__hash__


def _divmod(a: Any, b: Any) -> tuple[Any, Any]:
    return a // b, a % b


def _install() -> None:
    def binary(function: Callable[[Any, Any], Any], swap: bool) -> Callable[[Any, Any], Any]:
        def method(self: Any, other: Any) -> Any:
            if type(other) not in (int, float, bool, Size, Ratio):
                return NotImplemented
            return self.recorder.number(function, *((other, self) if swap else (self, other)))
        return method

    def comparison(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def method(self: Any, other: Any) -> Any:
            if type(other) not in (int, float, bool, Size, Ratio):
                return NotImplemented
            answer = function(self.value, plain(other))
            self.recorder.ask(answer)
            return answer
        return method

    def unary(function: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda self, *rest: self.recorder.number(function, self, *rest)

    for kind in (Size, Ratio):
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
            setattr(kind, f"__{name}__", binary(getattr(operator, name), False))
            setattr(kind, f"__r{name}__", binary(getattr(operator, name), True))
        kind.__divmod__ = _divmod  # type: ignore[operator]
        for name in ("eq", "ne", "lt", "le", "gt", "ge"):
            setattr(kind, f"__{name}__", comparison(getattr(operator, name)))
        for name, function in (("neg", operator.neg), ("abs", abs), ("pos", operator.pos), ("ceil", math.ceil),
                               ("floor", math.floor), ("trunc", math.trunc), ("round", round)):
            setattr(kind, f"__{name}__", unary(function))


_install()
def plain(value: Any) -> Any:
    """Numbers in place of sizes, in nested arguments."""
    if isinstance(value, Number):
        return value.value
    if type(value) is torch.Size:
        return torch.Size(plain(item) for item in value)
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(plain(item) for item in value))
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if type(value) is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    return value
