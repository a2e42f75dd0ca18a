"""Warn where an optimizer steps a model and not its auxiliary networks."""

import warnings
import weakref
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from glcan_fx.errors import (
    UnusedGradientsWarning,
)

if TYPE_CHECKING:
    from glcan_fx.step.local_model import LocalModel


_STEPS = 10  # of one optimizer: another may step the auxiliary networks, later or less often


watched: weakref.WeakKeyDictionary[Any, Counter[int]] = weakref.WeakKeyDictionary()  # steps of the model alone


def warn_of_unstepped(local: "LocalModel") -> None:
    """From now on, until it is known: warn where an optimizer steps the model and none its auxiliary networks, as one
    that was made before them does."""
    _watch_optimizers()
    watched[local] = Counter()


@cache
def _watch_optimizers() -> None:
    """Once in a process: PyTorch has no way to drop such a hook from inside it."""
    register_optimizer_step_post_hook(_stepped)


def _stepped(optimizer: Optimizer, *_: Any) -> None:
    for compiled in list(watched):
        networks = {id(p) for index in range(compiled.plan.k - 1)
                    for p in compiled.aux.get_submodule(str(index)).parameters() if p.requires_grad}
        taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not networks or networks & taken:
            del watched[compiled]
            continue
        watched[compiled][id(optimizer)] += any(id(p) in taken for p in compiled.original.parameters())
        if watched[compiled][id(optimizer)] == _STEPS:
            del watched[compiled]
            warnings.warn(
                f"{_STEPS} optimizer steps changed parameters of {type(compiled.original).__name__}, and none those of "
                "its auxiliary networks, which stay as they were initialised. Create the optimizer after transform(), "
                "from local.parameters() or local.parameter_groups().", UnusedGradientsWarning, stacklevel=3)
