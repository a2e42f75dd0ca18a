"""Pass 1, trace: capture a module as a graph in which every node knows its value, bytes and module path.

The call is recorded again at another batch size. Where the recordings differ, the innermost module that differs becomes
opaque, so that no batch size is frozen into the graph.
"""

import logging
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from glcan_fx.capture.calls import arguments_in, erase_unused
from glcan_fx.capture.recorder import Recorder
from glcan_fx.capture.shadow import fake_copy, replicate
from glcan_fx.capture.source_lines import NotMadeYet, Opaque, Uncapturable, in_words, place_of
from glcan_fx.capture.trace import Report, Trace, quiet, within
from glcan_fx.errors import TraceError
from glcan_fx.fakes import Fakes

log = logging.getLogger("glcan_fx")


def trace(
    model: nn.Module, example_inputs: Sequence[Any] | Mapping[str, Any], *, path: str = "", hooks: bool = False
) -> Trace:
    """Capture one training-mode call of ``model`` (or its sub-module ``path``) on fake copies of ``example_inputs``.

    ``example_inputs`` are the call's arguments, a sequence of positional or a dict of keyword ones; containers of
    tensors may be among them. ``hooks``: the hooks on the model's modules run, too, which they do not otherwise: they
    are the user's, and see fake tensors. Raises TraceError, with the module path and source line, when the call cannot
    be captured or run.
    """
    _check(model, example_inputs)
    mode = Fakes()
    subject = _Subject(model, path, example_inputs, hooks)
    recorder, root, forced = _climb(subject, mode)
    graph, constants = recorder.nodes.graph, recorder.nodes.constants
    _follow_dtypes(subject, forced, recorder)
    erase_unused(graph, arguments_in(graph))
    vars(root.get_submodule(path)).update(constants)
    if path:
        _prefix(graph, path)
    report = _report(recorder, path)
    log.info("%s captured on rung %d: %d nodes, %d specialisations, %d opaque modules", type(model).__name__,
             report.rung, len(graph.nodes), len(report.specialisations), len(report.opaque))
    reads = {_joined(path, inner): names for inner, names in recorder.reads.items()}
    return Trace(graph, root, mode, constants, report, reads, hooks, recorder.caches)


class _Subject(NamedTuple):
    """What is recorded: a model's sub-module ``path``, called with these inputs, with or without the user's hooks."""

    model: nn.Module
    path: str
    inputs: Sequence[Any] | Mapping[str, Any]
    hooks: bool


def _climb(subject: _Subject, mode: Fakes) -> tuple[Recorder, nn.Module, dict[str, Opaque]]:
    """Record until no more modules have to be opaque; returns the recorder, the shadow, and the modules that were."""
    model, path, inputs, _ = subject
    forced: dict[str, Opaque] = {}
    while True:
        try:
            recorder, root = _record(subject, mode, forced)
        except NotMadeYet as error:
            message = (f"{type(model).__name__} cannot be captured yet: {error}. Please call the model once with a "
                       "batch, and transform it then.")
            raise TraceError(message, replayable=False) from error
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
            message, reason = _explain(error, model, path, inputs)
            raise TraceError(message, reason, replayable=getattr(error, "replayable", True),
                             reached=partial(reached, model, path, inputs)) from error
        found = _batch_baked(subject, mode, forced, recorder)
        if found.keys() <= forced.keys():
            recorder.lost |= {f"'{p}': {o.reason}, and it cannot be made opaque": None for p, o in found.items()}
            return recorder, root, forced
        forced |= found


def _report(recorder: Recorder, path: str) -> Report:
    """How the sub-module ``path`` was captured, with the paths of the whole model."""
    rung = 3 if recorder.opaque else 2 if recorder.specialisations else 1
    asked = (replace(s, module=_joined(path, s.module)) for s in recorder.specialisations.values())
    opaque = (replace(o, path=_joined(path, o.path)) for o in recorder.opaque.values())
    return Report(rung, tuple(asked), tuple(opaque), tuple(recorder.lost))


def _joined(*paths: str) -> str:
    return ".".join(filter(None, paths))


def _record(
    subject: _Subject, mode: Fakes, forced: Mapping[str, Opaque], *, floating: torch.dtype | None = None,
    again: bool = False
) -> tuple[Recorder, nn.Module]:
    model, path, inputs, hooks = subject
    convert = fake_copy(mode, floating)
    root = replicate(model, convert, hooks=hooks)
    if not root.training:
        root.train()
    recorder = Recorder(root.get_submodule(path), mode, model.get_submodule(path), forced)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    try:
        with quiet():
            recorder.record(tree_map_only(Tensor, convert, list(args)), tree_map_only(Tensor, convert, dict(kwargs)))
    finally:
        answered = recorder.caches is not None and recorder.caches.clear_used()
    if answered and not again:
        return _record(subject, mode, forced, floating=floating, again=True)
    return recorder, root


def _batch_baked(
    subject: _Subject, mode: Fakes, forced: Mapping[str, Opaque], main: Recorder
) -> dict[str, Opaque]:
    """Modules whose recording is another one at another batch size."""
    model, path, inputs, _ = subject
    given = dict(inputs) if isinstance(inputs, Mapping) else list(inputs)
    batch = next((t.shape[0] for t in tree_leaves(given) if isinstance(t, Tensor) and t.dim() > 1), 0)

    def larger(value: Tensor) -> Tensor:
        if value.dim() > 0 and value.shape[0] == batch:
            return torch.empty(batch + 1, *value.shape[1:], dtype=value.dtype, device="meta")
        return value

    if not batch:
        return {}
    try:
        more = subject._replace(inputs=tree_map_only(Tensor, larger, given))
        second, _ = _record(more, mode, {**forced, **main.opaque})
    except Exception as error:  # noqa: BLE001
        main.lost[f"the model does not run at batch size {batch + 1}: {type(error).__name__}"] = None
        return {}
    _follow_batch(main.nodes.graph, second.nodes.graph, batch)
    found = _differing(main, second, "its operations depend on the batch size")
    if "" in found and len(found) == 1:
        message, reason = _explain(Uncapturable("its own operations depend on the batch size"), model, path, inputs)
        raise TraceError(message, reason)
    return found


def _follow_batch(graph: fx.Graph, larger: fx.Graph, batch: int) -> None:
    """Where a number is the batch size or a multiple of it, though not by operations on sizes (``len(x)``), let both
    graphs ask the input; ``larger`` was recorded with one more image, which tells such numbers from fixed ones."""
    pairs = list(zip(graph.nodes, larger.nodes, strict=False))
    if len(graph.nodes) != len(larger.nodes) or any((a.op, str(a.target)) != (b.op, str(b.target)) for a, b in pairs):
        return
    inputs = [(a, b) for a, b in pairs if a.op == "placeholder" and isinstance(a.meta["value"], Tensor)
              and a.meta["value"].dim() > 1 and a.meta["value"].shape[0] == batch]
    for node, other in pairs if inputs else ():
        ours, theirs = [node.args, node.kwargs], [other.args, other.kwargs]
        leaves, structure = tree_flatten(ours)
        others = tree_leaves(theirs)
        if len(leaves) != len(others):
            continue
        for index, (small, large) in enumerate(zip(leaves, others, strict=True)):
            if type(small) is type(large) is int and small != large and small == (large - small) * batch:
                leaves[index] = _multiple_of_batch(node, inputs[0][0], large - small)
                others[index] = _multiple_of_batch(other, inputs[0][1], large - small)
        node.args, node.kwargs = tree_unflatten(leaves, structure)
        other.args, other.kwargs = tree_unflatten(others, structure)


def _multiple_of_batch(node: fx.Node, source: fx.Node, factor: int) -> fx.Node:
    """A number in front of ``node``: so many times as there are images in an input."""
    batch: int = source.meta["value"].shape[0]
    made = source
    for function, key, value in ((getattr, "shape", tuple(source.meta["value"].shape)), (operator.getitem, 0, batch),
                                 (operator.mul, factor, batch * factor)):
        made = _asked(node, function, made, key, value)
        made.meta.update(derived=True, overwritten=False, dtypes={}, dependent=True)
    return made


def _follow_dtypes(subject: _Subject, forced: Mapping[str, Opaque], main: Recorder) -> None:
    """Where a type is that of a tensor (``y.to(x.dtype)``), let the graph ask that tensor: under autocast, or in a
    model that is converted later, it is another. A recording in another type tells such types from fixed ones."""
    graph = main.nodes.graph
    asked = [node for node in graph.nodes if node.meta.get("dtypes")]
    if not asked:
        return
    try:
        mode = Fakes()
        other = torch.float32 if any(p.dtype == torch.float64 for p in subject.model.parameters()) else torch.float64
        second, _ = _record(subject, mode, {**forced, **main.opaque}, floating=other)
    except Exception as error:  # noqa: BLE001 - the types stay as they were recorded
        log.debug("not recorded in another type: %s", error)
        return
    nodes, others = list(graph.nodes), list(second.nodes.graph.nodes)
    if [(n.op, n.target) for n in nodes] != [(n.op, n.target) for n in others]:
        return
    twin = dict(zip(nodes, others, strict=True))
    for node in asked:
        fixed = set(tree_leaves([*twin[node].args, twin[node].kwargs]))
        follow = partial(_asking_for_dtype, node, fixed)
        node.args, node.kwargs = tree_map(follow, node.args), tree_map(follow, node.kwargs)


def _asking_for_dtype(node: fx.Node, fixed: set[Any], value: Any) -> Any:
    """In place of an argument that is the type of a tensor: a node that asks the tensor; ``fixed`` types stay."""
    if not isinstance(value, torch.dtype) or value not in node.meta["dtypes"] or value in fixed:
        return value
    return _asked(node, getattr, node.meta["dtypes"][value], "dtype", value)


def _asked(node: fx.Node, function: Callable[..., Any], source: fx.Node, key: Any, value: Any) -> fx.Node:
    """A node in front of ``node``, and of the same place in the model, that asks another one for what is ``value``."""
    with node.graph.inserting_before(node):
        made = node.graph.call_function(function, (source, key))
    made.meta.update({**node.meta, "value": value, "saved": 0, "storages": {}, "mutates": set(), "returned_by": []})
    return made


def _differing(a: Recorder, b: Recorder, reason: str) -> dict[str, Opaque]:
    """The innermost modules whose own operations differ between two recordings."""
    own, other = _operations(a.nodes.graph), _operations(b.nodes.graph)
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
    convert = fake_copy(Fakes())
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


def _prefix(graph: fx.Graph, path: str) -> None:
    """Make paths relative to the model of those relative to its sub-module ``path``."""
    calls = {call for node in graph.nodes if node.meta.get("call") for call in node.meta["call"].around()}
    for call in calls:
        call.path = _joined(path, call.path)
        call.left = {node: _joined(path, name) for node, name in call.left.items()}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"{path}.{node.target}"
        node.meta["module"] = _joined(path, node.meta.get("module", ""))
        node.meta["returned_by"] = [_joined(path, inner) for inner in node.meta["returned_by"]]


def _explain(error: Exception, model: nn.Module, path: str, inputs: Any) -> tuple[str, str]:
    """What happened, where (module path, class, source line), what was tried, what to do; and the first in short."""
    where, code = place_of(error)
    inner = _joined(path, getattr(error, "module_path", ""))
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
    ), f"{reason.splitlines()[0] if reason else ''}, {f'at {where}' if where else f'in {inner or kind}'}"
