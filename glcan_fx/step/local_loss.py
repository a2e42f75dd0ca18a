"""The loss of a local module, differentiated at once, and the random numbers that it must not move."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glcan_fx.auxiliary.builder import Auxiliary
from glcan_fx.capture.random_numbers import python_random, random_state, set_random_state
from glcan_fx.step.averages import Averages
from glcan_fx.step.gradients import Passed, Sides
from glcan_fx.step.output import parts_of_loss, reported, shape_of, total
from glcan_fx.step.sliced import SlicedHead, in_patches


class LocalLoss(nn.Module):
    """(values, context) -> the loss of a local module, which is already differentiated.

    ``network`` makes predictions of the values that the module outputs and those that the loss reads beside them,
    ``head`` the loss of predictions and context, ``backward`` (added when the model is assembled) the gradients. The
    last local module has no network. What the network and the loss draw at random moves no random state of the model's.
    auxiliary: what ``network`` belongs to: further terms of the loss, and what of it follows the model's own weights.
    reports: return the parts of a loss, too.
    """

    def __init__(
        self, auxiliary: Auxiliary | None, head: nn.Module, *, last: bool = False, reports: bool = True
    ) -> None:
        super().__init__()
        self.share, self.patches = 1.0, 1
        self.weights: dict[str, float] = {}
        if auxiliary is not None:
            self.network = auxiliary.network
            self.share, self.patches = auxiliary.share, auxiliary.patches
            self.weights = {name: term.weight for name, term in auxiliary.terms.items()}
            if auxiliary.terms:
                self.terms = nn.ModuleDict({name: term.criterion for name, term in auxiliary.terms.items()})
            if auxiliary.averages:
                self.averages = Averages(auxiliary.averages, auxiliary.momentum)
        self.head = head
        self.last, self.reports = last, reports
        self.agrees = False  # whether predictions are of the shape of the model's outputs
        self.__dict__.update(draws=Draws(), made=None)

    def forward(
        self, *values: Any, context: tuple[Any, ...] = (), inputs: tuple[Any, ...] = (), through: Passed = (),
        sides: Sides = (None, None)
    ) -> Any:
        state = self._note_draws(values)
        loss = self._loss(values, context)
        if state is not None and not self.last:
            set_random_state(*state)
        if isinstance(self.head, SlicedHead):
            loss, outputs = loss
            return self._finished(loss, inputs, through, sides), outputs
        return self._finished(loss, inputs, through, sides)

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
        if "averages" in self._modules:
            self.averages(self.network)
        if self.patches > 1 and torch.is_grad_enabled():
            return in_patches(partial(self._predicted, context=context), values[0], self.patches,
                              list(self.network.parameters()))
        return self._predicted(*values, context=context)

    def _predicted(self, *values: Any, context: tuple[Any, ...]) -> Any:
        made = self.network(*values)
        prediction, beside = made if self.weights else (made, {})
        self.__dict__["made"] = shape_of(prediction)
        loss = self.head(prediction, *context)
        if self.share == 1 and not beside:
            return loss
        terms = {name: self.weights[name] * self.terms[name](value, *context) for name, value in beside.items()}
        return _Sum(torch.stack([self.share * total(loss), *terms.values()]).sum(), loss, terms)

    def _finished(self, loss: Any, inputs: tuple[Any, ...], through: Passed, sides: Sides) -> Any:
        if isinstance(loss, _Sum):
            parts: Any = {**(parts_of_loss(loss.task) or {"task": total(loss.task).detach()}),
                          **{name: term.detach() for name, term in loss.terms.items()}}
            loss = loss.loss
        else:
            parts = parts_of_loss(loss)
        if "backward" not in self._modules:
            return loss if not self.reports else reported(total(loss), parts)
        made = self._modules["backward"](loss, *inputs, through=through, sides=sides)  # type: ignore[misc]
        return reported(made, parts) if self.reports else made


class _Sum(NamedTuple):
    """A local loss with terms of its own beside the task's loss, each with its weight."""

    loss: Tensor
    task: Any
    terms: dict[str, Tensor]


class Draws:
    """The random states in front of the present local module of a step."""

    before: Any = None

    def moved(self, state: tuple[torch.device, Tensor] | None) -> bool:
        """Whether random numbers were drawn since the last call, by torch or by Python; ``state``: torch's now."""
        now = (None if state is None else state[1].numpy().tobytes(), python_random())
        before, self.before = self.before, now
        return before != now
