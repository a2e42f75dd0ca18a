"""Questions about the nodes of a recorded graph: what they are computed from, and where they lie in the model."""

from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from glcan_fx.capture.trace import Trace, is_float

Groups = Mapping[fx.Node, tuple[fx.Node, ...]]
"""Of every value that is one of several side by side (see ``structure/streams.py``), all of them."""


def tensor_of(node: fx.Node) -> Tensor:
    """The first tensor in a node's value. Raises StopIteration where there is none."""
    return next(leaf for leaf in tree_leaves(node.meta["value"]) if isinstance(leaf, Tensor))


def is_float_tensor(node: fx.Node) -> bool:
    """Whether a node's value is one floating-point or complex tensor."""
    return node.op != "output" and isinstance(node.meta.get("value"), Tensor) and is_float(node.meta["value"])


def ancestors(
    nodes: Iterable[fx.Node], known: Set[fx.Node] = frozenset(), groups: Groups = MappingProxyType({})
) -> set[fx.Node]:
    """The nodes themselves and all that they are computed from, but for those ``known`` with all of theirs. groups:
    with each node those that are side by side with it."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node not in known:
            found.add(node)
            stack.extend(node.all_input_nodes)
            stack.extend(groups.get(node, ()))
    return found


def descendants(node: fx.Node, *, values: bool = False) -> set[fx.Node]:
    """The nodes that are computed from a node's value; values: and not from its sizes alone."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in found and not (values and is_size(user)):
                found.add(user)
                stack.append(user)
    return found


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a number, or some, from the sizes of a value."""
    tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves(node.meta.get("value")))
    return node.op == "call_function" and not tensors and not node.meta["mutates"]


def computed(trace: Trace, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """What a node's function, method or module computes of these arguments."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    module = trace.module(node)
    function: Any = node.target if module is None else module
    return function(*args, **kwargs)


def name_of_call(node: fx.Node) -> str:
    """The name of the function or method that a node calls, or the path of its module."""
    return str(getattr(node.target, "__name__", node.target))


def makes_new(node: fx.Node) -> bool:
    """Whether a node makes a tensor of which only the size is that of another."""
    name = name_of_call(node)
    return node.op != "call_module" and (name.startswith("new_") or name.endswith("_like"))


def input_dependent(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that a step computes once: from the inputs, by drawing random numbers, or by changing a buffer."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        depends = node.op == "placeholder" or any(source in found for source in node.all_input_nodes)
        if depends or node.meta.get("mutates") or node.meta.get("random"):
            found.add(node)
    return found


def called_path(node: fx.Node) -> str:
    """The path of the module that a node calls; "" where it calls none."""
    return str(node.target) if node.op == "call_module" else ""


def common_path(nodes: Iterable[fx.Node]) -> str:
    """The innermost module that all of these nodes lie in."""
    common: list[str] | None = None
    for node in nodes:
        parts = node.meta["module"].split(".") if node.meta.get("module") else []
        common = parts if common is None else [a for a, b in zip(common, parts, strict=False) if a == b]
        if common != parts[: len(common)]:
            common = common[: next(i for i, (a, b) in enumerate(zip(common, parts, strict=False)) if a != b)]
    return ".".join(common or [])
