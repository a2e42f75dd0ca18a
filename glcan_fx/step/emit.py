"""Pass 6, emit: write the training step as one graph that a person can read.

Local modules stand in order; between them stand explicit detach nodes, writes to and reads from the feature cache, the
auxiliary networks, the local losses and their backward passes. fx's generated code drops every value after its last
use, which is what frees a module's activations, and a cached feature after its last reader.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from torch import fx

from glcan_fx.auxiliary.builder import Auxiliary
from glcan_fx.capture.trace import is_float
from glcan_fx.fx_utils import Parts, with_headlines
from glcan_fx.plans.plan import Reach, Run
from glcan_fx.step import output as passing
from glcan_fx.step.calls import Label, whole_calls
from glcan_fx.step.pooling import pool_first
from glcan_fx.step.tail import sliced_tail, tail_inputs
from glcan_fx.structure.nodes import ancestors
from glcan_fx.structure.parts import parts_of
from glcan_fx.structure.structure import Structure
from glcan_fx.tasks import Task

Readers = Mapping[fx.Node, Set[int]]
"""The local modules, other than its own, that read each value."""


@dataclass(frozen=True)
class Emitted:
    """The graph of a training step, what it calls as modules of their own on the model's layers, the paths of the
    modules whose operations are written out, and the compiled part's forward alone, of the same calls."""

    graph: fx.Graph
    parts: Parts
    opened: tuple[str, ...]
    forward: fx.Graph | None


class _Emitter:
    """The graph under construction; ``raw`` holds values as their module made them. Nodes are those of ``calls``."""

    def __init__(
        self, structure: Structure, cuts: Sequence[fx.Node], auxiliaries: Sequence[Auxiliary], tail: Sequence[fx.Node],
        recomputed: Sequence[Sequence[Run]], reaches: Sequence[Reach], agree: bool,
    ) -> None:
        self.reaches, self.agree = reaches, agree
        self.graph = fx.Graph()
        self.trace = structure.trace
        ends = [structure.together(cut) for cut in cuts]
        read = [auxiliary.inputs for auxiliary in auxiliaries]
        calls = whole_calls(structure.trace, _labels(structure, cuts, tail, recomputed),
                            [node for nodes in (*ends, *read) for node in nodes])
        self.calls = calls
        self.opened = tuple(dict.fromkeys(call.path for call in calls.opened))
        pool_first(structure.trace, calls, [calls.at[node] for nodes in ends for node in nodes])
        self.ends = [[calls.at[node] for node in nodes] for nodes in ends]
        self.nodes = [node for node in calls.graph.nodes if node.op != "placeholder"]
        self.owner = {node: label.module for node, label in calls.label.items()}
        self.read_by_losses = {calls.at[node] for nodes in read for node in nodes}
        self.left = {calls.at[node]: name for call in calls.opened for node, name in call.left.items()
                     if node in calls.at}
        self.tail = self._tail()
        self.raw: dict[fx.Node, fx.Node] = {}
        self.constant: dict[tuple[fx.Node, int], fx.Node] = {}
        self.cut: dict[fx.Node, fx.Node] = {}
        self.leaf: dict[fx.Node, fx.Node] = {}  # through which a later module's loss reaches this value's module
        self.passed: dict[fx.Node, fx.Node] = {}  # what later modules read in place of these
        self.cached: dict[fx.Node, fx.Node] = {}
        self.read: dict[tuple[fx.Node, int], fx.Node] = {}
        self.parts: Parts = {}

    def _tail(self) -> list[fx.Node]:
        """What runs slice by slice; with what of it does not depend on the input, which is not cut into slices."""
        behind = {node for node, label in self.calls.label.items() if label.tail}
        made = behind | {node for node in ancestors(behind) if node not in self.owner and node.op != "placeholder"}
        return [node for node in self.nodes if node in made]

    def view(self, node: fx.Node, module: int) -> fx.Node:
        """A value as local module ``module`` sees it: its own, or detached."""
        if node.op == "placeholder" and (module == 0 or not is_float(node.meta["value"])):
            return self.raw[node]  # module 0 hands the inputs their gradients
        if node not in self.owner and node.op != "placeholder":  # every module computes its own
            if (node, module) not in self.constant:
                self.constant[node, module] = self._copy(node, module)
            return self.constant[node, module]
        if node.op != "placeholder" and self.owner[node] == module or not is_float(node.meta["value"]):
            return self.raw[node]
        if node in self.owner and self._joined(self.owner[node]):
            return self.raw[node]
        if node in self.passed and self._linked(self.owner[node], module):
            return self.passed[node]
        if node in self.cut and self.owner[node] == module - 1:
            return self.cut[node]
        if (node, module) not in self.read:
            self.read[node, module] = self.graph.create_node(
                "call_function", passing.cache_read, (self.cached.get(node, self.raw[node]),),
                name=f"focal_{node.name}"
            )
        return self.read[node, module]

    def _joined(self, module: int) -> bool:
        """Whether the last loss trains a local module, whose graph then lives as long as the last one's."""
        return self.reaches[-1].first <= module < len(self.ends)

    def _linked(self, module: int, reader: int) -> bool:
        """Whether a local loss reaches ``module`` by what ``reader`` computes."""
        return module < reader and any(reach.first <= module and reader <= reach.until for reach in self.reaches[:-1])

    def hand_on(self, module: int, readers: Readers) -> None:
        """Behind a module: its cut for the next one, its other values that are read later for the cache."""
        if self._joined(module):
            return
        for node in self.nodes:
            if self.owner.get(node) != module or not is_float(node.meta["value"]):
                continue
            later, is_cut = set(readers.get(node, ())), node in self.ends[module]
            place = self.ends[module].index(node) if is_cut else 0
            cut = f"cut_{module}_{place}" if place else f"cut_{module}"
            if any(self._linked(module, reader) for reader in later) and node not in self.cached:
                name = cut if is_cut else f"passed_{node.name}"
                made = self.graph.create_node("call_function", passing.leaf, (self.raw[node],), name=name)
                self.leaf[node] = self.passed[node] = self.cached[node] = made
                if node.meta["overwritten"]:
                    self.passed[node] = self.graph.create_node("call_function", passing.copied, (made,))
                continue
            if is_cut:
                op, target = ("call_function", passing.leaf) if self.agree else ("call_method", "detach")
                self.cut[node] = self.graph.create_node(op, target, (self.raw[node],), name=cut)
                later.discard(module + 1)
            if later:
                self.cache(node)

    def sides(self, module: int) -> dict[str, Any]:
        """What a local module's loss reads of the cuts around it, where gradients on both sides of a cut are to agree:
        what it is given, and its output."""
        if not self.agree:
            return {}
        before = self.cut[self.ends[module - 1][0]] if module else None
        return {"sides": (before, self.raw[self.ends[module][0]] if module < len(self.ends) else None)}

    def through(self, reach: Reach) -> tuple[tuple[tuple[fx.Node, fx.Node], ...], ...]:
        """What a loss comes back by, of each local module behind which it is computed, the last one first: pairs of a
        value and what later modules read in its place."""
        return tuple(tuple((self.raw[node], self.leaf[node]) for node in self.leaf if self.owner[node] == module)
                     for module in range(reach.until - 1, reach.first - 1, -1) if not self._joined(module))

    def emit(self, node: fx.Node, module: int, read_later: bool) -> None:
        self.raw[node] = self._copy(node, module)
        if read_later and node.meta["overwritten"] and is_float(node.meta["value"]):
            self.cache(node, keep=True)  # before the operation that overwrites it
        self.leave(node)

    def leave(self, node: fx.Node) -> None:
        """Set the attribute of the model on which a forward that is written out leaves a value."""
        if node in self.left:
            self.graph.create_node("call_module", "aux.leave", (self.left[node], self.raw[node]), name="left")

    def may_run_again(self, group: Sequence[fx.Node], readers: Readers) -> bool:
        """Whether a part keeps something for backward, makes something that others read and changes nothing that they
        see, and is the same twice (random numbers outside torch make a module opaque)."""
        inside = set(group)
        opaque = {part.path for part in self.trace.report.opaque}

        def is_opaque(node: fx.Node) -> bool:
            return any(str(part.target) in opaque for part in node.meta.get("recorded", (node,)))

        return sum(node.meta["saved"] for node in group) > 0 and bool(self._ends(group, readers)) and not any(
            not node.meta["mutates"] <= inside or is_opaque(node)
            or node.meta["overwritten"] and (readers.get(node) or not inside.issuperset(node.users)) for node in group)

    def _ends(self, group: Sequence[fx.Node], readers: Readers) -> list[fx.Node]:
        """What is read of a part, outside of it."""
        inside = set(group)
        return [node for node in group if readers.get(node) or node in self.read_by_losses or node in self.left
                or not inside.issuperset(node.users)]

    def emit_all(self, nodes: Sequence[fx.Node], module: int, readers: Readers, depth: int = 0) -> None:
        """Neighbouring nodes of one local module; runs of them that run again as one call each."""
        for again, group in self._runs(nodes, depth):
            if again and self.may_run_again(group, readers):
                self.emit_again(group, module, readers, depth + 1)
            elif again:
                self.emit_all(group, module, readers, depth + 1)
            else:
                for node in group:
                    self.emit(node, module, bool(readers.get(node)))

    def _runs(self, nodes: Sequence[fx.Node], depth: int) -> list[tuple[bool, list[fx.Node]]]:
        """Neighbouring nodes of one run at this depth, and whether they are of one."""
        def key(node: fx.Node) -> tuple[int, ...]:
            return self.calls.label[node].runs[depth: depth + 1]
        return [(bool(run), list(group)) for run, group in groupby(nodes, key)]

    def emit_again(self, group: Sequence[fx.Node], module: int, readers: Readers, depth: int) -> None:
        """One call for blocks that run again in backward."""
        name, inputs, ends = self._part(group, module, readers, depth)
        called = self.graph.create_node(
            "call_module", f"aux.{name}", tuple(self.view(node, module) for node in inputs), name=name)
        trains = [str(node.target) for node in group if node.op in ("call_module", "get_attr")]
        called.meta = {"local_module": module, "traced": ends[-1].name, "trains": trains}
        for index, node in enumerate(ends):
            self.raw[node] = self.graph.create_node("call_function", operator.getitem, (called, index), name=node.name)
            self.raw[node].meta = {"local_module": module, "traced": node.name}
            self.leave(node)

    def _part(
        self, group: Sequence[fx.Node], module: int, readers: Readers, depth: int
    ) -> tuple[str, list[fx.Node], list[fx.Node]]:
        """A part of its own for blocks that run again, in which runs at ``depth`` run again once more: its name, its
        inputs and outputs."""
        inside = set(group)
        inputs = list(dict.fromkeys(s for node in group for s in node.all_input_nodes if s not in inside))
        ends = self._ends(group, readers)
        name = f"block_{module}_{sum(part.startswith(f'block_{module}_') for part in self.parts)}"
        self.parts[name] = graph = fx.Graph()
        made = {node: graph.placeholder(node.name) for node in inputs}

        def copy(nodes: Sequence[fx.Node], depth: int) -> None:
            for again, some in self._runs(nodes, depth):
                if again and self.may_run_again(some, readers):
                    inner, given, returned = self._part(some, module, readers, depth + 1)
                    called = graph.call_module(f"aux.{inner}", tuple(made[node] for node in given))
                    for index, node in enumerate(returned):
                        made[node] = graph.call_function(operator.getitem, (called, index))
                elif again:
                    copy(some, depth + 1)
                else:
                    for node in some:
                        made[node] = graph.node_copy(node, made.__getitem__)
                        made[node].meta = {}

        copy(group, depth)
        graph.output(tuple(made[node] for node in ends))
        return name, inputs, ends

    def cache(self, node: fx.Node, **options: Any) -> None:
        if node not in self.cached:
            self.cached[node] = self.graph.create_node(
                "call_function", passing.cache_write, (self.raw[node],), options, name=f"cache_{node.name}")

    def _copy(self, node: fx.Node, module: int) -> fx.Node:
        sources = {source: self.view(source, module) for source in node.all_input_nodes}
        new = self.graph.node_copy(node, lambda source: sources[source])
        if node.op == "get_attr" and str(node.target).rpartition(".")[2] in self.trace.constants:
            new.target = f"aux.constants.{str(node.target).rpartition('.')[2]}"
        new.meta = {"local_module": module, "traced": node.name}
        return new


def _labels(
    structure: Structure, cuts: Sequence[fx.Node], tail: Sequence[fx.Node], recomputed: Sequence[Sequence[Run]]
) -> dict[fx.Node, Label]:
    owner, sliced = structure.assign(cuts), set(tail)
    part = parts_of(structure).of if any(recomputed) else {}
    inside = [dict(_runs_of(runs)) for runs in recomputed] or [{}] * (len(cuts) + 1)
    return {node: Label(owner[node], () if node in sliced else inside[owner[node]].get(part.get(node, ""), ()),
                        node in sliced)
            for node in structure.dependent if node.op not in ("placeholder", "output")}


def _runs_of(runs: Sequence[Run], around: tuple[int, ...] = ()) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of every block in some runs the runs that it lies in, outermost first."""
    for index, run in enumerate(runs):
        yield from ((name, (*around, index)) for name in run.blocks)
        yield from _runs_of(run.inside, (*around, index))


def emit(
    structure: Structure, cuts: Sequence[fx.Node], auxiliaries: Sequence[Auxiliary], task: Task,
    comments: Sequence[str], outputs: Callable[[Any], Any], *, slices: int = 1,
    recomputed: Sequence[Sequence[Run]] = (), reaches: Sequence[Reach], agree: bool = False,
) -> Emitted:
    """The graph of a training step.

    ``outputs`` maps the compiled part's output to what the last head is given; ``slices``: the tail and the last
    loss run in so many slices of the batch; ``recomputed``: of each local module, the blocks that run again in
    backward; ``reaches``: what each local loss trains; ``agree``: whether losses compare gradients on both sides of
    a cut.
    """
    tail = sliced_tail(structure, task) if slices > 1 else []
    out = _Emitter(structure, cuts, auxiliaries, tail, recomputed, reaches, agree)
    graph, calls = out.graph, out.calls
    inputs, context = task.prepare(graph, structure.trace.placeholders)
    out.raw.update(zip([calls.at[node] for node in structure.trace.placeholders], inputs, strict=True))
    if task.network_is_part and structure.trace.report.asks_about_sizes(out.opened):
        graph.create_node("call_module", "aux.sizes", tuple(inputs), name="sizes")
    later = set(out.tail)
    nodes = [node for node in out.nodes if node in out.owner and node not in later]
    read = [[calls.at[node] for node in auxiliary.inputs] for auxiliary in auxiliaries]
    made = fx.map_arg(structure.trace.output.args[0], calls.at.__getitem__)
    calls.graph.output(made)
    readers = _readers(out, nodes, made, read)
    losses: dict[int, fx.Node] = {}

    def local_loss(index: int) -> None:
        reach = out.reaches[index]
        given: dict[str, Any] = {"inputs": tuple(inputs)} if reach.first == 0 else {}
        given |= {"through": through} if (through := out.through(reach)) else {}
        given |= out.sides(index)
        losses[index] = graph.create_node(
            "call_module", f"aux.{index}", tuple(out.view(node, reach.until) for node in read[index]),
            {"context": tuple(context), **given}, name=f"loss_{index}")

    for module in range(len(cuts) + 1):
        before = len(graph.nodes)
        mine = [node for node in nodes if out.owner[node] == module]
        place = {node: position for position, node in enumerate(mine)}
        done = 0
        for index, reach in enumerate(out.reaches[:-1]):
            if reach.last < reach.until == module:  # the loss of an earlier module, behind some of these blocks
                end = 1 + max(place[node] for node in read[index] if node in place)
                out.emit_all(mine[done:end], module, readers)
                local_loss(index)
                done = max(done, end)
        out.emit_all(mine[done:], module, readers)
        if module < len(cuts):
            if out.reaches[module].until == module:
                local_loss(module)
            out.hand_on(module, readers)
        else:
            result: Any = tuple(out.view(node, module) for node in tail_inputs(out.tail))
            if not out.tail:
                result = outputs(fx.map_arg(made, lambda node: out.view(node, len(cuts))))
                result, context = task.finish(graph, result, context)
            loss = graph.create_node(
                "call_module", "aux.last", (result,), {"context": tuple(context), **out.sides(module)},
                name=f"loss_{module}")
            if slices > 1:
                pair, loss = loss, graph.create_node("call_function", operator.getitem, (loss, 0), name=f"sum_{module}")
                result = graph.create_node("call_function", operator.getitem, (pair, 1), name="outputs")
        next(islice(graph.nodes, before, None)).meta["headline"] = comments[module]
    _finish(graph, task, [losses[index] for index in sorted(losses)], loss, result)
    if out.tail:
        out.parts["tail"] = _subgraph(out.tail, tail_inputs(out.tail), made)
    return Emitted(graph, out.parts, out.opened, out.calls.graph)


def emit_whole(
    structure: Structure, task: Task, comment: str, outputs: Callable[[Any], Any], by_name: bool, path: str
) -> Emitted:
    """The graph of a step that is not cut: the model is called as it is."""
    graph = fx.Graph()
    inputs, context = task.prepare(graph, structure.trace.placeholders)
    names = [str(node.target) for node in structure.trace.placeholders]
    args: Any = () if by_name else tuple(inputs)
    kwargs: Any = dict(zip(names, inputs, strict=True)) if by_name else {}
    called = graph.create_node("call_module", path or "aux.whole", args, kwargs, name="outputs")
    called.meta.update(headline=comment, local_module=0)
    result, context = task.finish(graph, outputs(called) if isinstance(
        structure.trace.output.args[0], fx.Node) else called, context)
    loss = graph.create_node("call_module", "aux.last", (result,), {"context": tuple(context)}, name="loss_0")
    _finish(graph, task, [], loss, result)
    return Emitted(graph, {}, (), None)


def _finish(graph: fx.Graph, task: Task, losses: list[fx.Node], loss: fx.Node, result: Any) -> None:
    if task.result() == "dict":
        final = graph.create_node("call_function", passing.merge, (losses, loss), name="losses")
    else:
        final = graph.create_node("call_function", passing.collect, ([*losses, loss], result), name="result")
    graph.output(final)
    with_headlines(graph)
    graph.lint()


def _subgraph(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Any) -> fx.Graph:
    """Some nodes as a graph of their own: ``inputs`` -> ``outputs`` (nested nodes)."""
    graph = fx.Graph()
    made = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = {}
    graph.output(fx.map_arg(outputs, made.__getitem__))
    return graph


def _readers(
    out: _Emitter, nodes: list[fx.Node], made: Any, read: Sequence[Sequence[fx.Node]]
) -> dict[fx.Node, set[int]]:
    """The local modules, other than its own, that read each value. made: the network's outputs; read: what auxiliary
    networks read."""
    readers: dict[fx.Node, set[int]] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            readers.setdefault(source, set()).add(out.owner[node])
    last: list[fx.Node] = list(tail_inputs(out.tail))
    fx.map_arg(made, last.append)
    for source in last:
        readers.setdefault(source, set()).add(len(out.ends))
    for reach, sources in zip(out.reaches, read, strict=False):
        for source in sources:
            readers.setdefault(source, set()).add(reach.until)
    return {node: {m for m in modules if m != out.owner.get(node)} for node, modules in readers.items()}
