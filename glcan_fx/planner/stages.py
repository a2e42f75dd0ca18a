"""What the blocks of a network take in a training step: bytes for backward, gradients, and operations to run again."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from glcan_fx.devices import Work
from glcan_fx.pytree import tensors_in
from glcan_fx.structure.nodes import is_size
from glcan_fx.structure.parts import parts_of
from glcan_fx.structure.structure import Structure, work_of


@dataclass(frozen=True)
class Stage:
    """A block of the trunk, or a part of neck and head.

    In bytes: ``saved`` is what it keeps for backward, its output included; ``needs`` is that and the gradients of
    values, at the layer where both are most; ``gradients`` are those of its parameters. ``work``: of its forward
    pass. ``since``, ``until``: a run of stages that runs again begins with stage ``since`` at the latest, and
    ends with ``until`` at the earliest (values that are changed in place); ``again``: whether it may run again.
    """

    name: str
    saved: int
    needs: int
    gradients: int
    work: Work
    since: int
    until: int
    again: bool


class Stages:
    """The stages of a network in order, the trunk's blocks first, and the values that pass from one to others."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._parts = parts_of(structure)
        self.names = [*self._parts.names, *self._parts.behind]
        self.trunk = len(self._parts.names)
        place = {name: index for index, name in enumerate(self.names)}
        self._nodes: list[list[fx.Node]] = [[] for _ in self.names]
        self._at: dict[fx.Node, int] = {}
        for node in structure.trace.graph.nodes:
            index = place.get(self._parts.of.get(node, ""))
            if index is not None and node.op != "output":
                self._nodes[index].append(node)
                self._at[node] = index
        self._sizes: dict[int, int] = {}
        self._made: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._known: dict[tuple[int, int], int] = {}  # what crosses
        self._values()
        self.stages = [self._stage(index) for index in range(len(self.names))]

    def _values(self) -> None:
        for node, index in self._at.items():
            if node.op in ("placeholder", "get_attr"):
                continue
            last = max([index, *(self._at.get(user, len(self.names)) for user in node.users if not is_size(user))])
            for key, size in _storages(node):
                self._sizes[key] = size
                self._made.setdefault(key, index)
                self._last[key] = max(self._last.get(key, index), last)

    def _stage(self, index: int) -> Stage:
        nodes, structure = self._nodes[index], self.structure
        passed = set(self._crossing(index, index + 1))
        kept: dict[int, int] = {}
        needs = 0
        inside, out = self._gradients(index), sum(self._sizes[key] for key in passed)
        place = {node: position for position, node in enumerate(nodes)}
        for node, of_values in zip(nodes, inside, strict=True):
            for key, size in (*node.meta["storages"].items(), *_storages(node)):
                mine = self._made.get(key, index) == index  # what earlier ones made is their output
                if mine and (key in node.meta["storages"] or key in passed):
                    kept[key] = size
            # running again, beside the gradient of the output: a variable outlives its last use by about a line
            held = dict(pair for other in nodes[: place[node] + 1]
                        if max((place.get(user, -1) for user in other.users), default=-1) + 1 >= place[node]
                        for pair in _storages(other) if self._made.get(pair[0], index) == index)
            needs = max(needs, sum(kept.values()) + of_values, sum((kept | held).values()) + out)
        parameters = {id(p): p for node in nodes for p in structure.trace.parameters(node) if p.requires_grad}
        gradients = sum(p.numel() * p.element_size() for p in parameters.values())
        opaque = {part.path for part in structure.trace.report.opaque}
        changed = [self._at.get(source, -1) for node in nodes for source in node.meta["mutates"]]
        over = [self._at.get(user, len(self.names))
                for node in nodes if node.meta["overwritten"] for user in node.users]
        return Stage(self.names[index], sum(kept.values()), needs, gradients,
                     work_of(structure, nodes), min([index, *changed]), max([index, *over]),
                     bool(kept) and not any(str(node.target) in opaque for node in nodes))

    def _gradients(self, index: int) -> list[int]:
        """Bytes of the gradients of values that are live while each node of a stage is processed backward: of what it
        makes, of its inputs, and of what was made before it and is read after it. Without those of values that pass
        the stage (``passing``)."""
        place = {node: position for position, node in enumerate(self._nodes[index])}
        spans: dict[int, tuple[int, int, int]] = {}  # of every value: from its first to its last place, and its bytes
        for node, position in place.items():
            for value in (node, *(source for source in node.all_input_nodes if source in self._at)):
                for key, size in _storages(value):
                    first, last, _ = spans.get(key, (position, position, size))
                    first = -1 if self._made.get(key, index) < index else min(first, place.get(value, position))
                    spans[key] = first, max(last, position), size
        passing = {key for key, made in self._made.items() if made < index < self._last[key]}
        outputs = {node: sum(size for _, size in _storages(node)) for node in place}
        return [outputs[node] + sum(size for key, (first, last, size) in spans.items()
                                    if first < position <= last and key not in passing)
                for node, position in place.items()]

    def _crossing(self, start: int, at: int) -> list[int]:
        """The values made by stages ``start`` and later, before ``at``, and read by ``at`` or later ones."""
        return [key for key, made in self._made.items() if start <= made < at <= self._last[key]]

    def crossing(self, start: int, at: int) -> int:
        """Bytes of the values that stages from ``start`` on made before ``at``, and that ``at`` or later ones read."""
        if (start, at) not in self._known:
            self._known[start, at] = sum(self._sizes[key] for key in self._crossing(start, at))
        return self._known[start, at]

    def may_run(self, start: int, end: int) -> bool:
        """Whether stages from ``start`` on, before ``end``, may run again together."""
        return all(stage.again and stage.since >= start and stage.until < end for stage in self.stages[start:end])

    def passing(self, start: int, at: int) -> int:
        """Bytes of the gradients that wait while ``at`` is processed backward: of the values that stages from ``start``
        on made before it, and that later ones read."""
        return sum(self._sizes[key] for key, made in self._made.items() if start <= made < at < self._last[key])


def _storages(node: fx.Node) -> Iterable[tuple[int, int]]:
    """The memory of a node's values, by key, with its bytes."""
    for tensor in tensors_in(node.meta.get("value")):
        storage = tensor.untyped_storage()
        yield storage._cdata, storage.nbytes()
