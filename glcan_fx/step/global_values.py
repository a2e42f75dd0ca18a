"""The global and enclosing variables that a function reads, which Python does not tell anybody of."""

import dis
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from glcan_fx.capture.modules import is_configuration

_DEPTH = 3  # functions that a function calls
_WRITERS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "clear"}
_LIBRARIES = ("torch", "torchvision", "numpy", "math", "builtins", "typing", "functools", "einops")


_CONTAINERS = (list, dict, set)


class Variable(NamedTuple):
    """A variable outside of a function: what it is called, and how to look at it."""

    what: str
    now: Callable[[], Any]


def variables_of(function: Any, depth: int = _DEPTH) -> Iterator[Variable]:
    """The variables that a function of Python reads and does not set: of its module, of modules and configurations that
    it names, of what encloses it; and those of the functions that it calls by such names."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, FunctionType) or _is_librarys(function.__module__):
        return
    known, names, own = function.__globals__, set[str](), set[str]()
    steps = [step for code in _codes(function.__code__) for step in dis.get_instructions(code)]
    for step in steps:
        own |= {step.argval} if step.opname in ("STORE_GLOBAL", "STORE_DEREF") else set()
        names |= {step.argval} if step.opname == "LOAD_GLOBAL" else set()
    inner = {name for code in _codes(function.__code__) for name in code.co_names}
    writes = not _WRITERS.isdisjoint(inner) or any(step.opname == "STORE_SUBSCR" for step in steps)
    for name in sorted(names & known.keys() - own):
        value = known[name]
        if writes and isinstance(value, _CONTAINERS):
            continue  # which of them it fills, as caches and logs are, nobody knows
        if isinstance(value, FunctionType) and depth:
            yield from variables_of(value, depth - 1)
        elif is_configuration(value) or isinstance(value, ModuleType) and not _is_librarys(value.__name__):
            for attribute in sorted(inner & vars(value).keys()):
                yield Variable(f"'{name}.{attribute}'", partial(vars(value).get, attribute))
        else:
            yield Variable(f"the global '{name}'", partial(known.get, name))
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name not in own and not (writes and isinstance(_content(cell), _CONTAINERS)):
            yield Variable(f"the variable '{name}' around {function.__qualname__}", partial(_content, cell))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code, and that of comprehensions in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _is_librarys(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _LIBRARIES
