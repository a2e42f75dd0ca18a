"""Pass 6, emit: write the training step as one graph that a person can read.

Local modules stand in order; between them stand explicit detach nodes, writes to and reads from the feature cache, the
auxiliary networks, the local losses and their backward passes. fx's generated code drops every value after its last
use, which is what frees a module's activations, and a cached feature after its last reader.
"""

import operator
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import groupby, islice
from typing import Any

from torch import Tensor, fx, nn

from . import runtime
from .analyze import Structure, ancestors, common_path
from .builder import Auxiliary
from .graphs import Parts, with_headlines
from .tasks import Task
from .trace import is_float


class _Emitter:
    """The graph under construction; ``raw`` holds values as their module made them."""

    def __init__(self, structure: Structure, cuts: Sequence[fx.Node]) -> None:
        self.graph = fx.Graph()
        self.structure = structure
        self.cuts = list(cuts)
        self.owner = structure.assign(cuts)
        self.dependent = structure.dependent
        self.pooled = pooled_activations(structure, self.owner, self.cuts)
        self.raw: dict[fx.Node, fx.Node] = {}
        self.constant: dict[tuple[fx.Node, int], fx.Node] = {}
        self.cut: dict[fx.Node, fx.Node] = {}
        self.cached: dict[fx.Node, fx.Node] = {}
        self.read: dict[tuple[fx.Node, int], fx.Node] = {}
        self.parts: Parts = {}

    def view(self, node: fx.Node, module: int) -> fx.Node:
        """A traced value as local module ``module`` sees it: its own, or detached."""
        if node.op == "placeholder" and (module == 0 or not is_float(node.meta["value"])):
            return self.raw[node]  # module 0 hands the inputs their gradients
        if node not in self.dependent:  # made of parameters alone: every module computes its own
            if (node, module) not in self.constant:
                self.constant[node, module] = self._copy(node, module)
            return self.constant[node, module]
        if node.op != "placeholder" and self.owner[node] == module or not is_float(node.meta["value"]):
            return self.raw[node]
        if node in self.cut and self.owner[node] == module - 1:
            return self.cut[node]
        if (node, module) not in self.read:
            self.read[node, module] = self.graph.create_node(
                "call_function", runtime.cache_read, (self.cached.get(node, self.raw[node]),),
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
        opaque = {part.path for part in self.structure.trace.report.opaque}
        swapped = {*self.pooled, *self.pooled.values()}
        return sum(node.meta["saved"] for node in group) > 0 and not any(
            not node.meta["mutates"] <= inside or node in swapped or str(node.target) in opaque
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
                "call_function", runtime.cache_write, (self.raw[node],), options, name=f"cache_{node.name}")

    def _copy(self, node: fx.Node, module: int, given: fx.Node | None = None) -> fx.Node:
        sources = {source: given or self.view(source, module) for source in node.all_input_nodes}
        new = self.graph.node_copy(node, lambda source: sources[source])
        if node.op == "get_attr" and str(node.target).rpartition(".")[2] in self.structure.trace.constants:
            new.target = f"aux.constants.{str(node.target).rpartition('.')[2]}"
        new.meta = {"local_module": module, "traced": node.name}
        return new


def emit(
    structure: Structure, cuts: Sequence[fx.Node], auxiliaries: Sequence[Auxiliary], task: Task,
    comments: Sequence[str], outputs: Callable[[Any], Any], *, slices: int = 1, recomputed: Set[int] = frozenset(),
) -> tuple[fx.Graph, Parts]:
    """The graph of a training step, and what it calls as modules of their own on the model's layers.

    ``outputs`` maps the traced output to what the last head is given; ``slices``: the tail and the last loss run in so
    many slices of the batch; ``recomputed``: local modules whose blocks run again in backward.
    """
    out = _Emitter(structure, cuts)
    graph = out.graph
    inputs, context = task.prepare(graph, structure.trace.placeholders)
    out.raw.update(zip(structure.trace.placeholders, inputs, strict=True))
    tail = sliced_tail(structure, task) if slices > 1 else []
    own = out.dependent - set(tail)
    nodes = [node for node in structure.trace.graph.nodes if node.op not in ("placeholder", "output") and node in own]
    readers = _readers(out, nodes, tail, auxiliaries)
    losses: list[fx.Node] = []
    for module in range(len(cuts) + 1):
        before = len(graph.nodes)
        mine = [node for node in nodes if out.owner[node] == module]
        for group in blocks_of(structure, mine) if module in recomputed else [[node] for node in mine]:
            if module in recomputed and out.may_run_again(group, readers):
                out.emit_again(group, module, readers)
                continue
            for node in group:
                out.emit(node, module, bool(readers.get(node)))
        if module < len(cuts):
            auxiliary = auxiliaries[module]
            values = tuple(out.view(node, module) for node in auxiliary.inputs)
            prediction = graph.create_node("call_module", f"aux.{module}.network", values, name=f"prediction_{module}")
            loss = graph.create_node(
                "call_module", f"aux.{module}.head", (prediction, *context), name=f"loss_{module}")
            losses.append(graph.create_node(
                "call_module", f"aux.{module}.backward", (loss, *(inputs if module == 0 else ())),
                name=f"local_loss_{module}"))
            _hand_on(out, module, nodes, readers)
        else:
            result: Any = tuple(out.view(node, module) for node in tail_inputs(tail))
            if not tail:
                views = {node: out.view(node, module) for node in structure.trace.output.all_input_nodes}
                result = outputs(fx.map_arg(structure.trace.output.args[0], views.__getitem__))
                result, context = task.finish(graph, result, context)
            loss = graph.create_node("call_module", "aux.last.head", (result, *context), name=f"loss_{module}")
            if slices > 1:
                pair, loss = loss, graph.create_node("call_function", operator.getitem, (loss, 0), name=f"sum_{module}")
                result = graph.create_node("call_function", operator.getitem, (pair, 1), name="outputs")
        next(islice(graph.nodes, before, None)).meta["headline"] = comments[module]
    if task.result() == "dict":
        final = graph.create_node("call_function", runtime.merge, (losses, loss), name="losses")
    else:
        final = graph.create_node("call_function", runtime.collect, ([*losses, loss], result), name="result")
    graph.output(final)
    with_headlines(graph)
    graph.lint()
    if tail:
        out.parts["tail"] = _subgraph(tail, tail_inputs(tail), structure.trace.output.args[0])
    return graph, out.parts


def _subgraph(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Any) -> fx.Graph:
    """Some nodes as a graph of their own: ``inputs`` -> ``outputs`` (nested nodes)."""
    graph = fx.Graph()
    made = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].meta = {}
    graph.output(fx.map_arg(outputs, made.__getitem__))
    return graph


def blocks_of(structure: Structure, nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Neighbouring nodes of one unit of the trunk, or of one part of the neck and head."""
    owner = structure.assign([unit.end for unit in structure.units])
    home = common_path(node for node in nodes if node not in structure.trunk).split(".")

    def key(node: fx.Node) -> Any:
        path = node.meta["module"].split(".")
        return owner[node] if node in structure.trunk else path[: len(home) + 1] if path[: len(home)] == home else path

    return [list(group) for _, group in groupby(nodes, key)]


def pooled_activations(
    structure: Structure, owner: Mapping[fx.Node, int], cuts: Sequence[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Max-pooling layers and the ReLU that only they read: pooled first, autograd keeps and makes no map of the ReLU's
    size. Values and gradients are the same, bit for bit: a window's largest value stays its largest, and where all are
    negative the gradient is 0 either way."""
    found = {}
    for node in structure.trace.graph.nodes:
        pool = structure.trace.module(node)
        if isinstance(pool, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) and not pool.return_indices:
            source = node.all_input_nodes[0]
            together = owner[node] == owner.get(source) and source not in cuts
            if together and isinstance(structure.trace.module(source), nn.ReLU) and len(source.users) == 1 and (
                    len(source.all_input_nodes[0].users) == 1):
                found[node] = source
    return found


def sliced_tail(structure: Structure, task: Task) -> list[fx.Node]:
    """The nodes behind the trunk, which run slice by slice; none where the task has a head of its own for that."""
    if task.outputs_are_levels:
        return []
    behind = {node for node in structure.dependent - structure.trunk if node.op not in ("placeholder", "output")}
    tail = behind | (ancestors(behind) - structure.dependent)  # what is made of parameters alone is not cut into slices
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
            return f"'{node.name}' changes what the trunk hands on, in place"
    numbers = [node for node in tail_inputs(tail) if not isinstance(node.meta["value"], Tensor)]
    return f"it reads the number '{numbers[0].name}', which may be the batch's size" if numbers else None


def tail_inputs(tail: Sequence[fx.Node]) -> list[fx.Node]:
    """What the tail reads and does not make."""
    inside = set(tail)
    return list(dict.fromkeys(source for node in tail for source in node.all_input_nodes if source not in inside))


def _readers(
    out: _Emitter, nodes: list[fx.Node], tail: Sequence[fx.Node], auxiliaries: Sequence[Auxiliary]
) -> dict[fx.Node, set[int]]:
    """The local modules, other than its own, that read each value."""
    readers: dict[fx.Node, set[int]] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            readers.setdefault(source, set()).add(out.owner[node])
    for source in [*out.structure.trace.output.all_input_nodes, *tail_inputs(tail)]:
        readers.setdefault(source, set()).add(len(out.cuts))
    for module, auxiliary in enumerate(auxiliaries):
        for source in auxiliary.inputs:
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
        part = nn.Module()
        part.add_module("network", auxiliary.network)
        part.add_module("head", head)
        aux.add_module(str(index), part)
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
