"""The chain: the values through which every path from the inputs to the output passes (dominators).

A region between two neighbors of the chain that hides most of the network (the body under a long skip, the encoder of
a U-Net, everything behind the first tap of a feature pyramid) is opened by ignoring its bypass edges.
"""

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import networkx as nx
from torch import Tensor, fx

from glcan_fx.capture.trace import Trace, is_float, within
from glcan_fx.errors import PlanError
from glcan_fx.pytree import tensors_in
from glcan_fx.structure.nodes import Groups, ancestors, common_path, input_dependent, makes_new, tensor_of

START: Any = "start"  # a virtual node before all inputs
GROWS = 1.5  # fewer positions than this factor more are padding or an extra token, not up-sampling

Edge = tuple[fx.Node, fx.Node]
Weight = Callable[[fx.Node], float]


@dataclass(frozen=True)
class Region:
    """The nodes between two neighbors of a chain, both excluded."""

    start: fx.Node
    end: fx.Node
    nodes: set[fx.Node]


@dataclass
class Flow:
    """The edges along which gradients flow from the inputs to the output.

    positions: the number of spatial positions (or tokens) of every floating-point tensor. weight: of a node, by which
    one of several paths is taken for the network, the others for bypasses. bypassed: the nodes that removed bypass
    edges led to. groups: values that are side by side, of which the graph has the first alone.
    """

    trace: Trace
    graph: nx.DiGraph
    positions: dict[fx.Node, int]
    weight: Weight
    bypassed: set[fx.Node]
    groups: Groups

    def above(self, node: fx.Node, known: Set[fx.Node] = frozenset()) -> set[fx.Node]:
        """What a value, and those that are side by side with it, are computed from, but for what is ``known``."""
        return ancestors([node], known, self.groups)

    def open_chain(self) -> list[fx.Node]:
        """The chain from the inputs to the output, once the bypasses around hidden networks are removed from the graph.
        """
        while True:
            chain = dominators(self.graph, self.trace.output)
            bypasses = self._next_bypasses(chain)
            if not bypasses:
                return chain
            self.graph.remove_edges_from(bypasses)
            self.bypassed.update(target for _, target in bypasses)

    def _next_bypasses(self, chain: list[fx.Node]) -> list[Edge]:
        """The bypasses of the first region in the trunk that hides the network."""
        for start, end in pairwise(chain):
            region = self.region(start, end)
            hides = region.nodes and self._hides_network(region)
            bypasses = _bypasses(self.graph, region, self.weight) if hides else []
            if bypasses or self.grows_between(start, end):
                return bypasses
        return []

    def region(self, start: fx.Node, end: fx.Node) -> Region:
        """What lies between two neighbors of the chain."""
        return Region(start, end, between(self.graph, start, end))

    def grows_between(self, start: fx.Node, end: fx.Node) -> bool:
        """Whether the resolution grows from one value of the chain to the next, or the network ends."""
        if end not in self.positions or start not in self.positions:
            return _is_exit(end)
        before, after = tensor_of(start).shape, tensor_of(end).shape
        moved = sorted(before) == sorted(after)  # axes, whose meaning was mistaken
        grows = len(before) == len(after) and not moved and self.positions[end] >= GROWS * self.positions[start]
        # the input itself may be padded with its mirror image, or enlarged
        return grows and end in self._computed and not self._given_back(end)

    @cached_property
    def _computed(self) -> frozenset[fx.Node]:
        """Nodes that are computed by layers."""
        found = set(self.trace.layers)
        for node in self.trace.graph.nodes:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return frozenset(found)

    def _given_back(self, end: fx.Node) -> bool:
        """Whether a block, less than half of the network, only restores at ``end`` the resolution that it was given."""
        layers = self.trace.layers
        for call in end.meta["call"].around() if "call" in end.meta else ():
            if not call.path or 2 * sum(within(node.meta["module"], call.path) for node in layers) >= len(layers):
                return False
            rank = tensor_of(end).dim()  # a neck is given tokens, and gives back maps
            given = [self.positions[node] for node in call.given()
                     if node in self.positions and tensor_of(node).dim() == rank]
            if given and self.positions[end] < GROWS * min(given):
                return True
        return False

    def pools_away(self, node: fx.Node) -> bool:
        """Whether the positions are gone at ``node`` for good: neither it nor what follows has any."""
        if self.positions.get(node, 1) > 1 or node.op == "placeholder":
            return False
        return all(self.positions.get(after, 1) <= 1 for after in nx.descendants(self.graph, node))

    def _hides_network(self, region: Region) -> bool:
        """Whether a region is more than one block: it ends in several outputs, is an hourglass, or holds other blocks.
        """
        if _is_exit(region.end):
            return True
        if self._is_hourglass(region) and (self.bypassed and not _is_gate(region) or self._holds_half(region)):
            return True
        return self._holds_most_layers(region) or self._holds_repeated_blocks(region)

    def _is_hourglass(self, region: Region) -> bool:
        """Whether the resolution shrinks inside a region, and grows again."""
        rank = tensor_of(region.start).dim()  # values of another rank are attention's heads and the like
        inside = [self.positions[n] for n in region.nodes if n in self.positions and tensor_of(n).dim() == rank]
        outside = min(self.positions.get(region.start, 1), self.positions.get(region.end, 1))
        # one position alone is a gate of channels, or an average beside other branches
        shrinks = any(1 < count < outside / GROWS for count in inside)
        return shrinks and self._grows_inside(region) and not self._passes_vectors(region)

    def _passes_vectors(self, region: Region) -> bool:
        """Whether all that is computed inside a region passes a value without positions: where to look (a spatial
        transformer), or with which weights, is no network around which a bypass leads."""
        graph = _inside(self.graph, region).copy()
        graph.remove_nodes_from([node for node in region.nodes if self.positions.get(node) == 1])
        graph.remove_edges_from([edge for edge in [(region.start, region.end)] if graph.has_edge(*edge)])
        return not nx.has_path(graph, region.start, region.end)

    def _grows_inside(self, region: Region) -> bool:
        """Whether the resolution grows inside a region. Attention to fewer tokens has its positions from the queries.
        """
        rank, found = tensor_of(region.start).dim(), {region.start: self.positions.get(region.start, 1)}
        for node in nx.topological_sort(self.graph.subgraph(region.nodes | {region.end})):
            above = max(found.get(source, 1) for source in self.graph.predecessors(node))
            same_rank = node in self.positions and tensor_of(node).dim() == rank
            if same_rank and self.positions[node] >= GROWS * above:
                return True
            found[node] = self.positions[node] if same_rank else above
        return False

    def _holds_half(self, region: Region) -> bool:
        """Whether the module that closes a region holds half of the layers, so that it is the network and no block."""
        home = common_path([*region.nodes, region.end])
        layers = self.trace.layers
        return not home or 2 * sum(within(node.meta["module"], home) for node in layers) >= len(layers)

    def _holds_most_layers(self, region: Region) -> bool:
        """Whether the model itself, not one of its blocks, closes a branch around most of its layers."""
        layers = self.trace.layers
        inside = len(region.nodes & layers)
        closes = region.end.meta["module"]
        outermost = not closes or within(common_path(layers), closes)
        return outermost and inside > 2 and 2 * inside > len(layers)

    def _holds_repeated_blocks(self, region: Region) -> bool:
        """Whether two or more blocks of one kind, each with branches of its own, lie inside the region."""
        bypasses = _bypasses(self.graph, region, self.weight)
        if not bypasses:
            return False
        inner = _without(_inside(self.graph, region), bypasses, region.start)
        own = common_path([*region.nodes, region.end])
        kinds: dict[type, set[str]] = {}
        for start, end in pairwise(dominators(inner, region.end)):
            inside = between(inner, start, end)
            path = common_path([*inside, end])
            if inside and start is not region.start and path != own:
                kinds.setdefault(type(self.trace.shadow.get_submodule(path)), set()).add(path)
        return any(len(paths) > 1 for paths in kinds.values())


def elements(node: fx.Node) -> float:
    """How many elements a node's value has, and one for the node itself."""
    return 1 + sum(tensor.numel() for tensor in tensors_in(node.meta.get("value")))


def dataflow(
    trace: Trace, positions: dict[fx.Node, int], data: Set[fx.Node], weight: Weight, carrying: Set[fx.Node],
    groups: Groups, ignored: Set[Edge] = frozenset(),
) -> Flow:
    """Edges along which gradients flow from the data to the outputs; sizes, masks and context carry none.

    positions: of every floating-point tensor; data: the inputs that are not context, carrying: what is computed of
    them; weight, groups: see ``Flow``; ignored: edges that are left out.

    Raises PlanError where no output depends on a floating-point input.
    """
    graph = _gradients(trace, data, carrying, groups, ignored)
    if trace.output not in graph:
        raise PlanError(
            "no output depends on a floating-point input: there is nothing to cut. Pass example_inputs= with the "
            "tensors that the model is trained on."
        )
    return Flow(trace, graph, positions, weight, set(), groups)


def _gradients(
    trace: Trace, data: Set[fx.Node], carrying: Set[fx.Node], groups: Groups, ignored: Set[Edge]
) -> nx.DiGraph:
    def first(node: fx.Node) -> fx.Node:
        return groups.get(node, (node,))[0]

    graph = nx.DiGraph()
    dependent = input_dependent(trace.graph)
    integers: set[fx.Node] = set()  # integer inputs (pixels in uint8, tokens) until they become floating-point numbers
    for node in trace.graph.nodes:
        if node.op == "placeholder" and node not in data:
            continue
        starts = node.op == "placeholder" or any(source in integers for source in _sources(node))
        carries = node.op == "output" or (node in dependent and is_float(node.meta["value"]))
        if not carries:
            if starts and _holds_tensor(node) and node in carrying:
                integers.add(node)
            continue
        if starts and node.op != "output":
            graph.add_edge(START, first(node))
        graph.add_edges_from((first(source), first(node)) for source in _sources(node)
                             if first(source) in graph and (source, node) not in ignored)
    return graph


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a node reads, but for what it reads the shape or type of alone (``x.reshape_as(y)``, ``zeros_like(x)``)."""
    if makes_new(node):
        return []
    alike = node.op == "call_method" and str(node.target).endswith("_as") and isinstance(node.args[0], fx.Node)
    return [node.args[0]] if alike else node.all_input_nodes  # type: ignore[list-item]


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("value")
    return any(True for _ in tensors_in(value)) if node.op == "placeholder" else isinstance(value, Tensor)


def dominators(graph: nx.DiGraph, end: fx.Node) -> list[fx.Node]:
    """Values through which every path from the inputs to ``end`` passes, in order, inputs first."""
    above = nx.immediate_dominators(graph, START)
    chain = [end]
    while above[chain[-1]] is not START:
        chain.append(above[chain[-1]])
    return chain[::-1]


def between(graph: nx.DiGraph, start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on the paths from ``start`` to ``end``, both excluded; not those that a removed bypass led to."""
    return _reached(graph.successors, start, end) & _reached(graph.predecessors, end, start)


def _reached(step: Callable[[fx.Node], Iterator[fx.Node]], start: fx.Node, stop: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [start]
    while stack:
        for node in step(stack.pop()):
            if node is not stop and node not in found:
                found.add(node)
                stack.append(node)
    return found


def _inside(graph: nx.DiGraph, region: Region) -> nx.DiGraph:
    return graph.subgraph(region.nodes | {region.start, region.end})


def _is_gate(region: Region) -> bool:
    """Whether a region's start is multiplied with what is made of it (spatial attention)."""
    end = region.end
    return region.start in end.all_input_nodes and getattr(end.target, "__name__", end.target) in ("mul", "imul")


def _is_exit(node: fx.Node) -> bool:
    """The end of the network, or a class that is made for it."""
    return node.op == "output" or (isinstance(node.target, type) and all(user.op == "output" for user in node.users))


def _bypasses(graph: nx.DiGraph, region: Region, weight: Weight) -> list[Edge]:
    """The fewest edges out of a region's start without which its heaviest path gets a chain of its own."""
    start, end = region.start, region.end
    inner = _inside(graph, region)
    branches = {target: nx.descendants(inner, target) | {target} for target in inner.successors(start)}
    kept: dict[frozenset[fx.Node], None] = {}
    for node in _heaviest_path(inner, start, weight):
        kept[frozenset(target for target, reach in branches.items() if node in reach)] = None
    for keep in sorted(kept, key=len, reverse=True):
        bypasses = [(start, target) for target in branches if target not in keep]
        if bypasses and len(dominators(_without(inner, bypasses, start), end)) > 2:
            return bypasses
    return []


def _heaviest_path(graph: nx.DiGraph, start: fx.Node, weight: Weight) -> Iterable[fx.Node]:
    """The nodes behind ``start`` on the path with the largest sum of weights."""
    total: dict[fx.Node | None, float] = {None: 0}
    after: dict[fx.Node, fx.Node | None] = {}
    for node in reversed(list(nx.topological_sort(graph))):
        after[node] = max(graph.successors(node), key=total.__getitem__, default=None)
        total[node] = weight(node) + total[after[node]]
    node = after[start]
    while node is not None:
        yield node
        node = after[node]


def _without(graph: nx.DiGraph, edges: list[Edge], start: fx.Node) -> nx.DiGraph:
    graph = graph.copy()
    graph.remove_edges_from(edges)
    graph.add_edge(START, start)
    return graph
