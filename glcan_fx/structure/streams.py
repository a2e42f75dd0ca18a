"""Streams: several inputs, pieces or views of one, from which the same is computed (siamese, stereo, two streams).

They are told by value numbering: with the inputs taken for one value, two nodes are side by side where they do the same
kind of thing to values that are side by side. Such values are cut together, and blocks are found as if there were one
stream, the first.
"""

import operator
from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor, fx

from glcan_fx.capture.trace import Trace
from glcan_fx.structure.nodes import Groups, ancestors, is_size, makes_new
from glcan_fx.structure.order import draws_random


def streams(trace: Trace, data: Set[fx.Node]) -> Groups:
    """Of every value that others are side by side with all of them, in the order of the streams. None unless half of
    the layers compute such values, nor where these draw random numbers, which would be drawn in another order."""
    starts = _starts(trace, data)
    groups = _alike(trace, {node: index for index, node in enumerate(starts)}) if starts else []
    found = {node: group for group in groups for node in group}
    layers = found.keys() & trace.layers
    enough = layers and 2 * len(layers) >= len(trace.layers)
    return found if enough and not any(draws_random(trace, group[0]) for group in groups) else {}


def _starts(trace: Trace, data: Set[fx.Node]) -> list[fx.Node]:
    """Where streams begin, in the order in which they are read: what the first layer is called with, where it is called
    several times; else the data, or the pieces of the one input that is."""
    return _passes(trace, data) or _inputs(trace, data)


def _passes(trace: Trace, data: Set[fx.Node]) -> list[fx.Node]:
    """What an encoder is called with, several times, before any layer has computed it: two views of an image."""
    first = next((node for node in trace.graph.nodes if node in trace.layers and node.op == "call_module"), None)
    if first is None:
        return []
    calls = [node for node in trace.graph.nodes if node.op == "call_module" and node.target == first.target]
    given = list(dict.fromkeys(node.args[0] for node in calls if node.args and isinstance(node.args[0], fx.Node)))
    above = [ancestors([value]) for value in given]
    views = len(given) == len(calls) > 1 and all(
        not known.isdisjoint(data) and known.isdisjoint(trace.layers) for known in above)
    return given if views else []


def _inputs(trace: Trace, data: Set[fx.Node]) -> list[fx.Node]:
    found = [node for node in trace.placeholders if node in data]
    stack = found if len(found) == 1 else []
    while stack:  # through what makes a tuple of pieces
        users = [user for user in stack.pop().users if user.op != "output"]
        found = [user for user in users if user.target is operator.getitem]
        stack = [user for user in users if not isinstance(user.meta["value"], Tensor)] if len(found) < 2 else []
    if len(found) < 2 or not all(isinstance(node.meta["value"], Tensor) and node.users for node in found):
        return []
    return sorted(found, key=lambda node: min(node.users))


def _alike(trace: Trace, starts: Mapping[fx.Node, int]) -> list[tuple[fx.Node, ...]]:
    """The groups of nodes that are side by side, one of each stream."""
    numbers: dict[str, int] = {}
    number: dict[fx.Node, int] = {}
    origin: dict[fx.Node, frozenset[int]] = {}  # the streams that a node is computed from, sizes aside
    rows: dict[int, dict[int, list[fx.Node]]] = {}
    for node in trace.graph.nodes:
        if node in starts:
            what, origin[node] = "start", frozenset([starts[node]])
        else:
            what = _what(trace, node, number)
            sources = [] if is_size(node) or makes_new(node) else node.all_input_nodes
            origin[node] = frozenset().union(*(origin[source] for source in sources))
        number[node] = numbers.setdefault(what, len(numbers))
        if len(origin[node]) == 1:
            rows.setdefault(number[node], {}).setdefault(min(origin[node]), []).append(node)
    found: list[tuple[fx.Node, ...]] = []
    for row in rows.values():
        if len(row) == len(starts) and len({len(nodes) for nodes in row.values()}) == 1:
            found += zip(*(row[stream] for stream in sorted(row)), strict=True)
    return found


def _what(trace: Trace, node: fx.Node, number: Mapping[fx.Node, int]) -> str:
    """What a node does, in words that are the same for another one that does the same with other weights."""
    what: Any = str(node.target)
    if (module := trace.module(node)) is not None:
        what = type(module).__qualname__, [p.shape[0] for p in module.parameters() if p.dim()]
    elif node.op == "get_attr":
        value = node.meta["value"]
        what = tuple(value.shape[:1]) if isinstance(value, Tensor) else what
    args: Any = fx.map_arg((node.args, node.kwargs), lambda source: f"%{number[source]}")
    return f"{node.op} {what} {args}"
