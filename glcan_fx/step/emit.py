"""Pass 6, emit: write the training step as one graph that a person can read.

Local modules stand in order; between them stand explicit detach nodes, writes to and reads from the feature cache, the
auxiliary networks, the local losses and their backward passes. fx's generated code drops every value after its last
use, which is what frees a module's activations, and a cached feature after its last reader.
"""

import operator
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from torch import Tensor, fx, nn

from glcan_fx.auxiliary.builder import Auxiliary
from glcan_fx.capture.trace import Trace, is_float
from glcan_fx.fx_utils import Parts, with_headlines
from glcan_fx.step import output as passing
from glcan_fx.step.calls import Label, whole_calls
from glcan_fx.step.local_loss import LocalLoss
from glcan_fx.structure.nodes import ancestors, common_path
from glcan_fx.structure.structure import Structure
from glcan_fx.tasks import Task


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
        recomputed: Set[int],
    ) -> None:
        self.graph = fx.Graph()
        self.trace = structure.trace
        calls = whole_calls(structure.trace, _labels(structure, cuts, tail, recomputed),
                            [*cuts, *(node for auxiliary in auxiliaries for node in auxiliary.inputs)])
        self.calls = calls
        self.opened = tuple(dict.fromkeys(call.path for call in calls.opened))
        self.nodes = [node for node in calls.graph.nodes if node.op != "placeholder"]
        self.cuts = [calls.at[cut] for cut in cuts]
        self.owner = {node: label.module for node, label in calls.label.items()}
        self.tail = self._tail()
        self.pooled = pooled_activations(structure.trace, calls.graph, self.owner, self.cuts)
        self.raw: dict[fx.Node, fx.Node] = {}
        self.constant: dict[tuple[fx.Node, int], fx.Node] = {}
        self.cut: dict[fx.Node, fx.Node] = {}
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
        if node in self.cut and self.owner[node] == module - 1:
            return self.cut[node]
        if (node, module) not in self.read:
            self.read[node, module] = self.graph.create_node(
                "call_function", passing.cache_read, (self.cached.get(node, self.raw[node]),),
                name=f"focal_{node.name}"
            )
        return self.read[node, module]

    def emit(self, node: fx.Node, module: int, read_later: bool) -> None:
        if node in self.pooled.values():
            return
        activation = self.pooled.get(node)
        if activation is None:
            self.raw[node] = self._copy(node, module)
        else:
            [source] = activation.all_input_nodes
            pooled = self._copy(node, module, self.view(source, module))
            self.raw[node] = self._copy(activation, module, pooled)
        if read_later and node.meta["overwritten"] and is_float(node.meta["value"]):
            self.cache(node, keep=True)  # before the operation that overwrites it

    def may_run_again(self, group: Sequence[fx.Node], readers: Mapping[fx.Node, Set[int]]) -> bool:
        """Whether a block keeps something for backward, changes nothing that others see, and is the same twice (random
        numbers outside torch make a module opaque)."""
        inside = set(group)
        opaque = {part.path for part in self.trace.report.opaque}
        swapped = {*self.pooled, *self.pooled.values()}

        def is_opaque(node: fx.Node) -> bool:
            return any(str(part.target) in opaque for part in node.meta.get("recorded", (node,)))

        return sum(node.meta["saved"] for node in group) > 0 and not any(
            not node.meta["mutates"] <= inside or node in swapped or is_opaque(node)
            or node.meta["overwritten"] and (readers.get(node) or not inside.issuperset(node.users)) for node in group)

    def emit_again(self, group: Sequence[fx.Node], module: int, readers: Mapping[fx.Node, Set[int]]) -> None:
        """One call for a block, which runs again in backward."""
        inside = set(group)
        inputs = list(dict.fromkeys(s for node in group for s in node.all_input_nodes if s not in inside))
        ends = [node for node in group if readers.get(node) or not inside.issuperset(node.users)]
        name = f"block_{module}_{sum(part.startswith(f'block_{module}_') for part in self.parts)}"
        self.parts[name] = _subgraph(group, inputs, tuple(ends))
        called = self.graph.create_node(
            "call_module", f"aux.{name}", tuple(self.view(node, module) for node in inputs), name=name)
        trains = [str(node.target) for node in group if node.op in ("call_module", "get_attr")]
        called.meta = {"local_module": module, "traced": ends[-1].name, "trains": trains}
        for index, node in enumerate(ends):
            self.raw[node] = self.graph.create_node("call_function", operator.getitem, (called, index), name=node.name)
            self.raw[node].meta = {"local_module": module, "traced": node.name}

    def cache(self, node: fx.Node, **options: Any) -> None:
        if node not in self.cached:
            self.cached[node] = self.graph.create_node(
                "call_function", passing.cache_write, (self.raw[node],), options, name=f"cache_{node.name}")

    def _copy(self, node: fx.Node, module: int, given: fx.Node | None = None) -> fx.Node:
        sources = {source: given or self.view(source, module) for source in node.all_input_nodes}
        new = self.graph.node_copy(node, lambda source: sources[source])
        if node.op == "get_attr" and str(node.target).rpartition(".")[2] in self.trace.constants:
            new.target = f"aux.constants.{str(node.target).rpartition('.')[2]}"
        new.meta = {"local_module": module, "traced": node.name}
        return new


def _labels(
    structure: Structure, cuts: Sequence[fx.Node], tail: Sequence[fx.Node], recomputed: Set[int]
) -> dict[fx.Node, Label]:
    owner, sliced = structure.assign(cuts), set(tail)
    block = _blocks(structure) if recomputed else {}
    return {node: Label(owner[node], block.get(node) if owner[node] in recomputed else None, node in sliced)
            for node in structure.dependent if node.op not in ("placeholder", "output")}


def _blocks(structure: Structure) -> dict[fx.Node, Any]:
    """Of every node the unit of the trunk, or the part of the neck and head, that it belongs to."""
    owner = structure.assign([unit.end for unit in structure.units])
    home = common_path(node for node in owner if node not in structure.trunk).split(".")

    def part(node: fx.Node) -> Any:
        path = (str(node.target) if node.op == "call_module" else node.meta["module"]).split(".")
        return tuple(path[: len(home) + 1] if path[: len(home)] == home else path)

    return {node: index if node in structure.trunk else part(node) for node, index in owner.items()}


def emit(
    structure: Structure, cuts: Sequence[fx.Node], auxiliaries: Sequence[Auxiliary], task: Task,
    comments: Sequence[str], outputs: Callable[[Any], Any], *, slices: int = 1, recomputed: Set[int] = frozenset(),
) -> Emitted:
    """The graph of a training step.

    ``outputs`` maps the compiled part's output to what the last head is given; ``slices``: the tail and the last loss
    run in so many slices of the batch; ``recomputed``: local modules whose blocks run again in backward.
    """
    out = _Emitter(structure, cuts, auxiliaries, sliced_tail(structure, task) if slices > 1 else [], recomputed)
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
    losses: list[fx.Node] = []
    for module in range(len(cuts) + 1):
        before = len(graph.nodes)
        mine = [node for node in nodes if out.owner[node] == module]
        for group in _groups(out, mine) if module in recomputed else [[node] for node in mine]:
            if module in recomputed and out.may_run_again(group, readers):
                out.emit_again(group, module, readers)
                continue
            for node in group:
                out.emit(node, module, bool(readers.get(node)))
        if module < len(cuts):
            given: dict[str, Any] = {"inputs": tuple(inputs)} if module == 0 else {}
            losses.append(graph.create_node(
                "call_module", f"aux.{module}", tuple(out.view(node, module) for node in read[module]),
                {"context": tuple(context), **given}, name=f"loss_{module}"))
            _hand_on(out, module, nodes, readers)
        else:
            result: Any = tuple(out.view(node, module) for node in tail_inputs(out.tail))
            if not out.tail:
                result = outputs(fx.map_arg(made, lambda node: out.view(node, len(cuts))))
                result, context = task.finish(graph, result, context)
            loss = graph.create_node(
                "call_module", "aux.last", (result,), {"context": tuple(context)}, name=f"loss_{module}")
            if slices > 1:
                pair, loss = loss, graph.create_node("call_function", operator.getitem, (loss, 0), name=f"sum_{module}")
                result = graph.create_node("call_function", operator.getitem, (pair, 1), name="outputs")
        next(islice(graph.nodes, before, None)).meta["headline"] = comments[module]
    _finish(graph, task, losses, loss, result)
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


def _groups(out: _Emitter, nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Neighbouring nodes of one block."""
    return [list(group) for _, group in groupby(nodes, lambda node: out.calls.label[node])]


def pooled_activations(
    trace: Trace, graph: fx.Graph, owner: Mapping[fx.Node, int], cuts: Sequence[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Max-pooling layers and the ReLU that only they read, where both are written out: pooled first, autograd keeps and
    makes no map of the ReLU's size. Values and gradients are the same, bit for bit: a window's largest value stays its
    largest, and where all are negative the gradient is 0 either way."""
    found = {}
    for node in graph.nodes:
        pool = trace.module(node)
        if isinstance(pool, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) and not pool.return_indices:
            source = node.all_input_nodes[0]
            together = owner[node] == owner.get(source) and source not in cuts
            if together and isinstance(trace.module(source), nn.ReLU) and len(source.users) == 1 and (
                    len(source.all_input_nodes[0].users) == 1):
                found[node] = source
    return found


def sliced_tail(structure: Structure, task: Task) -> list[fx.Node]:
    """The recorded nodes behind the trunk, which run slice by slice; none where the task has a head of its own for
    that."""
    if task.outputs_are_levels:
        return []
    behind = {node for node in structure.dependent - structure.trunk if node.op not in ("placeholder", "output")}
    tail = behind | (ancestors(behind) - structure.dependent)
    # (what does not depend on the input is not cut into slices)
    return [node for node in structure.trace.graph.nodes if node in tail]


def why_not_sliced(structure: Structure, task: Task) -> str | None:
    """What keeps the tail from running slice by slice."""
    tail = sliced_tail(structure, task)
    inside = set(tail)
    for node in tail:
        module = structure.trace.module(node)
        if module is not None and any("running_mean" in part._buffers for part in module.modules()):
            return f"'{node.target}' keeps statistics of the whole batch"
        if not node.meta["mutates"] <= inside:
            return f"'{node.name}' changes the trunk's output, in place"
    numbers = [node for node in tail_inputs(tail) if not isinstance(node.meta["value"], Tensor)]
    return f"it reads the number '{numbers[0].name}', which may be the batch's size" if numbers else None


def tail_inputs(tail: Sequence[fx.Node]) -> list[fx.Node]:
    """What the tail reads and does not make."""
    inside = set(tail)
    return list(dict.fromkeys(source for node in tail for source in node.all_input_nodes if source not in inside))


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
        readers.setdefault(source, set()).add(len(out.cuts))
    for module, sources in enumerate(read):
        for source in sources:
            readers.setdefault(source, set()).add(module)
    return {node: {m for m in modules if m != out.owner.get(node)} for node, modules in readers.items()}


def _hand_on(out: _Emitter, module: int, nodes: list[fx.Node], readers: dict[fx.Node, set[int]]) -> None:
    """After a module's backward: its cut for the next module, its other values that are read later for the cache."""
    for node in nodes:
        if out.owner[node] != module or not is_float(node.meta["value"]):
            continue
        later = set(readers.get(node, ()))
        if node is out.cuts[module]:
            out.cut[node] = out.graph.create_node("call_method", "detach", (out.raw[node],), name=f"cut_{module}")
            later.discard(module + 1)
        if later:
            out.cache(node)


def register(
    aux: nn.Module, structure: Structure, cuts: Sequence[fx.Node], auxiliaries: Sequence[Auxiliary],
    heads: Sequence[nn.Module], task: Task,
) -> None:
    """Fill the ``aux`` module: per local module its network and head; what the task itself trains; constants."""
    for index, (auxiliary, head) in enumerate(zip(auxiliaries, heads, strict=True)):
        aux.add_module(str(index), LocalLoss(auxiliary.network, head))
    register_task(aux, task)
    if structure.trace.constants:
        part = nn.Module()
        for name, value in structure.trace.constants.items():
            part.register_buffer(name, value, persistent=False)
        aux.add_module("constants", part)


def register_task(aux: nn.Module, task: Task) -> None:
    """Register what the task itself trains, a learned criterion."""
    trained = {name: module for name, module in task.modules().items()
               if any(p.requires_grad for p in module.parameters())}
    if trained:
        aux.add_module("task", nn.ModuleDict(trained))
