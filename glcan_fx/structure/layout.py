"""Which axis of a value holds the channels."""

import math
import operator
from collections.abc import Sequence

from torch import fx, nn

from glcan_fx.capture.trace import Trace
from glcan_fx.layers import channel_axis
from glcan_fx.structure.nodes import is_float_tensor, tensor_of


def channels_last(trace: Trace) -> frozenset[fx.Node]:
    """Values whose channels are the last axis: made or read by layers that act on the last axis."""
    last: dict[fx.Node, bool] = {}
    nodes = [n for n in trace.graph.nodes if is_float_tensor(n)]

    def evidence(node: fx.Node, value: fx.Node) -> bool | None:
        module = trace.module(node)
        if isinstance(module, nn.Linear | nn.MultiheadAttention):
            return True
        if isinstance(module, nn.LayerNorm):
            return channel_axis(module, tensor_of(node)) == -1
        if module is None:
            return None
        weights = [p for p in module.parameters() if p.dim() >= 2]
        if any(p.dim() >= 3 for p in weights) and not any(True for _ in module.children()):
            return False
        # matrices alone, and one of the size of the last axis: a recurrent layer, or a transformer's block
        last_axis = tensor_of(value).shape[-1] if tensor_of(value).dim() > 2 else 0
        matrices = bool(weights) and all(p.dim() == 2 for p in weights)
        return True if matrices and any(last_axis in p.shape for p in weights) else None

    for node in trace.graph.nodes:
        made = node if is_float_tensor(node) else next(  # of several results, the first
            (user for user in node.users if user.target is operator.getitem and is_float_tensor(user)), None)
        own = None if made is None else evidence(node, made)
        if made is not None and own is not None:
            last[made] = own
            for source in node.all_input_nodes:
                if is_float_tensor(source):
                    last[source] = own
    for order in (nodes, reversed(nodes)):  # nearly the same shape, same layout: forwards, then backwards
        for node in order:
            for source in node.all_input_nodes:
                if is_float_tensor(source) and _alike(tensor_of(source).shape, tensor_of(node).shape):
                    if source in last:
                        last.setdefault(node, last[source])
                    elif node in last:
                        last[source] = last[node]
    return frozenset(node for node, value in last.items() if value)


def _alike(a: Sequence[int], b: Sequence[int]) -> bool:
    """Same shape, or but for one size (an extra token), or with positions swapped, or in a row (tokens of a map), some
    of them in the batch (windows)."""
    if len(a) != len(b):
        return min(len(a), len(b)) > 1 and (a[-1], math.prod(a)) == (b[-1], math.prod(b))
    return sum(x != y for x, y in zip(a, b, strict=True)) <= 1 or (sorted(a) == sorted(b) and a[-1] == b[-1])


def count_positions(shape: tuple[int, ...], last: bool, batch: int = 0) -> int:
    """The product of the spatial (or token) sizes; 1 where there are none. last: whether channels are the last axis;
    batch: of the inputs, to count, of windows or frames in the batch, those of one image."""
    folded = shape[0] // batch if batch and shape and shape[0] % batch == 0 else 1
    return max(1, folded) * math.prod(shape[1:-1] if last else shape[2:])
