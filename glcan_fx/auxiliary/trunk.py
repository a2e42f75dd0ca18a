"""Analog features: what an auxiliary network makes of taps that are still to come, on a shortened trunk.

Regions of the trunk that keep the shape are dropped (or, with ``depth``, sampled evenly, as in AugLocal, arXiv
2402.17318, section 3.2), a region that changes the shape leaves one convolution with the source's own kind of norm and
activation (GLCAN, arXiv 2406.00446, section 4.1).
"""

from collections.abc import Sequence
from itertools import pairwise, takewhile

from torch import fx

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.auxiliary.stage import fixes_size_of_all, reaches, region_between, repeat, stage
from glcan_fx.auxiliary.tails import fixed_sizes
from glcan_fx.capture.trace import is_float
from glcan_fx.errors import PlanError
from glcan_fx.layers import narrowed
from glcan_fx.structure.nodes import ancestors, is_size, tensor_of
from glcan_fx.structure.structure import Structure


def synthesize_taps(
    build: Builder, cut: fx.Node, own: fx.Node, missing: list[fx.Node], width: float, depth: int, lean: bool,
    predictions: bool,
) -> None:
    """Walk the trunk from the cut and make the missing taps on the way."""
    structure = build.structure
    wanted = {*missing, *(unit.end for unit in structure.units)}
    order = {node: index for index, node in enumerate(structure.chain)}
    ahead = [node for node in structure.chain[order[cut] + 1:] if node in wanted]
    ahead = ahead[: max((i + 1 for i, node in enumerate(ahead) if node in missing), default=0)]
    way = _way(structure, cut, ahead, missing)
    keep = _sampled_blocks(structure, way, depth)
    interface = structure.interface if predictions else frozenset()
    value, present, narrow = own, cut, False
    for index, (start, end) in enumerate(pairwise(way)):
        same = structure.shape(start) == structure.shape(end)
        if (same and end in keep) or not _can_shorten(structure, start, end):
            value = _copy_region(build, cut, start, end, value, f"block{index}")
            present = end
            if not narrow:
                build.full.add(f"block{index}")
        elif not same:
            final = predictions and _is_output(structure, end, way[index + 1:]) or any(
                structure.trace.module(node) in interface for node in region_between(structure, start, end))
            final_width = 1.0 if final else width
            value = stage(build, start, end, value, present, f"stage{index}", final_width, lean)
            present = end
            narrow = narrowed(structure.channels(end), final_width) < structure.channels(end)
        else:
            value = _resized(build, start, end, value, f"sized{index}")
        if end in missing:
            made, needed = tensor_of(present).dtype, tensor_of(end).dtype
            build.values[end] = value if made == needed else build.graph.call_method("to", (value, needed))
    for tap in missing:  # taps beside the chain: from the nearest value of the chain before them
        if tap not in build.values:
            above = ancestors([tap])
            start = next((n for n in reversed(structure.chain) if n in above and n is not tap), structure.chain[0])
            base = own if order.get(start, -1) <= order[cut] else build.values.get(start, own)
            origin = start if order.get(start, -1) > order[cut] and start in build.values else cut
            same = structure.shape(origin) == structure.shape(tap)
            build.values[tap] = base if same else stage(
                build, origin, tap, base, origin, f"tap_{tap.name}", width, lean)


def _is_output(structure: Structure, made: fx.Node, ahead: Sequence[fx.Node]) -> bool:
    """Whether a value of the trunk, or one of its shape behind it, is what the network returns: what follows the
    network takes all of its channels."""
    outputs = structure.trace.output.all_input_nodes
    same = takewhile(lambda node: structure.shape(node) == structure.shape(made), ahead)
    return any(node in outputs for node in same)


def _way(structure: Structure, cut: fx.Node, ahead: list[fx.Node], missing: list[fx.Node]) -> list[fx.Node]:
    """The values of the trunk that are made one after the other. Where tokens become a map by the sizes of another
    that is not made, the new map is made from what was before the tokens."""
    known, dependent = structure.known_by(cut), structure.dependent
    way = [cut]

    def asks_for_what_is_not_made(start: fx.Node, end: fx.Node) -> bool:
        region = region_between(structure, start, end)
        made = known | {start, *region}
        return any(source in dependent and source not in made and (is_size(node) or is_size(source))
                   for node in region for source in node.all_input_nodes)

    for end in ahead:
        while len(way) > 1 and way[-1] not in missing and not _can_shorten(structure, way[-1], end) and (
                asks_for_what_is_not_made(way[-1], end)):
            way.pop()
        way.append(end)
    return way


def _sampled_blocks(structure: Structure, way: list[fx.Node], depth: int) -> set[fx.Node]:
    """``depth`` of the shape-keeping blocks ahead, sampled evenly (AugLocal's rule)."""
    blocks = [end for start, end in pairwise(way) if structure.shape(start) == structure.shape(end)]
    if depth >= len(blocks):
        return set(blocks) if depth else set()
    return {blocks[round((j + 1) * (len(blocks) - 1) / depth)] for j in range(depth)}


def _can_shorten(structure: Structure, start: fx.Node, end: fx.Node) -> bool:
    same_rank = len(structure.spatial(start)) == len(structure.spatial(end)) and len(structure.shape(start)) > 2
    return same_rank and reaches(structure, start, end)


def _copy_region(
    build: Builder, cut: fx.Node, start: fx.Node, end: fx.Node, value: fx.Node, prefix: str
) -> fx.Node:
    """A fresh copy of a trunk region, applied to ``value``."""
    structure = build.structure
    known, dependent, context = structure.known_by(cut), structure.dependent, structure.context
    region = [node for node in region_between(build.structure, start, end) if node not in known]
    saved = dict(build.values)
    build.values[start] = value
    for node in region:
        if node.op == "placeholder":
            build.input(node)
            continue
        for source in node.all_input_nodes:
            if source not in build.values and source not in region:
                beside = source in context or not is_float(source.meta["value"])
                if source in dependent and source in known and beside:
                    build.input(source)  # context, or a size, that is known by then
                    continue
                if source in dependent and source not in context:
                    raise PlanError(
                        f"the region up to '{end.name}' also reads '{source.name}', which the auxiliary network does "
                        "not have: use GLCAN(depth=0), or other split points."
                    )
                for extra in [n for n in structure.trace.graph.nodes if n in ancestors([source])]:
                    if extra.op == "placeholder":
                        build.input(extra)
                    elif extra not in build.values:
                        build.copy(extra, prefix)
        build.copy(node, prefix)
    result = build.values[end]
    build.values = {**saved, **{node: build.values[node] for node in build.inputs if node in build.values}}
    return result


def _resized(build: Builder, start: fx.Node, end: fx.Node, value: fx.Node, name: str) -> fx.Node:
    """``value`` in place of ``end``, where what lies between is dropped, as it keeps the example's shape: with as many
    positions as ``end`` has at every size."""
    structure = build.structure
    alike = [node for node in fixed_sizes(structure) if structure.spatial(node) == structure.spatial(end)
             and len(structure.shape(node)) == len(structure.shape(end))
             and (node in structure.channels_last) == (start in structure.channels_last)]
    region = region_between(structure, start, end) if alike else []
    fixed = [node for node in region if node in alike and fixes_size_of_all(structure, set(region), start, node, end)]
    return repeat(build, fixed[-1], value, name) if fixed else value
