"""Pass 1, trace: capture a module as a graph in which every node knows its value, bytes and module path.

Everything runs on a *shadow* of the module: the same module tree with fake tensors for parameters and buffers and
without hooks. The user's weights, buffers, mode, hooks and random state are never touched.
"""

import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import TraceError

_PACKAGE = __file__.rpartition("/")[0]


@dataclass(frozen=True)
class Trace:
    """A captured module.

    ``graph``: targets are relative to the user's model. Each node's ``meta`` holds

    - ``value``: the fake tensor (or nested structure, or plain number) the node produced for the example inputs,
    - ``module``: path of the innermost module whose ``forward`` made the node ("" is the model itself),
    - ``returned_by``: paths of the modules whose call returned this value, innermost first,
    - ``saved``: bytes of memory that autograd first kept for backward while the node ran (parameters excluded),
    - ``mutates``: the input nodes whose tensors the node changed in place,
    - ``overwritten``: whether this node's tensor was changed in place after some other node had read it.

    ``constants`` are the tensors that were created while tracing, by attribute name.
    """

    graph: fx.Graph
    shadow: nn.Module
    mode: FakeTensorMode
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return self.graph.output_node()

    def module(self, node: fx.Node) -> nn.Module | None:
        """The (shadow) module that a ``call_module`` node calls."""
        return self.shadow.get_submodule(str(node.target)) if node.op == "call_module" else None

    def parameters(self, node: fx.Node) -> list[nn.Parameter]:
        """Parameters that this node itself uses (of the shadow, so fake)."""
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(self.shadow.get_submodule(owner), name, None) if hasattr_path(self.shadow, owner) else None
            return [value] if isinstance(value, nn.Parameter) else []
        module = self.module(node)
        return list(module.parameters()) if module is not None else []


def hasattr_path(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def trace(model: nn.Module, example_inputs: Sequence[Any], *, path: str = "") -> Trace:
    """Capture ``model`` (or its sub-module ``path``) in training mode on fake copies of ``example_inputs``.

    ``example_inputs`` are the positional arguments of the captured module's ``forward``; tensors may be nested.
    Raises TraceError, with the module path and source line, when the module cannot be captured or run.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    root = shadow(model, mode)
    if not root.training:
        root.train()
    target = root.get_submodule(path)
    tracer = _Tracer()
    try:
        captured = tracer.trace(target, _left_out(target, len(example_inputs)))
    except Exception as error:  # noqa: BLE001 - whatever the user's forward raises under tracing
        raise TraceError(_explain(error, model, target, ".".join(filter(None, [path, *tracer.stack[-1:]])))) from error
    _drop_left_out(captured, len(example_inputs))
    constants = _constants(captured, target)
    inputs = [_fake(mode, value) for value in example_inputs]
    _check_types(model, example_inputs)
    arguments = sum(node.op == "placeholder" for node in captured.nodes)
    if len(inputs) > arguments:
        raise TraceError(f"example_inputs= has {len(inputs)} values, but the forward of {type(target).__name__} takes "
                         f"{arguments} argument{'s' * (arguments != 1)}")
    recorder = _Recorder(fx.GraphModule(target, captured), tracer)
    try:
        with quiet(), mode, torch.enable_grad():
            recorder.run(*inputs)
    except Exception as error:  # noqa: BLE001
        node = getattr(recorder, "current", None)
        where = node.meta.get("module", "") if node is not None else path
        raise TraceError(_explain(error, model, target, where, node)) from error
    graph: fx.Graph = recorder.graph
    _follow_mutations(graph)
    if path:
        _prefix(graph, path)
    return Trace(graph, root, mode, constants)


def _left_out(target: nn.Module, given: int) -> dict[str, Any]:
    """Optional arguments behind the example inputs: they keep their defaults."""
    arguments = [p for p in inspect.signature(target.forward).parameters.values()
                 if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return {p.name: p.default for p in arguments[given:] if p.default is not p.empty}


def _drop_left_out(graph: fx.Graph, given: int) -> None:
    """Remove the placeholders of arguments that keep their defaults, and fx's checks of them."""
    for node in [node for node in graph.nodes if node.op == "placeholder"][given:]:
        checks = _descendants(node)
        if all(user.op == "call_function" for user in checks):
            for user in reversed(checks):
                graph.erase_node(user)
            graph.erase_node(node)


def _descendants(node: fx.Node) -> list[fx.Node]:
    """What is computed from a node, in order."""
    found = {node}
    for other in node.graph.nodes:
        if any(source in found for source in other.all_input_nodes):
            found.add(other)
    return [other for other in node.graph.nodes if other in found and other is not node]


def _constants(graph: fx.Graph, target: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither parameters nor buffers: made while tracing, or plain attributes."""
    owned = {name for name, _ in [*target.named_parameters(remove_duplicate=False),
                                  *target.named_buffers(remove_duplicate=False)]}
    constants: dict[str, Tensor] = {}
    for node in graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if path not in owned:
            value: Any = target
            for part in path.split("."):
                value = getattr(value, part)
            if isinstance(value, Tensor):
                node.target = "_constant_" + path.replace(".", "_")
                constants[node.target] = value
                target.__dict__[node.target] = value  # of the shadow
    return constants


def _check_types(model: nn.Module, example_inputs: Sequence[Any]) -> None:
    """Fake tensors compute in mixed types where real ones refuse, so say it here."""
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    for leaf in tree_leaves(list(example_inputs)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and own and leaf.dtype not in own:
            raise TraceError(
                f"example_inputs= are {leaf.dtype}, but the parameters of {type(model).__name__} are "
                f"{', '.join(map(str, own))}: pass example_inputs of the type that the model computes in."
            )


def shadow(module: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The same module tree with fake parameters and buffers (on the CPU) and without hooks; shares nothing mutable."""
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def fake(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            tensors[id(tensor)] = _fake(mode, tensor)
        return tensors[id(tensor)]

    def copy(module: nn.Module) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        new: nn.Module = object.__new__(type(module))
        modules[id(module)] = new
        new.__dict__ = dict(vars(module))
        for name in ("_parameters", "_buffers"):
            vars(new)[name] = {key: fake(tensor) for key, tensor in vars(module)[name].items()}
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                vars(new)[name] = type(value)()
            elif type(value) in (list, dict, set) and not name.startswith("_"):  # a forward pass may keep things there
                vars(new)[name] = value.copy()
        vars(new)["_modules"] = {k: None if m is None else copy(m) for k, m in vars(module)["_modules"].items()}
        return new

    return copy(module)


def _fake(mode: FakeTensorMode, value: Any) -> Any:
    def one(tensor: Tensor) -> Tensor:
        with mode:
            out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(out, requires_grad=tensor.requires_grad)
        return out

    return tree_map_only(Tensor, one, value)


class _Tracer(fx.Tracer):
    """Modules without children, and torch.nn's own, are leaves; everything else is entered.

    A childless module that stays whole keeps its own ``self.training`` behaviour (dropout, stochastic depth). One
    that is called with lists or dicts of values is plumbing, and entered as well.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.returned_by: dict[str, list[str]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.stack.append(self.path_of_module(m))
        plumbing = any(isinstance(value, list | tuple | dict) for value in [*args, *kwargs.values()])
        if plumbing and not any(True for _ in m.children()) and not super().is_leaf_module(m, self.stack[-1]):
            out = forward(*args, **kwargs)
        else:
            out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.returned_by.setdefault(out.node.name, []).append(self.stack[-1])
        self.stack.pop()  # not in a finally: after a failure the stack tells where
        return out

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        node.meta["module"] = self.stack[-1] if self.stack else ""
        return node


class _Recorder(fx.Interpreter):
    """Runs the graph on fake tensors and records each node's value and the bytes autograd keeps for it."""

    def __init__(self, module: fx.GraphModule, tracer: _Tracer) -> None:
        super().__init__(module)
        self.current: fx.Node | None = None
        self._seen = {tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers()]}
        self._keep: list[Tensor] = []  # storages stay alive, so that their addresses are not used twice
        for node in module.graph.nodes:
            node.meta["returned_by"] = tracer.returned_by.get(node.name, [])

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        n.meta["saved"] = 0
        before = {source: _version(self.env.get(source)) for source in n.all_input_nodes}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, nn.Parameter) and storage._cdata not in self._seen:
                self._seen.add(storage._cdata)
                self._keep.append(tensor.detach())
                n.meta["saved"] += storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            n.meta["value"] = super().run_node(n)
        n.meta["mutates"] = {source for source, version in before.items() if _version(self.env[source]) != version}
        n.meta["overwritten"] = False
        for source in n.meta["mutates"]:
            source.meta["overwritten"] |= any("value" in user.meta and user is not n for user in source.users)
        return n.meta["value"]


def _follow_mutations(graph: fx.Graph) -> None:
    """Let whoever reads a tensor after an in-place operation read that operation's result: same tensor, true order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        for source in node.meta.get("mutates", ()):
            old, new = source.meta["value"], node.meta["value"]
            if isinstance(old, Tensor) and old is new:
                for user in [user for user in source.users if order[user] > order[node]]:
                    user.replace_input_with(source, node)


def _version(value: Any) -> int:
    return sum(leaf._version for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _prefix(graph: fx.Graph, path: str) -> None:
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"{path}.{node.target}"
        node.meta["module"] = ".".join(filter(None, [path, node.meta.get("module", "")]))
        node.meta["returned_by"] = [f"{path}.{p}" for p in node.meta["returned_by"]]


def _explain(error: Exception, model: nn.Module, target: nn.Module, path: str, node: fx.Node | None = None) -> str:
    """What happened, where (module path, class, source line), what to do."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    torch_root = torch.__path__[0]
    own = [f for f in frames if not f.filename.startswith(torch_root) and not f.filename.startswith(_PACKAGE)]
    where = f"{own[-1].filename}:{own[-1].lineno}, in `{own[-1].line}`" if own else "no source line of its own"
    kind = type(target).__name__
    with suppress(AttributeError):
        kind = type(model.get_submodule(path)).__name__
    at = f" at graph node {node.format_node()}" if node is not None else ""
    return (
        f"{type(model).__name__} cannot be captured: module '{path or '(the model itself)'}' of class {kind} "
        f"failed{at}: {type(error).__name__}: {str(error).strip()}\n  where: {where}\n"
        "  what to do: (1) pass example_inputs= of the sizes that you train with; (2) move the code that depends on "
        "tensor values into a sub-module without children: such modules are kept whole; (3) compile the part that "
        "can be captured, for example the backbone."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's fake tensors from logging an error that is about to be explained."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def is_float(value: Any) -> bool:
    """Whether a traced value is, or holds, a floating-point or complex tensor: the values that carry gradients."""
    return any(isinstance(leaf, FakeTensor | Tensor) and (leaf.is_floating_point() or leaf.is_complex())
               for leaf in tree_leaves(value))
