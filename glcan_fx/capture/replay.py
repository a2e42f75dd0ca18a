"""Run a model's own forward with the calls of some of its sub-modules answered from elsewhere.

Where a model cannot be captured, one of its sub-modules, the trunk, still can. The model's forward then runs as Python:
once up to the trunk, and once behind it for every local module, given what the trunk returned (or what an auxiliary
network makes of it). What was called before the trunk is answered from a record, so that it runs once a step. Random
numbers are the same each time, and what the forward changes (counters, buffers, attributes) it changes when it runs to
its end.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from glcan_fx.capture.random_numbers import RandomState, kept_python_random, seed
from glcan_fx.capture.shadow import random_like, real_copy, replicate
from glcan_fx.capture.trace import within
from glcan_fx.capture.views import empty_stand_ins, run_to_the_end, substituted
from glcan_fx.errors import UnsupportedError
from glcan_fx.initialization import freshen, moments, unhooked_copy
from glcan_fx.pytree import map_tensors

Record = dict[str, list[Any]]  # what sub-modules returned, by path, in order of their calls; and the random states
_STATES = ""  # at the beginning and behind each of these calls


@dataclass(frozen=True)
class Call:
    """One call of a sub-module, as it was seen."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    first: int  # when it began and ended, in order of events
    last: int
    saved: int  # bytes that it keeps for backward


def calls_of(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, random: bool = True
) -> list[Call]:
    """Run a real copy of ``model`` in training mode on random values of the given sizes, or on the given values; what
    it called, in order."""
    with torch.random.fork_rng(devices=[]), kept_python_random(), torch.enable_grad():
        seed()  # the same run whenever the model is planned
        real = replicate(model, real_copy).train()
        found: list[Call] = []
        events = _Events()
        for path, part in real.named_modules():
            if path:
                part.__dict__["forward"] = _watched(part.forward, path, found, events)
        convert = random_like if random else real_copy
        real(*(tree_map_only(Tensor, convert, value) for value in args),
             **{key: tree_map_only(Tensor, convert, value) for key, value in kwargs.items()})
    return sorted(found, key=lambda call: call.first)


class _Events:
    """Counts begins and ends of calls, and the bytes that autograd has kept so far."""

    def __init__(self) -> None:
        self.count = self.saved = 0
        self.seen: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in self.seen:
            self.seen[storage._cdata] = tensor.detach()
            self.saved += storage.nbytes()
        return tensor.detach()  # the tensor itself would hold the graph that holds it


def _watched(forward: Callable[..., Any], path: str, found: list[Call], events: _Events) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        events.count += 1
        first, before = events.count, events.saved
        with saved_tensors_hooks(events.pack, lambda tensor: tensor):
            result = forward(*args, **kwargs)
        events.count += 1
        found.append(Call(path, args, kwargs, result, first, events.count, events.saved - before))
        return result
    return watched


class _Answers:
    """What a forward that runs again is given: it would change it in place a second time.

    check: give copies, and raise UnsupportedError where the second change (y += x) makes another value; a second ReLU
    does not.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Any], check: bool) -> None:
        self.model, self.check = model, check
        self.given: list[tuple[Tensor, Tensor, int]] = []  # a copy, what it is of, its version
        self.inputs = [self.give(value) for value in inputs]

    def give(self, value: Any) -> Any:
        return map_tensors(value, self._copy) if self.check else value

    def _copy(self, tensor: Tensor) -> Tensor:
        clone = tensor.clone()
        self.given.append((clone, tensor, clone._version))
        return clone

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Really call a sub-module, which may change what it is given."""
        self.look()
        result = module(*args, **kwargs)
        self.given = [(clone, tensor, version) for clone, tensor, version in self.given if clone._version == version]
        return result

    def look(self) -> None:
        for clone, tensor, version in self.given:
            if clone._version != version and not torch.equal(clone, tensor):
                raise UnsupportedError(
                    f"the forward of {type(self.model).__name__} changes a value in place (x *= 2, y += x), but it "
                    "runs as Python, once for every local module, so that would happen as often. Write a new value: "
                    "y = y + x.")


_CHECKED = 3  # steps


@dataclass(frozen=True)
class Surroundings:
    """What runs around the trunk: plain data. ``inputs``: names of the model's arguments; ``arguments``: of the
    trunk's; ``behind``: the sub-modules that are called behind it."""

    trunk: str
    inputs: tuple[str, ...]
    arguments: tuple[str, ...]
    behind: tuple[str, ...]


@dataclass(frozen=True)
class Segments:
    """Local modules as runs of sub-module calls: names of the model's arguments, and the paths called per module."""

    inputs: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]


def surroundings(model: nn.Module, names: Sequence[str], calls: Sequence[Call], trunk: Call) -> Surroundings:
    """Describe what runs around one of the calls of ``calls_of``."""
    bound = arguments_of(model.get_submodule(trunk.path), trunk)
    behind = {call.path for call in calls if call.first > trunk.last and not within(trunk.path, call.path)}
    return Surroundings(trunk.path, tuple(names), tuple(bound), tuple(sorted(behind)))


def arguments_of(module: nn.Module, call: Call) -> dict[str, Any]:
    """The arguments of a call by name."""
    bound = inspect.signature(module.forward).bind(*call.args, **call.kwargs)
    return dict(bound.arguments)


class Answered:
    """What a record has of the calls that a forward makes again, which leave the random states that they left then.

    behind: what is not in the record, by path: its call leaves the random state as it is now."""

    def __init__(self, record: Record, inputs: Any, behind: Record | None = None) -> None:
        self.given = {path: list(values) for path, values in {**record, **(behind or {})}.items()}
        self.states = self.given.pop(_STATES, [RandomState(inputs)])
        if behind:
            self.states.append(RandomState(inputs))
        self._restore()

    def __contains__(self, path: str) -> bool:
        return bool(self.given.get(path))

    def take(self, path: str) -> Any:
        """What the next call of a sub-module returned."""
        self._restore()
        return self.given[path].pop(0)

    def _restore(self) -> None:
        if self.states:
            self.states.pop(0).restore()


class Reached(BaseException):  # a model's own `except Exception` must not stop it
    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.arguments = arguments


class Entry(nn.Module):
    """The model's forward up to its trunk: (inputs) -> (the trunk's arguments, record of what was called before)."""

    def __init__(self, model: nn.Module, around: Surroundings) -> None:
        super().__init__()
        self.__dict__.update(model=model, around=around)

    def forward(self, *inputs: Any) -> tuple[tuple[Any, ...], Record]:
        around: Surroundings = self.__dict__["around"]
        record: Record = {_STATES: [RandomState(inputs)]}

        def stop(*args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(trunk.forward).bind(*args, **kwargs).arguments
            raise Reached(tuple(given[name] for name in around.arguments))

        def answer(path: str, module: nn.Module) -> Callable[..., Any] | None:
            if path == around.trunk:
                return stop
            if within(around.trunk, path):
                return None

            def recorded(*args: Any, **kwargs: Any) -> Any:
                result = module(*args, **kwargs)
                record.setdefault(path, []).append(result)
                record[_STATES].append(RandomState(inputs))
                return result
            return recorded

        trunk = self.__dict__["model"].get_submodule(around.trunk)
        try:
            view = substituted(self.__dict__["model"], answer, again=True)
            view.forward(**dict(zip(around.inputs, inputs, strict=True)))
        except Reached as reached:
            return reached.arguments, record
        raise UnsupportedError(f"this time the forward of {type(self.__dict__['model']).__name__} did not call "
                               f"'{around.trunk}', the part that is compiled: transform the model without it")


class Rest(nn.Module):
    """The model's forward behind its trunk: (the trunk's outputs, record, *inputs) -> the model's outputs.

    fresh: with newly initialised copies of what is called there; otherwise with the model's own, not registered.
    """

    def __init__(self, model: nn.Module, around: Surroundings, *, fresh: bool) -> None:
        super().__init__()
        self.__dict__["around"] = around
        if not fresh:
            self.__dict__["model"] = model
            return
        keep = {*around.behind}

        def answer(path: str, module: nn.Module) -> Callable[..., Any] | None:
            if path in keep:
                return module
            holds = within(around.trunk, path) and path != around.trunk or any(within(kept, path) for kept in keep)
            return None if holds else Absent(path)

        view = substituted(model, answer)
        empty_stand_ins(view)
        first = next(model.parameters(), None)
        if first is not None and next(view.parameters(), None) is None:  # a forward may ask it for device and type
            empty = nn.Parameter(first.detach().new_empty(0), requires_grad=False)
            view.__dict__["_parameters"] = {**view._parameters, "_first": empty}
        self.model = unhooked_copy(view)
        freshen(self.model, moments(view))

    def forward(self, outputs: Any, record: Record, *inputs: Any) -> Any:
        around: Surroundings = self.__dict__["around"]
        model: nn.Module = self.__dict__["model"] if "model" in self.__dict__ else self.model  # noqa: SIM401
        given = Answered(record, inputs, {around.trunk: [outputs]})
        self.__dict__["steps"] = steps = self.__dict__.get("steps", 0) + 1
        answers = _Answers(model, inputs, steps <= _CHECKED)

        def answer(path: str, module: nn.Module) -> Callable[..., Any] | None:
            if within(around.trunk, path) and path != around.trunk:
                return None
            return lambda *args, **kwargs: (answers.give(given.take(path)) if path in given
                                            else answers.call(module, args, kwargs))

        view = substituted(model, answer)
        found = run_to_the_end(model, view, dict(zip(around.inputs, answers.inputs, strict=True)))
        answers.look()
        return found


class Segment(nn.Module):
    """(record, *inputs) -> record: one local module's calls. The last one returns the model's outputs instead."""

    def __init__(self, model: nn.Module, segments: Segments, index: int) -> None:
        super().__init__()
        self.__dict__.update(model=model, segments=segments, index=index)

    def forward(self, record: Record, *inputs: Any) -> Any:
        segments: Segments = self.__dict__["segments"]
        index, model = self.__dict__["index"], self.__dict__["model"]
        later = {path for group in segments.paths[index + 1:] for path in group}
        later -= {path for group in segments.paths[: index + 1] for path in group}
        last = index == len(segments.paths) - 1
        made = {path: list(values) for path, values in record.items()} or {_STATES: [RandomState(inputs)]}
        given = Answered(record, inputs)
        units = {path for group in segments.paths for path in group}
        self.__dict__["steps"] = steps = self.__dict__.get("steps", 0) + 1
        answers = _Answers(model, inputs, steps <= _CHECKED and index > 0)

        def answer(path: str, module: nn.Module) -> Callable[..., Any] | None:
            if path not in units:
                return None if any(within(unit, path) for unit in units) else module

            def call(*args: Any, **kwargs: Any) -> Any:
                if path in given:
                    return answers.give(given.take(path))
                if path in later:
                    raise Reached(())
                result = answers.call(module, args, kwargs)
                made.setdefault(path, []).append(result)
                made[_STATES].append(RandomState(inputs))
                return result
            return call

        arguments = dict(zip(segments.inputs, answers.inputs, strict=True))
        view = substituted(model, answer, again=not last)
        try:
            outputs = run_to_the_end(model, view, arguments) if last else view.forward(**arguments)
        except Reached:
            answers.look()
            return made
        answers.look()
        return outputs if last else made  # an early exit: the last segment finds the same


class Absent:
    """Stands for a sub-module that an auxiliary network does not have."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError(f"'{self.path}' is called behind the trunk, which it was not when the model was planned")


def detach_record(record: Record) -> Record:
    """A record without history."""
    return {path: [map_tensors(value, Tensor.detach) for value in values] for path, values in record.items()}
