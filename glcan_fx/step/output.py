"""What a training step returns, and how values pass from one local module to the next."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from glcan_fx.pytree import map_tensors, tensors_in
from glcan_fx.tasks.criteria import NamedLoss, named, reports_of, scalar_of

if TYPE_CHECKING:
    pass


class LocalOutput(NamedTuple):
    """What a training step returns outside the detection contract.

    loss: scalar, the sum of the local losses: what to minimise. output: the model's own training output, detached,
    for metrics. losses: one scalar per local module; every one but the last is already differentiated. Where the
    criterion returns a dict, its values can be read from them by name, detached: ``losses[-1]["ce"]``.
    """

    loss: Tensor
    output: Any
    losses: tuple[Tensor, ...]


def cache_write(value: Any, *, keep: bool = False) -> Any:
    """Put a value into the feature cache: detached, freed after its last reader.

    keep: a copy, for a value that a later module overwrites in place.
    """
    return map_tensors(detach(value), Tensor.clone) if keep else detach(value)


def cache_read(value: Any) -> Any:
    """Read a focal feature: an alias without history, so that no gradient passes from reader to writer."""
    return detach(value)


def leaf(value: Any) -> Any:
    """A value for the next local modules by whose graph a local loss gives it a gradient, and without its history."""
    return map_tensors(value, _leaf)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor.detach()


def copied(value: Any) -> Any:
    """A copy of a value that is overwritten in place."""
    return map_tensors(value, Tensor.clone)


def detach(value: Any) -> Any:
    """Detach every tensor of a nested value, dataclasses included."""
    return map_tensors(value, Tensor.detach)


def total(loss: Any) -> Tensor:
    """A local loss as one scalar: what is minimised of what the criterion returns (``criteria.py`` has the rules)."""
    return scalar_of(loss)


def parts_of_loss(loss: Any) -> dict[str, Tensor] | None:
    """The values of a dict of losses by name, detached, for reports; None for a plain tensor."""
    return reports_of(loss)


def reported(scalar: Tensor, parts: dict[str, Tensor] | None) -> Any:
    """A local loss beside its parts, where it has some."""
    return scalar if parts is None else (scalar, parts)


def collect(losses: Sequence[Any], output: Any) -> LocalOutput:
    """Assemble the result of a training step. losses: per local module a scalar, or (scalar, its parts by name)."""
    scalars = tuple(named(*loss) if isinstance(loss, tuple) else total(loss) for loss in losses)
    loss = scalars[0].as_subclass(Tensor) if type(scalars[0]) is NamedLoss else scalars[0]  # still made from it
    return LocalOutput(loss if len(scalars) == 1 else torch.stack(scalars).sum(), detach(output), scalars)


def merge(losses: Sequence[Tensor], last: dict[str, Tensor]) -> dict[str, Tensor]:
    """Assemble a detector's dict of losses: its own keys from the last module, one key per other local module."""
    return {**{f"loss_local_{index}": loss for index, loss in enumerate(losses)}, **last}


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of the first tensor of a nested value, but for the batch."""
    tensor = next(tensors_in(value), None)
    return None if tensor is None else tuple(tensor.shape[1:])
