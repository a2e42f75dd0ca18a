"""What a user asks of a plan, checked."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from glcan_fx.auxiliary.method import OPEN, Method
from glcan_fx.config import K, Options, check_count
from glcan_fx.errors import PlanError
from glcan_fx.methods import GLCAN
from glcan_fx.units import in_bytes

_OF_GPU = 0.9  # the rest is for library workspaces and fragmentation


@dataclass(frozen=True)
class Request:
    """What the user asks for; memory_budget: in bytes, the least that there is, or None."""

    k: K
    method: Method
    memory_budget: int | Literal["least"] | None
    compute_budget: float | None
    options: Options
    devices: int = 1

    @property
    def wants_auxiliary(self) -> bool:
        """Whether the user configured auxiliary networks, so that there must be some."""
        return self.method != GLCAN()

    @property
    def needs_graph(self) -> bool:
        """Whether the user asked for auxiliary networks that a model that runs as Python cannot have."""
        method = self.method
        plain = GLCAN(head=method.head, width=1.0, hidden=0, stride=getattr(method, "stride", OPEN))
        width = 1.0 if method.width is None else method.width
        hidden = getattr(method, "hidden", None) or 0
        return not isinstance(method, GLCAN) or replace(method, width=width, hidden=hidden) != plain


def request_for(
    model: nn.Module, k: K, method: Method, memory_budget: int | str | None, compute_budget: float | None,
    options: Options, devices: int = 1,
) -> Request:
    """The request, with the memory budget in bytes: the user's, or the GPU's with k="auto". Raises PlanError for what
    is not possible."""
    if compute_budget is not None and (
            isinstance(compute_budget, bool) or not isinstance(compute_budget, int | float) or not compute_budget > 0):
        raise PlanError(f"compute_budget={compute_budget!r}: give a training step's compute relative to "
                        "backpropagation's, such as 1.3")
    budget = None if memory_budget is None else in_bytes(memory_budget)
    if budget is None and k == "auto":
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if device.type != "cuda":
            raise PlanError("k='auto' takes the fewest local modules that fit: pass memory_budget=, or move the model "
                            "to the GPU first")
        budget = int(_OF_GPU * torch.cuda.get_device_properties(device).total_memory)
    check_count("devices", devices)
    return Request(k, method, budget, compute_budget, options, devices)
