"""The tail of a network, which follows its trunk: neck, head, and how it ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from glcan_fx.capture.trace import is_float, quiet
from glcan_fx.structure.nodes import (
    ancestors,
    called_path,
    computed,
    descendants,
    is_float_tensor,
    is_size,
    tensor_of,
)
from glcan_fx.structure.structure import Structure, once, region_between

Ending = Literal["mean", "decoder", "maps"]
"""How a network ends: with global average pooling of the trunk's last map, as classifiers do; with a decoder that joins
maps of several sizes; or with maps otherwise."""


@dataclass(frozen=True)
class Tail:
    """What follows the trunk for some of the network's outputs: nodes in order, and the taps they read."""

    nodes: list[fx.Node]
    taps: frozenset[fx.Node]


def tail_of(structure: Structure, outputs: Any) -> Tail:
    """The part of the graph between the taps and ``outputs`` (nested nodes)."""
    dependent = structure.dependent
    known = {tap.node for tap in structure.taps}
    needed: set[fx.Node] = set()
    taps: set[fx.Node] = set()
    stack: list[fx.Node] = []
    fx.map_arg(outputs, lambda node: stack.append(node))
    while stack:
        node = stack.pop()
        if node in known and node in dependent:
            taps.add(node)
        elif node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    return Tail([node for node in structure.trace.graph.nodes if node in needed], frozenset(taps))


def towers_of(structure: Structure, tail: Tail) -> dict[fx.Node, tuple[set[fx.Node], fx.Node, fx.Node]]:
    """Calls of modules with weights that keep their input's shape, by their last node: (nodes, input, output).

    Of a row of blocks that read other values, too (the layers of a query decoder), the first of the network is none:
    what it reads would be left out.
    """
    groups: dict[str, set[fx.Node]] = {}
    for node in tail.nodes:
        parts = (str(node.target) if node.op == "call_module" else node.meta["module"]).split(".")
        for depth in range(1, len(parts) + 1):
            groups.setdefault(".".join(parts[:depth]), set()).add(node)
    everything = set(tail.nodes)
    towers: dict[fx.Node, tuple[set[fx.Node], fx.Node, fx.Node]] = {}
    taken: set[fx.Node] = set()
    for path in sorted(filter(None, groups), key=lambda path: path.count(".")):  # rows in the order of their calls
        nodes = groups[path]
        if nodes & taken or nodes == everything or any(
                structure.trace.module(node) in structure.interface for node in nodes):
            continue
        found = _stream(structure, tail, nodes, path)
        if found and not any(
                structure.spatial(n) == structure.spatial(found[1]) for n in nodes & fixed_sizes(structure)):
            towers[found[1]] = (nodes, *found)
            taken |= nodes
    return towers


def _stream(structure: Structure, tail: Tail, nodes: set[fx.Node], path: str) -> tuple[fx.Node, fx.Node] | None:
    """The map that a call of a module with weights reads, and the one of the same shape that it makes. Where it reads
    several values, one has to come from another module of a row of such."""
    if not any(p.dim() >= 2 for node in nodes for p in structure.trace.parameters(node)):
        return None
    sources = {s for n in nodes for s in n.all_input_nodes if s not in nodes and s in structure.dependent}
    ends = [n for n in nodes if any(user not in nodes for user in n.users)]
    if len(ends) != 1 or not is_map(ends[0]):
        return None
    alike = [s for s in sources if is_map(s) and tensor_of(s).shape == tensor_of(ends[0]).shape]
    if len(sources) > 1:
        alike = [source for source in alike if _in_a_row(structure, source, path)]
    elif alike and alike[0] in tail.taps:  # the first layer on a tap adapts it (a lateral convolution): no tower
        return None
    return (alike[0], ends[0]) if len(alike) == 1 else None


def _in_a_row(structure: Structure, node: fx.Node, path: str) -> bool:
    """Whether a value is returned by a module of the same class as that of ``path``, in the same numbered row."""
    shadow, (row, _, _) = structure.trace.shadow, path.rpartition(".")
    return path.rpartition(".")[2].isdigit() and any(
        other != path and other.rpartition(".")[0] == row
        and type(shadow.get_submodule(other)) is type(shadow.get_submodule(path))
        for other in [*node.meta["returned_by"], called_path(node)] if other)


def direct_layers(structure: Structure, cut: fx.Node, tail: Tail) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """The layers that make the network's maps, where all of them can be made from the module's own output instead; and
    what follows them.

    That is so where each is a map of the cut's rank, of as many images, and what follows needs no other layer with
    weights.
    """
    interface = structure.interface
    made = [node for node in tail.nodes if structure.trace.module(node) in interface]
    rank, images = len(structure.shape(cut)), structure.shape(cut)[:1]
    if not made or cut in structure.channels_last or rank < 3 or structure.positions(cut) <= 1:
        return None
    if any(tap in structure.trace.output.all_input_nodes for tap in tail.taps):  # no layer of the tail makes that map
        return None
    if any(not is_map(node) or len(structure.shape(node)) != rank or structure.positions(node) <= 1
           or is_queried(structure, cut, node) for node in made):
        return None
    if any(structure.shape(node)[:1] != images for node in made):  # two images that are compared, frames
        return None
    needed = _behind(tail, made)
    if any(structure.trace.parameters(node) for node in needed) or any(
            node in tail.taps for node in needed for node in node.all_input_nodes):
        return None
    if any(node in tail.nodes and node not in made and node not in needed
           for node in structure.trace.output.all_input_nodes):  # made of a tap without a layer
        return None
    return made, needed


def last_layers(structure: Structure, outputs: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The last maps and vectors with weights in front of outputs, and what is made of them up to the outputs (a
    softmax, a shift, two heads side by side), with the parameters and inputs that it reads; both in order."""
    made: set[fx.Node] = set()
    behind: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in structure.trace.layers and node in structure.dependent and is_map(node):
            made.add(node)
        elif node not in behind:
            behind.add(node)
            stack.extend(node.all_input_nodes)
    nodes = structure.trace.graph.nodes
    return [node for node in nodes if node in made], [node for node in nodes if node in behind]


def _behind(tail: Tail, made: list[fx.Node]) -> list[fx.Node]:
    """What of the tail is computed from the layers that make the maps, and what it needs beside them."""
    reached: set[fx.Node] = set()
    for node in tail.nodes:
        if node in made or any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    inside = set(tail.nodes)
    beside = ancestors(reached - set(made), set(made)) & inside
    return [node for node in tail.nodes if node in (reached | beside) - set(made)]


def ending_of(structure: Structure, outputs_are_predictions: bool) -> Ending:
    """How the network ends."""
    tail = tail_of(structure, structure.trace.output.args[0])
    if any(is_averaged(structure, tap, tail) for tap in tail.taps):
        return "mean"
    sizes: dict[fx.Node, set[tuple[int, ...]]] = {  # of the maps that a value is computed from
        tap: {structure.spatial(tap)} for tap in tail.taps if tap.op != "placeholder" and is_map(tap)}
    for node in tail.nodes:
        if not is_size(node):
            sizes[node] = set().union(*(sizes.get(source, set()) for source in node.all_input_nodes))
    joins = any(len(known) > 1 for known in sizes.values())
    return "decoder" if outputs_are_predictions and joins else "maps"


def is_averaged(structure: Structure, tap: fx.Node, tail: Tail) -> bool:
    """Whether all that reads a tap's values is global average pooling."""
    if not is_map(tap):  # a number among the arguments
        return False
    readers = [user for user in tap.users if user in tail.nodes and not is_size(user)]
    return len(structure.spatial(tap)) > 0 and bool(readers) and all(
        ("mean" in (name := name_of(structure, user)) or "avgpool" in name)
        and is_map(user) and structure.positions(user) <= 1 for user in readers)


def takes_any_size(structure: Structure, tap: fx.Node) -> bool:
    """Whether no pooling window behind a tap has a size of its own."""
    names = [name_of(structure, user) for user in tap.users]
    return not any("avgpool" in name and "adaptive" not in name for name in names)


@once
def fixed_sizes(structure: Structure) -> frozenset[fx.Node]:
    """The operations without weights that make the same spatial size of every map: adaptive poolings, resizing or
    cutting to given sides. At the example's size they may keep the shape. Found by trying a larger map."""
    return frozenset(node for node in structure.trace.graph.nodes if _fixes_size(structure, node))


def _fixes_size(structure: Structure, node: fx.Node) -> bool:
    sources = node.all_input_nodes
    if len(sources) != 1 or node.op not in ("call_function", "call_method", "call_module") or node.meta["mutates"]:
        return False
    source = sources[0]
    if not (is_map(source) and is_map(node)) or structure.trace.parameters(node):
        return False
    shape, sizes = list(structure.shape(source)), structure.spatial(source)
    if not sizes or len(sizes) != len(structure.spatial(node)):
        return False
    first = 1 if source in structure.channels_last else 2
    shape[first: first + len(sizes)] = [2 * size + 1 for size in sizes]
    try:
        with quiet(), structure.trace.mode, torch.no_grad():
            larger = torch.empty(shape, dtype=tensor_of(source).dtype, device="cpu")
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _: larger)
            made = computed(structure.trace, node, args, kwargs)
    except Exception:  # noqa: BLE001 - it takes maps of one size only
        return False
    return isinstance(made, Tensor) and made.shape == tensor_of(node).shape


_ATTENTION = ("matmul", "bmm", "baddbmm", "einsum", "scaleddotproductattention", "multiheadattention")


def is_queried(structure: Structure, start: fx.Node, end: fx.Node) -> bool:
    """Whether the positions at ``end`` are those of queries that the data has no part in (object queries, latents):
    what they stand for is for attention to find, and no convolution on neighboring positions does."""
    return structure.positions(start) != structure.positions(end) and any(
        name_of(structure, node) in _ATTENTION and {True, False} == {
            by_values(structure, source) for source in node.all_input_nodes
            if source.op != "get_attr" and is_float_tensor(source)}
        for node in region_between(structure, start, end))


@once
def by_values(structure: Structure, node: fx.Node) -> bool:
    """Whether a value is computed from the values of the data, not from their sizes and from parameters alone (the
    reference points of queries)."""
    return any(node in descendants(source, values=True) for source in structure.data)


def name_of(structure: Structure, node: fx.Node) -> str:
    """What a node calls, in small letters."""
    module = structure.trace.module(node)
    name = node.target if module is None else type(module).__name__
    return (name if isinstance(name, str) else getattr(name, "__name__", "")).lower().replace("_", "")


def is_map(node: fx.Node) -> bool:
    return isinstance(node.meta["value"], Tensor) and is_float(node.meta["value"])
