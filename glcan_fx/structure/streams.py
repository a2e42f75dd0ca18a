"""Streams: several inputs, or pieces of one, from which the same is computed (siamese, stereo, two streams).

They are told by value numbering: with the inputs taken for one value, two nodes are side by side where they do the same
kind of thing to values that are side by side. Such values are cut together, and blocks are found as if there were one
stream, the first.
"""

import operator
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx

from glcan_fx.capture.recorder import Seeded
from glcan_fx.capture.trace import Trace, is_float, quiet
from glcan_fx.pytree import map_tensors
from glcan_fx.structure.nodes import Groups, is_size, makes_new


def streams(trace: Trace, data: Set[fx.Node]) -> Groups:
    """Of every value that others are side by side with all of them, in the order of the streams. None unless half of
    the layers compute such values, nor where these draw random numbers, which would be drawn in another order."""
    starts = _starts(trace, data)
    groups = _alike(trace, {node: index for index, node in enumerate(starts)}) if starts else []
    found = {node: group for group in groups for node in group}
    layers = found.keys() & trace.layers
    enough = layers and 2 * len(layers) >= len(trace.layers)
    return found if enough and not any(_draws(trace, group[0]) for group in groups) else {}


def _starts(trace: Trace, data: Set[fx.Node]) -> list[fx.Node]:
    """Where streams begin, in the order in which they are read: the data, or the pieces of the one input that is."""
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


def _draws(trace: Trace, node: fx.Node) -> bool:
    """Whether a node draws random numbers, as opaque modules may."""
    if node.op in ("placeholder", "get_attr", "output") or is_size(node) or not is_float(node.meta["value"]):
        return False
    if any(opaque.path == node.target for opaque in trace.report.opaque):
        return True
    seeded = Seeded()
    with quiet(), trace.mode, torch.no_grad(), seeded:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: map_tensors(source.meta["value"], Tensor.clone))
        if node.op == "call_method":
            getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            function: Any = trace.module(node) or node.target
            function(*args, **kwargs)
    return seeded.found
