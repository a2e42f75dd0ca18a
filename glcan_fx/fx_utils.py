"""fx graphs as plain data, so that what holds one can be saved and loaded without tracing it again."""

import importlib
import linecache
import sys
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload, OpOverloadPacket

_META = ("local_module", "traced", "headline", "trains")  # what a step's graph keeps of each node


@dataclass(frozen=True)
class _Reference:
    name: str


@dataclass(frozen=True)
class _Named:
    """A function that pickle does not find by itself: an operator of torch.ops, or one with another qualified name."""

    module: str
    path: str


Parts = dict[str, fx.Graph]  # parts of a model that a graph calls as modules, by name
Packed = list[tuple[str, str, Any, Any, Any, dict[str, Any]]]


def pack(graph: fx.Graph) -> Packed:
    """The nodes of a graph in order; references to other nodes by name."""
    def named(value: Any) -> Any:
        return fx.map_arg(value, lambda node: _Reference(node.name))  # type: ignore[arg-type, return-value]

    def target(value: Any) -> Any:
        if isinstance(value, OpOverload | OpOverloadPacket):
            return _Named("torch.ops", str(value))
        module, name = getattr(value, "__module__", None), getattr(value, "__name__", "")
        if callable(value) and getattr(value, "__qualname__", name) != name and getattr(
                sys.modules.get(str(module)), name, None) is value:
            return _Named(str(module), name)
        return value

    return [(node.op, node.name, target(node.target), named(node.args), named(node.kwargs),
             {key: node.meta[key] for key in _META if key in node.meta}) for node in graph.nodes]


def unpack(packed: Packed) -> fx.Graph:
    """The graph that ``pack`` was given."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolved(value: Any) -> Any:
        if isinstance(value, _Reference):
            return nodes[value.name]
        if isinstance(value, tuple | list):
            parts = [resolved(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {key: resolved(part) for key, part in value.items()}
        if isinstance(value, slice):
            return slice(resolved(value.start), resolved(value.stop), resolved(value.step))
        return value

    for op, name, target, args, kwargs, meta in packed:
        if isinstance(target, _Named):
            home: Any = torch.ops if target.module == "torch.ops" else importlib.import_module(target.module)
            target = reduce(getattr, target.path.split("."), home)
        nodes[name] = graph.create_node(op, target, resolved(args), resolved(kwargs), name=name)
        nodes[name].meta.update(meta)
    with_headlines(graph)
    return graph


def function_of(graph: fx.Graph, name: str) -> Any:
    """The function ``(self, *inputs)`` that a graph describes; ``name`` stands in tracebacks."""
    made = graph.python_code("self")
    space = dict(made.globals)
    linecache.cache[name] = (len(made.src), None, made.src.splitlines(keepends=True), name)
    exec(compile(made.src, name, "exec"), space)
    return space["forward"]


def with_headlines(graph: fx.Graph) -> None:
    """Let the generated code show each node's ``meta["headline"]`` as a comment before it."""
    headlines = {node.name: node.meta["headline"] for node in graph.nodes if "headline" in node.meta}
    if headlines:
        graph.on_generate_code(lambda _: _Headlines(headlines))


class _Headlines:
    def __init__(self, headlines: dict[str, str]) -> None:
        self.headlines = headlines

    def __call__(self, body: list[str]) -> list[str]:
        out = []
        for line in body:
            name = line.split(" ", 1)[0].removesuffix(":")
            if name in self.headlines:
                out.append(f"\n# {self.headlines[name]}\n")
            out.append(line)
        return out


class Network(fx.GraphModule):
    """A GraphModule that is saved with its graph as it is, functions included."""

    def __reduce__(self) -> Any:
        root = nn.Module()
        root.__dict__.update({key: value for key, value in vars(self).items() if key in _STATE})
        return _load_network, (root, pack(self.graph), type(self).__name__)


_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")


def _load_network(root: nn.Module, packed: Packed, name: str) -> Network:
    network = Network(root, unpack(packed), class_name=name)
    network.__dict__.update({key: value for key, value in vars(root).items() if key in _STATE})
    return network


