"""Recorded calls of modules, and the functions that a recorded graph calls itself."""

import dataclasses
from collections.abc import Iterator, Set
from typing import Any

from torch import Tensor, fx

from glcan_fx.pytree import map_tensors


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module whose forward was recorded, so that a step may call the module as a whole instead.

    args, kwargs: as graph arguments; ``args`` is None where a graph cannot hold them. results: which part of what the
    call returned a node's value is, as steps of (function, key) from the whole. left: nodes whose values the call left
    on a module, by the path of the attribute. value: what it returned, on fake tensors.
    """

    path: str
    parent: "Call | None"
    args: tuple[Any, ...] | None = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[fx.Node, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    left: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    value: Any = None
    hooks: int = 0  # the first number that a hook registered in it may have

    def given(self) -> set[fx.Node]:
        """The nodes among its arguments."""
        found: set[fx.Node] = set()
        if self.args is not None:
            fx.map_arg((self.args, self.kwargs), found.add)
        return found

    def around(self) -> "Iterator[Call]":
        """The call itself, and those that it was made in, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


def arguments_in(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that recorded calls of modules were given."""
    calls = {call for node in graph.nodes if node.meta.get("call") for call in node.meta["call"].around()}
    return {node for call in calls for node in call.given()}


def erase_unused(graph: fx.Graph, keep: Set[fx.Node] = frozenset()) -> None:
    """Erase sizes, types and parameters that nothing reads, but for those in ``keep``."""
    for node in reversed(graph.nodes):
        if not node.users and node.meta.get("derived") and node not in keep:
            graph.erase_node(node)


def after_change(value: Any, change: Any) -> Any:
    """``value``, read after ``change`` has written to it in place."""
    return value


def assign(x: Tensor, key: Any, value: Any) -> Tensor:
    """``x[key] = value``; returns ``x``."""
    x[key] = value
    return x


def detached(value: Any) -> Any:
    """What was computed under ``torch.no_grad()``."""
    return map_tensors(value, Tensor.detach)


def left_on(module: Any, name: str, call: Any) -> Any:
    """What ``call`` has left on an attribute of a module."""
    return getattr(module, name)
