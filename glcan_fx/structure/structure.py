"""The structure of a recorded network: the trunk, its units, where it can be cut, and what the tail reads from it."""

from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, fx, nn

from glcan_fx.capture.calls import Call
from glcan_fx.capture.trace import Trace
from glcan_fx.devices import Work
from glcan_fx.layers import predictors
from glcan_fx.pytree import tensors_in
from glcan_fx.structure.context import carrying_data
from glcan_fx.structure.layout import count_positions
from glcan_fx.structure.nodes import Groups, ancestors, descendants, input_dependent, is_size, tensor_of


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
    are the inputs that it begins with, all others are context. ``groups``: values that are side by side (several images
    through one encoder), of which the chain has the first: a local module that ends with one makes all of them.
    ``found``: what functions of it found, see ``once``."""

    trace: Trace
    chain: list[fx.Node]
    units: list[Unit]
    taps: list[Tap]
    channels_last: frozenset[fx.Node]
    data: frozenset[fx.Node]
    groups: Groups = field(default_factory=dict)
    found: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def together(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """A value with those that are side by side with it, in the order of the streams."""
        return self.groups.get(node, (node,))

    def above(self, node: fx.Node, known: Set[fx.Node] = frozenset()) -> set[fx.Node]:
        """What a value, and those that are side by side with it, are computed from, but for what is ``known``."""
        return ancestors([node], known, self.groups)

    @cached_property
    def shares_layers(self) -> bool:
        """Whether the same layers compute the values that are side by side."""
        return all(len({str(node.target) for node in group}) == 1 for node, group in self.groups.items()
                   if node in self.trace.layers)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(tensor_of(node).shape)

    def channels(self, node: fx.Node) -> int:
        shape = self.shape(node)
        return shape[-1 if node in self.channels_last or len(shape) < 3 else 1] if len(shape) > 1 else 1

    def positions(self, node: fx.Node) -> int:
        """Number of positions per image: the product of the spatial (or token) sizes; 1 where there are none."""
        return count_positions(self.shape(node), node in self.channels_last)

    def stride(self, node: fx.Node) -> int:
        """Input size over this value's size along the last spatial axis; 0 where the value has no positions."""
        source, value = self.spatial(self.chain[0]), self.spatial(node)
        return round(source[-1] / value[-1]) if source and len(value) == len(source) else 0

    def spatial(self, node: fx.Node) -> tuple[int, ...]:
        shape = self.shape(node)
        return shape[1:-1] if node in self.channels_last else shape[2:]

    @cached_property
    def trunk(self) -> frozenset[fx.Node]:
        """Nodes that the trunk's last value is computed from."""
        return frozenset(self.above(self.chain[-1]))

    @cached_property
    def dependent(self) -> frozenset[fx.Node]:
        """Nodes that are computed from the inputs, or change a buffer."""
        return frozenset(input_dependent(self.trace.graph))

    @cached_property
    def context(self) -> frozenset[fx.Node]:
        """Nodes that are computed from inputs that are not the data (labels, masks, prompts), or of truth values (where
        tokens are padding), and from nothing else."""
        return self.dependent - carrying_data(self.trace, self.data)

    def uses(self, cuts: Sequence[fx.Node]) -> list[Used]:
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
    def _used(self) -> dict[tuple[fx.Node, ...], list[Used]]:
        return {}

    @cached_property
    def interface(self) -> frozenset[nn.Module]:
        """The layers that make the network's outputs."""
        return frozenset(predictors(self.trace.shadow, self.trace.output.meta["value"]))

    @cached_property
    def _sizes(self) -> list[fx.Node]:
        return [node for node in self.trace.graph.nodes if node.all_input_nodes and is_size(node)]

    def known_by(self, cut: fx.Node) -> set[fx.Node]:
        """What a value of the trunk is computed from, and the sizes of that."""
        return self._with_sizes(self.above(cut), cut)

    def _with_sizes(self, known: set[fx.Node], cut: fx.Node) -> set[fx.Node]:
        for node in self._sizes:
            if all(source in known and source not in self.together(cut) for source in node.all_input_nodes):
                known.add(node)
        return known

    def assign(self, cuts: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """Which local module each node of the graph belongs to: the first whose cut it is needed for. Sizes belong to
        what they are of, so that it need not be kept."""
        key = tuple(cuts)
        if key not in self._assigned:
            owner: dict[fx.Node, int] = {}
            known: set[fx.Node] = set()
            divided = self.divided(cuts)
            for index, cut in enumerate(cuts):
                known = self._with_sizes(self._with_calls(known, self.above(cut, known), divided), cut)
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

    def divided(self, cuts: Sequence[fx.Node]) -> set[Call]:
        """The calls of modules that go on behind one of the cuts with layers that have parameters."""
        found: set[Call] = set()
        for end in (value for cut in cuts for value in self.together(cut)):
            calls = [call for call in end.meta["call"].around() if call.path not in end.meta["returned_by"]] if (
                end.meta.get("call")) else []
            if calls:
                behind = {node for node in descendants(end) if node in self._weighted}
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


_T = TypeVar("_T")


def once(function: Callable[..., _T]) -> Callable[..., _T]:
    """Remember in a structure what a function of it, and of arguments that can be keys, returned."""
    @wraps(function)
    def remembered(structure: Structure, *arguments: Hashable) -> _T:
        key = function, arguments
        if key not in structure.found:
            structure.found[key] = function(structure, *arguments)
        found: _T = structure.found[key]
        return found
    return remembered


@once
def region_between(structure: Structure, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Nodes between two values of the trunk (start excluded, end included), in graph order."""
    behind, before = ancestors([end]), structure.above(start)
    return [node for node in structure.trace.graph.nodes if node in behind and node not in before]


def multiply_adds(structure: Structure, nodes: Iterable[fx.Node] | None = None) -> float:
    """Of one forward pass at the example's size, or some of its nodes: from the layers' weights and the positions that
    they are applied to (a transposed convolution's are its input's)."""
    total = 0.0
    for node in structure.trace.graph.nodes if nodes is None else nodes:
        for tensor in list(tensors_in(node.meta.get("value")))[:1]:
            weights = sum(p.numel() for p in structure.trace.parameters(node) if p.dim() > 1)
            at = node.all_input_nodes[0] if weights and _is_transposed(structure.trace, node) else node
            positions = structure.positions(at) if isinstance(at.meta["value"], Tensor) else 1
            total += weights * positions * (tensor.shape[0] if tensor.dim() else 1)
    return total


def work_of(structure: Structure, nodes: Iterable[fx.Node]) -> Work:
    """What the operators of some nodes do in a forward pass at the example's size; a module is one."""
    nodes = list(nodes)
    moved = operators = 0
    for node in nodes:
        given = [tensor for source in node.all_input_nodes for tensor in tensors_in(source.meta.get("value"))]
        made = list(tensors_in(node.meta.get("value")))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        looks_only = {tensor.untyped_storage()._cdata for tensor in made} <= known and not node.meta["mutates"]
        if node.op not in ("placeholder", "get_attr", "output") and not looks_only:
            operators += 1
            moved += sum(t.numel() * t.element_size() for t in (*given, *made, *structure.trace.parameters(node)))
    return Work(2 * multiply_adds(structure, nodes), moved, operators)


def _is_transposed(trace: Trace, node: fx.Node) -> bool:
    called = getattr(node.target, "__name__", "")
    return "conv_transpose" in called or bool(getattr(trace.module(node), "transposed", False))
