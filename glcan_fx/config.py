"""What a user may ask for beside a model: data that checks itself."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from glcan_fx.devices import Device, check_device
from glcan_fx.errors import PlanError

K = int | Literal["fewest", "natural", "auto"] | Sequence[str]
"""Local modules: a number, "natural" (one per block), "fewest", "auto", or a list of split points (module paths)."""

OptimizerLike = str | Callable[[Iterable[nn.Parameter]], Optimizer] | None

OPTIMIZERS: Mapping[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True),
    "adam": partial(torch.optim.Adam, lr=0.1, foreach=True),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a plan is simulated and verified, and savings that change no gradient.

    Args:
        optimizer: that memory is simulated with: "sgd" (with momentum), "adam", a function of the parameters, or None.
        example_targets: targets of one batch, to simulate a step with a criterion of your own.
        fused_loss: compute a dense focal loss from class ids in the last module, too: the same gradients, less memory.
        slices: run the last module's end (a detector's head, an upsampler, and the loss) in so many slices of the
            batch, each with its backward: the same gradients where the loss is a mean over images, which the first
            steps check.
        verify: run the compiled training step beside the model, on random values at two batch sizes, and probe whether
            every local module gets gradients, where that takes about a second.
        device: on which a step is to be fast: ``compute_budget``, and all that a plan says of compute, is then about
            estimated seconds. A name of ``glcan_fx.DEVICES`` ("rtx4090"), "cpu" or "cuda" (the one at hand, measured in
            two seconds), or a ``glcan_fx.Device``. None: about floating-point operations.

    Raises PlanError for values that are not possible.
    """

    optimizer: OptimizerLike = "sgd"
    example_targets: Any = field(default=None, repr=False)
    fused_loss: bool = True
    slices: int = 1
    verify: bool = True
    device: str | Device | None = None

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        check_device(self.device)
        check_count("slices", self.slices)


def check_count(name: str, value: Any, error: type[Exception] = PlanError) -> None:
    """Raise an error where an argument is not a number, 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise error(f"{name}={value!r}: a number, 1 or more")


def kind_of_optimizer(optimizer: OptimizerLike) -> tuple[str | None, int]:
    """What an optimizer is called, and how many numbers it keeps for each parameter."""
    if optimizer is None:
        return None, 0
    parameter = nn.Parameter(torch.zeros(8))
    parameter.grad = torch.zeros(8)
    made = (OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer)([parameter])
    made.step()
    kept = [value for value in made.state[parameter].values() if isinstance(value, torch.Tensor)]
    return optimizer if isinstance(optimizer, str) else type(made).__name__, sum(t.numel() == 8 for t in kept)


def check_optimizer(optimizer: OptimizerLike) -> None:
    """Raise PlanError for a name that is not an optimizer's."""
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise PlanError(f"optimizer={optimizer!r}: choose {' or '.join(map(repr, OPTIMIZERS))}, or pass a function of "
                        "the parameters")
