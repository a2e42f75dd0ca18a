"""Pass 1, trace: capture a module as a graph in which every node knows its value, bytes and module path.

Everything runs on a *shadow* of the module: the same module tree with fake tensors for parameters and buffers and
without hooks. The user's weights, buffers, mode, hooks and random state are never touched.

The call is recorded more than once: at the example's batch size and at another one, in training and in evaluation mode.
Where the recordings differ, the innermost module that differs becomes opaque, so that neither a batch size nor a
``training`` flag is frozen into the graph.
"""

import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from glcan_fx.capture.recorder import Call, Recorder, arguments_in, erase_unused
from glcan_fx.capture.shadow import fake_copy, replicate
from glcan_fx.capture.source_lines import NotMadeYet, Opaque, Specialisation, Uncapturable, in_words, place_of
from glcan_fx.errors import TraceError

log = logging.getLogger("glcan_fx")


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
    the attributes that recorded forwards read, by module path.
    """

    graph: fx.Graph
    shadow: nn.Module
    mode: FakeTensorMode
    constants: dict[str, Tensor] = field(default_factory=dict)
    report: Report = Report()
    reads: dict[str, set[str]] = field(default_factory=dict)

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


def left_on(module: Any, name: str, call: Any) -> Any:
    """What ``call`` has left on an attribute of a module."""
    return getattr(module, name)


def only_asked(node: fx.Node) -> bool:
    """Whether what reads a parameter, or module, only asks for its type, device or shape, or what was left on it."""
    return bool(node.users) and all(
        user.target is left_on or user.target is getattr and user.args[1] in ("dtype", "device", "shape")
        for user in node.users)


def within(path: str, home: str) -> bool:
    """Whether a module path is that of ``home``, or of something in it; the root, "", holds nothing by name."""
    return bool(home) and (path == home or path.startswith(home + "."))


def hasattr_path(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def trace(model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any], *, path: str = "") -> Trace:
    """Capture one training-mode call of ``model`` (or its sub-module ``path``) on fake copies of ``example_inputs``.

    ``example_inputs`` are the call's arguments, a sequence of positional or a dict of keyword ones; containers of
    tensors may be among them. Raises TraceError, with the module path and source line, when the call cannot be
    captured or run.
    """
    _check(model, example_inputs)
    forced: dict[str, Opaque] = {}
    while True:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        try:
            main, root = _record(model, path, example_inputs, mode, forced)
        except NotMadeYet as error:
            message = (f"{type(model).__name__} cannot be captured yet: {error}. Please call the model once with a "
                       "batch, and transform it then.")
            raise TraceError(message, replayable=False) from error
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
            message, reason = _explain(error, model, path, example_inputs)
            raise TraceError(message, reason, replayable=getattr(error, "replayable", True),
                             reached=partial(reached, model, path, example_inputs)) from error
        found = _batch_baked(model, path, example_inputs, mode, forced, main)
        if found.keys() <= forced.keys():
            main.lost |= {f"'{p}': {o.reason}, and it cannot be made opaque": None for p, o in found.items()}
            break
        forced |= found
    _follow_dtypes(model, path, example_inputs, forced, main)
    erase_unused(main.graph, arguments_in(main.graph))
    rung = 3 if main.opaque else 2 if main.specialisations else 1
    report = Report(rung, tuple(main.specialisations.values()), tuple(main.opaque.values()), tuple(main.lost))
    log.info("%s captured on rung %d: %d nodes, %d specialisations, %d opaque modules", type(model).__name__, rung,
             len(main.graph.nodes), len(report.specialisations), len(report.opaque))
    target = root.get_submodule(path)
    for name, value in main.constants.items():
        target.__dict__[name] = value  # of the shadow
    if path:
        _prefix(main.graph, path)
        main.reads = {".".join(filter(None, [path, inner])): names for inner, names in main.reads.items()}
        report = replace(report, opaque=tuple(replace(o, path=f"{path}.{o.path}") for o in report.opaque),
                         specialisations=tuple(replace(s, module=".".join(filter(None, [path, s.module])))
                                               for s in report.specialisations))
    return Trace(main.graph, root, mode, main.constants, report, main.reads)


def _record(
    model: nn.Module, path: str, inputs: Sequence[Any] | Mapping[str, Any], mode: FakeTensorMode,
    forced: Mapping[str, Opaque], *, floating: torch.dtype | None = None,
) -> tuple[Recorder, nn.Module]:
    convert = fake_copy(mode, floating)
    root = replicate(model, convert)
    if not root.training:
        root.train()
    recorder = Recorder(root.get_submodule(path), mode, model.get_submodule(path), forced)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    with quiet():
        recorder.record(tree_map_only(Tensor, convert, list(args)), tree_map_only(Tensor, convert, dict(kwargs)))
    return recorder, root


def _batch_baked(
    model: nn.Module, path: str, inputs: Any, mode: FakeTensorMode, forced: Mapping[str, Opaque], main: Recorder
) -> dict[str, Opaque]:
    """Modules whose recording is another one at another batch size."""
    given = dict(inputs) if isinstance(inputs, Mapping) else list(inputs)
    batch = next((t.shape[0] for t in tree_leaves(given) if isinstance(t, Tensor) and t.dim() > 1), 0)

    def larger(value: Tensor) -> Tensor:
        if value.dim() > 0 and value.shape[0] == batch:
            return torch.empty(batch + 1, *value.shape[1:], dtype=value.dtype, device="meta")
        return value

    if not batch:
        return {}
    try:
        second, _ = _record(model, path, tree_map_only(Tensor, larger, given), mode, {**forced, **main.opaque})
    except Exception as error:  # noqa: BLE001
        main.lost[f"the model does not run at batch size {batch + 1}: {type(error).__name__}"] = None
        return {}
    found = _differing(main, second, "its operations depend on the batch size")
    if "" in found and len(found) == 1:
        message, reason = _explain(Uncapturable("its own operations depend on the batch size"), model, path, inputs)
        raise TraceError(message, reason)
    return found


def _follow_dtypes(
    model: nn.Module, path: str, inputs: Any, forced: Mapping[str, Opaque], main: Recorder
) -> None:
    """Where a type is that of a tensor (``y.to(x.dtype)``), let the graph ask that tensor: under autocast, or in a
    model that is converted later, it is another. A recording in another type tells such types from fixed ones."""
    asked = [node for node in main.graph.nodes if node.meta.get("dtypes")]
    if not asked:
        return
    try:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        other = torch.float32 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float64
        second, _ = _record(model, path, inputs, mode, {**forced, **main.opaque}, floating=other)
    except Exception as error:  # noqa: BLE001 - the types stay as they were recorded
        log.debug("not recorded in another type: %s", error)
        return
    if [(n.op, n.target) for n in main.graph.nodes] != [(n.op, n.target) for n in second.graph.nodes]:
        return
    others = dict(zip(main.graph.nodes, list(second.graph.nodes), strict=True))
    for node in asked:
        types = set(tree_leaves([*others[node].args, others[node].kwargs]))

        def follow(value: Any, node: fx.Node = node, types: set[Any] = types) -> Any:
            if isinstance(value, torch.dtype) and value in node.meta["dtypes"] and value not in types:
                with main.graph.inserting_before(node):
                    asks = main.graph.call_function(getattr, (node.meta["dtypes"][value], "dtype"))
                asks.meta.update({**node.meta, "value": value, "saved": 0, "storages": frozenset(), "mutates": set(),
                                  "returned_by": []})
                return asks
            return value

        node.args, node.kwargs = tree_map(follow, node.args), tree_map(follow, node.kwargs)


def _differing(a: Recorder, b: Recorder, reason: str) -> dict[str, Opaque]:
    """The innermost modules whose own operations differ between two recordings."""
    own, other = _operations(a.graph), _operations(b.graph)
    paths = [path for path in own.keys() | other.keys() if own.get(path) != other.get(path)
             and path not in a.opaque.keys() | b.opaque.keys()]
    innermost = [path for path in paths if not any((not path or within(p, path)) and p != path for p in paths)]
    return {path: Opaque(path, type(a.root.get_submodule(path)).__name__, reason, "") for path in innermost}


def _operations(graph: fx.Graph) -> dict[str, list[Any]]:
    """Per module, the operations of its own forward, with their constants."""
    found: dict[str, list[Any]] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            owner = node.meta["module"]
            if node.op == "call_module":
                owner = owner.rpartition(".")[0]
            constants = fx.map_arg((node.args, node.kwargs), lambda source: source.op == "placeholder")
            found.setdefault(owner, []).append((node.op, str(node.target), repr(constants)))
    return found


def _check(model: nn.Module, example_inputs: Any) -> None:
    """Refuse what cannot be seen on fake tensors, or only too late."""
    lazy = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if is_lazy(p)]
    if lazy:
        raise TraceError(f"parameter '{lazy[0]}' of {type(model).__name__} has no shape yet: call the model once with "
                         "a batch, which makes its lazy layers, and transform it then.")
    values = list(example_inputs.values()) if isinstance(example_inputs, Mapping) else list(example_inputs)
    if len(values) > 1 and all(isinstance(value, int) for value in values):
        raise TraceError(f"example_inputs= are the numbers {tuple(values)}: pass a tensor of that shape, "
                         f"torch.empty{tuple(values)}")
    _check_types(model, values)


def _check_types(model: nn.Module, example_inputs: Sequence[Any]) -> None:
    """Fake tensors compute in mixed types where real ones refuse, so say it here."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for leaf in tree_leaves(list(example_inputs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and own and leaf.dtype not in own:
            raise TraceError(
                f"example_inputs= are {leaf.dtype}, but the parameters of {type(model).__name__} are "
                f"{', '.join(map(str, own))}: pass example_inputs of the type that the model computes in."
            )


def reached(model: nn.Module, path: str, inputs: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What one call of a model, or of its sub-module ``path``, on fake tensors calls until it fails: module path, class
    and sizes of the result of every module without parts, and of every other that returned."""
    convert = fake_copy(FakeTensorMode(allow_non_fake_inputs=True))
    root = replicate(model, convert).train()
    found: list[tuple[str, str, str]] = []

    def note(name: str, module: nn.Module, out: Any) -> None:
        sizes = ["x".join(map(str, leaf.shape)) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        found.append((name, type(module).__name__, ", ".join(sizes)))

    for name, module in root.get_submodule(path).named_modules(prefix=path):
        module.register_forward_hook(lambda module, _, out, name=name: note(name, module, out))
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    with quiet(), suppress(Exception), torch.random.fork_rng(devices=[]):  # the user knows the error already
        root.get_submodule(path)(*tree_map_only(Tensor, convert, list(args)),
                                 **tree_map_only(Tensor, convert, dict(kwargs)))
    return found


def shadow(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same module tree with fake parameters and buffers (on the CPU) and without hooks; shares nothing mutable."""
    return replicate(module, fake_copy(mode))


def _prefix(graph: fx.Graph, path: str) -> None:
    calls = {call for node in graph.nodes if node.meta.get("call") for call in node.meta["call"].around()}
    for call in calls:
        call.path = f"{path}.{call.path}" if call.path else path
        call.left = {node: f"{path}.{name}" for node, name in call.left.items()}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"{path}.{node.target}"
        node.meta["module"] = ".".join(filter(None, [path, node.meta.get("module", "")]))
        node.meta["returned_by"] = [f"{path}.{p}" if p else path for p in node.meta["returned_by"]]


def _explain(error: Exception, model: nn.Module, path: str, inputs: Any) -> tuple[str, str]:
    """What happened, where (module path, class, source line), what was tried, what to do; and the first in short."""
    where, code = place_of(error)
    inner = ".".join(filter(None, [path, getattr(error, "module_path", "")]))
    kind = type(model.get_submodule(inner)).__name__
    reason = in_words(error)
    shapes = ", ".join("x".join(map(str, leaf.shape)) for leaf in tree_leaves(
        dict(inputs) if isinstance(inputs, Mapping) else list(inputs)) if isinstance(leaf, Tensor))
    return (
        f"{type(model).__name__} cannot be captured: module '{inner or '(the model itself)'}' of class {kind} "
        f"failed: {reason}\n  where: {where or 'no source line of its own'}{f', in `{code}`' if code else ''}\n"
        "  tried: recording the call, answering questions about sizes, calling the module as a whole\n"
        f"  what to do: (1) pass example_inputs= that the model runs on (these are {shapes or 'no tensors'}); (2) move "
        "the code that a graph cannot hold into a sub-module of its own: such modules are kept whole; (3) compile the "
        "part that can be captured, for example the backbone."
    ), f"{reason.splitlines()[0] if reason else ''}, at {where or inner}"


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
    return any(isinstance(leaf, FakeTensor | Tensor) and (leaf.is_floating_point() or leaf.is_complex())
               for leaf in tree_leaves(value))
