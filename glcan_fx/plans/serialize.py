"""Plans as JSON text."""

import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import cattrs
import torch
from cattrs.preconf.json import make_converter
from torch import Tensor

from glcan_fx.auxiliary.method import Method
from glcan_fx.errors import LoadError, PlanError
from glcan_fx.methods import METHODS
from glcan_fx.tasks import Spec

KEY = "aux.plan"  # in a compiled model's state dict
_FORMAT, _VERSION = "glcan_fx.plan", 7

_P = TypeVar("_P")


def plan_to_json(plan: Any) -> str:
    """A plan as JSON text."""
    data = _CONVERTER.unstructure(plan)
    del data["reads"]  # of a compiled model
    return json.dumps({"format": _FORMAT, "version": _VERSION, **data}, indent=1)


def plan_from_json(text: str, kind: type[_P]) -> _P:
    """Read ``plan_to_json``'s text. Raises PlanError for text that is not a plan, with what is wrong and where."""
    try:
        data = json.loads(text)
    except (TypeError, ValueError) as error:
        raise PlanError(f"this is not a plan in JSON: {error}") from error
    if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
        raise PlanError(f"this is not a plan in JSON: it has no \"format\": \"{_FORMAT}\"")
    if data.pop("version", None) != _VERSION:
        raise PlanError(f"this is not a plan of format version {_VERSION}: make it again with glcan_fx.plan()")
    try:
        return _CONVERTER.structure(data, kind)
    except cattrs.BaseValidationError as error:
        raise PlanError(f"this is not a plan in JSON, or was edited wrongly: {'; '.join(cattrs.transform_error(error))}"
                        ) from error


def plan_to_tensor(plan: Any) -> Tensor:
    """A plan as bytes, which a state dict can hold."""
    return torch.frombuffer(bytearray(zlib.compress(plan_to_json(plan).encode())), dtype=torch.uint8)


def plan_from_state(state: Mapping[str, Any], kind: type[_P]) -> _P:
    """The plan that a compiled model's state dict was made by. Raises PlanError where it has none."""
    prefix = prefix_in(state)
    if prefix is None:
        raise PlanError(f"no plan in this state dict: it has no '{KEY}', so it is a plain model's, or of a compiled "
                        "one without auxiliary networks (k=1), whose state dict is the plain model's")
    try:
        text = zlib.decompress(bytes(state[prefix + KEY].cpu().tolist()))
    except zlib.error as error:
        raise PlanError(
            f"the plan in this state dict, '{prefix}{KEY}', cannot be read: {error}. An average over buffers "
            "(AveragedModel(use_buffers=True)) changes it: take it from the model's own.") from error
    return plan_from_json(text.decode(), kind)


def prefix_in(state: Mapping[str, Any]) -> str | None:
    """What stands in front of a compiled model's keys; None where there are no auxiliary networks. Raises LoadError
    for more than one compiled model."""
    nested = [key for key, value in state.items() if isinstance(value, Mapping) and value and all(
        isinstance(name, str) for name in value) and prefix_in(value) is not None]
    if nested:
        raise LoadError(f"this is a checkpoint that holds state dicts, not one: pass checkpoint[{nested[0]!r}]")
    found = [key[:-len(KEY)] for key in state if key == KEY or key.endswith(f".{KEY}")]
    if len(found) > 1:
        raise LoadError(f"there are {len(found)} compiled models in this state dict, under "
                        f"{', '.join(map(repr, found))}: take one of them out first")
    return found[0] if found else None


def _method_to_data(method: Method) -> dict[str, Any]:
    kind: Any = type(method)
    options = {field.name: getattr(method, field.name) for field in dataclasses.fields(kind) if field.name != "rules"}
    return {"name": method.name, **{name: _method_to_data(value) if isinstance(value, Method) else value
                                    for name, value in options.items()}}


def _method_from_data(data: dict[str, Any], _: Any) -> Method:
    options = {name: _method_from_data(value, None) if isinstance(value, dict) else
               tuple(value) if isinstance(value, list) else value for name, value in data.items()}
    name = options.pop("name", None)
    if name not in METHODS:
        raise ValueError(f"method {name!r}: known are {', '.join(METHODS)}")
    return METHODS[name](**options)


def _inputs_from_data(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"shape", "dtype"}:
        return Spec(tuple(value["shape"]), value["dtype"])
    if isinstance(value, dict):
        return {key: _inputs_from_data(part) for key, part in value.items()}
    return tuple(_inputs_from_data(part) for part in value) if isinstance(value, list) else value


def _inputs(value: Any, _: Any) -> Any:
    if not isinstance(value, list | dict):
        raise ValueError("inputs are neither a list nor named")
    return _inputs_from_data(value)


def _is_method(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Method)


_CONVERTER = make_converter(forbid_extra_keys=True)
_CONVERTER.register_unstructure_hook_func(_is_method, _method_to_data)
_CONVERTER.register_structure_hook_func(_is_method, _method_from_data)
_CONVERTER.register_structure_hook_func(lambda kind: kind is Any, _inputs)
