"""Which node of the graph stands for a value: tensors are known by identity, sizes remember their node."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from glcan_fx.capture.calls import Call, after_change, detached
from glcan_fx.capture.source_lines import Uncapturable, users_frame
from glcan_fx.capture.symbolic import Number
from glcan_fx.fakes import Fakes
from glcan_fx.pytree import parts_of, plain_data, tensors_in

_Way = tuple[Any, ...]  # from what a node returned to a part of it, as steps of (function, key)


class Nodes:
    """The graph that is being recorded, and the node of every value.

    root: whose parameters and buffers become ``get_attr`` nodes. stack, calls: paths of the modules, and the calls,
    that are under way, outermost first; the recorder keeps them up to date. constants: the tensors that are neither
    parameters nor buffers, by the name of their node.
    """

    def __init__(self, root: nn.Module, mode: Fakes, stack: list[str], calls: list[Call]) -> None:
        self.graph = fx.Graph()
        self.mode, self.stack, self.calls = mode, stack, calls
        self.constants: dict[str, Tensor] = {}
        self._naming = False  # whether the arguments of a call are being named, and nothing else reads what is made
        self._attributes = _attributes_of(root)
        self._known: dict[int, tuple[fx.Node, _Way]] = {}  # by the tensor's id
        self._undo: list[Callable[[], Any]] = []  # takes the bookkeeping back, newest last
        self._parts: dict[tuple[fx.Node, _Way], fx.Node] = {}
        self._devices: dict[int, tuple[Any, Tensor]] = {}
        self._dtypes: dict[tuple[int, torch.dtype], Tensor] = {}  # whose .dtype a frame of Python has asked for
        self._asked_dtypes: dict[torch.dtype, fx.Node] = {}  # of the operation that is being recorded
        self._objects: dict[int, tuple[fx.Node, list[int]]] = {}  # dataclasses that a node returned, and their tensors
        self._storages: dict[int, list[tuple[fx.Node, Tensor]]] = {}  # who shares memory
        self._aliases: dict[int, Tensor] = {}
        self._keep: list[Any] = []  # what is known by identity must stay alive
        self._state: set[int] = set()  # storages of parameters and buffers
        for tensor in [*root.parameters(), *root.buffers()]:
            self._devices.setdefault(id(tensor.device), (tensor.device, tensor))
            self._state.add(tensor.untyped_storage()._cdata)

    def forget(self) -> None:
        """Let go of the values, at the end of a recording."""
        for table in (self._keep, self._undo, self._known, self._objects, self._parts, self._storages, self._devices,
                      self._dtypes, self._aliases):
            table.clear()

    def alias(self, tensor: Tensor) -> Tensor:
        """The same tensor as a value of its own, for a node that returns its argument."""
        view = tensor.view_as(tensor)
        self._aliases[id(view)] = tensor
        self._keep.append(view)
        return view

    def is_alias(self, tensor: Tensor, other: Any) -> bool:
        """Whether a tensor is, in eager mode, the same object as another."""
        while tensor is not other and id(tensor) in self._aliases:
            tensor = self._aliases[id(tensor)]
        return tensor is other

    def knows(self, tensor: Tensor) -> bool:
        """Whether a recorded operation made this tensor, or it has been read."""
        return id(tensor) in self._known

    def made_by(self, tensor: Tensor) -> fx.Node:
        """The node that returned a known tensor, alone or in a container."""
        return self._known[id(tensor)][0]

    def asked_for_dtype(self, dtype: torch.dtype, tensor: Tensor) -> None:
        """Note that the model's code read ``tensor.dtype``."""
        self._dtypes[id(users_frame()), dtype] = tensor

    def depends(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed from the inputs."""
        return id(tensor) in self._known and bool(self._known[id(tensor)][0].meta["dependent"])

    def is_state(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer, or a part of one."""
        return tensor.untyped_storage()._cdata in self._state

    def detach(self, tensor: Tensor) -> Tensor:
        """A tensor without its history, where it may have one, as a value of its own."""
        free = not isinstance(tensor, nn.Parameter) and not self.depends(tensor)
        if free or self.knows(tensor) and self.made_by(tensor).target is detached:
            return tensor
        node = self.create("call_function", detached, (self.argument(tensor),), {})
        value = tensor.detach()
        self.describe(node, value, derived=True)
        return value

    def mutated(self, node: fx.Node, tensor: Tensor) -> None:
        """Note that a node changed a tensor in place: who reads its memory from now on reads it behind the change."""
        results = {id(part) for part in tensors_in(node.meta["value"])}
        for other, shared in list(self._storages.get(tensor.untyped_storage()._cdata, ())):
            if other is node:
                continue
            other.meta["overwritten"] |= any(user is not node for user in other.users)
            if other in node.all_input_nodes:
                node.meta["mutates"].add(other)
            if id(shared) not in results and self._known.get(id(shared), (None,))[0] is other:
                after = self.create("call_function", after_change, (self.argument(shared), node), {})
                self.describe(after, shared, derived=True)

    def create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """A new node at the end of the graph, with what is known of it before it runs (see ``Trace``)."""
        name = self.stack[-1].replace(".", "_") if op == "call_module" else None
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        node.meta.update(module=self.stack[-1], returned_by=[], saved=0, storages={},
                         mutates=set(), overwritten=False, dtypes=self._asked_dtypes,
                         call=self.calls[-1] if self.calls else None,
                         dependent=any(source.meta["dependent"] for source in node.all_input_nodes))
        self._asked_dtypes = {}
        return node

    def describe(self, node: fx.Node, value: Any, *, derived: bool = False) -> None:
        """Note what a node stands for, so that its tensors are known."""
        node.meta.setdefault("module", "")
        node.meta.setdefault("saved", 0)
        node.meta.setdefault("storages", {})
        node.meta.setdefault("mutates", set())
        node.meta.setdefault("overwritten", False)
        node.meta["value"] = value if isinstance(value, Tensor) else plain_data(value)
        if derived:
            node.meta["derived"] = True
        self._learn(value, node, ())
        if dataclasses.is_dataclass(value):
            self._keep.append(value)
            self._set(self._objects, id(value), (node, [id(tensor) for tensor in tensors_in(value)]))

    def _learn(self, value: Any, node: fx.Node, way: tuple[Any, ...]) -> None:
        if isinstance(value, Tensor):
            if self._known.get(id(value), (None,))[0] is not node:  # what is returned twice goes by its first name
                self._set(self._known, id(value), (node, way))
            self._keep.append(value)
            alike = self._storages.setdefault(value.untyped_storage()._cdata, [])
            alike.append((node, value))
            self._undo.append(alike.pop)
            device = value.device
            self._devices.setdefault(id(device), (device, value))
        else:
            for step, part in parts_of(value):
                self._learn(part, node, (*way, step))

    def _set(self, table: dict[Any, Any], key: Any, value: Any) -> None:
        if key in table:
            self._undo.append(partial(table.__setitem__, key, table[key]))
        else:
            self._undo.append(partial(table.pop, key, None))
        table[key] = value

    def argument(self, value: Any) -> Any:
        """What stands for a value in the graph. Raises Uncapturable where a graph cannot hold it."""
        if isinstance(value, Number):
            return value.fx_node
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, torch.device) and id(value) in self._devices:
            node = self.create("call_function", getattr, (self.node_of(self._devices[id(value)][1]), "device"), {})
            self.describe(node, value, derived=True)
            return node
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._made(value, tuple(map(self.argument, value)), {})
        if isinstance(value, tuple):
            return tuple(map(self.argument, value))
        if isinstance(value, list):
            return [self.argument(item) for item in value]
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if id(value) in self._objects and self._objects[id(value)][1] == [id(t) for t in tensors_in(value)]:
                return self._objects[id(value)][0]
            fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value) if f.init}
            made = {key: self.argument(part) for key, part in fields.items() if part is not None}
            return self._made(value, (), made)
        if isinstance(value, Mapping):
            if not all(isinstance(part, str | int | float | bool) for key in value
                       for part in (key if isinstance(key, tuple) else (key,))):
                raise Uncapturable("it makes a dict whose keys are neither names nor numbers, nor tuples of them")
            return {key: self.argument(part) for key, part in value.items()}
        if isinstance(value, torch.dtype) and (tensor := self._dtypes.get((id(users_frame()), value))) is not None:
            self._asked_dtypes[value] = self.node_of(tensor)
        if isinstance(value, int | float) and type(value) not in (bool, int, float):
            return int(value) if isinstance(value, int) else float(value)  # NumPy's numbers, members of enumerations
        if value is None or value is Ellipsis or isinstance(
                value, int | float | complex | str | torch.dtype | torch.device | torch.memory_format | torch.layout):
            return value
        raise Uncapturable(f"a value of class {type(value).__name__} is passed on, which a graph cannot hold")

    def arguments_of_call(self, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """What stands for the arguments of a module's call; None for ``args`` where a graph cannot hold them."""
        self._naming = True
        try:
            return self.argument(tuple(args)), self.argument(dict(kwargs))
        except Uncapturable:
            return None, {}
        finally:
            self._naming = False

    def _made(self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """An object of a class of the user's, made of what is known."""
        node = self.create("call_function", type(value), args, kwargs)
        if self._naming:  # for a call that may never be made whole: nobody else reads the object
            node.meta.update(value=plain_data(value), derived=True)
        else:
            self.describe(node, value)
        return node

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that stands for a tensor. Raises Uncapturable where no recorded operation made it."""
        if id(tensor) in self._known:
            return self._part_of(tensor)
        if id(tensor) in self._attributes:
            return self._attribute(self._attributes[id(tensor)], tensor)
        if isinstance(tensor, FakeTensor):
            raise Uncapturable("a tensor appears that no recorded operation made")
        name = f"_constant_{len(self.constants)}"
        self.constants[name] = tensor
        return self._attribute(name, tensor)

    def _attribute(self, path: str, tensor: Tensor) -> fx.Node:
        node = self.create("get_attr", path, (), {})
        self.describe(node, tensor, derived=True)
        if not isinstance(tensor, FakeTensor):
            node.meta["value"] = self.mode.from_tensor(tensor)
        return node

    def _part_of(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor that a node returned, alone or in a container: then a node for every step into it."""
        node, way = self._known[id(tensor)]
        if node.target is detached and tensor.grad_fn is not None:
            raise Uncapturable("it calls an autograd function, which has a gradient of its own")
        for depth, (function, step) in enumerate(way):
            key = node, way[: depth + 1]
            if key not in self._parts:
                above = node if depth == 0 else self._parts[node, way[:depth]]
                part = self.create("call_function", function, (above, step), {})
                part.meta.update(value=above.meta["value"][step], derived=True)
                self._set(self._parts, key, part)
        if way:
            self._learn(tensor, self._parts[node, way], ())
        return self._known[id(tensor)][0]

    def mark(self) -> tuple[fx.Node | None, int]:
        """The present state, for ``roll_back``."""
        return next(iter(reversed(self.graph.nodes)), None), len(self._undo)

    def roll_back(self, last: fx.Node | None, undo: int) -> None:
        """Erase the nodes, and forget the values, that came after a ``mark``."""
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        while len(self._undo) > undo:
            self._undo.pop()()


def _attributes_of(root: nn.Module) -> dict[int, str]:
    """Paths of the tensors of a module tree, by id."""
    found: dict[int, str] = {}
    for path, tensor in [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]:
        found.setdefault(id(tensor), path)
    for path, module in root.named_modules():
        for name, value in vars(module).items():  # what is neither a parameter nor a buffer: read when it is used
            if isinstance(value, Tensor) and value.is_leaf and not value.requires_grad:
                found.setdefault(id(value), f"{path}.{name}" if path else name)
    return found
