"""Find the trunk of a recorded network, and divide it into units. Only the graph decides; no architecture is known.

The trunk is the chain of dominators from the input on. It ends where the resolution first grows, where the spatial
positions are pooled away, where images in one batch are put together, or where a bypass comes back for the last time.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import networkx as nx
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from glcan_fx.capture.trace import Trace, within
from glcan_fx.pytree import tensors_in
from glcan_fx.structure.context import carrying_data, data_inputs
from glcan_fx.structure.layout import channels_last, count_positions
from glcan_fx.structure.nodes import (
    Groups,
    called_path,
    common_path,
    descendants,
    input_dependent,
    is_float_tensor,
    is_size,
    tensor_of,
)
from glcan_fx.structure.regions import GROWS, Edge, Flow, Weight, between, dataflow, elements
from glcan_fx.structure.streams import streams
from glcan_fx.structure.structure import Structure, Tap, Unit

_FEW = 0.25  # of the layers: what a neck takes over of the trunk at most
_CLEARLY = 1.5  # so many times more units: fewer are those of a neck


def analyze(trace: Trace) -> Structure:
    """Find the structure of a recorded network.

    Raises PlanError where no output depends on a floating-point input.
    """
    layouts = channels_last(trace)

    def most_units(weight: Weight, ignored: Set[Edge] = frozenset()) -> Structure:
        found = [_structure(trace, data, layouts, weight, ignored) for data in data_inputs(trace)]
        return max(found, key=lambda structure: len(structure.units))

    # Where paths part, the network is the one with the largest values. But below nested decoders and wide heads, that
    # is theirs, and many more blocks lie on the one with the most layers; and where the data go along (the positions of
    # points, beside their features), on what layers compute.
    by_size, by_depth = most_units(elements), most_units(lambda node: node in trace.layers)
    found = by_depth if len(by_depth.units) >= _CLEARLY * len(by_size.units) else by_size
    along = _data_along(trace)
    if along and _is_finer(structure := most_units(elements, along), found):
        return structure
    return found


def _is_finer(structure: Structure, than: Structure) -> bool:
    """Whether a structure has clearly more units, or as many and clearly fewer layers in the largest."""
    def largest(structure: Structure) -> int:
        owner = structure.assign([unit.end for unit in structure.units])
        return _most(owner[node] for node in structure.trace.layers if node in owner)

    more = len(structure.units) / len(than.units)
    return more >= _CLEARLY or more >= 1 and largest(than) >= _CLEARLY * largest(structure)


def _data_along(trace: Trace) -> frozenset[Edge]:
    """The edges by which what no layer has computed joins what layers have."""
    learned: set[fx.Node] = set()
    for node in trace.graph.nodes:
        if node in trace.layers or not learned.isdisjoint(node.all_input_nodes):
            learned.add(node)
    return frozenset((source, node) for node in learned for source in node.all_input_nodes
                     if source not in learned and not learned.isdisjoint(node.all_input_nodes))


def _structure(
    trace: Trace, data: frozenset[fx.Node], layouts: frozenset[fx.Node], weight: Weight, ignored: Set[Edge]
) -> Structure:
    """The structure with these inputs as the data. ignored: edges on which nothing is learnt."""
    batch = next((tensor_of(node).shape[0] for node in data if tensor_of(node).dim() > 1), 0)
    positions = {node: count_positions(tuple(tensor_of(node).shape), node in layouts, batch)
                 for node in trace.graph.nodes if is_float_tensor(node)}
    carrying = carrying_data(trace, data)
    flow = dataflow(trace, positions, data, weight, carrying, streams(trace, data), ignored)
    whole = flow.open_chain()
    chain = _until_tail(flow, whole)
    units = _units(flow, chain) or _units(flow, whole)[:1]  # no layer before what was taken for the tail: one unit
    units = units or [Unit(whole[-1], *_names(trace, whole[-1]))]  # no layer at all
    units = _without_ending(flow, whole, units, carrying)
    chain = chain if units[-1].end in chain else whole
    chain = chain[: chain.index(units[-1].end) + 1]
    structure = Structure(trace, chain, units, [], layouts, data, flow.groups)
    taps = _taps(structure, structure.trunk - structure.context)
    return replace(structure, taps=taps)


def _until_tail(flow: Flow, chain: list[fx.Node]) -> list[fx.Node]:
    """The chain up to the trunk's last value."""
    stop = _before_long_skip(flow, chain, _last_before_tail(flow, chain))
    # A neck's own projections belong to the tail: what shares a module with the event that ends the trunk, or with
    # growth beside it.
    event, trunk = chain[min(stop + 1, len(chain) - 1)], chain[: stop + 1]
    for home in sorted({event.meta.get("module", "") if event.op != "output" else "", *_growing(flow, trunk)}):
        outside = [node for node in trunk if not _lies_in(node, home)]
        layers = flow.above(trunk[-1]) & flow.trace.layers
        few = sum(_lies_in(node, home) for node in layers) <= _FEW * len(layers)
        trunk = outside if len(outside) > len(trunk) / 2 and few else trunk
    return trunk


def _lies_in(node: fx.Node, home: str) -> bool:
    return within(node.meta["module"], home) or within(called_path(node), home)


def _growing(flow: Flow, trunk: list[fx.Node]) -> set[str]:
    """The modules in which the resolution of a value grows that the trunk does not come from."""
    beside = flow.positions.keys() - flow.above(trunk[-1])
    return {node.meta["module"] for node in beside for source in node.all_input_nodes[:1]
            if source in flow.positions and flow.grows_between(source, node)}


def _last_before_tail(flow: Flow, chain: list[fx.Node]) -> int:
    """The index of the last value before the resolution grows, the positions are gone, or one batch is taken apart."""
    positions = flow.positions
    for index, (start, end) in enumerate(pairwise(chain)):
        if flow.grows_between(start, end):
            return index
        weighted = not flow.trace.layers.isdisjoint({*between(flow.graph, start, end), end})
        if weighted:
            continue
        gone = start in positions and positions.get(end) == 1
        flattened = gone and tensor_of(start).dim() > 2 >= tensor_of(end).dim()
        pooled = positions.get(start, 1) > 1 and flow.pools_away(end)
        if pooled or flattened:
            return index
        whole = next((node for node in reversed(chain[:index + 1]) if _taken_apart(flow, node, end)), None)
        if whole is not None and flow.trace.layers.isdisjoint(between(flow.graph, whole, end)):
            return chain.index(whole)
    return len(chain) - 1


def _taken_apart(flow: Flow, start: fx.Node, end: fx.Node) -> bool:
    """Whether images that ran in one batch (two to compare, frames) become one value per example, at their size."""
    if not (start in flow.positions and end in flow.positions):
        return False
    before, after = tensor_of(start), tensor_of(end)
    return (before.dim() == after.dim() > 0 and after.shape[0] < before.shape[0]
            and flow.positions[start] * after.shape[0] == flow.positions[end] * before.shape[0])


def _before_long_skip(flow: Flow, chain: list[fx.Node], stop: int) -> int:
    """The index of the last value before a bypass that comes back behind the last block: a long skip, merged before
    up-sampling, feeds the tail."""
    returns = set()
    for target in flow.bypassed:
        behind = nx.descendants(flow.graph, target) | {target}
        returns.add(next((node for node in chain if node in behind), None))
    for index in reversed(range(1, stop + 1)):
        if chain[index] in returns:
            return index - 1
        if between(flow.graph, chain[index - 1], chain[index]):
            break
    return stop


def _units(flow: Flow, chain: list[fx.Node]) -> list[Unit]:
    """Partition the chain into units: at block boundaries, each with trainable weights of its own."""
    trace, kinds = flow.trace, _block_kinds(flow, chain)
    ends: list[fx.Node] = []
    cut: fx.Node | None = None  # where the present unit may end
    at_block = weighted = apart = False
    done: set[fx.Node] = set()
    for node in chain:
        fresh = flow.above(node, done)
        done |= fresh
        if not trace.layers.isdisjoint(fresh):
            if weighted and cut is not None:
                ends.append(cut)
                cut, at_block = None, False
            weighted, apart = True, False
        apart |= _joins_positions(flow, node, fresh & trace.layers)  # a tail that reads some teaches some layers only
        may_end = weighted and not (at_block or apart) and is_float_tensor(node) and not _inside_block(
            trace, node, kinds)
        if may_end and (cut is None or _no_worse(flow, node, cut)):
            cut = node
            at_block = any(type(trace.shadow.get_submodule(path)) in kinds for path in node.meta["returned_by"])
    if weighted and (cut is not None or not ends):
        ends.append(chain[-1])
    elif ends:
        ends[-1] = chain[-1]
    inside = _nodes_in(ends)
    return [Unit(end, *_names(trace, end, inside)) for end in ends]


def _joins_positions(flow: Flow, node: fx.Node, layers: Set[fx.Node]) -> bool:
    """Whether a node puts values that some of these layers made, each others, beside one another as positions."""
    sources = [source for source in node.all_input_nodes if source in flow.graph and source in flow.positions]
    beside = len(sources) > 1 and flow.positions.get(node) == sum(flow.positions[source] for source in sources)
    return beside and sum(not layers.isdisjoint(flow.above(source)) for source in sources) > 1


def _is_head(flow: Flow, chain: list[fx.Node], start: fx.Node, end: fx.Node) -> bool:
    """Whether what makes the network's output ``end`` of ``start`` is no layer after another: layers side by side (a
    mean and a deviation, two outputs), or weights that are read as parameters (prototypes). Auxiliary networks copy it,
    with the tail."""
    trace = flow.trace
    stack, seen = [start], {end}
    while stack:
        node = stack.pop()
        if node is trace.output:
            return True
        if node not in seen:
            seen.add(node)
            stack += [user for user in node.users if not is_size(user)]
    if any(node.op == "get_attr" and node in trace.layers for node in flow.above(end, flow.above(start))):
        return True
    for first, last in pairwise(chain[chain.index(start): chain.index(end) + 1]):
        inside = between(flow.graph, first, last)
        branches = [(nx.descendants(flow.graph, node) | {node}) & inside & trace.layers
                    for node in flow.graph.successors(first) if node in inside]
        alone = [branch.difference(*(other for other in branches if other is not branch)) for branch in branches]
        if sum(map(bool, alone)) > 1:
            return True
    return False


def _without_ending(flow: Flow, chain: list[fx.Node], units: list[Unit], carrying: Set[fx.Node]) -> list[Unit]:
    """The units without what follows their last layer, where that is what the network returns (a softmax, a shift), or
    reads context (a mask of tokens); and without a head. Auxiliary networks copy it, with the rest of the tail."""
    trace, dependent = flow.trace, input_dependent(flow.trace.graph)
    returned = units[-1].end in trace.output.all_input_nodes
    dropped = returned and len(units) > 1 and _is_head(flow, chain, units[-2].end, units[-1].end)
    units, homes = (units[:-1], _nodes_in(trace.layers)) if dropped else (units, {})

    def belongs(node: fx.Node) -> bool:
        if dropped:  # what a block returns is its own
            return any(path in homes for path in node.meta["returned_by"])
        return not returned and all(source in carrying or source not in dependent for source in node.all_input_nodes)

    index = chain.index(units[-1].end)
    while index > 1 and not belongs(chain[index]) and trace.layers.isdisjoint(
            flow.above(chain[index], flow.above(chain[index - 1]))):
        index -= 1
    if index == 0 or not is_float_tensor(chain[index]):
        return units
    return [*units[:-1], replace(units[-1], end=chain[index])]


def _block_kinds(flow: Flow, chain: list[fx.Node]) -> set[type[nn.Module]]:
    """The classes of modules that close a region, but for those that hold the whole chain, or several
    blocks of one class (a stage)."""
    paths = set()
    for start, end in pairwise(chain):
        region = between(flow.graph, start, end)
        path = common_path([*region, end]) if region else ""
        if path and not all(within(node.meta["module"], path) for node in chain[1:]):
            paths.add(path)
    kinds = {path: type(flow.trace.shadow.get_submodule(path)) for path in paths}
    stages = {path for path in paths if _most(kinds[other] for other in paths - {path} if within(other, path)) > 1}
    return {kinds[path] for path in paths} - {kinds[path] for path in stages}


def _most(values: Iterable[Any]) -> int:
    """How many there are of the most frequent of some values."""
    return max(Counter(values).values(), default=0)


def _no_worse(flow: Flow, node: fx.Node, before: fx.Node) -> bool:
    """Whether a cut at ``node`` is as good as one at ``before``: it divides fewer calls, or as many, and later local
    modules read no more bytes across it (an extra token aside)."""
    def handed_on(value: fx.Node) -> int:
        known = flow.above(value)
        read = (each for each in known if any(user not in known and not is_size(user) for user in each.users))
        memory = (tensor.untyped_storage() for each in read for tensor in tensors_in(each.meta["value"]))
        return sum({storage._cdata: storage.nbytes() for storage in memory}.values())

    divides, divided_before = _divides(flow.trace, node), _divides(flow.trace, before)
    if divides != divided_before:
        return divides < divided_before
    return handed_on(node) - handed_on(before) <= (GROWS - 1) * tensor_of(before).nbytes


def _divides(trace: Trace, node: fx.Node) -> int:
    """How many calls of modules a cut at a value divides: that go on behind it with layers."""
    calls = node.meta["call"].around() if node.meta.get("call") else ()
    under_way = [call for call in calls if call.path not in node.meta["returned_by"]]
    if not under_way:
        return 0
    behind = descendants(node) & trace.layers
    return sum(not behind.isdisjoint(trace.inside[call]) for call in under_way)


def _inside_block(trace: Trace, node: fx.Node, kinds: set[type[nn.Module]]) -> bool:
    """Whether a value is internal to a module of a block kind (and not what that module returns)."""
    path = called_path(node) or node.meta["module"]
    while path:
        if type(trace.shadow.get_submodule(path)) in kinds and path not in node.meta["returned_by"]:
            return True
        path = path.rpartition(".")[0]
    return False


def _nodes_in(nodes: Iterable[fx.Node]) -> dict[str, set[fx.Node]]:
    """Of every module, which of the nodes lie in it."""
    found: dict[str, set[fx.Node]] = {}
    for node in nodes:
        for path in (node.meta["module"], called_path(node)):
            while path:
                found.setdefault(path, set()).add(node)
                path = path.rpartition(".")[0]
    return found


def _names(
    trace: Trace, node: fx.Node, inside: Mapping[str, Set[fx.Node]] = MappingProxyType({}),
    groups: Groups = MappingProxyType({}),
) -> tuple[str, tuple[str, ...]]:
    """A value's name in the user's module paths, and its other names.

    The name is the outermost module that returns this value and holds none of the others (``inside``, by module), but
    for those that are side by side with it.
    """
    paths = [path for path in node.meta["returned_by"] if path]
    calls = {path: trace.returns[path].index(node) for path in paths}
    if not paths:
        inner = node.name.removeprefix(node.meta["module"].replace(".", "_") + "_")
        return ".".join(filter(None, [node.meta["module"], inner])), ()
    own = [p for p in paths if not inside.get(p, set()) - set(groups.get(node, (node,)))]
    unique = {path: f"{path}:{call}" if call else path for path, call in calls.items()}  # a module's later calls
    name = own[-1] if own else paths[0]
    return unique[name], tuple(unique[path] for path in paths if path != name)


def _taps(structure: Structure, trunk: frozenset[fx.Node]) -> list[Tap]:
    """Values of the trunk, and inputs, that the tail reads, in graph order."""
    trace = structure.trace
    dependent = input_dependent(trace.graph)
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack: list[fx.Node] = [trace.output]
    while stack:
        node = stack.pop()
        if node in seen or node not in dependent:
            continue
        seen.add(node)
        holds_tensor = any(isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta["value"]))
        if node.op == "placeholder" or (node in trunk and holds_tensor):
            found.add(node)
        else:
            stack.extend(node.all_input_nodes)

    inside = _nodes_in(unit.end for unit in structure.units)
    return [
        Tap(node, str(node.target) if node.op == "placeholder" else _names(trace, node, inside, structure.groups)[0])
        for node in trace.graph.nodes if node in found
    ]


def unit_at(structure: Structure, name: str) -> Unit | None:
    """The unit that ends at a split point given by name: a unit's own, or any module path on the chain."""
    for unit in structure.units:
        if name == unit.name or name in unit.aliases:
            return unit
    for node in structure.chain:
        if node.op != "placeholder" and (name in node.meta["returned_by"] or name == _names(structure.trace, node)[0]):
            return Unit(node, name, ())
    return None
