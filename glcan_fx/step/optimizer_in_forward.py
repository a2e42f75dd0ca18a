"""An optimizer that steps each local module inside the forward pass, so that its gradients are freed at once.

What torch's "optimizer step in backward" does per parameter, per local module: a module's gradients exist as soon as
its loss does, and nothing else in the step uses its parameters, so they need not wait for ``loss.backward()``. The
numbers are those of the ordinary loop; what would change them is refused.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from glcan_fx.errors import UnsupportedError
from glcan_fx.step.gradients import LocalBackward, leaves_of
from glcan_fx.step.learning import is_half

_INSTEAD = "or train with an ordinary optimizer, which steps everything behind backward()"


class OptimizerInForward(Optimizer):
    """``LocalModel.optimizer_in_forward``'s result; to a training loop, the optimizer that it is made of.

    inner: over all parameters, so that ``state_dict``, ``param_groups`` and ``defaults`` are its own; each of its steps
    sees the parameters of one local module only. owned: returns, by local module, the parameters that no other part of
    the step uses; the rest waits for ``step()``. names: of the parameters, by id. max_norm: clips the gradients of
    every local module, by their own norm.
    """

    def __init__(
        self, inner: Optimizer, owned: Callable[[], Mapping[str, Sequence[Tensor]]], names: Mapping[int, str],
        max_norm: float | None = None,
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self.max_norm = max_norm
        self.checks = 5  # steps that are still to be checked where that makes a GPU wait; negative: no values to check
        self._owned, self._names = owned, names
        self._lists: dict[str, list[list[Tensor]]] = {}  # by local module, by group
        self._home: dict[int, str] = {}  # local module, by id of a parameter
        self._stepped: dict[int, str] = {}  # the same, of those that were stepped since the last step()
        self._delivered: dict[str, list[bool]] = {}  # by local module: whether its loss reached backward
        self._gradients: dict[int, tuple[int, int]] = {}  # after backward: identity and version, by id of a parameter
        self._settings: list[dict[str, Any]] = []  # of the groups, when the forward pass began; none before one
        self._versions: dict[int, int] = {}  # of the parameters that were stepped, behind their step
        self._old: dict[int, tuple[ref[Tensor], int]] = {}  # gradients from before the forward pass, and their versions
        self._both: Tensor | None = None  # a parameter whose gradient is two steps' together
        self._queued = False  # whether the present backward pass will look at the gradients when it ends
        self._link()

    def _link(self) -> None:
        """Share the inner optimizer's state and groups, which loading replaces."""
        self.state, self.param_groups = self.inner.state, self.inner.param_groups
        self._lists = {}

    def state_dict(self) -> dict[str, Any]:
        """The state dict of an ordinary optimizer over the same parameters."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, or an ordinary optimizer's over the same parameters."""
        self.inner.load_state_dict(state_dict)
        self._link()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._lists = {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedError("an optimizer that steps in the forward pass belongs to its compiled model and cannot be"
                               " copied: keep its state_dict(), and call optimizer_in_forward() of the copied model")

    # ------------------------------------------------------------------------------------------ in the forward pass

    @contextmanager
    def forward(self, parts: Sequence[LocalBackward]) -> Iterator[None]:
        """One training forward pass, in which these local modules are stepped.

        After an exception the steps that were made stay, and the next forward pass is a new one.
        """
        if self._stepped:
            self._finish()
            raise UnsupportedError(
                "two training forward passes without optimizer.step() in between: the first has already stepped the "
                "local modules, so gradients cannot be accumulated, nor a batch be skipped behind its forward pass. "
                f"Call step() after each (torch.no_grad() around a pass that only looks at the loss), {_INSTEAD}. The "
                "next forward pass begins a new step.")
        refuse_distributed()
        if is_half(next(p.device.type for group in self.param_groups for p in group["params"])):
            raise UnsupportedError("float16 autocast needs a GradScaler, which scales the loss after the local modules "
                                   f"have been stepped. Use bfloat16, {_INSTEAD}.")
        if not self._lists:
            self._assign()
        self._note_old()
        self._settings = self._numbers()
        for part in parts:
            part.optimizer = self
        try:
            yield
        except BaseException:
            self._finish()
            raise
        finally:
            for part in parts:
                part.optimizer = None

    def take(
        self, part: LocalBackward, parameters: Sequence[Tensor], gradients: list[Tensor | None]
    ) -> list[bool]:
        """Step a local module with its gradients, and drop them; returns which of the parameters are its own."""
        own = [self._home.get(id(p)) == part.name for p in parameters]
        mine = [p for p, mine in zip(parameters, own, strict=True) if mine]
        if not mine:
            return own
        for parameter in mine:
            self._refuse_hooked(parameter)
        for index, parameter in enumerate(parameters):
            if own[index]:
                parameter.grad, gradients[index] = gradients[index], None
        with torch.autocast(mine[0].device.type, enabled=False):
            self._clip(mine)
            self._run(self._lists[part.name])
        for parameter in mine:
            parameter.grad = None
            self._versions[id(parameter)] = parameter._version
        self._stepped.update((id(p), part.name) for p in mine)
        self._delivered[part.name] = part.delivered
        return own

    def refuse_used_again(self, losses: Sequence[Tensor]) -> None:
        """Raise UnsupportedError where a loss depends on a parameter that was stepped before."""
        if self.checks <= 0 or not self._stepped:
            return
        for parameter in leaves_of(losses):
            if id(parameter) in self._stepped:
                raise UnsupportedError(
                    f"parameter '{self._name(parameter)}' was stepped with the local module "
                    f"'{self._stepped[id(parameter)]}', but a later one uses it, too, in a way that the compiler does "
                    f"not see. Register it under both modules, {_INSTEAD}.")

    # ------------------------------------------------------------------------------------------ in backward and behind

    def arrived(self, part: LocalBackward, gradient: Tensor) -> None:
        """Check what a local loss that is already stepped gets from ``loss.backward()``."""
        if part.delivered == [True]:
            raise UnsupportedError(f"backward() a second time through the loss of the local module '{part.name}', which"
                                   f" was stepped in the forward pass, once. Call it once, {_INSTEAD}.")
        if self._may_look(gradient) and float(gradient) != 1:
            self._finish()
            raise UnsupportedError(
                f"the loss was scaled before backward() (the gradient of the local loss '{part.name}' is "
                f"{float(gradient):.6g}, not 1), but its module was stepped in the forward pass, without the scale. "
                f"Minimise the plain sum of the losses: no GradScaler, no division, no weights; {_INSTEAD}.")
        self.in_backward()

    def in_backward(self) -> None:
        """Called in every backward pass: look at the gradients when it ends."""
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._note_gradients)

    def _note_gradients(self) -> None:
        self._queued = False
        self._both = self._added_to()
        self._gradients = {id(p): (id(p.grad), p.grad._version) for group in self.param_groups for p in group["params"]
                           if p.grad is not None}

    def step(self, closure: Any = None) -> Any:
        """Step what the forward pass did not: the last local module, and what more than one trains.

        Raises UnsupportedError where the loop did something between forward and here that the local modules, already
        stepped, could not know of.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._settings and self.checks >= 0:
            raise UnsupportedError("optimizer.step() without a training forward pass before it: the local modules are "
                                   f"stepped there. Call it once after each, {_INSTEAD}.")
        try:
            if self._settings:
                self._check_loop()
        except UnsupportedError:
            self._finish()
            raise
        rest = [[p for p in group["params"] if id(p) not in self._stepped] for group in self.param_groups]
        self._clip([p for group in rest for p in group])
        self._run(rest)
        self._finish()
        self.checks -= self.checks > 0
        return loss

    def _check_loop(self) -> None:
        if self._both is not None:
            raise UnsupportedError(
                f"the gradient of '{self._name(self._both)}' was added to the last step's, but the local modules were "
                f"stepped with this one's alone. Call zero_grad() in every step, {_INSTEAD}.")
        missed = [name for name, delivered in self._delivered.items() if delivered != [True]]
        if missed:
            raise UnsupportedError(
                f"the loss of the local module '{missed[0]}' did not reach backward() before optimizer.step(), but the "
                f"module was stepped in the forward pass. Minimise the sum of all losses, {_INSTEAD}.")
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if self._versions.get(id(parameter), parameter._version) != parameter._version:
                    raise UnsupportedError(
                        f"parameter '{self._name(parameter)}' was changed between its step, in the forward pass, and "
                        f"optimizer.step(). Change weights before the forward pass or behind step(), {_INSTEAD}.")
                if gradient is not None and id(parameter) in self._stepped:
                    raise UnsupportedError(
                        f"parameter '{self._name(parameter)}' got a further gradient in backward() (a penalty on "
                        "weights?), but was stepped in the forward pass. Use the optimizer's weight_decay, "
                        f"{_INSTEAD}.")
                if gradient is not None and self._gradients.get(id(parameter)) != (id(gradient), gradient._version):
                    raise UnsupportedError(
                        f"the gradient of '{self._name(parameter)}' was changed between backward() and "
                        "optimizer.step() (clip_grad_norm_, clip_grad_value_, ...), but those of the local modules are "
                        "gone by then. Clip per local module instead, optimizer_in_forward(..., max_norm=1.0), "
                        f"{_INSTEAD}.")
        if self._numbers() != self._settings:
            raise UnsupportedError(
                "the optimizer's param_groups changed between the forward pass and optimizer.step(), behind the steps "
                "of the local modules. Change the learning rate before the forward pass; an optimizer that counts in "
                f"its groups cannot step in the forward pass: use another, {_INSTEAD}.")

    # ------------------------------------------------------------------------------------------ helpers

    def _assign(self) -> None:
        self._home = {id(p): name for name, parameters in self._owned().items() for p in parameters}
        self._lists = {name: [[] for _ in self.param_groups] for name in self._home.values()}
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if id(parameter) in self._home:
                    self._lists[self._home[id(parameter)]][index].append(parameter)
        given = {id(p) for group in self.param_groups for p in group["params"]}
        self._home = {key: name for key, name in self._home.items() if key in given}

    def _run(self, lists: Sequence[list[Tensor]]) -> None:
        """A step of the inner optimizer on some of its parameters: ``lists``, by group."""
        groups, kept = self.param_groups, [group["params"] for group in self.param_groups]
        try:
            for group, some in zip(groups, lists, strict=True):
                group["params"] = some
            self.inner.param_groups = [group for group in groups if group["params"]]
            self.inner.step()
        finally:
            self.inner.param_groups = groups
            for group, whole in zip(groups, kept, strict=True):
                group["params"] = whole

    def _clip(self, parameters: Sequence[Tensor]) -> None:
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)

    def _finish(self) -> None:
        self._stepped, self._delivered, self._gradients, self._versions = {}, {}, {}, {}
        self._settings, self._queued = [], False
        self._old, self._both = {}, None

    def _numbers(self) -> list[dict[str, Any]]:
        return [{key: value.tolist() if isinstance(value, Tensor) else value for key, value in group.items()
                 if isinstance(value, bool | int | float | tuple | Tensor)} for group in self.param_groups]

    def _may_look(self, value: Tensor) -> bool:
        return self.checks > 0 or self.checks == 0 and not value.is_cuda

    def _note_old(self) -> None:
        """Remember gradients of the last step that are still there; the loop may clear them until backward."""
        self._old = {id(p): (ref(p.grad), p.grad._version) for group in self.param_groups for p in group["params"]
                     if p.grad is not None and self._may_look(p.grad) and bool(p.grad.any())}

    def _added_to(self) -> Tensor | None:
        """A parameter whose gradient was added to the last step's, without zero_grad() in between."""
        for group in self.param_groups:
            for p in group["params"]:
                old, version = self._old.get(id(p), (None, 0))
                gradient: Tensor | None = p.grad
                if old is not None and gradient is not None and old() is gradient and gradient._version == version + 1:
                    return p
        return None

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter), f"of shape {tuple(parameter.shape)}")

    def _refuse_hooked(self, parameter: Tensor) -> None:
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UnsupportedError(f"parameter '{self._name(parameter)}' has a gradient hook, which would run in "
                                   f"backward(), after the step. Remove it, {_INSTEAD}.")
        if parameter.grad is not None:
            raise UnsupportedError(f"parameter '{self._name(parameter)}' has a gradient from before the forward pass, "
                                   "which a step inside cannot add to. Call zero_grad() before the first forward pass.")


def refuse_distributed() -> None:
    """Raise UnsupportedError among several processes, whose gradients are averaged before a step."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and (
            torch.distributed.get_world_size() > 1):
        raise UnsupportedError("torch.distributed runs with more than one process: gradients are averaged in backward()"
                               ", so local modules cannot be stepped in the forward pass. Use an ordinary optimizer.")
