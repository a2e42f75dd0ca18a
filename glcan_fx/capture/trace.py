"""A recorded module as a value: the graph, what each node knows, and how the module was captured.

Everything runs on a *shadow* of the module: the same module tree with fake tensors for parameters and buffers and
without hooks. The user's weights, buffers, mode, hooks and random state are never touched.
"""

import logging
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from glcan_fx.capture.caches import Caches
from glcan_fx.capture.calls import Call, left_on
from glcan_fx.capture.shadow import fake_copy, replicate
from glcan_fx.capture.source_lines import Opaque, Specialisation
from glcan_fx.fakes import Fakes


@dataclass(frozen=True)
class Report:
    """How a module was captured: what its graph holds for, and what it does not keep.

    rung: 1 the call was recorded as it is; 2 questions about sizes were answered for the example's; 3 some modules are
    opaque, called as a whole. specialisations: the questions; opaque: the modules; lost: what of the user's model the
    training graph does not keep (evaluation keeps everything).
    """

    rung: int = 1
    specialisations: tuple[Specialisation, ...] = ()
    opaque: tuple[Opaque, ...] = ()
    lost: tuple[str, ...] = ()

    def asks_about_sizes(self, opened: Collection[str]) -> bool:
        """Whether a forward that is written out asks about sizes, so that the step holds for some answers only."""
        return any(asked.module in opened and asked.where != "argument" for asked in self.specialisations)

    def lines(self, model: str) -> list[str]:
        """The report in words, a fact a line."""
        rungs = ("whole", "whole, for the example's answers about sizes", "with some modules called as they are",
                 "around its trunk, which is the rest of it", "at calls of its sub-modules")
        return [
            f"{model} was captured on rung {self.rung} of 5: {rungs[self.rung - 1]}",
            *dict.fromkeys(f"holds while {s.code} is {s.answer} ({s.where})" for s in self.specialisations),
            *(f"opaque: {o.path} ({o.kind}): {o.reason} {o.where}".rstrip() for o in self.opaque),
            *(f"not kept in training: {line}" for line in self.lost),
        ]


@dataclass(frozen=True)
class Trace:
    """A captured module.

    ``graph``: targets are relative to the user's model. Each node's ``meta`` holds

    - ``value``: the fake tensor (or nested structure, or plain number) the node produced for the example inputs,
    - ``module``: path of the innermost module whose ``forward`` made the node ("" is the model itself),
    - ``returned_by``: paths of the modules whose call returned this value, innermost first,
    - ``saved``: bytes of memory that autograd first kept for backward while the node ran (parameters excluded),
    - ``storages``: the identities of that memory, to find out which values' it is,
    - ``mutates``: the input nodes whose tensors the node changed in place,
    - ``overwritten``: whether this node's tensor was changed in place after some other node had read it.

    - ``call``: the innermost recorded ``Call`` that the node was made in,
    - ``random``: whether it draws random numbers that do not depend on the inputs.

    ``constants`` are the tensors that are neither parameters nor buffers, by attribute name; ``reads`` are the names of
    the attributes that recorded forwards read, by module path; ``hooks``: whether the user's hooks ran; ``caches``: the
    user's, as they were before one was used.
    """

    graph: fx.Graph
    shadow: nn.Module
    mode: Fakes
    constants: dict[str, Tensor] = field(default_factory=dict)
    report: Report = Report()
    reads: dict[str, set[str]] = field(default_factory=dict)
    hooks: bool = False
    caches: Caches | None = None

    def clear_caches(self) -> None:
        """Clear the user's caches that fake tensors, or recorded sizes, were put into: before the model really runs."""
        if self.caches is not None:
            self.caches.clear_used()

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    @cached_property
    def layers(self) -> frozenset[fx.Node]:
        """Nodes with a trainable weight; norms, biases, tokens and position tables do not make a local module."""
        def is_weight(node: fx.Node, p: nn.Parameter) -> bool:
            return p.requires_grad and p.dim() >= 2 and (node.op != "get_attr" or min(p.shape[:2]) > 1)

        return frozenset(node for node in self.graph.nodes if any(is_weight(node, p) for p in self.parameters(node)))

    @cached_property
    def inside(self) -> dict[Call, set[fx.Node]]:
        """Of every recorded call, the nodes that were made in it."""
        found: dict[Call, set[fx.Node]] = {}
        for node in self.graph.nodes:
            for call in node.meta["call"].around() if node.meta.get("call") else ():
                found.setdefault(call, set()).add(node)
        return found

    @cached_property
    def given(self) -> dict[fx.Node, list[Call]]:
        """Of every node, the recorded calls that it is an argument of."""
        found: dict[fx.Node, list[Call]] = {}
        for call in self.inside:
            for node in call.given():
                found.setdefault(node, []).append(call)
        return found

    @cached_property
    def returns(self) -> dict[str, list[fx.Node]]:
        """Of every module, the values that its calls returned, in order."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            for path in node.meta["returned_by"]:
                found.setdefault(path, []).append(node)
        return found

    def module(self, node: fx.Node) -> nn.Module | None:
        """The (shadow) module that a ``call_module`` node calls."""
        return self.shadow.get_submodule(str(node.target)) if node.op == "call_module" else None

    def parameters(self, node: fx.Node) -> list[nn.Parameter]:
        """Parameters that this node itself uses (of the shadow, so fake)."""
        if node.op == "get_attr" and only_asked(node):
            return []
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(self.shadow.get_submodule(owner), name, None) if hasattr_path(self.shadow, owner) else None
            return [value] if isinstance(value, nn.Parameter) else []
        module = self.module(node)
        return list(module.parameters()) if module is not None else []


def only_asked(node: fx.Node) -> bool:
    """Whether what reads a parameter, or module, only asks for its type, device or shape, or what was left on it."""
    return bool(node.users) and all(
        user.target is left_on or user.target is getattr and user.args[1] in ("dtype", "device", "shape")
        for user in node.users)


def within(path: str, home: str) -> bool:
    """Whether a module path is that of ``home``, or of something in it; the root, "", holds nothing by name."""
    return bool(home) and (path == home or path.startswith(home + "."))


def hasattr_path(root: nn.Module, path: str) -> bool:
    """Whether ``root`` has a sub-module at ``path``."""
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def shadow(module: nn.Module, mode: Fakes) -> nn.Module:
    """The same module tree with fake parameters and buffers (on the CPU) and without hooks; shares nothing mutable."""
    return replicate(module, fake_copy(mode))


_QUIET = threading.Lock()
_quiet_users = 0


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's fake tensors from logging an error that is about to be explained; several threads may."""
    global _quiet_users
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    with _QUIET:
        _quiet_users += 1
        logger.addFilter(_nothing)
    try:
        yield
    finally:
        with _QUIET:
            _quiet_users -= 1
            if not _quiet_users:
                logger.removeFilter(_nothing)


def _nothing(_: logging.LogRecord) -> bool:
    return False


def is_float(value: Any) -> bool:
    """Whether a traced value is, or holds, a floating-point or complex tensor: the values that carry gradients."""
    return any(isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
               for leaf in tree_leaves(value))
