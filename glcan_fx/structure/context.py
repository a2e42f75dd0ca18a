"""Which inputs of a network are the data, and which are context: labels, masks, prompts, edges, sizes."""

from collections.abc import Set

import torch
from torch import Tensor, fx

from glcan_fx.capture.trace import Trace, is_float
from glcan_fx.pytree import tensors_in
from glcan_fx.structure.nodes import descendants

_FEW = 0.25  # of the layers: what is computed from context alone at most


def data_inputs(trace: Trace) -> list[frozenset[fx.Node]]:
    """Which inputs may be the data: those from which most layers are reached; where there are several, all together, or
    one of them. All others are context, which may join anywhere."""
    called = [node for node in trace.graph.nodes if node.op not in ("placeholder", "get_attr")]
    layers = [node for node in called if _is_layer(trace, node)]
    inputs = trace.graph.find_nodes(op="placeholder")
    reached = {}
    for source in inputs:
        behind = descendants(source, values=True)
        reached[source] = sum(node in behind for node in layers)
    most = max(reached.values(), default=0)
    data = [source for source in inputs if reached[source] == most]
    together = frozenset(data)
    if most == 0:
        return [together]
    joined = frozenset().union(*(_in_one_batch(trace, source, set(layers)) for source in data))
    if joined or len(data) == 1:
        return [together | joined]
    # a second network beside the first (siamese, two streams) is not context: auxiliary networks would copy it
    alone = [source for source in data if _is_float_input(source)
             and len(layers) - reached[source] <= _FEW * len(layers)]
    return [together, *(frozenset([source]) for source in alone)]


def carrying_data(trace: Trace, inputs: Set[fx.Node]) -> set[fx.Node]:
    """The nodes that are computed from some inputs, but for masks: truth values, and what is made of them alone. All of
    them where masks are all that reaches the output."""
    for masks in (False, True):
        found = set(inputs)
        for node in trace.graph.nodes:
            value = node.meta.get("value")
            mask = isinstance(value, Tensor) and value.dtype == torch.bool
            if (masks or not mask) and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        if trace.output in found:
            break
    return found


def _in_one_batch(trace: Trace, data: fx.Node, layers: set[fx.Node]) -> set[fx.Node]:
    """Other inputs of the same shape that are put into one batch with the data before its first layer: two images that
    one encoder reads."""
    origins: dict[fx.Node, set[fx.Node]] = {}
    joined: set[fx.Node] = set()
    batch = next((tensor.shape[0] for tensor in tensors_in(data.meta["value"]) if tensor.dim()), 0)
    for node in trace.graph.nodes:
        if node.op == "output":
            continue
        origins[node] = {node} if node.op == "placeholder" else set()
        if node not in layers:
            origins[node].update(*(origins[source] for source in node.all_input_nodes))
        sizes = [tensor.shape[0] for tensor in tensors_in(node.meta["value"]) if tensor.dim()]
        if data in origins[node] and len(origins[node]) > 1 and sizes and sizes[0] > batch:
            joined |= origins[node]
    return {source for source in joined - {data} if _shapes(source) == _shapes(data)}


def _shapes(node: fx.Node) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors_in(node.meta["value"])]


def _is_layer(trace: Trace, node: fx.Node) -> bool:
    """Whether a node computes with a weight."""
    used = (node, *(source for source in node.all_input_nodes if source.op == "get_attr"))
    return any(p.dim() >= 2 for part in used for p in trace.parameters(part))


def _is_float_input(node: fx.Node) -> bool:
    return any(map(is_float, tensors_in(node.meta["value"])))
