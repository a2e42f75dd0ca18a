"""Pass 6, emit: write the training step as one graph that a person can read.

Local modules stand in order; between them stand explicit detach nodes, writes to and reads from the feature cache, the
auxiliary networks, the local losses and their backward passes. fx's generated code drops every value after its last
use, which is what frees a module's activations, and a cached feature after its last reader.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from torch import fx, nn

from . import runtime
from .analyze import Structure, input_dependent, known_by
from .graphs import with_headlines
from .synthesize import Auxiliary
from .tasks import Task
from .trace import is_float


def assign(structure: Structure, cuts: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Which local module each node of the traced graph belongs to: the first whose cut it is needed for."""
    owner: dict[fx.Node, int] = {}
    for index, cut in enumerate(cuts):
        for node in known_by(structure.trace, cut):  # sizes, so that what they are of need not be kept
            owner.setdefault(node, index)
    for node in structure.trace.graph.nodes:
        if node.op != "output":
            owner.setdefault(node, len(cuts))
    return owner


class _Emitter:
    """The graph under construction; ``raw`` holds values as their module made them."""

    def __init__(self, structure: Structure, cuts: Sequence[fx.Node]) -> None:
        self.graph = fx.Graph()
        self.structure = structure
        self.cuts = list(cuts)
        self.owner = assign(structure, cuts)
        self.dependent = input_dependent(structure.trace.graph)
        self.raw: dict[fx.Node, fx.Node] = {}
        self.constant: dict[tuple[fx.Node, int], fx.Node] = {}
        self.cut: dict[fx.Node, fx.Node] = {}
        self.cached: dict[fx.Node, fx.Node] = {}
        self.read: dict[tuple[fx.Node, int], fx.Node] = {}

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
        self.raw[node] = self._copy(node, module)
        if read_later and node.meta["overwritten"] and is_float(node.meta["value"]):
            self.cache(node, keep=True)  # before the operation that overwrites it

    def cache(self, node: fx.Node, **options: Any) -> None:
        if node not in self.cached:
            self.cached[node] = self.graph.create_node(
                "call_function", runtime.cache_write, (self.raw[node],), options, name=f"cache_{node.name}")

    def _copy(self, node: fx.Node, module: int) -> fx.Node:
        sources = {source: self.view(source, module) for source in node.all_input_nodes}
        new = self.graph.node_copy(node, lambda source: sources[source])
        if node.op == "get_attr" and str(node.target).rpartition(".")[2] in self.structure.trace.constants:
            new.target = f"aux.constants.{str(node.target).rpartition('.')[2]}"
        new.meta = {"local_module": module, "traced": node.name}
        return new


def emit(
    structure: Structure, cuts: Sequence[fx.Node], auxiliaries: Sequence[Auxiliary], task: Task,
    comments: Sequence[str], outputs: Callable[[Any], Any],
) -> fx.Graph:
    """The graph of a training step. ``outputs`` maps the traced output to what the last head is given."""
    out = _Emitter(structure, cuts)
    graph = out.graph
    inputs, context = task.prepare(graph, structure.trace.placeholders)
    out.raw.update(zip(structure.trace.placeholders, inputs, strict=True))
    nodes = [n for n in structure.trace.graph.nodes if n.op not in ("placeholder", "output") and n in out.dependent]
    readers = _readers(out, nodes, auxiliaries)
    losses: list[fx.Node] = []
    for module in range(len(cuts) + 1):
        before = len(graph.nodes)
        for node in nodes:
            if out.owner[node] == module:
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
            views = {node: out.view(node, module) for node in structure.trace.output.all_input_nodes}
            result = outputs(fx.map_arg(structure.trace.output.args[0], views.__getitem__))
            result, context = task.finish(graph, result, context)
            loss = graph.create_node("call_module", "aux.last.head", (result, *context), name=f"loss_{module}")
        next(islice(graph.nodes, before, None)).meta["headline"] = comments[module]
    if task.result() == "dict":
        final = graph.create_node("call_function", runtime.merge, (losses, loss), name="losses")
    else:
        final = graph.create_node("call_function", runtime.collect, ([*losses, loss], result), name="result")
    graph.output(final)
    with_headlines(graph)
    graph.lint()
    return graph


def _readers(out: _Emitter, nodes: list[fx.Node], auxiliaries: Sequence[Auxiliary]) -> dict[fx.Node, set[int]]:
    """The local modules, other than its own, that read each value."""
    readers: dict[fx.Node, set[int]] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            readers.setdefault(source, set()).add(out.owner[node])
    for source in out.structure.trace.output.all_input_nodes:
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
