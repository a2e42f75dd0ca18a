"""Record one call of a module as an fx graph, by running it on fake tensors.

Python really runs, so keyword arguments, containers, ``isinstance``, decorators and control flow on shapes need no
support of their own. A TorchFunctionMode sees every torch call, and the modules tell of their calls;
tensors are known by identity. Sizes are numbers that remember the node that computes them: arithmetic on them is
recorded, questions about them are answered and noted with file and line. A module whose forward does something that a
graph cannot hold becomes one opaque node, the innermost such module first.
"""

import contextlib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from glcan_fx.capture.caches import Caches
from glcan_fx.capture.calls import Call, arguments_in, assign, detached, erase_unused
from glcan_fx.capture.modules import (
    argument_names,
    holds_containers,
    is_torch_own,
    noting_class,
    reads_noted,
    run_really,
)
from glcan_fx.capture.nodes import Nodes
from glcan_fx.capture.patches import patched
from glcan_fx.capture.random_numbers import Seeded, kept_python_random, python_random
from glcan_fx.capture.source_lines import (
    NotMadeYet,
    Opaque,
    Specialisation,
    Uncapturable,
    in_words,
    place_of,
    users_place,
)
from glcan_fx.capture.symbolic import Number, Ratio, Size, plain
from glcan_fx.capture.trace import within
from glcan_fx.fakes import Fakes
from glcan_fx.layers import is_norm
from glcan_fx.pytree import map_tensors, parts_of, plain_data, tensors_in

_TABLES = ("_parameters", "_buffers", "_modules")
_OPERATORS = {"add": "add", "sub": "sub", "mul": "mul", "div": "truediv", "matmul": "matmul"}  # nicer to read
_BINARY = {getattr(Tensor, name): getattr(operator, name) for name in ("__pow__", "__floordiv__", "__mod__")}
_SIZES = ("size", "numel", "nelement")  # methods whose answers are sizes


class Recorder(TorchFunctionMode):
    """Records one call of ``root`` (fake parameters); paths are those of ``root``'s own tree.

    original: the module with real tensors, for parts that only run on those. forced: modules that are to be opaque,
    with the reason.
    """

    def __init__(
        self, root: nn.Module, mode: Fakes, original: nn.Module, forced: Mapping[str, Opaque]
    ) -> None:
        super().__init__()
        self.root, self.mode, self.original, self.forced = root, mode, original, forced
        self.stack: list[str] = [""]
        self.calls: list[Call] = []  # that are under way
        self.reads: dict[str, set[str]] = {}  # names of the attributes that recorded forwards read, by module path
        self.specialisations: dict[tuple[str, str], Specialisation] = {}
        self.opaque: dict[str, Opaque] = {}
        self.lost: dict[str, None] = {}
        self.nodes = Nodes(root, mode, self.stack, self.calls)
        self.caches: Caches | None = None  # as they were before a size was first looked up in one
        self._paused = False
        self._noting_classes: dict[type, type] = {}
        self._configurations: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._paths: dict[int, list[str]] = {}
        for path, module in root.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(path)
        self._whole = {id(module) for module in root.modules() if is_torch_own(module) or is_norm(module)}
        self._held: list[Tensor] = []  # what is known by its storage must stay alive
        self._saved = {t.untyped_storage()._cdata for t in [*root.parameters(), *root.buffers()]}
        self._first_hook = RemovableHandle.next_id
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def record(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Graph:
        """Run the module; returns the finished graph. Raises whatever the module's own forward raises."""
        args, kwargs = self._inputs(args, kwargs)
        with patched(self), self.mode, torch.enable_grad(), self:
            result = self._enter(self.root, "", args, kwargs)
        with self._pause():
            node = self.nodes.graph.output(self.nodes.argument(result))
        node.meta.update(value=plain_data(result), module="", returned_by=[], saved=0, mutates=set(), overwritten=False)
        graph = self.nodes.graph
        asked_for_types = {node for user in graph.nodes for node in user.meta.get("dtypes", {}).values()}
        erase_unused(graph, asked_for_types | arguments_in(graph))
        self.nodes.forget()
        self._held.clear()
        return graph

    def _inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Make placeholders; returns the arguments with numbers that are recorded."""
        given = []
        for name, value in zip(argument_names(self.root, args, kwargs), [*args, *kwargs.values()], strict=True):
            node = self.nodes.graph.placeholder(name)
            node.meta.update(returned_by=[], dependent=True)
            number = type(value) in (int, float)
            given.append(self._number(value, node) if number else value)
            self.nodes.describe(node, value)
            if not number and not any(True for _ in tensors_in(value)) and value is not None:
                self.specialisations["argument", name] = Specialisation("argument", name, repr(value))
        return given[:len(args)], dict(zip(kwargs, given[len(args):], strict=True))

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
                if bool(kwargs.get("requires_grad", (*args, True)[1])) is args[0].requires_grad:
                    return args[0]
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
            self.nodes.asked_for_dtype(value, args[0])
        if isinstance(value, Tensor) and name != "grad":
            node = self.nodes.create("call_function", getattr, (self.nodes.argument(args[0]), name), {})
            self.nodes.describe(node, value)
        return value

    def _torch_call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        method = bool(args) and isinstance(args[0], Tensor) and getattr(Tensor, name, None) is func
        op, target, shown = "call_method" if method else "call_function", name if method else func, args
        operation = getattr(operator, _OPERATORS.get(name, name), None) if method and not kwargs else None
        if name == "__setitem__":
            op, target = "call_function", assign
        elif func in _BINARY and len(args) == 2:
            op, target = "call_function", _BINARY[func]
        elif name.startswith("__r") and hasattr(operator, f"__{name[3:]}") and len(args) == 2:
            op, target, shown = "call_function", getattr(operator, f"__{name[3:]}"), args[::-1]
        elif operation is not None and (name in _OPERATORS and len(args) == 2 or name.startswith("__")):
            op, target = "call_function", operation

        def asked(out: Any) -> Any:  # answers that are not tensors
            if name in _SIZES and isinstance(out, torch.Size):
                return self._sizes(args[0], out)
            if name in _SIZES and type(out) is int:
                node = self.nodes.create(op, target, self.nodes.argument(args), self.nodes.argument(kwargs))
                return self._number(out, node)
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
        sources = list(tensors_in((args, kwargs)))
        versions = [tensor._version for tensor in sources]
        out, saved, random = self._measured(run, any(self.nodes.depends(tensor) for tensor in sources))
        changed = [t for t, version in zip(sources, versions, strict=True) if t._version != version]
        if not changed and not any(True for _ in tensors_in(out)):
            return answer(out)
        if changed and not torch.is_grad_enabled():
            args, kwargs = self._ungraded(changed, (args, kwargs))
        node = self.nodes.create(op, target, self.nodes.argument(tuple(args)), self.nodes.argument(dict(kwargs)))
        node.meta |= {"saved": sum(saved.values()), "storages": saved}
        if random:  # the same for all who read it
            node.meta |= {"random": True, "dependent": True}
        if not changed and not torch.is_grad_enabled():  # the same values as without no_grad, and no gradient
            self.nodes.describe(node, out)
            node = self.nodes.create("call_function", detached, (node,), {})
        given = {id(tensor) for tensor in sources} - {id(tensor) for tensor in changed}
        out = map_tensors(out, lambda t: self.nodes.alias(t) if id(t) in given else t)
        self.nodes.describe(node, out)
        for tensor in changed:
            self.nodes.mutated(node, tensor)
        return out

    def _ungraded(self, changed: Sequence[Tensor], arguments: Any) -> Any:
        """What stands for the arguments of an operation that changes a tensor in place under ``torch.no_grad()``: a
        graph runs it with gradients. Raises Uncapturable where that tensor is no state, or has a gradient."""
        if any(tensor.requires_grad or not self.nodes.is_state(tensor) for tensor in changed):
            raise Uncapturable("it changes a tensor in place under torch.no_grad()")
        kept = {id(tensor) for tensor in changed}
        return map_tensors(arguments, lambda t: t if id(t) in kept else self.nodes.detach(t))

    def _measured(self, run: Callable[[], Any], dependent: bool) -> tuple[Any, dict[int, int], bool]:
        """Run something. Returns its result, the bytes of memory that it first saves for backward, by storage, and
        whether it draws random numbers (False where it is ``dependent`` on the inputs: nobody asks)."""
        saved: dict[int, int] = {}
        seen, held = self._saved, self._held  # not self: autograd's graphs would keep it alive

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if not isinstance(tensor, nn.Parameter) and storage._cdata not in seen:
                seen.add(storage._cdata)
                held.append(tensor.detach())
                saved[storage._cdata] = storage.nbytes()
            return tensor.detach()  # the tensor itself would hold the graph that holds it

        seeded = None if dependent else Seeded()
        with saved_tensors_hooks(pack, lambda tensor: tensor), seeded or contextlib.nullcontext():
            out = run()
        return out, saved, seeded is not None and seeded.found

    # ---- sizes

    def _sizes(self, tensor: Tensor, value: torch.Size) -> torch.Size:
        node = self.nodes.create("call_function", getattr, (self.nodes.argument(tensor), "shape"), {})
        self.nodes.describe(node, tuple(value), derived=True)
        return torch.Size(
            self._number(size, self.nodes.create("call_function", operator.getitem, (node, index), {}))
            for index, size in enumerate(value))

    def _number(self, value: Any, node: fx.Node) -> Any:
        self.nodes.describe(node, value, derived=True)
        return Size(value, node, self) if type(value) is int else Ratio(value, node, self)

    def number(self, function: Callable[..., Any], *args: Any) -> Any:
        """Arithmetic on sizes."""
        value = function(*map(plain, args))
        if self._paused or type(value) not in (int, float):
            return value
        return self._number(value, self.nodes.create("call_function", function, self.nodes.argument(args), {}))

    def note(self, text: str) -> None:
        """Note something of the model that the graph does not keep."""
        self.lost.setdefault(f"'{self.stack[-1]}': {text}")

    def ask(self, answer: Any) -> None:
        """Note that Python's control flow used a size."""
        if not self._paused:
            where, code = users_place()
            path = self.stack[-1]
            self.specialisations.setdefault((where, path), Specialisation(where, code, repr(answer), path))

    def watch_caches(self) -> None:
        """Note that caches may be used from here on: a size was looked up, or a module runs that is not recorded."""
        self.caches = self.caches or Caches(self.original)

    def note_hooks(self, keys: Sequence[int]) -> None:
        """Calls in which a hook runs that was registered around them, while recording, cannot be made whole: it will
        not be there."""
        recorded = [key for key in keys if key >= self._first_hook]
        for call in self.calls if recorded else ():
            if min(recorded) < call.hooks:
                call.args = None

    # ---- module calls

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Stands for ``module(*args, **kwargs)`` while recording."""
        paths = self._paths.get(id(module))
        if self._paused or paths is None:
            return module.forward(*args, **kwargs)
        # a module that is held in several places (one activation for all blocks) goes by its name in the caller
        path = next((path for path in paths if within(path, self.stack[-1])), paths[0])
        if path in self.forced:
            return self._as_opaque(module, path, args, kwargs, self.forced[path])
        with_children = any(True for _ in module.children())
        if id(module) in self._whole or not with_children and not holds_containers(args, kwargs):
            try:
                return self._leaf(module, path, args, kwargs)
            except Exception as error:  # noqa: BLE001
                return self._as_opaque(module, path, args, kwargs, self._cause(module, path, error), error)
        mark = self.nodes.mark()
        try:
            return self._enter(module, path, args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever a user's forward raises
            cause = self._cause(module, path, error)
            self.nodes.roll_back(*mark)
            return self._as_opaque(module, path, args, kwargs, cause, error)

    def _enter(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        call = Call(path, self.calls[-1] if self.calls else None, hooks=RemovableHandle.next_id)
        with self._pause():
            call.args, call.kwargs = self.nodes.arguments_of_call(args, kwargs)
        self.stack.append(path)
        self.calls.append(call)
        state = {key: dict(vars(module)[key]) for key in _TABLES}
        attributes = dict(vars(module))
        try:
            with kept_python_random(), self._reads_noted(module, path):
                before = python_random()
                out = module.forward(*args, **kwargs)
                if python_random() != before:
                    raise Uncapturable("it draws random numbers outside of torch", replayable=False)
            self._check_state(module, state, attributes)
            with self._pause():
                call.results = {self.nodes.argument(value): way for way, value in _parts_of_kind(out, (Tensor, Number))
                                if isinstance(value, Number) or self.nodes.knows(value)}
                call.value = plain(out)
                self.reads[path] -= vars(module).keys() - attributes.keys()  # "installed": what it sets itself, once
                for name, value in vars(module).items():
                    if isinstance(value, Tensor) and self.nodes.knows(value) and value is not attributes.get(name):
                        call.left[self.nodes.node_of(value)] = f"{path}.{name}" if path else name
        except Exception:
            vars(module).update(attributes | state)  # what is recorded instead must not see what this call left
            raise
        finally:
            self.stack.pop()
            self.calls.pop()
        self._returned(out, path)
        return out

    def _reads_noted(self, module: nn.Module, path: str) -> contextlib.AbstractContextManager[None]:
        kind = type(module)
        if kind not in self._noting_classes:
            self._noting_classes[kind] = noting_class(kind)
        return reads_noted(module, self._noting_classes[kind], self.reads.setdefault(path, set()),
                           self._configurations)

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
            if isinstance(value, Tensor) and self.nodes.is_alias(value, before):
                continue  # a conversion that converts nothing: self.mean = self.mean.type_as(x)
            kept = isinstance(before, bool | int | float | Tensor) and isinstance(value, bool | int | float | Tensor)
            if isinstance(before, Tensor) and not self.nodes.knows(before):
                continue  # overwritten unread: something that each call leaves, no state
            if kept and value is not before and (isinstance(value, Tensor) or plain(value) != before):
                raise Uncapturable(f"it changes its own attribute '{name}'", replayable=False)

    def _returned(self, out: Any, path: str) -> None:
        """Note whose value this is. What a block returns beside it (attention weights, a state) is made before it."""
        made = [tensor for tensor in tensors_in(out) if self.nodes.knows(tensor)]
        if path and made:
            value = max(made, key=lambda tensor: (tensor.is_floating_point(), self.nodes.made_by(tensor)))
            self.nodes.node_of(value).meta["returned_by"].append(path)

    def _leaf(self, module: nn.Module, path: str, args: Any, kwargs: Any, *, really: bool = False) -> Any:
        with self._pause():
            for tensor in tensors_in((args, kwargs)):
                self.nodes.node_of(tensor)  # made by the caller
        known: Collection[str] = ()
        if not is_torch_own(module):
            if id(module) not in self._whole:  # norms keep nothing, and are many
                self.watch_caches()
            known = set(dict(module.named_parameters()))
        self.stack.append(path)
        try:
            with self._pause(), kept_python_random():
                def run() -> Any:
                    if really:
                        inner = self.original.get_submodule(path)
                        return run_really(inner, self.root.get_submodule(path), args, kwargs)
                    return module.forward(*plain(args), **plain(kwargs))
                out = self._run("call_module", path, args, kwargs, run)
        finally:
            self.stack.pop()
        if not is_torch_own(module) and set(dict(module.named_parameters())) != known:
            raise NotMadeYet(f"module '{path}' of class {type(module).__name__} makes parameters in its first call")
        self._returned(out, path)
        return out

    def _as_opaque(
        self, module: nn.Module, path: str, args: Any, kwargs: Any, cause: Opaque, error: Exception | None = None
    ) -> Any:
        """One node for the whole module: run on fake tensors, or, where those do not answer, on real ones."""
        mark = self.nodes.mark()
        for really in (False, True):
            try:
                out = self._leaf(module, path, args, kwargs, really=really)
                self.opaque = {p: o for p, o in self.opaque.items() if not p.startswith(path + ".")}
                self.opaque[path] = cause
                return out
            except Exception as again:  # noqa: BLE001
                self.nodes.roll_back(*mark)
                failure: Exception = again
        if error is not None and not isinstance(error, Uncapturable):
            raise error
        raise failure

    def _cause(self, module: nn.Module, path: str, error: Exception) -> Opaque:
        where, code = place_of(error)
        if not hasattr(error, "module_path"):
            error.module_path = path  # type: ignore[attr-defined]  # the innermost: for the message
        reason = (in_words(error).splitlines() or [""])[0]
        return Opaque(path, type(module).__name__, reason[:200], f"{where} `{code}`" if code else where)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def _parts_of_kind(
    value: Any, kinds: tuple[type, ...], way: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The parts of a nested value that are of some classes, and the ways to them."""
    if isinstance(value, kinds):
        yield way, value
    else:
        for step, part in parts_of(value):
            yield from _parts_of_kind(part, kinds, (*way, step))
