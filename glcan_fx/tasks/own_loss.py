"""The loss that a model computes itself."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from glcan_fx.errors import CriterionError, PlanError
from glcan_fx.tasks.base import Task, specs


class OwnLoss(Task):
    """The loss that the model computes itself, from labels among its arguments: ``outputs.loss``, ``outputs["loss"]``,
    the first of several outputs, or all that the model returns.

    A training step is ``local(*inputs)``, or ``local(**inputs)``, as the model is called; there are no targets. Local
    losses are computed by the model's own code, which the auxiliary networks copy.
    """

    name = "own_loss"
    takes_targets = False

    def __init__(self, unless: str = "") -> None:
        self.unless = unless  # what to say where it is only supposed, and the model has no loss

    def example_inputs(self, model: nn.Module, given: Any) -> tuple[Any, ...] | dict[str, Any]:
        if given is None and self.unless:
            raise PlanError(self.unless)
        return super().example_inputs(model, given)

    def fits(self, outputs: Any) -> None:
        if self.unless and _named_loss(outputs) is None:
            raise PlanError(f"{self.unless}. (Nor does the model return a scalar called 'loss'.)")
        self.loss(outputs, None)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        found = _named_loss(outputs)
        if found is None:
            first = outputs[0] if isinstance(outputs, list | tuple) and outputs else outputs
            found = first if isinstance(first, Tensor) and first.numel() == 1 and first.is_floating_point() else None
        if found is None:
            raise CriterionError(
                f"task 'own_loss': the model returns no loss, but {type(outputs).__name__} {specs(outputs)}. It is "
                "looked for as outputs.loss, outputs['loss'], the first output, or all that is returned: give the "
                "labels that the model computes it from among example_inputs= and in every step, or pass task= or "
                "criterion=.")
        return found


def _named_loss(outputs: Any) -> Tensor | None:
    """A scalar that outputs call their loss."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point() else None
