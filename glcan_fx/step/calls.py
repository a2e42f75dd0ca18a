"""The graph of a step calls the model's own modules as a whole, wherever nothing divides their calls.

The recorded graph of single operations is for analysis. Here every recorded call of a module that lies in one local
module becomes one node again, with the model's own arguments; single operations are left of what a cut divides, the
root's forward and the containers that a cut passes through. So hooks, control flow, random numbers and state inside
such calls are the model's own, as they are when the step runs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx

from glcan_fx.capture.calls import Call, after_change, left_on
from glcan_fx.capture.trace import Trace
from glcan_fx.pytree import plain_data


class Label(NamedTuple):
    """What must be the same of all that a whole call computes: its local module, the runs of blocks that run again that
    it lies in, outermost first, and whether it is the tail that runs slice by slice."""

    module: int
    runs: tuple[int, ...] = ()
    tail: bool = False


@dataclass(frozen=True)
class WholeCalls:
    """A graph of whole calls: ``at`` maps the recorded nodes that are still known to its nodes; ``label`` is what
    the recorded nodes of each were labelled; ``opened`` are the calls whose operations are written out."""

    graph: fx.Graph
    at: dict[fx.Node, fx.Node]
    label: dict[fx.Node, Label]
    opened: tuple[Call, ...]


def whole_calls(trace: Trace, label: Mapping[fx.Node, Label], wanted: Iterable[fx.Node]) -> WholeCalls:
    """Call whole modules where all that a call computes from the inputs has one label.

    wanted: recorded nodes that others than the graph's own nodes read. A call stays open where one of these, or a value
    that is read outside, cannot be had from what the call returns or leaves on its modules.
    """
    return _Folding(trace, label, wanted).fold()


@dataclass
class _Folding:
    trace: Trace
    label: Mapping[fx.Node, Label]
    wanted: Iterable[fx.Node]
    graph: fx.Graph = field(default_factory=fx.Graph)
    at: dict[fx.Node, fx.Node] = field(default_factory=dict)
    labels: dict[fx.Node, Label] = field(default_factory=dict)

    def fold(self) -> WholeCalls:
        wanted = {*self.wanted, *self.trace.output.all_input_nodes}
        inside = self.trace.inside
        whole: dict[Call, bool] = {}
        for node in self.trace.graph.nodes:
            if node.op in ("placeholder", "output"):
                if node.op == "placeholder":
                    self._copy(node)
                continue
            outermost = None
            for call in reversed(list(node.meta["call"].around()) if node.meta.get("call") else []):
                if call not in whole:
                    whole[call] = self._undivided(call, inside[call], wanted)
                if whole[call]:
                    outermost = call
                    break
            if outermost is None:
                self._copy(node)
            elif outermost not in self._done:
                self._done.add(outermost)
                self._call(outermost, inside[outermost], wanted)
        kept = {self.at[node] for node in wanted}
        for node in reversed(self.graph.nodes):  # sizes and parameters that only divided calls would be given
            if not node.users and node.meta.get("derived") and node not in kept:
                self.graph.erase_node(node)
                self.labels.pop(node, None)
        alive = set(self.graph.nodes)
        at = {node: made for node, made in self.at.items() if made in alive}
        return WholeCalls(self.graph, at, self.labels, tuple(call for call, folded in whole.items() if not folded))

    def __post_init__(self) -> None:
        self._done: set[Call] = set()

    # ---- which calls

    def _undivided(self, call: Call, nodes: set[fx.Node], wanted: set[fx.Node]) -> bool:
        if not call.path or call.args is None:
            return False
        labels = {self.label[node] for node in nodes if node in self.label}
        given = [self.label[node] for node in call.given() if node in self.label]
        if any(before.module > label.module for before in given for label in labels):  # made later, and not needed
            return False
        return len(labels) <= 1 and all(
            self._obtainable(call, nodes, node) for node in self._outlets(call, nodes, wanted))

    def _obtainable(self, call: Call, nodes: set[fx.Node], node: fx.Node) -> bool:
        """Whether a value that was made in a call can be had behind it."""
        if node in call.results or node in call.left or node not in nodes:
            return True
        changed = node.target is after_change and node.args[0] not in nodes
        again = bool(node.meta.get("derived")) and all(
            self._obtainable(call, nodes, source) for source in node.all_input_nodes)
        return changed or again and node.target is not after_change

    def _outlets(self, call: Call, nodes: set[fx.Node], wanted: set[fx.Node]) -> list[fx.Node]:
        """Those of a call's nodes that are read outside of it, or given to a call there."""
        given = self.trace.given
        return [node for node in nodes if node in wanted or any(user not in nodes for user in node.users)
                or any(call not in other.around() for other in given.get(node, ()))]

    # ---- nodes

    def _copy(self, node: fx.Node) -> fx.Node:
        made = self.graph.node_copy(node, self.at.__getitem__)
        made.meta = {**node.meta, "mutates": {self.at[source] for source in node.meta["mutates"]}}
        if node in self.label:
            self.labels[made] = self.label[node]
        self.at[node] = made
        return made

    def _call(self, call: Call, nodes: set[fx.Node], wanted: set[fx.Node]) -> None:
        """One node for a call, and nodes for those of its values that others read."""
        assert call.args is not None
        args: Any = fx.map_arg(call.args, self.at.__getitem__)
        kwargs: Any = fx.map_arg(call.kwargs, self.at.__getitem__)
        made = self.graph.create_node("call_module", call.path, args, kwargs, name=call.path.replace(".", "_"))
        outside = {source for node in nodes for source in node.meta["mutates"]} - nodes
        made.meta = {
            "module": call.path.rpartition(".")[0], "returned_by": [call.path], "value": plain_data(call.value),
            "returned": call.value,
            "saved": sum(node.meta["saved"] for node in nodes), "mutates": {self.at[source] for source in outside},
            "storages": {key: size for node in nodes for key, size in node.meta["storages"].items()},
            "random": any(node.meta.get("random") for node in nodes), "recorded": nodes,
            "overwritten": any(node.meta["overwritten"] for node in nodes if call.results.get(node) == ())}
        labels = {self.label[node] for node in nodes if node in self.label}
        if labels:
            self.labels[made] = next(iter(labels))
        for node in sorted(self._outlets(call, nodes, wanted)):
            self._outlet(call, nodes, node, made)

    def _outlet(self, call: Call, nodes: set[fx.Node], node: fx.Node, made: fx.Node) -> fx.Node:
        if node in self.at:
            return self.at[node]
        if node in call.results:
            found = made
            for depth, (function, key) in enumerate(call.results[node]):
                found = self._part(found, function, key)
                last = depth == len(call.results[node]) - 1
                found.meta.update(_meta(node, "value", "overwritten") if last else {})
            self.at[node] = found
        elif node in call.left:
            owner, _, name = call.left[node].rpartition(".")
            holder = self.graph.create_node("get_attr", owner, (), {})
            holder.meta = {"module": owner, "mutates": set(), "saved": 0, "storages": {}, "overwritten": False,
                           "value": None, "returned_by": []}
            self.at[node] = self.graph.create_node("call_function", left_on, (holder, name, made), {})
            self.at[node].meta = {**node.meta, "mutates": set(), "saved": 0, "storages": {}}
        else:  # made again of what there is
            for source in node.all_input_nodes:
                if source in nodes and not (node.target is after_change and source is not node.args[0]):
                    self._outlet(call, nodes, source, made)
            known = {source: self.at.get(source, made) for source in node.all_input_nodes}
            self.at[node] = self.graph.node_copy(node, known.__getitem__)
            self.at[node].meta = {**node.meta, "mutates": set()}
        if node in self.label:
            self.labels[self.at[node]] = self.label[node]
        return self.at[node]

    def _part(self, whole: fx.Node, function: Any, key: Any) -> fx.Node:
        for user in whole.users:
            if user.target is function and user.args == (whole, key):
                return user
        part = self.graph.create_node("call_function", function, (whole, key), {})
        value = function(whole.meta["returned"], key)
        part.meta = {"module": whole.meta["module"], "returned_by": [], "value": plain_data(value), "returned": value,
                     "saved": 0, "mutates": set(), "storages": {}, "overwritten": False, "derived": True}
        if whole in self.labels:
            self.labels[part] = self.labels[whole]
        return part


def _meta(node: fx.Node, *names: str) -> dict[str, Any]:
    return {name: node.meta[name] for name in names}
