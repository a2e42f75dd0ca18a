"""Which entries of a value depend on the data.

A class token joins the patches in front of the first block; a cut there outputs a value of which one position depends
on parameters alone. A tail that reads this position teaches the patch embedding nothing. To find such positions without
knowing an architecture, the recorded operations run once with NaN for data: what is NaN afterwards depends on it. Only
operations on values of which some entries depend on data, and others do not, run on real memory, for two images.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from glcan_fx.capture.shadow import replicate
from glcan_fx.capture.trace import quiet, shadow
from glcan_fx.fakes import Fakes
from glcan_fx.structure.nodes import ancestors, makes_new, name_of_call
from glcan_fx.structure.structure import Structure, once

log = logging.getLogger("glcan_fx")

_BATCH = 2
_WORK = 5e10  # multiplications on real memory: a few seconds


@dataclass
class Seen:
    """A tensor, and which of its entries depend on data. It is fake, but where some do: NaN, and others do not: 1."""

    value: Tensor
    depends: Literal["all", "some", "none"]
    shared: bool = False  # its memory is that of another value


class Undecided(Exception):
    """It cannot be said what depends on data."""


def reads_some(structure: Structure, cut: fx.Node) -> bool:
    """Whether some entries of what is handed on at a cut depend on data, and others do not."""
    return cut in walked(structure)[0]


Walked = tuple[dict[fx.Node, Seen], "Walk | None"]


@once
def walked(structure: Structure) -> Walked:
    """Of the trunk's values those of which some entries depend on data, and what found them."""
    try:
        with alone():
            return _walk(structure)
    except Undecided as error:
        log.debug("not decided which positions depend on data: %s", error)
        return {}, None


def _walk(structure: Structure) -> Walked:
    trunk, chain = structure.trunk, set(structure.chain)
    joins = [node for node in _joins(structure) if node in trunk]
    mixed: dict[fx.Node, Seen] = {}
    if not joins:
        return mixed, None
    trace = structure.trace
    batch = next((t.shape[0] for t in _tensors([n.meta["value"] for n in trace.placeholders]) if t.dim() > 1), 0)
    walk = Walk(shadow(trace.shadow, trace.mode), trace.mode)

    def given(value: Tensor) -> Seen:
        shape = (_BATCH, *value.shape[1:]) if value.dim() and value.shape[0] == batch else value.shape
        return Seen(walk.empty(shape, value.dtype), "all")

    for node in trace.graph.nodes:
        if node.op == "placeholder":
            walk.values[node] = tree_map_only(Tensor, given, node.meta["value"])
        else:
            walk.run(node)
        joins = [join for join in joins if join is not node]
        seen = walk.values[node]
        if node in chain and isinstance(seen, Seen):
            if seen.depends == "some":
                mixed[node] = replace(seen)
            elif not joins:  # what follows mixes no others in
                break
        if node is structure.chain[-1]:
            break
    return mixed, walk


def _joins(structure: Structure) -> Iterator[fx.Node]:
    """Nodes that may put entries that depend on data beside others that do not."""
    depends: set[fx.Node] = set()
    for node in structure.trace.graph.nodes:
        sources = [source for source in node.all_input_nodes if _tensors(source.meta.get("value"))]
        own = [source for source in sources if source in depends]
        if node.op == "placeholder" or own and not makes_new(node):
            depends.add(node)
            rest = len(own) < len(sources)
            if overwritten := node.meta.get("mutates", set()) - depends:
                depends |= overwritten
                yield node
            elif own and _may_join(structure.trace.module, node, rest) and _grows(
                    node.meta.get("value"), _tensors([source.meta["value"] for source in own])):
                yield node


def _may_join(module_of: Callable[[fx.Node], nn.Module | None], node: fx.Node, beside: bool) -> bool:
    """Whether an operation on data that enlarges it can add what is not data; ``beside``: it reads such."""
    def name(node: fx.Node) -> str:
        return (name_of_call(node) if module_of(node) is None else type(module_of(node)).__name__).lower()

    module = module_of(node)
    if module is not None and next(module.parameters(), None) is not None:
        return not type(module).__module__.startswith("torch.nn.")
    padded = "pad" in name(node) and not all("conv" in name(user) or "pool" in name(user) for user in node.users)
    return beside or padded  # a convolution's own padding, written in front of it, adds no positions


def _grows(made: Any, sources: list[Tensor]) -> bool:
    largest = max((t.numel() for t in sources), default=0)
    return any(t.numel() > largest for t in _tensors(made))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def alone() -> Iterator[None]:
    """Without gradients, and with the random state as it was."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]), quiet():
        yield


class Walk:
    """Runs a graph's nodes one by one, as far as needed to know what depends on data."""

    def __init__(self, root: nn.Module, mode: Fakes) -> None:
        self.root, self.mode = root, mode
        self.values: dict[fx.Node, Any] = {}
        self.work = 0

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        with self.mode:
            return torch.empty(shape, dtype=dtype, device="cpu")

    def constant(self, node: fx.Node) -> Any:
        """A value that is known, but of which nothing is learnt: a feature of an earlier module, a size."""
        missing = ancestors([node], self.values.keys())
        for source in node.graph.nodes:
            if source in missing:
                self.run(source)
        return tree_map(lambda leaf: Seen(self.fake(leaf), "none") if isinstance(leaf, Seen) else leaf,
                        self.values[node])

    def inputs(self, node: fx.Node) -> list[Seen]:
        values = fx.map_arg((node.args, node.kwargs), lambda source: self.values[source])
        return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Seen)]

    def run(self, node: fx.Node) -> None:
        try:
            self.values[node] = self._result(node)
        except Undecided:
            raise
        except Exception as error:  # noqa: BLE001 - what reads it is not known, either
            log.debug("%s: %s", node.name, error)
            self.values[node] = Undecided

    def _result(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(self.root.get_submodule(owner), name)
            return Seen(value, "none") if isinstance(value, Tensor) else value
        if any(self.values[source] is Undecided for source in node.all_input_nodes):
            return Undecided
        seen = self.inputs(node)
        data = [leaf for leaf in seen if leaf.depends != "none"]
        with self.mode:
            out, changed, given = self._call(node, seen, self.fake)
        beside = len(data) < len(seen)
        if not data or makes_new(node):
            return _wrapped(out, seen, given, lambda value: Seen(value, "none"))
        floats = [leaf.value for leaf in data if _is_float(leaf.value)]
        if any(leaf.depends == "some" for leaf in data) or changed and beside or floats and _may_join(
                self.module, node, beside) and _grows(out, floats):
            self._account(node, seen, out)
            out, changed, given = self._call(node, seen, _real)
            for leaf in changed:
                after = self._classified(given[id(leaf)])
                if leaf.shared and not _alike(leaf, after):
                    raise Undecided(f"{node.name} changes memory that other values share")
                leaf.value, leaf.depends = after.value, after.depends
            return _wrapped(out, seen, given, self._classified)
        return _wrapped(out, seen, given, lambda value: Seen(value, "all"))

    def _account(self, node: fx.Node, seen: list[Seen], out: Any) -> None:
        """Add up the multiplications of an operation that is about to run, and stop where they are too many."""
        module = self.module(node)
        given = module.parameters() if module is not None else [s.value for s in seen if s.depends == "none"]
        fans = [weight[0].numel() for weight in given if weight.dim() in (2, 4, 5)]
        self.work += sum(t.numel() for t in _tensors(out)) * max(fans, default=1)
        if self.work > _WORK:
            raise Undecided("it takes too long")

    def _call(
        self, node: fx.Node, seen: list[Seen], convert: Callable[[Seen], Tensor]
    ) -> tuple[Any, list[Seen], dict[int, Tensor]]:
        """What a node returns, the inputs that it changed, and the tensors that it was called with."""
        given = {id(leaf): convert(leaf) for leaf in seen}
        versions = {key: value._version for key, value in given.items()}
        values = fx.map_arg((node.args, node.kwargs), lambda source: self.values[source])
        args, kwargs = tree_map(lambda leaf: given[id(leaf)] if isinstance(leaf, Seen) else leaf, values)
        if (module := self.module(node)) is not None:
            out = (module if convert == self.fake else replicate(module, _filled).eval())(*args, **kwargs)
        elif node.op == "call_method":
            out = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            out = node.target(*args, **kwargs)
        return out, [leaf for leaf in seen if given[id(leaf)]._version != versions[id(leaf)]], given

    def _classified(self, value: Tensor) -> Seen:
        if not _is_float(value):
            return Seen(self.empty(value.shape, value.dtype), "all")
        depends = value.isnan()
        if depends.all() or not depends.any():
            return Seen(self.empty(value.shape, value.dtype), "all" if value.numel() and depends.all() else "none")
        for axis in range(depends.dim()):
            if torch.equal(depends.any(axis), depends.all(axis)):  # kept once, for it may be large
                depends = depends.narrow(axis, 0, 1)
        kept = torch.where(depends, torch.nan, 1.0).to(value.dtype)
        return Seen(kept.expand(value.shape), "some")

    def fake(self, seen: Seen) -> Tensor:
        return self.empty(seen.value.shape, seen.value.dtype) if seen.depends == "some" else seen.value


def _wrapped(out: Any, seen: list[Seen], given: dict[int, Tensor], wrap: Callable[[Tensor], Seen]) -> Any:
    """What a node returned: inputs of it as they are, and what shares an input's memory marked."""
    inputs = {id(given[id(leaf)]): leaf for leaf in seen}
    memory = {given[id(leaf)].untyped_storage()._cdata: leaf for leaf in seen}

    def one(value: Tensor) -> Seen:
        if id(value) in inputs:
            return inputs[id(value)]
        made = wrap(value)
        if base := memory.get(value.untyped_storage()._cdata):
            made.shared = base.shared = True
        return made

    return tree_map_only(Tensor, one, out)


def _alike(a: Seen, b: Seen) -> bool:
    return a.depends == b.depends and (a.depends != "some" or torch.equal(a.value.isnan(), b.value.isnan()))


def _real(seen: Seen) -> Tensor:
    if seen.depends == "some":
        return seen.value.clone()
    return torch.full_like(_filled(seen.value), torch.nan) if seen.depends == "all" and _is_float(
        seen.value) else _filled(seen.value)


def _filled(tensor: Tensor) -> Tensor:
    fill = 1 if _is_float(tensor) else 0
    out = torch.full(tensor.shape, fill, dtype=tensor.dtype)
    return nn.Parameter(out, requires_grad=False) if isinstance(tensor, nn.Parameter) else out


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
