"""Steps for other sizes: where the model's own forward asks about sizes, it may go another way than with the example.

A step is written out for the answers that the example gave. At sizes that have not been seen, the model is recorded
again; where the step would be another one, that one runs instead, with the same local modules and auxiliary networks.
"""

import logging
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from .analyze import analyze
from .connect import connect_again
from .emit import Emitted
from .errors import GlcanFxError, ModelChangedError
from .local_model import LocalModel
from .tasks import Spec
from .trace import trace

log = logging.getLogger("glcan_fx")


def step_for(local: LocalModel, given: dict[str, Any]) -> Emitted | None:
    """The step for arguments of these sizes, by name; None where it is the one that there is.

    Raises ModelChangedError where there is none.
    """
    names = [name for name in local.names() if name != "targets"]
    example = {name: tree_map_only(Tensor, lambda t: Spec.of(t).empty(), given[name])
               for name in names if name in given}
    plan = local.plan
    asked = "; ".join(dict.fromkeys(f"`{s.code}` ({s.where})" for s in plan.report.specialisations if s.module in
                                    local.__dict__["_opened"]))
    try:
        inputs: Any = example if isinstance(plan.inputs, dict) else list(example.values())
        made = connect_again(local, analyze(trace(local.original, inputs)))
    except GlcanFxError as error:
        raise ModelChangedError(
            f"{plan.model} asks about sizes, {asked}, and the training step was written for the answers that "
            f"example_inputs= gave. For {_sizes(example)} it cannot be written: {error}. Train on sizes with the same "
            "answers, or compile again for these.") from error
    if made.graph.python_code("self").src == local.code:
        return None
    log.info("%s goes another way for %s (%s): a second training step", plan.model, _sizes(example), asked)
    return made


def _sizes(example: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in example.items() if isinstance(value, Tensor))
