"""The loss of a local module, differentiated at once, and the random numbers that it must not move."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from glcan_fx.capture.shadow import python_random
from glcan_fx.pytree import tensors_in

from glcan_fx.step.gradients import Passed
from glcan_fx.step.output import reported, shape_of, total
from glcan_fx.step.sliced import SlicedHead


class LocalLoss(nn.Module):
    """(values, context) -> the loss of a local module, which is already differentiated.

    ``network`` makes predictions of the values that the module outputs and those that the loss reads beside them,
    ``head`` the loss of predictions and context, ``backward`` (added when the model is assembled) the gradients. The
    last local module has no network. What the network and the loss draw at random moves no random state of the model's.
    reports: return the parts of a dict of losses, too.
    """

    def __init__(self, network: nn.Module | None, head: nn.Module, *, last: bool = False, reports: bool = True) -> None:
        super().__init__()
        if network is not None:
            self.network = network
        self.head = head
        self.last, self.reports = last, reports
        self.agrees = False  # whether predictions are of the shape of the model's outputs
        self.__dict__.update(draws=Draws(), made=None)

    def forward(
        self, *values: Any, context: tuple[Any, ...] = (), inputs: tuple[Any, ...] = (), through: Passed = ()
    ) -> Any:
        state = self._note_draws(values)
        loss = self._loss(values, context)
        if state is not None and not self.last:
            set_random_state(*state)
        if isinstance(self.head, SlicedHead):
            loss, outputs = loss
            return self._finished(loss, inputs, through), outputs
        return self._finished(loss, inputs, through)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _note_draws(self, values: Any) -> tuple[torch.device, Tensor] | None:
        """The random state behind the local module, which is also that in front of the next one."""
        part: Any = self._modules.get("backward")
        watched = part is not None and part.watch.on
        if self.last and not watched:
            return None
        draws: Draws = self.__dict__["draws"]
        state = random_state(values)
        if watched:
            part.watch.drew = draws.moved(state)
        return state

    def _loss(self, values: tuple[Any, ...], context: tuple[Any, ...]) -> Any:
        if "network" not in self._modules:
            return self.head(*values, *context)
        prediction = self.network(*values)
        self.__dict__["made"] = shape_of(prediction)
        return self.head(prediction, *context)

    def _finished(self, loss: Any, inputs: tuple[Any, ...], through: Passed) -> Any:
        if "backward" not in self._modules:
            return loss if not self.reports else reported(total(loss), loss)
        made = self._modules["backward"](loss, *inputs, through=through)  # type: ignore[misc]
        return reported(made, loss) if self.reports else made


class Draws:
    """The random states in front of the present local module of a step."""

    before: Any = None

    def moved(self, state: tuple[torch.device, Tensor] | None) -> bool:
        """Whether random numbers were drawn since the last call, by torch or by Python; ``state``: torch's now."""
        now = (None if state is None else state[1].numpy().tobytes(), python_random())
        before, self.before = self.before, now
        return before != now


def random_state(values: Any) -> tuple[torch.device, Tensor] | None:
    """The random state of the device that values are on; None where nothing is drawn (on fake tensors)."""
    tensor = next(tensors_in(values), None)
    if tensor is None or isinstance(tensor, FakeTensor):
        return None
    if tensor.device.type == "cpu":
        return tensor.device, torch.get_rng_state()
    if tensor.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        return tensor.device, torch.cuda.get_rng_state(tensor.device)
    return None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)
