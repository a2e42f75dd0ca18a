"""Pass 2, analyze: find the trunk, its units, where it can be cut, and what the tail reads from it.

Only the graph decides; no architecture is known by name. The idea (compare the dominator trees of a control-flow
graph): the values through which every path from the input to the output passes form a chain. A region between two
neighbours of the chain that hides most of the network (the body under a long skip, the encoder of a U-Net, everything
behind the first tap of a feature pyramid) is opened by ignoring its bypass edges. The trunk ends where the resolution
first grows, where the positions are pooled away, or where a bypass comes back for the last time.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

import networkx as nx
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from glcan_fx.capture.recorder import Call
from glcan_fx.capture.trace import Trace, is_float, within
from glcan_fx.errors import PlanError
from glcan_fx.layers import channel_axis, predictors
from glcan_fx.pytree import tensors_in

_START: Any = "start"  # a virtual node before all inputs
_FEW = 0.25  # of the layers: what is computed from context alone at most
_GROWS = 1.5  # fewer positions than this factor more are padding or an extra token, not up-sampling


@dataclass(frozen=True)
class Unit:
    """A block of the trunk: the smallest part that may become a local module.

    ``end`` is its output, ``name`` that value in the user's own module path, ``aliases`` other paths that
    return the same value.
    """

    end: fx.Node
    name: str
    aliases: tuple[str, ...]


@dataclass(frozen=True)
class Tap:
    """A value of the trunk (or an input of the network) that the tail reads."""

    node: fx.Node
    name: str


class Used(NamedTuple):
    """What a local module uses: the number of its parameters, those of earlier modules not counted again; bytes that it
    keeps for backward; bytes of its parameters' gradients."""

    parameters: int
    saved: int
    gradients: int


@dataclass(frozen=True)
class Structure:
    """Where one can cut. ``chain`` is the trunk's chain of values from the input on; ``units`` partition it; ``data``
    are the inputs that it begins with, all others are context."""

    trace: Trace
    chain: list[fx.Node]
    units: list[Unit]
    taps: list[Tap]
    channels_last: frozenset[fx.Node]
    data: frozenset[fx.Node]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(tensor_of(node).shape)

    def channels(self, node: fx.Node) -> int:
        shape = self.shape(node)
        return shape[-1 if node in self.channels_last or len(shape) < 3 else 1] if len(shape) > 1 else 1

    def positions(self, node: fx.Node) -> int:
        """Number of places per image: the product of the spatial (or token) sizes; 1 where there are none."""
        return _positions(self.shape(node), node in self.channels_last)

    def stride(self, node: fx.Node) -> int:
        """Input size over this value's size along the last spatial axis; 0 where the value has no places."""
        source, value = self.spatial(self.chain[0]), self.spatial(node)
        return round(source[-1] / value[-1]) if source and len(value) == len(source) else 0

    def spatial(self, node: fx.Node) -> tuple[int, ...]:
        shape = self.shape(node)
        return shape[1:-1] if node in self.channels_last else shape[2:]

    @cached_property
    def trunk(self) -> frozenset[fx.Node]:
        """Nodes that the trunk's last value is computed from."""
        return frozenset(ancestors([self.chain[-1]]))

    @cached_property
    def dependent(self) -> frozenset[fx.Node]:
        """Nodes that are computed from the inputs, or change a buffer."""
        return frozenset(input_dependent(self.trace.graph))

    def uses(self, cuts: Sequence[fx.Node]) -> list["Used"]:
        """Of each local module."""
        key = tuple(cuts)
        if key not in self._used:
            found = [[0, 0, 0] for _ in range(len(cuts) + 1)]
            owner = self.assign(cuts)
            seen: set[int] = set()
            for node in sorted(owner, key=owner.__getitem__):
                new = {id(p): p for p in self.trace.parameters(node) if id(p) not in seen}
                seen |= new.keys()
                found[owner[node]][0] += sum(p.numel() for p in new.values())
                found[owner[node]][1] += node.meta["saved"]
                found[owner[node]][2] += sum(p.numel() * p.element_size() for p in new.values() if p.requires_grad)
            self._used[key] = [Used(*numbers) for numbers in found]
        return self._used[key]

    @cached_property
    def _used(self) -> dict[tuple[fx.Node, ...], list["Used"]]:
        return {}

    @cached_property
    def interface(self) -> frozenset[nn.Module]:
        """The layers that make the network's outputs."""
        return frozenset(predictors(self.trace.shadow, self.trace.output.meta["value"]))

    @cached_property
    def context(self) -> frozenset[fx.Node]:
        """Nodes that are computed from inputs that are not the data (labels, masks, prompts), and from nothing else."""
        data = {*self.data}
        for node in self.trace.graph.nodes:
            if any(source in data for source in node.all_input_nodes):
                data.add(node)
        return self.dependent - data

    @cached_property
    def _sizes(self) -> list[fx.Node]:
        return [node for node in self.trace.graph.nodes if node.all_input_nodes and is_size(node)]

    def known_by(self, cut: fx.Node) -> set[fx.Node]:
        """What a value of the trunk is computed from, and the sizes of that."""
        return self._with_sizes(ancestors([cut]), cut)

    def _with_sizes(self, known: set[fx.Node], cut: fx.Node) -> set[fx.Node]:
        for node in self._sizes:
            if all(source in known and source is not cut for source in node.all_input_nodes):
                known.add(node)
        return known

    def assign(self, cuts: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """Which local module each node of the graph belongs to: the first whose cut it is needed for. Sizes belong to
        what they are of, so that it need not be kept."""
        key = tuple(cuts)
        if key not in self._assigned:
            owner: dict[fx.Node, int] = {}
            known: set[fx.Node] = set()
            divided = self._divided(cuts)
            for index, cut in enumerate(cuts):
                known = self._with_sizes(self._with_calls(known, ancestors([cut], known), divided), cut)
                for node in known - owner.keys():
                    owner[node] = index
            needed = ancestors([self.trace.output])
            for node in self.trace.graph.nodes:
                if node.op != "output" and node not in owner:
                    sources = [owner[source] for source in node.all_input_nodes]
                    # what nobody reads happens as early as it can, in the model's order (it may draw random numbers)
                    owner[node] = len(cuts) if node in needed else max(sources, default=0)
            self._assigned[key] = owner
        return self._assigned[key]

    def _divided(self, cuts: Sequence[fx.Node]) -> set[Call]:
        """The calls of modules that go on behind one of the cuts with layers that have parameters."""
        found: set[Call] = set()
        for cut in cuts:
            calls = [call for call in cut.meta["call"].around() if call.path not in cut.meta["returned_by"]] if (
                cut.meta.get("call")) else []
            if calls:
                behind = {node for node in _behind(cut) if node in self._weighted}
                found |= {call for call in calls if not behind.isdisjoint(self.trace.inside[call])}
        return found

    @cached_property
    def _weighted(self) -> frozenset[fx.Node]:
        """Nodes that compute with parameters, frozen ones included."""
        return frozenset(node for node in self.trace.graph.nodes if node in self.dependent and any(
            self.trace.parameters(used) for used in (node, *(s for s in node.all_input_nodes if s.op == "get_attr"))))

    def _with_calls(self, known: set[fx.Node], new: set[fx.Node], divided: Set[Call]) -> set[fx.Node]:
        """What is known and new, with the rest of the calls that the new nodes lie in: a module's call belongs to one
        local module as a whole. But for divided ones, and those whose rest has parameters, which this local module's
        loss would not train."""
        known = known | new
        stack, seen = list(new), set[Call]()
        while stack:
            node = stack.pop()
            if node not in self.dependent or node.meta.get("derived") or not node.meta.get("call"):
                continue
            for call in node.meta["call"].around():
                if call in divided or call in seen or call.args is None or call.parent is None:
                    continue
                seen.add(call)
                more = ancestors((self.trace.inside[call] | call.given()) - known, known)
                if any(p.requires_grad for missing in more for p in self.trace.parameters(missing)):
                    continue
                known |= more
                stack += more
        return known

    @cached_property
    def _assigned(self) -> dict[tuple[fx.Node, ...], dict[fx.Node, int]]:
        return {}


def analyze(trace: Trace) -> Structure:
    """Find the structure of a traced network. Raises PlanError where there is no differentiable path."""
    layouts = _channels_last(trace)
    found = [_structure(trace, data, layouts) for data in _data_inputs(trace)]
    return max(found, key=lambda structure: len(structure.units))


def _structure(trace: Trace, data: frozenset[fx.Node], layouts: frozenset[fx.Node]) -> Structure:
    """The structure with these inputs as the data."""
    graph = _dataflow(trace, data)
    positions = {n: _positions(tuple(tensor_of(n).shape), n in layouts) for n in trace.graph.nodes if _is_tensor(n)}
    graph, chain, bypassed = _chain(trace, graph, positions)
    chain = _until_tail(trace, graph, chain, bypassed, positions)
    units = _units(trace, graph, chain)
    chain = chain[: chain.index(units[-1].end) + 1] if units else chain
    structure = Structure(trace, chain, units, [], layouts, data)
    return replace(structure, taps=_taps(trace, structure.trunk - structure.context, [unit.end for unit in units]))


# ---------------------------------------------------------------------------------------------- values


def tensor_of(node: fx.Node) -> Tensor:
    """The first floating-point tensor that a node produced."""
    return next(leaf for leaf in tree_leaves(node.meta["value"]) if isinstance(leaf, Tensor))


def _is_tensor(node: fx.Node) -> bool:
    return node.op != "output" and isinstance(node.meta.get("value"), Tensor) and is_float(node.meta["value"])


def ancestors(nodes: Iterable[fx.Node], known: Set[fx.Node] = frozenset()) -> set[fx.Node]:
    """The nodes themselves and all that they are computed from, but for those ``known`` with all of theirs."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node not in known:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _behind(node: fx.Node, *, values: bool = False) -> set[fx.Node]:
    """What is computed from a value; values: and not from its sizes alone."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in found and not (values and is_size(user)):
                found.add(user)
                stack.append(user)
    return found


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a number, or some, from the sizes of a value."""
    tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta.get("value")))
    return node.op == "call_function" and not tensors and not node.meta["mutates"]


def input_dependent(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that a step computes once: those that depend on the inputs, draw random numbers, or change a buffer."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        depends = node.op == "placeholder" or any(source in found for source in node.all_input_nodes)
        if depends or node.meta.get("mutates") or node.meta.get("random"):
            found.add(node)
    return found


def _data_inputs(trace: Trace) -> list[frozenset[fx.Node]]:
    """Which inputs may be the data: those from which most layers are reached; where there are several, all together,
    or one of them. All others are context (labels, masks, prompts, edges), which may join anywhere."""
    def is_layer(node: fx.Node) -> bool:
        used = (node, *(source for source in node.all_input_nodes if source.op == "get_attr"))
        return any(p.dim() >= 2 for part in used for p in trace.parameters(part))

    layers = [node for node in trace.graph.nodes if node.op not in ("placeholder", "get_attr") and is_layer(node)]
    inputs = trace.graph.find_nodes(op="placeholder")
    reached = {}
    for source in inputs:
        behind = _behind(source, values=True)
        reached[source] = sum(node in behind for node in layers)
    most = max(reached.values(), default=0)
    data = [source for source in inputs if reached[source] == most]
    floating = [source for source in data if any(map(is_float, tensors_in(source.meta["value"])))]
    all_together = frozenset(data)
    if most == 0 or len(data) == 1:
        return [all_together]
    # a second network beside the first (siamese, two streams) is no context: auxiliary networks would copy it
    few = [source for source in floating if len(layers) - reached[source] <= _FEW * len(layers)]
    return [all_together, *(frozenset([source]) for source in few)]


def _dataflow(trace: Trace, data: frozenset[fx.Node]) -> nx.DiGraph:
    """Edges along which gradients flow from the data to the outputs; sizes, masks and context carry none."""
    graph = nx.DiGraph()
    dependent = input_dependent(trace.graph)
    whole: set[fx.Node] = set()  # integer inputs (pixels in uint8, tokens) until they become floating-point numbers
    for node in trace.graph.nodes:
        if node.op == "placeholder" and node not in data:
            continue
        tensors = any(True for _ in tensors_in(node.meta.get("value"))) if node.op == "placeholder" else isinstance(
            node.meta.get("value"), Tensor)
        starts = node.op == "placeholder" or any(source in whole for source in node.all_input_nodes)
        carries = node.op == "output" or (node in dependent and is_float(node.meta["value"]))
        if not carries:
            if starts and tensors:
                whole.add(node)
            continue
        if starts and node.op != "output":
            graph.add_edge(_START, node)
        for source in node.all_input_nodes:
            if source in graph:
                graph.add_edge(source, node)
    if trace.output not in graph:
        raise PlanError(
            "no output depends on a floating-point input: there is nothing to cut. Pass example_inputs= with the "
            "tensors that the model is trained on."
        )
    return graph


def _channels_last(trace: Trace) -> frozenset[fx.Node]:
    """Values whose channels are the last axis: made or read by layers that act on the last axis."""
    last: dict[fx.Node, bool] = {}
    nodes = [n for n in trace.graph.nodes if _is_tensor(n)]

    def evidence(node: fx.Node) -> bool | None:
        module = trace.module(node)
        if isinstance(module, nn.Linear | nn.MultiheadAttention):
            return True
        if isinstance(module, nn.LayerNorm):
            return channel_axis(module, tensor_of(node)) == -1
        opaque = module is not None and any(True for _ in module.children())
        if module is not None and not opaque and any(p.dim() >= 3 for p in module.parameters()):
            return False
        return None

    for node in nodes:
        own = evidence(node)
        if own is not None:
            last[node] = own
            for source in node.all_input_nodes:
                if _is_tensor(source):
                    last[source] = own
    for order in (nodes, reversed(nodes)):  # nearly the same shape, same layout: forwards, then backwards
        for node in order:
            for source in node.all_input_nodes:
                if _is_tensor(source) and _alike(tensor_of(source).shape, tensor_of(node).shape):
                    if source in last:
                        last.setdefault(node, last[source])
                    elif node in last:
                        last[source] = last[node]
    return frozenset(node for node, value in last.items() if value)


def _alike(a: Sequence[int], b: Sequence[int]) -> bool:
    """Same shape, or but for one size (an extra token), or with places swapped, or in a row (tokens of a map)."""
    if len(a) != len(b):
        return min(len(a), len(b)) > 2 and (a[0], a[-1], math.prod(a)) == (b[0], b[-1], math.prod(b))
    return sum(x != y for x, y in zip(a, b, strict=True)) <= 1 or (sorted(a) == sorted(b) and a[-1] == b[-1])


def _positions(shape: tuple[int, ...], channels_last: bool) -> int:
    return math.prod(shape[1:-1] if channels_last else shape[2:])


def multiply_adds(structure: Structure, nodes: Iterable[fx.Node] | None = None) -> float:
    """Of one forward pass at the example's size, or some of its nodes: from the layers' weights and the places that
    they are applied to (a transposed convolution's are its input's)."""
    total = 0.0
    for node in structure.trace.graph.nodes if nodes is None else nodes:
        for tensor in list(tensors_in(node.meta.get("value")))[:1]:
            weights = sum(p.numel() for p in structure.trace.parameters(node) if p.dim() > 1)
            at = node.all_input_nodes[0] if weights and _is_transposed(structure.trace, node) else node
            places = structure.positions(at) if isinstance(at.meta["value"], Tensor) else 1
            total += weights * places * (tensor.shape[0] if tensor.dim() else 1)
    return total


def _is_transposed(trace: Trace, node: fx.Node) -> bool:
    called = getattr(node.target, "__name__", "")
    return "conv_transpose" in called or bool(getattr(trace.module(node), "transposed", False))


# ---------------------------------------------------------------------------------------------- the chain


def _chain(
    trace: Trace, graph: nx.DiGraph, positions: dict[fx.Node, int]
) -> tuple[nx.DiGraph, list[fx.Node], set[fx.Node]]:
    """Chain of values from input to output after opening the regions that hide the network.

    Returns the graph without the bypass edges, the chain, and the nodes that the bypass edges led to.
    """
    graph = graph.copy()
    bypassed: set[fx.Node] = set()
    while True:
        chain = _dominators(graph, trace.output)
        for start, end in pairwise(chain):
            region = _between(graph, start, end)
            if region and _hides_network(trace, graph, start, end, region, positions, bool(bypassed)):
                bypasses = _bypasses(graph, start, end, region)
                if bypasses:
                    graph.remove_edges_from(bypasses)
                    bypassed.update(target for _, target in bypasses)
                    break
            if _leaves_trunk(start, end, positions, graph):
                return graph, chain, bypassed
        else:
            return graph, chain, bypassed


def _dominators(graph: nx.DiGraph, end: fx.Node) -> list[fx.Node]:
    """Values through which every path from the inputs to ``end`` passes, in order, inputs first."""
    above = nx.immediate_dominators(graph, _START)
    chain = [end]
    while above[chain[-1]] is not _START:
        chain.append(above[chain[-1]])
    return chain[::-1]


def _between(graph: nx.DiGraph, start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on the paths between two neighbours of the chain, both excluded."""
    return _reach(graph, start, end, forward=True) & _reach(graph, end, start, forward=False)


def _reach(graph: nx.DiGraph, start: fx.Node, stop: fx.Node, *, forward: bool) -> set[fx.Node]:
    step = graph.successors if forward else graph.predecessors
    found: set[fx.Node] = set()
    stack = [start]
    while stack:
        for node in step(stack.pop()):
            if node not in found and node is not stop:
                found.add(node)
                stack.append(node)
    return found


def _hides_network(
    trace: Trace, graph: nx.DiGraph, start: fx.Node, end: fx.Node, region: set[fx.Node],
    positions: dict[fx.Node, int], opened: bool,
) -> bool:
    """Whether a region is more than one block: it ends in several outputs, is an hourglass, or holds other blocks."""
    if _is_exit(end):
        return True
    rank = tensor_of(start).dim()  # of another rank are attention's heads and the like
    places = [positions[node] for node in region if node in positions and tensor_of(node).dim() == rank]
    outside = min(positions.get(start, 1), positions.get(end, 1))
    narrows = places and 1 < min(places) < outside / _GROWS and _grows(graph, start, end, region, positions)
    if narrows and (opened or _holds_half(trace, region, end)):
        return True
    return _holds_most_layers(trace, start, end, region) or _holds_repeated_blocks(trace, graph, start, end, region)


def _grows(
    graph: nx.DiGraph, start: fx.Node, end: fx.Node, region: set[fx.Node], positions: dict[fx.Node, int]
) -> bool:
    """Whether places come back inside a region. Attention to fewer tokens has its places from the queries."""
    rank, found = tensor_of(start).dim(), {start: positions.get(start, 1)}
    for node in nx.topological_sort(graph.subgraph(region | {end})):
        above = max(found.get(source, 1) for source in graph.predecessors(node))
        same = node in positions and tensor_of(node).dim() == rank
        if same and positions[node] >= _GROWS * above:
            return True
        found[node] = positions[node] if same else above
    return False


def _is_exit(node: fx.Node) -> bool:
    """The end of the network, or a class that is made for it."""
    return node.op == "output" or (isinstance(node.target, type) and all(user.op == "output" for user in node.users))


def _holds_half(trace: Trace, region: set[fx.Node], end: fx.Node) -> bool:
    """Whether the module that closes a region holds half of the layers, so that it is the network and no block."""
    home = common_path([*region, end])
    layers = trace.layers
    return not home or 2 * sum(within(node.meta["module"], home) for node in layers) >= len(layers)


def _holds_most_layers(trace: Trace, start: fx.Node, end: fx.Node, region: set[fx.Node]) -> bool:
    """Whether the model itself, not one of its blocks, closes a branch around most of its layers."""
    layers = trace.layers
    home = common_path(layers)
    inside = sum(node in region for node in layers)
    outermost = not end.meta["module"] or within(home, end.meta["module"])
    return outermost and inside > 2 and 2 * inside > len(layers)


def _holds_repeated_blocks(
    trace: Trace, graph: nx.DiGraph, start: fx.Node, end: fx.Node, region: set[fx.Node]
) -> bool:
    """Whether two or more blocks of one kind, each with branches of its own, lie inside the region."""
    bypasses = _bypasses(graph, start, end, region)
    if not bypasses:
        return False
    inner = _without(graph.subgraph(region | {start, end}), bypasses, start)
    kinds: dict[type, set[str]] = {}
    for a, b in pairwise(_dominators(inner, end)):
        inside = _between(inner, a, b)
        if inside and a is not start:
            path = common_path([*inside, b])
            if path != common_path([*region, end]):
                kinds.setdefault(type(_module_at(trace, path)), set()).add(path)
    return any(len(paths) > 1 for paths in kinds.values())


def _bypasses(graph: nx.DiGraph, start: fx.Node, end: fx.Node, region: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """The fewest edges out of ``start`` without which the heaviest path through the region gets a chain of its own."""
    inner = graph.subgraph(region | {start, end})
    heaviest: dict[fx.Node, tuple[int, fx.Node | None]] = {}
    for node in reversed(list(nx.topological_sort(inner))):
        weight, after = max(((heaviest[t][0], t) for t in inner.successors(node)), default=(0, None), key=_first)
        heaviest[node] = _weight(node) + weight, after
    branches = {target: nx.descendants(inner, target) | {target} for target in inner.successors(start)}
    kept: dict[frozenset[fx.Node], None] = {}
    node = heaviest[start][1]
    while node is not None:
        kept[frozenset(target for target, reach in branches.items() if node in reach)] = None
        node = heaviest[node][1]
    for keep in sorted(kept, key=len, reverse=True):
        bypasses = [(start, target) for target in branches if target not in keep]
        if bypasses and len(_dominators(_without(inner, bypasses, start), end)) > 2:
            return bypasses
    return []


def _without(graph: nx.DiGraph, edges: list[tuple[fx.Node, fx.Node]], start: fx.Node) -> nx.DiGraph:
    graph = graph.copy()
    graph.remove_edges_from(edges)
    graph.add_edge(_START, start)
    return graph


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


def _weight(node: fx.Node) -> int:
    return sum(leaf.numel() for leaf in tree_leaves(node.meta.get("value")) if isinstance(leaf, Tensor)) + 1


def _leaves_trunk(start: fx.Node, end: fx.Node, positions: dict[fx.Node, int], graph: nx.DiGraph) -> bool:
    """Whether the resolution grows from one value of the chain to the next."""
    if end not in positions or start not in positions:
        return _is_exit(end)
    same_rank = tensor_of(start).dim() == tensor_of(end).dim()
    return same_rank and positions[end] >= _GROWS * positions[start]


def _pools_away(trace: Trace, graph: nx.DiGraph, node: fx.Node, positions: dict[fx.Node, int]) -> bool:
    """Whether the places are gone at ``node`` for good: neither it nor what follows has any."""
    if positions.get(node, 1) > 1 or node.op == "placeholder":
        return False
    return all(positions.get(after, 1) <= 1 for after in nx.descendants(graph, node))


def _until_tail(
    trace: Trace, graph: nx.DiGraph, chain: list[fx.Node], bypassed: set[fx.Node], positions: dict[fx.Node, int]
) -> list[fx.Node]:
    """The chain up to the trunk's last value."""
    stop = len(chain) - 1
    for index, (start, end) in enumerate(pairwise(chain)):
        weighted = any(node in trace.layers for node in {*_between(graph, start, end), end})
        flattened = start in positions and end in positions and tensor_of(start).dim() > 2 >= tensor_of(end).dim()
        pooled = positions.get(start, 1) > 1 and _pools_away(trace, graph, end, positions)
        if _leaves_trunk(start, end, positions, graph) or (not weighted and (pooled or flattened)):
            stop = index
            break
    # A bypass that comes back after the last block feeds the tail (a long skip, merged before up-sampling).
    returns = {next((node for node in chain if node is target or node in nx.descendants(graph, target)), None)
               for target in bypassed}
    for index in reversed(range(1, stop + 1)):
        if chain[index] in returns:
            stop = index - 1
            break
        if _between(graph, chain[index - 1], chain[index]):
            break
    # A neck's own projections belong to the tail: leave out what shares a module with the event that ends the trunk.
    event, trunk = chain[min(stop + 1, len(chain) - 1)], chain[: stop + 1]
    home = event.meta.get("module", "") if event.op != "output" else ""
    outside = [node for node in trunk if not (within(node.meta["module"], home) or within(_target(node), home))]
    return outside if len(outside) > len(trunk) / 2 else trunk


# ---------------------------------------------------------------------------------------------- units


def _units(trace: Trace, graph: nx.DiGraph, chain: list[fx.Node]) -> list[Unit]:
    """Partition the chain into units: at block boundaries, each with trainable weights of its own."""
    regions = {end: _between(graph, start, end) for start, end in pairwise(chain)}
    kinds = set()
    for end, region in regions.items():
        path = common_path([*region, end]) if region else ""
        if path and not all(within(node.meta["module"], path) for node in chain[1:]):
            kinds.add(type(_module_at(trace, path)))
    ends: list[fx.Node] = []
    cut: fx.Node | None = None  # where the present unit may end
    at_block = weighted = False
    done: set[fx.Node] = set()
    for node in chain:
        fresh = ancestors([node], done)
        done |= fresh
        if any(part in trace.layers for part in fresh):
            if weighted and cut is not None:
                ends.append(cut)
                cut, at_block = None, False
            weighted = True
        if weighted and not at_block and _is_tensor(node) and not _inside_block(trace, node, kinds) and (
                cut is None or _divides(node) <= _divides(cut)):
            cut = node
            at_block = any(type(_module_at(trace, path)) in kinds for path in node.meta["returned_by"])
    if weighted and (cut is not None or not ends):
        ends.append(chain[-1])
    elif ends:
        ends[-1] = chain[-1]
    inside = _holders(ends)
    return [Unit(end, *_names(trace, end, inside)) for end in ends]


def _divides(node: fx.Node) -> int:
    """How many calls of modules a cut at a value divides."""
    calls = node.meta["call"].around() if node.meta.get("call") else ()
    return sum(call.path not in node.meta["returned_by"] for call in calls)


def _inside_block(trace: Trace, node: fx.Node, kinds: set[type]) -> bool:
    """Whether a value is internal to a module of a block kind (and not what that module returns)."""
    path = _target(node) or node.meta["module"]
    while path:
        if type(_module_at(trace, path)) in kinds and path not in node.meta["returned_by"]:
            return True
        path = path.rpartition(".")[0]
    return False


def _holders(nodes: Iterable[fx.Node]) -> dict[str, set[fx.Node]]:
    """Of every module, which of the nodes lie in it."""
    found: dict[str, set[fx.Node]] = {}
    for node in nodes:
        for path in (node.meta["module"], _target(node)):
            while path:
                found.setdefault(path, set()).add(node)
                path = path.rpartition(".")[0]
    return found


def _names(
    trace: Trace, node: fx.Node, inside: Mapping[str, Set[fx.Node]] = MappingProxyType({})
) -> tuple[str, tuple[str, ...]]:
    """A value's name in the user's module paths, and its other names.

    The name is the outermost module that returns this value and holds none of the others (``inside``, by module).
    """
    paths = [path for path in node.meta["returned_by"] if path]
    calls = {path: trace.returns[path].index(node) for path in paths}
    if not paths:
        inner = node.name.removeprefix(node.meta["module"].replace(".", "_") + "_")
        return ".".join(filter(None, [node.meta["module"], inner])), ()
    own = [p for p in paths if not inside.get(p, set()) - {node}]
    unique = {path: f"{path}:{call}" if call else path for path, call in calls.items()}  # a module's later calls
    name = own[-1] if own else paths[0]
    return unique[name], tuple(unique[path] for path in paths if path != name)


def _taps(trace: Trace, trunk: frozenset[fx.Node], ends: list[fx.Node]) -> list[Tap]:
    """Values of the trunk, and inputs, that the tail reads, in graph order."""
    dependent = input_dependent(trace.graph)
    taps: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack: list[fx.Node] = [trace.output]
    while stack:
        node = stack.pop()
        if node in seen or node not in dependent:
            continue
        seen.add(node)
        if node.op == "placeholder" or (node in trunk and any(
            isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta["value"])
        )):
            taps[node] = None
        else:
            stack.extend(node.all_input_nodes)
    inside = _holders(ends)
    return [
        Tap(node, str(node.target) if node.op == "placeholder" else _names(trace, node, inside)[0])
        for node in trace.graph.nodes if node in taps
    ]


def _target(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else ""


def common_path(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that all of these nodes lie in."""
    common: list[str] | None = None
    for node in nodes:
        parts = node.meta["module"].split(".") if node.meta.get("module") else []
        common = parts if common is None else [a for a, b in zip(common, parts, strict=False) if a == b]
        if common != parts[: len(common)]:
            common = common[: next(i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b)]
    return ".".join(common or [])


def _module_at(trace: Trace, path: str) -> nn.Module:
    return trace.shadow.get_submodule(path)


def unit_at(structure: Structure, name: str) -> Unit | None:
    """The unit that ends at a split point given by name: a unit's own, or any module path on the chain."""
    for unit in structure.units:
        if name == unit.name or name in unit.aliases:
            return unit
    for node in structure.chain:
        if node.op != "placeholder" and (name in node.meta["returned_by"] or name == _names(structure.trace, node)[0]):
            return Unit(node, name, ())
    return None
