"""Record one call of a module as an fx graph, by running it on fake tensors.

Python really runs, so keyword arguments, containers, ``isinstance``, decorators and control flow on shapes need no
support of their own. A TorchFunctionMode sees every torch call, and the modules tell of their calls;
tensors are known by identity. Sizes are numbers that remember the node that computes them: arithmetic on them is
recorded, questions about them are answered and noted with file and line. A module whose forward does something that a
graph cannot hold becomes one opaque node, the innermost such module first.
"""

import contextlib
import dataclasses
import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from glcan_fx.capture.shadow import (
    fake_like,
    kept_python_random,
    python_random,
    random_like,
    real_copy,
    recording,
    replicate,
)
from glcan_fx.capture.source_lines import (
    NotMadeYet,
    Opaque,
    Specialisation,
    Uncapturable,
    in_words,
    place_of,
    users_frame,
    users_place,
)
from glcan_fx.capture.symbolic import Number, Ratio, Size, plain
from glcan_fx.layers import is_norm
from glcan_fx.pytree import map_tensors, parts_of, plain_data, tensors_in

_OPERATORS = {"add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "matmul": "matmul"}  # nicer to read
_SIZES = ("size", "numel", "nelement")  # methods whose answers are sizes


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module whose forward was recorded, so that a step may call the module as a whole instead.

    args, kwargs: as graph arguments; ``args`` is None where a graph cannot hold them. results: which part of what the
    call returned a node's value is, as steps of (function, key) from the whole. left: nodes whose values the call left
    on a module, by the path of the attribute. value: what it returned, on fake tensors.
    """

    path: str
    parent: "Call | None"
    args: tuple[Any, ...] | None = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[fx.Node, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    left: dict[fx.Node, str] = dataclasses.field(default_factory=dict)
    value: Any = None
    hooks: int = 0  # the first number that a hook registered in it may have

    def given(self) -> set[fx.Node]:
        """The nodes among its arguments."""
        found: set[fx.Node] = set()
        if self.args is not None:
            fx.map_arg((self.args, self.kwargs), found.add)
        return found

    def around(self) -> "Iterator[Call]":
        """The call itself, and those that it was made in, innermost first."""
        call: Call | None = self
        while call is not None:
            yield call
            call = call.parent


class Recorder(TorchFunctionMode):
    """Records one call of ``root`` (fake parameters); paths are those of ``root``'s own tree.

    original: the module with real tensors, for parts that only run on those. forced: modules that are to be opaque,
    with the reason.
    """

    def __init__(
        self, root: nn.Module, mode: FakeTensorMode, original: nn.Module, forced: Mapping[str, Opaque]
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root, self.mode, self.original, self.forced = root, mode, original, forced
        self.stack: list[str] = [""]
        self.calls: list[Call] = []  # that are under way
        self.reads: dict[str, set[str]] = {}  # names of the attributes that recorded forwards read, by module path
        self.specialisations: dict[tuple[str, str], Specialisation] = {}
        self.opaque: dict[str, Opaque] = {}
        self.constants: dict[str, Tensor] = {}
        self.lost: dict[str, None] = {}
        self._paused = self._naming = False
        self._watched: dict[type, type] = {}
        self._paths = {id(module): path for path, module in reversed(list(root.named_modules(remove_duplicate=False)))}
        self._whole = {id(module) for module in root.modules() if _is_torch_own(module) or is_norm(module)}
        self._attributes: dict[int, str] = {}
        for path, tensor in [*root.named_parameters(remove_duplicate=False),
                             *root.named_buffers(remove_duplicate=False)]:
            self._attributes.setdefault(id(tensor), path)
        for path, module in root.named_modules():
            for name, value in vars(module).items():  # what is neither a parameter nor a buffer: read when it is used
                if isinstance(value, Tensor) and value.is_leaf and not value.requires_grad:
                    self._attributes.setdefault(id(value), f"{path}.{name}" if path else name)
        self._known: dict[int, tuple[fx.Node, tuple[Any, ...]]] = {}  # tensor id -> node, and the way to it from there
        self._undo: list[Callable[[], Any]] = []  # takes the bookkeeping back, newest last
        self._parts: dict[tuple[fx.Node, tuple[Any, ...]], fx.Node] = {}
        self._devices: dict[int, tuple[Any, Tensor]] = {}
        self._dtypes: dict[tuple[int, torch.dtype], Tensor] = {}  # whose .dtype a frame of Python has asked for
        self._asked_dtypes: dict[torch.dtype, fx.Node] = {}  # of the operation that is being recorded
        self._objects: dict[int, tuple[fx.Node, list[int]]] = {}  # dataclasses that a node returned, and their tensors
        self._storages: dict[int, list[tuple[fx.Node, Tensor]]] = {}  # who shares memory
        self._keep: list[Any] = []  # what is known by identity must stay alive
        self._held: list[Tensor] = []  # and what is known by its storage
        self._saved = {t.untyped_storage()._cdata for t in [*root.parameters(), *root.buffers()]}
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        for tensor in [*root.parameters(), *root.buffers()]:
            self._devices.setdefault(id(tensor.device), (tensor.device, tensor))

    def record(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Graph:
        """Run the module; returns the finished graph. Raises whatever the module's own forward raises."""
        given = []
        for name, value in zip(argument_names(self.root, args, kwargs), [*args, *kwargs.values()], strict=True):
            node = self.graph.placeholder(name)
            node.meta.update(returned_by=[], dependent=True)
            number = type(value) in (int, float)
            given.append(self._number(value, node) if number else value)
            self._describe(node, value)
            if not number and not any(True for _ in tensors_in(value)) and value is not None:
                self.specialisations["argument", name] = Specialisation("argument", name, repr(value))
        args, kwargs = given[:len(args)], dict(zip(kwargs, given[len(args):], strict=True))
        with _patched(self), self.mode, torch.enable_grad(), self:
            result = self._enter(self.root, "", args, kwargs)
        with self._pause():
            node = self.graph.output(self._argument(result))
        node.meta.update(value=plain_data(result), module="", returned_by=[], saved=0, mutates=set(), overwritten=False)
        erase_unused(self.graph, {node for user in self.graph.nodes for node in user.meta.get("dtypes", {}).values()}
                     | arguments_in(self.graph))
        for table in (self._keep, self._held, self._undo, self._known, self._objects, self._parts, self._storages,
                      self._devices, self._dtypes):
            table.clear()
        return self.graph

    # ---- torch calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*plain(args), **plain(kwargs))
        name = getattr(func, "__name__", "")
        with self._pause():
            if name in ("__get__", "__set__", "__delete__"):
                return self._property(func, name, args)
            if name == "requires_grad_":
                raise Uncapturable("it makes a tensor that wants a gradient")
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is not self._hooks:
                raise Uncapturable("it runs under saved-tensor hooks")
            return self._torch_call(func, name, args, kwargs)

    def _property(self, func: Any, kind: str, args: Any) -> Any:
        name = func.__self__.__name__
        if kind != "__get__":
            raise Uncapturable(f"it assigns to .{name} of a tensor")
        value = func(*args)
        if isinstance(value, torch.Size):
            return self._sizes(args[0], value)
        if isinstance(value, torch.dtype):
            self._dtypes[id(users_frame()), value] = args[0]
        if isinstance(value, Tensor) and name != "grad":
            node = self._create("call_function", getattr, (self._argument(args[0]), name), {})
            self._describe(node, value)
        return value

    def _torch_call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        method = bool(args) and isinstance(args[0], Tensor) and getattr(Tensor, name, None) is func
        op, target, shown = "call_method" if method else "call_function", name if method else func, args
        operation = getattr(operator, _OPERATORS.get(name, name), None) if method and not kwargs else None
        if name == "__setitem__":
            op, target = "call_function", assign
        elif name.startswith("__r") and hasattr(operator, f"__{name[3:]}") and len(args) == 2:
            op, target, shown = "call_function", getattr(operator, f"__{name[3:]}"), args[::-1]
        elif operation is not None and (name in _OPERATORS and len(args) == 2 or name.startswith("__")):
            op, target = "call_function", operation

        def asked(out: Any) -> Any:  # answers that are no tensors
            if name in _SIZES and isinstance(out, torch.Size):
                return self._sizes(args[0], out)
            if name in _SIZES and type(out) is int:
                return self._number(out, self._create(op, target, self._argument(args), self._argument(kwargs)))
            if name == "__len__":
                self.ask(out)
            return out

        if target is assign:
            return self._run(op, target, args, kwargs, lambda: assign(*plain(args)))
        return self._run(op, target, shown, kwargs, lambda: func(*plain(args), **plain(kwargs)), asked)

    def _run(
        self, op: str, target: Any, args: Any, kwargs: Any, run: Callable[[], Any],
        answer: Callable[[Any], Any] = lambda out: out,
    ) -> Any:
        """Run something; where tensors come out, or are changed, record it as a node."""
        sources = [t for t in tensors_in((args, kwargs)) if isinstance(t, Tensor)]
        versions = [tensor._version for tensor in sources]
        kept: dict[int, int] = {}
        seen, held = self._saved, self._held  # not self: autograd's graphs would keep it alive

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, nn.Parameter) and storage._cdata not in seen:
                seen.add(storage._cdata)
                held.append(tensor.detach())
                kept[storage._cdata] = storage.nbytes()
            return tensor

        seeded = None if any(self._depends(tensor) for tensor in sources) else _Seeded()
        with saved_tensors_hooks(pack, lambda tensor: tensor), seeded or contextlib.nullcontext():
            out = run()
        changed = [t for t, version in zip(sources, versions, strict=True) if t._version != version]
        if not changed and not any(True for _ in tensors_in(out)):
            return answer(out)
        node = self._create(op, target, self._argument(tuple(args)), self._argument(dict(kwargs)))
        node.meta |= {"saved": sum(kept.values()), "storages": frozenset(kept)}
        if seeded is not None and seeded.found:  # the same for all who read it
            node.meta |= {"random": True, "dependent": True}
        if not torch.is_grad_enabled():  # the same values as without no_grad, and no gradient
            if changed:
                raise Uncapturable("it changes a tensor in place under torch.no_grad()")
            self._describe(node, out)
            node = self._create("call_function", detached, (node,), {})
        given = {id(tensor) for tensor in sources} - {id(tensor) for tensor in changed}
        out = map_tensors(out, lambda t: t.view_as(t) if id(t) in given else t)  # a value of its own for every node
        self._describe(node, out)
        for tensor in changed:
            self._mutated(node, tensor)
        return out

    def _depends(self, tensor: Tensor) -> bool:
        """Whether a tensor is computed from the inputs."""
        return id(tensor) in self._known and bool(self._known[id(tensor)][0].meta["dependent"])

    def _mutated(self, node: fx.Node, tensor: Tensor) -> None:
        results = {id(part) for part in tensors_in(node.meta["value"])}
        for other, shared in list(self._storages.get(tensor.untyped_storage()._cdata, ())):
            if other is node:
                continue
            other.meta["overwritten"] |= any(user is not node for user in other.users)
            if other in node.all_input_nodes:
                node.meta["mutates"].add(other)
            if id(shared) not in results and self._known.get(id(shared), (None,))[0] is other:
                after = self._create("call_function", after_change, (self._argument(shared), node), {})
                self._describe(after, shared, derived=True)  # who reads it from now on reads it behind the change

    # ---- sizes

    def _sizes(self, tensor: Tensor, value: torch.Size) -> torch.Size:
        node = self._create("call_function", getattr, (self._argument(tensor), "shape"), {})
        self._describe(node, tuple(value), derived=True)
        return torch.Size(
            self._number(size, self._create("call_function", operator.getitem, (node, index), {}))
            for index, size in enumerate(value))

    def _number(self, value: Any, node: fx.Node) -> Any:
        self._describe(node, value, derived=True)
        return Size(value, node, self) if type(value) is int else Ratio(value, node, self)

    def number(self, function: Callable[..., Any], *args: Any) -> Any:
        """Arithmetic on sizes."""
        value = function(*map(plain, args))
        if self._paused or type(value) not in (int, float):
            return value
        return self._number(value, self._create("call_function", function, self._argument(args), {}))

    def note(self, text: str) -> None:
        """Note something of the model that the graph does not keep."""
        self.lost.setdefault(f"'{self.stack[-1]}': {text}")

    def ask(self, answer: Any) -> None:
        """Note that Python's control flow used a size."""
        if not self._paused:
            where, code = users_place()
            path = self.stack[-1]
            self.specialisations.setdefault((where, path), Specialisation(where, code, repr(answer), path))

    def note_hooks(self, keys: Sequence[int]) -> None:
        """Calls in which a hook runs that was registered around them cannot be made whole: it will not be there."""
        for call in self.calls if keys else ():
            if min(keys) < call.hooks:
                call.args = None

    # ---- module calls

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Stands for ``module(*args, **kwargs)`` while recording."""
        path = self._paths.get(id(module))
        if self._paused or path is None:
            return module.forward(*args, **kwargs)
        if path in self.forced:
            return self._as_opaque(module, path, args, kwargs, self.forced[path])
        with_children = any(True for _ in module.children())
        if id(module) in self._whole or not with_children and not _holds_containers(args, kwargs):
            try:
                return self._leaf(module, path, args, kwargs)
            except Exception as error:  # noqa: BLE001
                return self._as_opaque(module, path, args, kwargs, self._cause(module, path, error), error)
        mark = next(iter(reversed(self.graph.nodes)), None), len(self._undo)
        try:
            return self._enter(module, path, args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a user's forward raises
            cause = self._cause(module, path, error)
            self._roll_back(*mark)
            return self._as_opaque(module, path, args, kwargs, cause, error)

    def _enter(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        call = Call(path, self.calls[-1] if self.calls else None, hooks=RemovableHandle.next_id)
        with self._pause():
            self._naming = True
            try:
                call.args, call.kwargs = self._argument(tuple(args)), self._argument(dict(kwargs))
            except Uncapturable:
                call.args = None
            finally:
                self._naming = False
        self.stack.append(path)
        self.calls.append(call)
        state = {key: dict(vars(module)[key]) for key in _TABLES}
        attributes = dict(vars(module))
        try:
            with kept_python_random(), self._watching(module, path):
                before = python_random()
                out = module.forward(*args, **kwargs)
                if python_random() != before:
                    raise Uncapturable("it draws random numbers outside of torch", replayable=False)
            self._check_state(module, state, attributes)
            with self._pause():
                call.results = {self._stands_for(value): way for way, value in _leaves(out, (Tensor, Number))
                                if isinstance(value, Number) or id(value) in self._known}
                call.value = plain(out)
                for name, value in vars(module).items():
                    if isinstance(value, Tensor) and id(value) in self._known and value is not attributes.get(name):
                        call.left[self._node_of(value)] = f"{path}.{name}" if path else name
        except Exception:
            vars(module).update(attributes | state)  # what is recorded instead must not see what this call left
            raise
        finally:
            self.stack.pop()
            self.calls.pop()
        self._returned(out, path)
        return out

    def _stands_for(self, value: Any) -> fx.Node:
        return value.fx_node if isinstance(value, Number) else self._node_of(value)

    @contextmanager
    def _watching(self, module: nn.Module, path: str) -> Iterator[None]:
        """Note which attributes a forward reads, by a class of its own for the shadow meanwhile."""
        kind, reads = type(module), self.reads.setdefault(path, set())
        if kind not in self._watched:
            self._watched[kind] = _watched_class(kind)
        before = vars(module).get(_READS)
        module.__dict__[_READS] = reads
        try:
            module.__class__ = self._watched[kind]
        except TypeError:  # a class of another layout: nothing is known of what it reads
            reads.add("*")
        try:
            yield
        finally:
            module.__class__ = kind
            if before is None:
                del module.__dict__[_READS]
            else:
                module.__dict__[_READS] = before

    def _check_state(self, module: nn.Module, tables: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        """Raise Uncapturable where a forward has left something behind that the next one would read."""
        if any(set(vars(module)[key]) - set(tables[key]) for key in ("_parameters", "_modules")):
            raise NotMadeYet(f"a module of class {type(module).__name__} makes parameters in its first call")
        for key, before in tables.items():
            changed = [name for name, value in vars(module)[key].items() if value is not before.get(name)]
            if changed:
                raise Uncapturable(f"it replaces its own '{changed[0]}'", replayable=False)
        for name, value in vars(module).items():
            before = attributes.get(name)
            kept = isinstance(before, bool | int | float | Tensor) and isinstance(value, bool | int | float | Tensor)
            if isinstance(before, Tensor) and id(before) not in self._known:
                continue  # overwritten unread: something that each call leaves, no state
            if kept and value is not before and (isinstance(value, Tensor) or plain(value) != before):
                raise Uncapturable(f"it changes its own attribute '{name}'", replayable=False)

    def _returned(self, out: Any, path: str) -> None:
        """Note whose value this is. What a block returns beside it (attention weights, a state) is made before it."""
        made = [tensor for tensor in tensors_in(out) if id(tensor) in self._known]
        if path and made:
            value = max(made, key=lambda tensor: (tensor.is_floating_point(), self._known[id(tensor)][0]))
            self._node_of(value).meta["returned_by"].append(path)

    def _leaf(self, module: nn.Module, path: str, args: Any, kwargs: Any, *, really: bool = False) -> Any:
        with self._pause():
            for tensor in tensors_in((args, kwargs)):
                self._node_of(tensor)  # made by the caller
        known = () if _is_torch_own(module) else set(dict(module.named_parameters()))
        self.stack.append(path)
        try:
            with self._pause(), kept_python_random():
                def run() -> Any:
                    return self._really(path, args, kwargs) if really else module.forward(*plain(args),
                                                                                         **plain(kwargs))
                out = self._run("call_module", path, args, kwargs, run)
        finally:
            self.stack.pop()
        if not _is_torch_own(module) and set(dict(module.named_parameters())) != known:
            raise NotMadeYet(f"module '{path}' of class {type(module).__name__} makes parameters in its first call")
        self._returned(out, path)
        return out

    def _as_opaque(
        self, module: nn.Module, path: str, args: Any, kwargs: Any, cause: Opaque, error: Exception | None = None
    ) -> Any:
        """One node for the whole module: run on fake tensors, or, where those do not answer, on real ones."""
        mark = next(iter(reversed(self.graph.nodes)), None), len(self._undo)
        for really in (False, True):
            try:
                out = self._leaf(module, path, args, kwargs, really=really)
                self.opaque = {p: o for p, o in self.opaque.items() if not p.startswith(path + ".")}
                self.opaque[path] = cause
                return out
            except Exception as again:  # noqa: BLE001
                self._roll_back(*mark)
                failure: Exception = again
        if error is not None and not isinstance(error, Uncapturable):
            raise error
        raise failure

    def _really(self, path: str, args: Any, kwargs: Any) -> Any:
        """Run a real copy of a module on random values of the right shapes; returns fake outputs."""
        with unset_fake_temporarily(), torch.random.fork_rng(devices=[]):
            module = replicate(self.original.get_submodule(path), real_copy)
            module.train(self.root.get_submodule(path).training)
            values = [map_tensors(plain(value), random_like) for value in args]
            named = {key: map_tensors(plain(value), random_like) for key, value in kwargs.items()}
            out = module(*values, **named)
        flat = [t for t in tensors_in(out) if t.is_floating_point() and t.requires_grad]
        real_ids = {id(t): index for index, t in enumerate(flat)}
        inputs = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        inputs += [p for p in self.root.get_submodule(path).parameters() if p.requires_grad]
        shapes = [(tuple(t.shape), t.stride(), t.dtype) for t in flat]
        linked = _Link.apply(shapes, *inputs) if flat else ()
        return map_tensors(out, lambda t: linked[real_ids[id(t)]] if id(t) in real_ids else fake_like(t))

    def _cause(self, module: nn.Module, path: str, error: Exception) -> Opaque:
        where, code = place_of(error)
        if not hasattr(error, "module_path"):
            error.module_path = path  # type: ignore[attr-defined]  # the innermost: for the message
        reason = (in_words(error).splitlines() or [""])[0]
        return Opaque(path, type(module).__name__, reason[:200], f"{where} `{code}`" if code else where)

    # ---- nodes

    def _create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        name = self.stack[-1].replace(".", "_") if op == "call_module" else None
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        node.meta.update(module=self.stack[-1], returned_by=[], saved=0, storages=frozenset(),
                         mutates=set(), overwritten=False, dtypes=self._asked_dtypes,
                         call=self.calls[-1] if self.calls else None,
                         dependent=any(source.meta["dependent"] for source in node.all_input_nodes))
        self._asked_dtypes = {}
        return node

    def _describe(self, node: fx.Node, value: Any, *, derived: bool = False) -> None:
        """Note what a node stands for, so that its tensors are known."""
        node.meta.setdefault("module", "")
        node.meta.setdefault("saved", 0)
        node.meta.setdefault("storages", frozenset())
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

    def _argument(self, value: Any) -> Any:
        """What stands for a value in the graph."""
        if isinstance(value, Number):
            return value.fx_node
        if isinstance(value, Tensor):
            return self._node_of(value)
        if isinstance(value, torch.device) and id(value) in self._devices:
            node = self._create("call_function", getattr, (self._node_of(self._devices[id(value)][1]), "device"), {})
            self._describe(node, value, derived=True)
            return node
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._made(value, tuple(map(self._argument, value)), {})
        if isinstance(value, tuple):
            return tuple(map(self._argument, value))
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if isinstance(value, slice):
            return slice(self._argument(value.start), self._argument(value.stop), self._argument(value.step))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if id(value) in self._objects and self._objects[id(value)][1] == [id(t) for t in tensors_in(value)]:
                return self._objects[id(value)][0]
            fields = {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value) if f.init}
            made = {key: self._argument(part) for key, part in fields.items() if part is not None}
            return self._made(value, (), made)
        if isinstance(value, Mapping):
            if not all(isinstance(key, str | int | float | bool) for key in value):
                raise Uncapturable("it makes a dict whose keys are neither names nor numbers")
            return {key: self._argument(part) for key, part in value.items()}
        if isinstance(value, torch.dtype) and (tensor := self._dtypes.get((id(users_frame()), value))) is not None:
            self._asked_dtypes[value] = self._node_of(tensor)
        if value is None or value is Ellipsis or isinstance(
                value, int | float | complex | str | torch.dtype | torch.device | torch.memory_format | torch.layout):
            return value
        raise Uncapturable(f"a value of class {type(value).__name__} is passed on, which a graph cannot hold")

    def _made(self, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """An object of a class of the user's, made of what is known."""
        node = self._create("call_function", type(value), args, kwargs)
        if self._naming:  # for a call that may never be made whole: nobody else reads the object
            node.meta.update(value=plain_data(value), derived=True)
        else:
            self._describe(node, value)
        return node

    def _node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self._known:
            node, way = self._known[id(tensor)]
            if node.target is detached and tensor.grad_fn is not None:
                raise Uncapturable("it calls an autograd function, which has a gradient of its own")
            for depth, (function, step) in enumerate(way):
                key = node, way[: depth + 1]
                if key not in self._parts:
                    above = node if depth == 0 else self._parts[node, way[:depth]]
                    part = self._create("call_function", function, (above, step), {})
                    part.meta.update(value=above.meta["value"][step], derived=True)
                    self._set(self._parts, key, part)
            if way:
                self._learn(tensor, self._parts[node, way], ())
            return self._known[id(tensor)][0]
        if id(tensor) in self._attributes:
            node = self._create("get_attr", self._attributes[id(tensor)], (), {})
            self._describe(node, tensor, derived=True)
            if not isinstance(tensor, FakeTensor):
                node.meta["value"] = self.mode.from_tensor(tensor)
            return node
        if isinstance(tensor, FakeTensor):
            raise Uncapturable("a tensor appears that no recorded operation made")
        name = f"_constant_{len(self.constants)}"
        self.constants[name] = tensor
        node = self._create("get_attr", name, (), {})
        self._describe(node, tensor, derived=True)
        node.meta["value"] = self.mode.from_tensor(tensor)
        return node

    def _roll_back(self, last: fx.Node | None, undo: int) -> None:
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        while len(self._undo) > undo:
            self._undo.pop()()

    @contextmanager
    def _pause(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def after_change(value: Any, change: Any) -> Any:
    """``value``, read after ``change`` has written to it in place."""
    return value


def arguments_in(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that recorded calls of modules were given."""
    calls = {call for node in graph.nodes if node.meta.get("call") for call in node.meta["call"].around()}
    return {node for call in calls for node in call.given()}


def erase_unused(graph: fx.Graph, keep: Set[fx.Node] = frozenset()) -> None:
    """Erase sizes, types and parameters that nothing reads."""
    for node in reversed(graph.nodes):
        if not node.users and node.meta.get("derived") and node not in keep:
            graph.erase_node(node)


def assign(x: Tensor, key: Any, value: Any) -> Tensor:
    """``x[key] = value``; returns ``x``."""
    x[key] = value
    return x


def detached(value: Any) -> Any:
    """What was computed under ``torch.no_grad()``."""
    return map_tensors(value, Tensor.detach)


# ---------------------------------------------------------------------------------------------- helpers


class _Seeded(TorchDispatchMode):
    """Whether an operation draws random numbers."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


_READS = "_glcan_fx_reads"


def _watched_class(kind: type) -> type:
    """A class like ``kind`` whose instances note which of their attributes are read."""
    def read(self: Any, name: str) -> Any:
        if not name.startswith("__"):
            reads = object.__getattribute__(self, "__dict__").get(_READS)
            if reads is not None:
                reads.add(name)
        return kind.__getattribute__(self, name)  # type: ignore[call-arg]

    return type(kind.__name__, (kind,), {"__getattribute__": read, "__module__": kind.__module__,
                                         "__qualname__": kind.__qualname__})


def _leaves(value: Any, kinds: tuple[type, ...], way: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The parts of a nested value that are of some classes, and the ways to them."""
    if isinstance(value, kinds):
        yield way, value
    else:
        for step, part in parts_of(value):
            yield from _leaves(part, kinds, (*way, step))


class _Link(torch.autograd.Function):
    """Fake outputs of a module that ran on real values, tied to its inputs in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, shapes: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*(t for t in inputs if not isinstance(t, nn.Parameter)))
        return tuple(torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("sizes only")


def argument_names(root: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for parameter in inspect.signature(root.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(len(names), len(args))]
    names += [f"argument_{index}" for index in range(len(names), len(args))]
    return [*names[: len(args)], *kwargs]


def _is_torch_own(module: nn.Module) -> bool:
    """One of torch.nn's own layers, which stay whole; its containers, and stacks of layers, are entered."""
    parametrized = "parametrizations" in module._modules
    own = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    holds = isinstance(module, nn.Sequential) or any(isinstance(part, nn.ModuleList) for part in module.modules())
    return (own and not holds) or parametrized


def _holds_containers(args: Any, kwargs: Any) -> bool:
    """Called with lists or dicts of values: a module without children is plumbing then, and entered."""
    return any(isinstance(value, list | tuple | dict) for value in [*args, *kwargs.values()])


def _with_hooks(module: nn.Module, args: Any, kwargs: Any, recorder: Recorder) -> Any:
    """Call a module of the shadow, and the hooks on it: a shadow has none but those that the model's forward registers
    while it runs, to collect what its layers return."""
    recorder.note_hooks([*module._forward_pre_hooks, *module._forward_hooks])
    for key, before in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = before(module, args, kwargs) or (args, kwargs)
        elif (changed := before(module, args)) is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    out = recorder.call(module, args, kwargs)
    for key, after in list(module._forward_hooks.items()):
        with_kwargs = key in module._forward_hooks_with_kwargs
        changed = after(module, args, kwargs, out) if with_kwargs else after(module, args, out)
        out = out if changed is None else changed
    return out


_TABLES = ("_parameters", "_buffers", "_modules")


_CHECKPOINTED = "activation checkpointing is left out: local modules take its place"
_DIVIDED = "activation checkpointing is left out where a cut divides the call: local modules take its place"
_CHECKPOINTS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


@contextmanager
def _patched(recorder: Recorder) -> Iterator[None]:
    """Let the recorder see module calls, and refuse what hides operations from it.

    ``nn.Module.__call__`` calls what ``Module.compile()`` leaves in an instance instead of the module; here that is the
    recorder. So only the recorder's own modules change. What else is patched holds for the whole process: a thread
    that does not record gets what the original does.
    """
    def called(module: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: _with_hooks(module, args, kwargs, recorder)

    before, modules = recording.recorder, list(recorder.root.modules())
    kept = [vars(module).get("_compiled_call_impl") for module in modules]
    with _patches:
        recording.recorder = recorder
        for module in modules:
            vars(module)["_compiled_call_impl"] = called(module)
        try:
            yield
        finally:
            recording.recorder = before
            for module, call in zip(modules, kept, strict=True):
                if call is None:
                    vars(module).pop("_compiled_call_impl", None)
                else:
                    vars(module)["_compiled_call_impl"] = call


class _Patches:
    """What is patched in torch: put in when the first thread begins to record, taken out when the last one ends."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                autocast, checkpoint = torch.amp.autocast_mode.autocast, torch.utils.checkpoint
                self._replace(torch.autograd.Function, "apply", _applying)
                self._replace(autocast, "__enter__", _entering)
                for name in _CHECKPOINTS:
                    if hasattr(checkpoint, name):
                        self._replace(checkpoint, name, _checkpointing)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            while not self._users and self._undo:
                self._undo.pop()()

    def _replace(self, owner: Any, name: str, around: Callable[[Any], Any]) -> None:
        before = vars(owner)[name]
        setattr(owner, name, around(before))
        self._undo.append(partial(setattr, owner, name, before))


_patches = _Patches()


def _applying(apply: Any) -> Any:
    def function_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = recording.now()
        if recorder is None:
            return apply.__get__(None, cls)(*args, **kwargs)
        if cls is torch.utils.checkpoint.CheckpointFunction:
            recorder.note(_CHECKPOINTED)
            for call in recorder.calls:  # no step may call these as a whole: this kind works in backward() only, and
                call.args = None  # without gradients where its inputs want none, as those of a local module do
            return args[0](*args[2:])
        raise Uncapturable(f"it calls the autograd function {cls.__name__}")
    return classmethod(function_apply)


def _entering(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def autocast_enter(self: Any) -> Any:
        if recording.now() is not None:
            raise Uncapturable("it enters torch.autocast")
        return enter(self)
    return autocast_enter


def _checkpointing(around: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
    def checkpointed(*args: Any, **kwargs: Any) -> Iterator[None]:
        recorder = recording.now()
        if recorder is None:
            return around(*args, **kwargs)
        recorder.note(_DIVIDED if recorder.stack[-1] else _CHECKPOINTED)
        return (None for _ in range(1))  # a generator that has nothing to do before and behind the call
    return checkpointed
