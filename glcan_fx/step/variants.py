"""Steps for other sizes: where the model's own forward asks about sizes, it may go another way than with the example.

A step is written out for the answers that the example gave. At sizes that have not been seen, the model is recorded
again; where the step would be another one, that one runs instead, with the same local modules and auxiliary networks.
"""

import logging
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from glcan_fx.capture.ladder import trace
from glcan_fx.errors import GlcanFxError, ModelChangedError
from glcan_fx.pytree import tensors_in
from glcan_fx.step.build import build_again
from glcan_fx.step.emit import Emitted
from glcan_fx.step.local_model import LocalModel
from glcan_fx.structure.trunk import analyze
from glcan_fx.tasks import Spec

log = logging.getLogger("glcan_fx")


def step_for(local: LocalModel, given: dict[str, Any]) -> Emitted | None:
    """The step for arguments of these sizes, by name; None where it is the one that there is.

    Raises ModelChangedError where there is none.
    """
    values = {name: given[name] for name in local.inputs() if name in given}
    return _written_for(local, values if isinstance(local.plan.inputs, dict) else tuple(values.values()))


def check_sizes(local: LocalModel, values: tuple[Any, ...]) -> None:
    """Raise ModelChangedError where the compiled part goes another way for arguments of these sizes."""
    names = list(local.plan.inputs) if isinstance(local.plan.inputs, dict) else []
    made = _written_for(local, dict(zip(names, values, strict=True)) if names else values)
    if made is not None:
        raise _refused(local, values, "it goes another way")


def _written_for(local: LocalModel, values: Any) -> Emitted | None:
    example = tree_map_only(Tensor, lambda tensor: Spec.of(tensor).empty(), values)
    try:
        trace_of = trace(local.original, example if isinstance(example, dict) else list(example),
                         path=local.plan.network)
        made = build_again(local, analyze(trace_of))
    except GlcanFxError as error:
        raise _refused(local, values, str(error)) from error
    if made.graph.python_code("self").src == local.code:
        return None
    log.info("%s goes another way for %s: a second training step", local.plan.model, _sizes(values))
    return made


def _refused(local: LocalModel, values: Any, reason: str) -> ModelChangedError:
    opened = local.__dict__["_opened"]
    asked = dict.fromkeys(f"`{s.code}` ({s.where})" for s in local.plan.report.specialisations if s.module in opened)
    return ModelChangedError(
        f"{local.plan.model} asks about sizes, {'; '.join(asked)}, and the training step was written for the answers "
        f"that example_inputs= gave. For {_sizes(values)} it cannot be written: {reason}. Train on sizes with the same "
        "answers, or compile again for these.")


LocalModel._written_for = staticmethod(step_for)  # a compiled model asks for it, and does not know how to record
LocalModel._check_new_sizes = staticmethod(check_sizes)


def _sizes(values: Any) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(values))
