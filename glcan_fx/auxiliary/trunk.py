"""Analog features: what an auxiliary network makes of taps that are still to come, on a shortened trunk.

Regions of the trunk that keep the shape are dropped (or, with ``depth``, sampled evenly, as in AugLocal, arXiv
2402.17318, section 3.2), a region that changes the shape leaves one convolution with the source's own kind of norm and
activation (GLCAN, arXiv 2406.00446, section 4.1).
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise, takewhile

from torch import fx

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.auxiliary.stage import fixes_size_of_all, reaches, repeat, stage
from glcan_fx.auxiliary.tails import by_values, fixed_sizes, is_map, is_queried
from glcan_fx.errors import PlanError
from glcan_fx.layers import narrowed
from glcan_fx.structure.nodes import ancestors, is_float_tensor, is_size, tensor_of
from glcan_fx.structure.structure import Structure, region_between


def synthesize_taps(
    build: Builder, cut: fx.Node, own: fx.Node, missing: list[fx.Node], width: float, depth: int, lean: bool,
    predictions: bool,
) -> None:
    """Walk the trunk from the cut and make the missing taps on the way."""
    structure = build.structure
    missing = list(dict.fromkeys(structure.together(node)[0] for node in missing))
    wanted = {*missing, *(unit.end for unit in structure.units), *_joins(structure)}
    order = {node: index for index, node in enumerate(structure.chain)}
    ahead = [node for node in structure.chain[order[cut] + 1:] if node in wanted]
    ahead = ahead[: max((i + 1 for i, node in enumerate(ahead) if node in missing), default=0)]
    way = _without_detours(structure, _way(structure, cut, ahead, missing), missing)
    keep = _sampled_blocks(structure, way, depth)
    interface = structure.interface if predictions else frozenset()
    value, present, narrow = own, cut, False
    regions = Regions(build, cut, width, lean, build.side_by_side(cut, own))
    for index, (start, end) in enumerate(pairwise(way)):
        with build.each_stream(end):
            same = structure.shape(start) == structure.shape(end)
            if (same and end in keep) or not _can_shorten(structure, start, end):
                value = regions.copy(start, end, f"block{index}")
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
        regions.made.update(build.side_by_side(end, value))
    for tap in missing:
        with build.each_stream(tap):
            _beside_the_chain(regions, tap, order, own)


def _beside_the_chain(regions: "Regions", tap: fx.Node, order: Mapping[fx.Node, int], own: fx.Node) -> None:
    """Make a tap that is not on the chain from the nearest value of the chain before it."""
    build, cut, structure = regions.build, regions.cut, regions.build.structure
    if tap not in build.values and not by_values(structure, tap):
        regions.again(tap, f"tap_{tap.name}")
    elif tap not in build.values:
        above = ancestors([tap])
        start = next((n for n in reversed(structure.chain) if n in above and n is not tap), structure.chain[0])
        base = own if order.get(start, -1) <= order[cut] else build.values.get(start, own)
        origin = start if order.get(start, -1) > order[cut] and start in build.values else cut
        same = structure.shape(origin) == structure.shape(tap)
        build.values[tap] = base if same else stage(
            build, origin, tap, base, origin, f"tap_{tap.name}", regions.width, regions.lean)


def _joins(structure: Structure) -> list[fx.Node]:
    """The values of the trunk in which streams that were side by side have become one."""
    return [end for start, end in pairwise(structure.chain) if is_float_tensor(end) and _join(structure, start, end)]


def _join(structure: Structure, start: fx.Node, end: fx.Node) -> bool:
    return len(structure.together(start)) > len(structure.together(end))


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
        present = {structure.shape(node) for node in way}
        for node in region:
            asked = {source for source in node.all_input_nodes
                     if source in dependent and source not in made and (is_size(node) or is_size(source))}
            if any(structure.shape(value) not in present for value in _measured(asked, made)):
                return True
            if is_float_tensor(node):
                present.add(structure.shape(node))
        return False

    for end in ahead:
        while len(way) > 1 and way[-1] not in missing and not _can_shorten(structure, way[-1], end) and (
                asks_for_what_is_not_made(way[-1], end)):
            way.pop()
        way.append(end)
    return way


def _measured(sizes: Set[fx.Node], made: Set[fx.Node]) -> set[fx.Node]:
    """The values that sizes are of, up to what is made."""
    found, stack = set[fx.Node](), list(sizes)
    while stack:
        node = stack.pop()
        if is_size(node):
            stack += [source for source in node.all_input_nodes if source not in made]
        else:
            found.add(node)
    return found


def _without_detours(structure: Structure, way: list[fx.Node], missing: list[fx.Node]) -> list[fx.Node]:
    """The way without values of another shape (a map in windows) between two of the same, if none of them is missing.
    """
    def alike(a: fx.Node, b: fx.Node) -> bool:
        return structure.shape(a) == structure.shape(b) and not _join(structure, a, b) and (
            (a in structure.channels_last) == (b in structure.channels_last))

    found = way[:1]
    for index, node in enumerate(way[1:], 1):
        needed = takewhile(lambda before: before not in missing, way[index:-1])
        returns = any(alike(found[-1], way[index + 1 + steps]) for steps, _ in enumerate(needed))
        if alike(found[-1], node) or not returns:
            found.append(node)
    return found


def _sampled_blocks(structure: Structure, way: list[fx.Node], depth: int) -> set[fx.Node]:
    """``depth`` of the shape-keeping blocks ahead, sampled evenly (AugLocal's rule)."""
    blocks = [end for start, end in pairwise(way) if structure.shape(start) == structure.shape(end)]
    if depth >= len(blocks):
        return set(blocks) if depth else set()
    return {blocks[round((j + 1) * (len(blocks) - 1) / depth)] for j in range(depth)}


def _can_shorten(structure: Structure, start: fx.Node, end: fx.Node) -> bool:
    same_rank = len(structure.spatial(start)) == len(structure.spatial(end)) and len(structure.shape(start)) > 2
    return same_rank and not _join(structure, start, end) and reaches(structure, start, end) and not is_queried(
        structure, start, end)


@dataclass
class Regions:
    """Fresh copies of regions of the trunk. made: what stands for the values of the trunk behind the cut, so far."""

    build: Builder
    cut: fx.Node
    width: float
    lean: bool
    made: dict[fx.Node, fx.Node]

    def copy(self, start: fx.Node, end: fx.Node, prefix: str) -> fx.Node:
        """A copy of what lies between two values, applied to what stands for the first. Raises PlanError where it reads
        something that cannot be made."""
        build, structure = self.build, self.build.structure
        known, dependent, context = structure.known_by(self.cut), structure.dependent, structure.context
        region = [node for node in region_between(structure, start, end) if node not in known]
        saved = dict(build.values)
        build.values |= {node: self.made[node] for node in structure.together(start)}
        for node in region:
            if node.op == "placeholder":
                build.input(node)
                continue
            for source in node.all_input_nodes:
                if source in build.values or source in region:
                    continue
                if source in dependent and (source in known or source not in context):
                    self._provide(source, prefix)
                else:
                    self.again(source, prefix)
            build.copy(node, prefix)
        result = build.values[end]
        build.values = {**saved, **{node: build.values[node] for node in build.inputs if node in build.values}}
        return result

    def again(self, node: fx.Node, prefix: str) -> None:
        """Compute a value as the model does, from what is known at the cut."""
        build, structure = self.build, self.build.structure
        if node in build.values:
            return
        if node.op == "placeholder" or node in structure.dependent and node in structure.known_by(self.cut):
            build.input(node)
            return
        for source in node.all_input_nodes:
            self.again(source, prefix)
        build.copy(node, prefix)

    def _provide(self, node: fx.Node, prefix: str) -> None:
        """Let there be a value that a copied region reads from beside it: context or what an earlier block made as it
        is, a size by computing it again. For another value behind the cut (a long skip) the last one of its shape, or
        one convolution."""
        build, structure = self.build, self.build.structure
        if node in build.values:
            return
        if node in structure.known_by(self.cut):
            build.input(node)
            return
        if is_size(node):
            for source in node.all_input_nodes:
                self._provide(source, prefix)
            build.copy(node, prefix)
            return
        values, above = {**build.values, **self.made}, ancestors([node])
        alike = [other for other in values if _same_shape(structure, other, node)]
        if alike:
            build.values[node] = values[next((other for other in reversed(alike) if other in above), alike[-1])]
            return
        origin = next(other for other in reversed(self.made) if other in above or other is self.cut)
        if not is_map(node) or len(structure.spatial(node)) != len(structure.spatial(origin)):
            raise PlanError(f"a region that is copied also reads '{node.name}', which the auxiliary network does "
                            "not have: choose other split points.")
        build.values[node] = stage(build, origin, node, self.made[origin], origin, f"{prefix}.{node.name}", self.width,
                                   self.lean)


def _same_shape(structure: Structure, a: fx.Node, b: fx.Node) -> bool:
    return is_float_tensor(a) and is_float_tensor(b) and structure.shape(a) == structure.shape(b)


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
