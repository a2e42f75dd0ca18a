"""The arguments of a training step: their signature, and what is unlike the example."""

import inspect
from typing import Any

from torch import Tensor, nn

from glcan_fx.tasks.base import Spec


def signature_of(model: nn.Module, takes_targets: bool) -> inspect.Signature | None:
    """Of the model's forward, with the targets of a training step, if any, behind its positional arguments, and
    without ``**kwargs``: a step takes what its example had."""
    try:
        known = [parameter for parameter in inspect.signature(model.forward).parameters.values()
                 if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    except (TypeError, ValueError):
        return None
    if not takes_targets or any(parameter.name == "targets" for parameter in known):
        return inspect.Signature([_SELF, *known])
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    before = [parameter for parameter in known if parameter.kind in positional]
    targets = inspect.Parameter("targets", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    return inspect.Signature([_SELF, *before, targets, *(p for p in known if p.kind not in positional)])


_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)


def unlike(example: Any, value: Any) -> tuple[str, str] | None:
    """Where an argument is another kind of value than in the example, or another value of what has no numbers."""
    if isinstance(example, Spec):
        return None if isinstance(value, Tensor) else ("a tensor", repr(value)[:60])
    if isinstance(example, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(example):
            return f"a list of {len(example)}", repr(value)[:60]
        return next(filter(None, map(unlike, example, value)), None)
    if isinstance(example, dict):
        if not isinstance(value, dict) or value.keys() != example.keys():
            return f"a dict with {', '.join(map(str, example))}", repr(value)[:60]
        return next(filter(None, (unlike(example[key], value[key]) for key in example)), None)
    if type(example) in (int, float):
        return None if type(value) in (int, float) else (repr(example), repr(value)[:60])
    if isinstance(value, Tensor) or type(example) is not type(value) or example != value:
        return repr(example)[:60], "a tensor" if isinstance(value, Tensor) else repr(value)[:60]
    return None
