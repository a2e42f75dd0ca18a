"""Local modules as modules of their own: a training step is these, in order.

A stage is one local module with its auxiliary network and loss. It registers what it trains under the names that the
compiled model has for it, so that hooks, ``fully_shard`` and state dicts work on it, and can be run alone: on another
device, or by another process.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import fx, nn

from glcan_fx.capture.modules import hooks_on
from glcan_fx.errors import UnsupportedError
from glcan_fx.fx_utils import function_of, with_headlines
from glcan_fx.step import output as passing

_F = TypeVar("_F", bound=Callable[..., Any])


def uncompiled(function: _F) -> _F:
    """A frame that torch.compile leaves alone; what it calls is compiled."""
    return torch.compiler.disable(function, recursive=False)


@dataclass(frozen=True)
class Piece:
    """A part of a step's graph, as a graph of its own. reads: the values that it is given, makes: those that it
    returns and that are read behind it; by their names in the whole graph."""

    graph: fx.Graph
    reads: tuple[str, ...]
    makes: tuple[str, ...]


def pieces_of(graph: fx.Graph) -> list[Piece]:
    """Of every local module its part of a step, and last what puts the result together."""
    *nodes, output = (node for node in graph.nodes if node.op != "placeholder")
    groups: list[list[fx.Node]] = [[]]
    for node in nodes:
        if "headline" in node.meta and any("headline" in before.meta for before in groups[-1]):
            groups.append([])
        groups[-1].append(node)
    [result] = output.args
    end = [groups[-1].pop()] if groups[-1] and groups[-1][-1] is result else []
    return [*map(_piece, groups), _piece(end, result)]


def _piece(nodes: Sequence[fx.Node], result: Any = None) -> Piece:
    """Some nodes, with all that others read of them; or with a ``result`` of their own."""
    inside = set(nodes)
    reads = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    if result is not None:
        fx.map_arg(result, lambda node: None if node in inside else reads.setdefault(node))
    makes = [node for node in nodes if not inside.issuperset(node.users)] if result is None else []
    graph = fx.Graph()
    box = graph.placeholder("values")  # what is taken out of it is freed after its last use, as arguments are not
    made = {node: graph.create_node("call_method", "pop", (box, 0), name=node.name) for node in reads}
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in makes) if result is None else fx.map_arg(result, made.__getitem__))
    with_headlines(graph)
    return Piece(graph, tuple(node.name for node in reads), tuple(node.name for node in makes))


def _ends(graph: fx.Graph) -> tuple[tuple[str, ...], Any]:
    """The values that are the local losses, in order, and that which is the model's output: a nested structure."""
    result: Any = next(iter(reversed(graph.nodes))).args[0]
    if not isinstance(result, fx.Node) or result.target not in (passing.collect, passing.merge):
        return (), None
    losses: Any
    losses, last = result.args
    if result.target is passing.merge:  # a detector's own losses are the last local module's
        losses, last = [*losses, last], None
    return tuple(node.name for node in losses), last


def _features(graph: fx.Graph) -> set[str]:
    """Inputs, and what the compiled part computes of them; detached, or in the cache."""
    found: set[str] = set()
    for node in graph.nodes:
        passed = node.target in ("detach", passing.leaf, passing.cache_write, passing.cache_read, passing.copied)
        if node.op == "placeholder" and node.target != "targets" or "local_module" in node.meta or (
                passed and node.args[0].name in found):
            found.add(node.name)
    return found


class Hidden:
    """A value that is no tree of tensors."""

    def __init__(self, value: Any) -> None:
        self.value = value


def called(run: Callable[..., Any], local: nn.Module, *values: Any) -> Any:
    """Run a local module on values as arguments."""
    return run(local, [value.value if isinstance(value, Hidden) else value for value in values])


class Step:
    """A training step of a compiled model: its local modules in order, and its result of what they make."""

    def __init__(self, graph: fx.Graph, name: str) -> None:
        *pieces, end = pieces_of(graph)
        self.pieces = pieces
        self.runs = [function_of(piece.graph, f"<local module {index} of {name} {id(graph):x}>")
                     for index, piece in enumerate(pieces)]
        self._end, self._result = end, function_of(end.graph, f"<result of {name} {id(graph):x}>")
        self.losses, self.output = _ends(graph)
        self.features = _features(graph)
        self.defaults = {node.name: node.args[0] for node in graph.nodes if node.op == "placeholder" and node.args}
        self.inputs = {str(node.target): node.name for node in graph.nodes if node.op == "placeholder"}
        readers = [*pieces, end]
        last = {name: index for index, piece in enumerate(readers) for name in piece.reads}
        self._freed = [{name for name in piece.reads if last[name] == index} for index, piece in enumerate(readers)]

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a step begins with: its arguments. Raises TypeError for one that is missing, or is none."""
        if unknown := [name for name in given if name not in self.inputs]:
            raise TypeError(f"a training step has no argument '{unknown[0]}': it takes {', '.join(self.inputs)}")
        values = {**self.defaults, **{self.inputs[name]: value for name, value in given.items()}}
        if missing := [name for name, inner in self.inputs.items() if inner not in values]:
            raise TypeError(f"a training step takes {', '.join(self.inputs)}; '{missing[0]}' is missing")
        return values

    @uncompiled
    def run(self, local: nn.Module, stage: "Stage", values: dict[str, Any], index: int) -> None:
        """Run a local module on the values of the step so far, and add what it makes; what nobody reads any more is
        dropped."""
        run, sharded = self.runs[index], type(stage) is not Stage  # FSDP2 made it a class of its own
        if sharded or hooks_on(stage):
            stage.__dict__["forward"] = partial(called, run, local)
            made = stage(*(self._hidden if sharded else self._taken)(values, index))
        else:
            made = run(local, self._taken(values, index))
        values.update(zip(self.pieces[index].makes, made, strict=True))

    def _hidden(self, values: dict[str, Any], index: int) -> list[Any]:
        """What a local module reads, with all that is neither an input of the model nor a feature in a box of its own:
        FSDP2 casts arguments, and targets keep their precision."""
        return [value if name in self.features else Hidden(value) for name, value in zip(
            self.pieces[index].reads, self._taken(values, index), strict=True)]

    @uncompiled
    def result(self, local: nn.Module, values: dict[str, Any]) -> Any:
        """What the step returns."""
        return self._result(local, self._taken(values, len(self.pieces)))

    def outputs(self, values: Mapping[str, Any]) -> Any:
        """The model's own output, of what the last local module made; None for a detector, which has losses only."""
        return passing.detach(fx.map_arg(self.output, lambda node: values[node.name]))

    def passed_on(self, index: int) -> list[str]:
        """The values, arguments included, that local module ``index`` and those behind it read of what is in front."""
        made = {name for piece in self.pieces[index:] for name in piece.makes}
        return list(dict.fromkeys(name for piece in self.pieces[index:] for name in piece.reads if name not in made))

    def _taken(self, values: dict[str, Any], index: int) -> list[Any]:
        reads = (*self.pieces, self._end)[index].reads
        return [values.pop(name) if name in self._freed[index] else values[name] for name in reads]


class Part(nn.Module):
    """A module of the model that several local modules divide, with what one of them has of it. owner: the module,
    where it has tensors itself."""

    owner: Any = None

    def _apply(self, fn: Any, recurse: bool = True) -> "Part":
        super()._apply(fn, recurse)
        for kind in ("_parameters", "_buffers") if self.owner is not None else ():  # it moves there, too
            self.owner.__dict__[kind].update(self.__dict__[kind])
        return self


class Share(Part):
    """Some of a compiled model's modules, parameters and buffers, under the names that they have there."""

    @staticmethod
    def of(root: nn.Module, paths: Iterable[str]) -> "Share":
        """These of ``root``."""
        share = Share()
        share.hold(root, paths)
        return share

    def hold(self, root: nn.Module, paths: Iterable[str]) -> None:
        """Register these of ``root``, in place of those before."""
        self._modules.clear()
        whole: set[str] = set()
        direct: dict[str, set[str]] = {}
        for path in sorted(dict.fromkeys(paths), key=lambda path: path.count(".")):  # in one order on all ranks
            *above, name = path.split(".")
            if any(".".join(above[:depth + 1]) in whole for depth in range(len(above))):
                continue
            owner = root.get_submodule(".".join(above))
            if owner._modules.get(name) is not None:
                whole.add(path)
                self._part(above)._modules[name] = owner._modules[name]
            elif name in owner._parameters or name in owner._buffers:
                direct.setdefault(".".join(above), set()).add(name)
        for path, names in direct.items():
            owner, made = root.get_submodule(path), self._part(path.split(".") if path else [])
            made.__dict__["_non_persistent_buffers_set"] = owner._non_persistent_buffers_set
            made.__dict__["owner"] = owner
            for kind in ("_parameters", "_buffers"):
                held = {name for name, value in owner.__dict__[kind].items() if value is not None}
                # the same dict where it has nothing else: what is replaced in one (sharded, moved) the other sees
                made.__dict__[kind] = owner.__dict__[kind] if held <= names else {
                    name: owner.__dict__[kind][name] for name in held & names}

    def _part(self, names: Sequence[str]) -> Part:
        part: Any = self
        for name in names:
            if part._modules.get(name) is None:
                part._modules[name] = Part()
            part = part._modules[name]
        return part


class Stage(Share):
    """A local module: ``stage(*values)`` runs it with its auxiliary network and loss, whose backward pass is part of
    the call.

    reads: the names of the values that it is given (arguments of the model, targets, what earlier stages made), makes:
    of those that it returns: what later stages read, and its loss, a scalar that hands the gradients over when it is
    differentiated. Its parameters are those that it trains, under the compiled model's own names.
    """

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    needs: tuple[str, ...]

    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self.__dict__.update(reads=piece.reads, makes=piece.makes, needs=())  # needs: two local modules' names, and why

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__" and self.needs and any(base.__name__ == "FSDPModule" for base in value.__mro__):
            first, last, why = self.needs
            raise UnsupportedError(f"fully_shard() on single local modules, but '{first}' and '{last}' need each "
                                   f"other: {why}. Shard the whole compiled model: fully_shard(local).")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{', '.join(self.reads)} -> {', '.join(self.makes)}"
