"""What an auxiliary network is made with: its options, and the graph under construction."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from glcan_fx.capture.trace import hasattr_path, shadow
from glcan_fx.fx_utils import Network
from glcan_fx.initialization import Moments, moments, unhooked_copy
from glcan_fx.layers import Cost
from glcan_fx.structure.structure import Structure


@dataclass(frozen=True)
class Term:
    """A part of a local loss beside the task's: ``criterion(values, *context)`` of what the network makes for it."""

    criterion: nn.Module
    weight: float


@dataclass(frozen=True)
class Auxiliary:
    """An auxiliary network: ``network`` is called with the values of ``inputs`` (nodes of the traced graph).

    It returns predictions, or, where there are ``terms``, these and a dict of what each term is computed from. share:
    the weight of the task's loss. averages: buffers of the network that follow parameters of the model, by path, and
    the momentum with which they do. patches: it runs on each of so many parts a side of its input in turn.
    """

    network: Network
    inputs: list[fx.Node]
    outputs: Any  # fake values of the network's predictions, at the example size
    cost: Cost  # at the example size
    terms: dict[str, Term] = field(default_factory=dict)
    share: float = 1.0
    averages: dict[str, str] = field(default_factory=dict)
    momentum: float = 0.0
    patches: int = 1


_RESHAPES = {"view": "reshape", "view_as": "reshape_as"}


@dataclass
class Builder:
    """The graph under construction and the modules that it calls."""

    structure: Structure
    model: nn.Module
    draft: bool
    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)  # source node -> new node
    inputs: list[fx.Node] = field(default_factory=list)
    moments: Moments = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)  # layers that are not copies: initialized at their final width
    full: set[str] = field(default_factory=set)  # prefixes of copies whose layers keep their widths
    terms: dict[str, tuple[Term, fx.Node]] = field(default_factory=dict)  # and the node of what it is computed from
    twins: dict[str, str] = field(default_factory=dict)  # copies that begin as the model's own layers, by path
    streams: dict[tuple[fx.Node, int], fx.Node] = field(default_factory=dict)  # of the first stream's nodes the others'
    average: str = ""  # prefix of such copies that follow the model's weights, with this momentum
    momentum: float = 0.0

    def add(self, name: str, module: nn.Module, *args: fx.Node, fresh: bool = False) -> fx.Node:
        self.register(name, module, fresh=fresh)
        return self.graph.call_module(name, args)

    def register(self, name: str, module: nn.Module, *, fresh: bool = False) -> None:
        owner = self.root
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in owner._modules:
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.add_module(last, module)
        if fresh:
            self.fresh.append(name)
        elif not self.draft:
            self.moments.update({f"{name}.{k}": v for k, v in moments(module).items()})

    def making(self) -> AbstractContextManager[Any]:
        """Where layers are made anew: with sizes only, for a draft."""
        mode: AbstractContextManager[Any] = self.structure.trace.mode
        return mode if self.draft else nullcontext()

    def clone(self, target: str) -> nn.Module:
        """A copy of one of the model's modules; of its sizes only, for a draft."""
        module = self.model.get_submodule(target)
        return shadow(module, self.structure.trace.mode) if self.draft else unhooked_copy(module)

    def input(self, node: fx.Node) -> fx.Node:
        if node not in self.values:
            self.inputs.append(node)
            self.values[node] = self.graph.placeholder(node.name)
        return self.values[node]

    @contextmanager
    def each_stream(self, node: fx.Node) -> Iterator[None]:
        """What is written meanwhile to make ``node`` is repeated for the values that are side by side with it: with
        the same layers where the model has the same, else with copies."""
        before, known = set(self.graph.nodes), dict(self.values)
        yield
        new = [node for node in self.graph.nodes if node not in before and node.op != "placeholder"]
        for stream in range(1, len(self.structure.together(node))):
            for made in new:
                if any(self._on_stream(source, stream) is not source for source in made.all_input_nodes):
                    self.streams[made, stream] = self._repeated(made, stream)
        for source, made in list(self.values.items()):
            if known.get(source) is not made:
                self.values |= self.side_by_side(source, made)

    def side_by_side(self, source: fx.Node, made: fx.Node) -> dict[fx.Node, fx.Node]:
        """What stands for a value of the first stream, and for those that are side by side with it."""
        return {node: self._on_stream(made, stream) for stream, node in enumerate(self.structure.together(source))}

    def _on_stream(self, made: fx.Node, stream: int) -> fx.Node:
        if stream and made.op == "placeholder":
            source = self.inputs[self.graph.find_nodes(op="placeholder").index(made)]
            group = self.structure.together(source)
            return self.input(group[stream]) if source is group[0] and len(group) > 1 else made
        return self.streams.get((made, stream), made)

    def _repeated(self, node: fx.Node, stream: int) -> fx.Node:
        new = self.graph.node_copy(node, lambda source: self._on_stream(source, stream))
        new.meta = {}
        if node.op == "call_module" and not self.structure.shares_layers:
            first, dot, rest = str(node.target).partition(".")
            new.target = f"{first}_{stream}{dot}{rest}"
            if not hasattr_path(self.root, new.target):
                self._add_copy(str(node.target), new.target)
        return new

    def _add_copy(self, path: str, new: str) -> None:
        """One more of a layer of this network, that begins as it does."""
        layer = self.root.get_submodule(path)
        self.register(new, shadow(layer, self.structure.trace.mode) if self.draft else unhooked_copy(layer),
                      fresh=path in self.fresh)
        own = {name: value for name, value in self.moments.items() if name.startswith(f"{path}.")}
        self.moments.update({new + name.removeprefix(path): value for name, value in own.items()})
        if path.partition(".")[0] in self.full:
            self.full.add(new.partition(".")[0])

    def copy(self, node: fx.Node, prefix: str) -> fx.Node:
        """Copy one node of the traced graph, its module or parameter included; its inputs must be there.

        What it overwrites is copied first: what a module outputs must not change under its auxiliary network.
        """
        for source in node.meta["mutates"]:
            self.values[source] = self.graph.call_function(torch.clone, (self.values[source],))
        new = self.graph.node_copy(node, lambda source: self.values[source])
        new.meta = {}
        if node.op == "call_method" and not any(isinstance(arg, torch.dtype) for arg in node.args):
            new.target = _RESHAPES.get(str(node.target), node.target)  # what is synthesised may be laid out otherwise
        if node.op in ("call_module", "get_attr"):
            path = f"{prefix}.{node.target}"
            if path not in self.copies:
                self.copies[path] = path
                self.attach(path, str(node.target), node.op)
            new.target = path
        self.values[node] = new
        return new

    def attach(self, path: str, target: str, op: str) -> None:
        if op == "call_module":
            self.register(path, self.clone(target))
            return
        owner, _, name = path.rpartition(".")
        if owner and not hasattr_path(self.root, owner):
            self.register(owner, nn.Module())
        value = self.structure.trace.constants.get(target.rpartition(".")[2])
        if value is None:
            source_owner, _, source_name = target.rpartition(".")
            value = getattr(self.model.get_submodule(source_owner), source_name)
        module = self.root.get_submodule(owner)
        if isinstance(value, nn.Parameter):
            parameter = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
            module.register_parameter(name, parameter)
            if not self.draft:
                self.moments.update({f"{owner}.{k}": v for k, v in moments(module).items() if k == name})
        else:
            module.register_buffer(name, value.detach().clone())
