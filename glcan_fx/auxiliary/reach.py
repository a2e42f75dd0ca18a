"""Auxiliary networks that depend on what their module computes from the data, at all positions.

A tail that reads a class token in front of the first attention teaches the patch embedding nothing, and one that drops
it teaches the token nothing.
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from glcan_fx.capture.trace import shadow
from glcan_fx.errors import PlanError
from glcan_fx.fx_utils import Network
from glcan_fx.structure.influence import Seen, Undecided, Walk, alone, walked
from glcan_fx.structure.nodes import makes_new
from glcan_fx.structure.structure import Structure


def reach(network: Network, structure: Structure, cut: fx.Node, inputs: list[fx.Node]) -> None:
    """Let an auxiliary network depend on the data at its cut: what of it reads only positions that do not depend on
    it reads the average of all positions instead. Where it still does not depend on all positions, or not all of its
    outputs on data, which may be all that a loss reads, the average is added at its input. Raises PlanError where its
    outputs do not depend on the data even so."""
    mixed, before = walked(structure)
    if (cut not in mixed or before is None) and not network.graph.find_nodes(op="get_attr"):  # it adds none of its own
        return
    with alone(), suppress(Undecided):
        walk = _begun(network, structure, cut, inputs, mixed.get(cut))
        for node in list(network.graph.nodes):
            if node.op not in ("placeholder", "output"):
                walk.run(node)
                if _misses(walk, node):
                    try:
                        _read_means(network.graph, walk, node)
                    finally:
                        network.recompile()  # whatever is undecided later
        made = _outputs(walk)
        if cut in mixed and (any(isinstance(leaf, Seen) and leaf.depends == "some" for leaf in made)
                             or _ignores_the_rest(network, structure, cut, inputs)):
            for node in structure.together(cut):
                _add_mean(network, inputs.index(node), mixed[cut])
            return
        if made and all(isinstance(leaf, Seen) and leaf.depends == "none" for leaf in made):
            raise PlanError(f"what an auxiliary network behind '{cut.name}' computes does not depend on the data there")


def _begun(
    network: Network, structure: Structure, cut: fx.Node, inputs: list[fx.Node], own: Seen | None
) -> Walk:
    """A walk through an auxiliary network, with its inputs. own: which entries at its cut depend on data; None: all."""
    before = walked(structure)[1]
    walk = Walk(shadow(network, structure.trace.mode), structure.trace.mode)
    for node, source in zip(network.graph.find_nodes(op="placeholder"), inputs, strict=True):
        known = before.constant(source) if before else tree_map_only(
            Tensor, lambda t: Seen(walk.empty(t.shape, t.dtype), "none"), source.meta["value"])
        mine = source in structure.together(cut)
        if mine and not isinstance(known, Seen):
            raise Undecided
        if mine:
            known = replace(own) if own is not None else replace(known, depends="all")
        walk.values[node] = known
    return walk


def _outputs(walk: Walk) -> list[Any]:
    """What a walk found of a network's outputs: a ``Seen`` or ``Undecided`` each."""
    nodes = next(iter(walk.values)).graph.output_node().args
    made = tree_leaves(fx.map_arg(nodes, lambda node: walk.values[node]))
    return [leaf for leaf in made if isinstance(leaf, Seen) or leaf is Undecided]


def _ignores_the_rest(network: Network, structure: Structure, cut: fx.Node, inputs: list[fx.Node]) -> bool:
    """Whether no output depends on the positions at the cut that do not depend on data (a class token that is
    dropped next): what makes them would not learn."""
    data = walked(structure)[0][cut]
    other = torch.where(data.value.isnan(), 1.0, torch.nan).to(data.value.dtype)
    walk = _begun(network, structure, cut, inputs, Seen(other, "some"))
    for node in network.graph.nodes:
        if node.op not in ("placeholder", "output"):
            walk.run(node)
    return all(isinstance(leaf, Seen) and leaf.depends == "none" for leaf in _outputs(walk))


def _add_mean(network: Network, index: int, seen: Seen) -> None:
    """Add the average of all positions to each at an input."""
    node = network.graph.find_nodes(op="placeholder")[index]
    with network.graph.inserting_after(node):
        mean = network.graph.call_method("mean", (node, _mixed_axes(seen)), {"keepdim": True})
    with network.graph.inserting_after(mean):
        mixed = network.graph.call_function(torch.add, (node, mean))
    node.replace_all_uses_with(mixed, delete_user_cb=lambda user: user not in (mean, mixed))
    network.recompile()


def _mixed_axes(seen: Seen) -> list[int]:
    depends = seen.value.isnan()
    return [axis for axis in range(depends.dim()) if (depends.any(axis) != depends.all(axis)).any()]


def _misses(walk: Walk, node: fx.Node) -> bool:
    """Whether a node reads a value that depends on data, but none of the entries that do."""
    made = walk.values[node]
    return isinstance(made, Seen) and made.depends == "none" and made.value.is_floating_point() and not makes_new(
        node) and any(leaf.depends == "some" for leaf in walk.inputs(_reader(walk, node)))


def _reader(walk: Walk, node: fx.Node) -> fx.Node:
    """The node that reads a tensor, where ``node`` takes one of several of its results."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) and not isinstance(walk.values[first], Seen) else node


def _read_means(graph: fx.Graph, walk: Walk, node: fx.Node) -> None:
    """Give a node the average of all positions, at every position, of what it reads."""
    reader = _reader(walk, node)
    means = {}
    with graph.inserting_before(node):
        for source in reader.all_input_nodes:
            seen = walk.values[source]
            if isinstance(seen, Seen) and seen.depends == "some":
                mean = graph.call_method("mean", (source, _mixed_axes(seen)), {"keepdim": True})
                means[source] = graph.call_method("expand_as", (mean, source))
                walk.run(mean)
                walk.run(means[source])
        if reader is not node:
            copied = graph.node_copy(reader, lambda source: means.get(source, source))
            walk.run(copied)
            means = {reader: copied}
    for source, mean in means.items():
        node.replace_input_with(source, mean)
    walk.run(node)
