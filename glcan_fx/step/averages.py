"""What of an auxiliary network follows the model's own weights, without gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from glcan_fx.errors import ModelChangedError


class Averages(nn.Module):
    """Moves buffers of an auxiliary network towards parameters of the model that they follow, once after each step of
    an optimizer: when these have changed (in the next forward pass, on every rank alike).

    follows: paths of the buffers, and of the parameters; ``bind`` says of which model. Raises ModelChangedError where
    the model has no such parameters any longer.
    """

    begun: Tensor

    def __init__(self, follows: Mapping[str, str], momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.__dict__.update(follows=dict(follows), model=None, seen=None)
        self.register_buffer("begun", torch.tensor(False))

    def bind(self, model: nn.Module) -> None:
        self.__dict__.update(model=model, seen=None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None, "seen": None}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def forward(self, network: nn.Module) -> None:
        tensors = dict(network.named_parameters()) | dict(network.named_buffers())
        model, follows = self.__dict__["model"], self.__dict__["follows"]
        try:
            sources = [model.get_parameter(path) for path in follows.values()]
        except AttributeError as error:
            raise ModelChangedError(
                f"an auxiliary network follows the weights of a block that was replaced: {error}. Compile again."
            ) from error
        averages = [tensors[path] for path in follows]
        if any(isinstance(source, FakeTensor) for source in sources):
            return
        versions = [source._version for source in sources]
        seen = self.__dict__["seen"]
        resumed = seen is None and bool(self.begun)
        if resumed or seen not in (None, versions):
            torch._foreach_lerp_(averages, [source.to(average.dtype) for source, average in zip(
                sources, averages, strict=True)], 1 - self.momentum)
        if seen is None:
            self.begun.fill_(True)
        self.__dict__["seen"] = versions
