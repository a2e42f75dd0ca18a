"""Run: local gradients inside the forward pass, handed over when the loop's own ``loss.backward()`` asks for them.

Each local loss is differentiated as soon as it exists, so that the module's activations are freed before the next
module starts. What stays are gradients, parameter-sized, behind a scalar: its backward multiplies them by whatever
arrives (1 / accumulation steps, a GradScaler's scale, a weight) and hands them to the autograd engine, so that
``.grad``, hooks, DistributedDataParallel and clipping see what they would see after a summed loss.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from .errors import CriterionError, UnsupportedError
from .nested import map_tensors


class LocalOutput(NamedTuple):
    """What a training step returns outside the detection contract.

    loss: scalar, the sum of the local losses: what to minimise. output: the model's own training output, detached,
    for metrics. losses: one scalar per local module; every one but the last is already differentiated.
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


def detach(value: Any) -> Any:
    """Detach every tensor of a nested value, dataclasses included."""
    return map_tensors(value, Tensor.detach)


def total(loss: Any) -> Tensor:
    """A local loss as one scalar: a tensor, or the sum over a dict or list of tensors."""
    terms = [leaf for leaf in tree_leaves(loss) if isinstance(leaf, Tensor)]
    if not terms:
        raise CriterionError(f"the criterion must return a scalar or a dict of scalars, not {type(loss).__name__}")
    wrong = next((term for term in terms if term.numel() != 1), None)
    if wrong is not None:
        raise CriterionError(f"the criterion must return a scalar, not a tensor of {wrong.numel()} values: reduce it, "
                             "for example with .mean()")
    return terms[0].reshape(()) if len(terms) == 1 else torch.stack([term.reshape(()) for term in terms]).sum()


def collect(losses: Sequence[Any], output: Any) -> LocalOutput:
    """Assemble the result of a training step."""
    scalars = tuple(total(loss) for loss in losses)
    return LocalOutput(scalars[0] if len(scalars) == 1 else torch.stack(scalars).sum(), detach(output), scalars)


def merge(losses: Sequence[Tensor], last: dict[str, Tensor]) -> dict[str, Tensor]:
    """Assemble a detector's dict of losses: its own keys from the last module, one key per other local module."""
    return {**{f"loss_local_{index}": loss for index, loss in enumerate(losses)}, **last}


class _Replay(torch.autograd.Function):
    """A scalar whose backward hands over gradients that already exist."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, stash: list[Tensor | None], delivered: list[bool], *parameters: Tensor
    ) -> Tensor:
        ctx.stash, ctx.delivered = stash, delivered
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "backward(create_graph=True) needs second-order gradients through the local losses, which are "
                "already differentiated when forward() returns. Compute gradient penalties on the original model."
            )
        if not ctx.stash:
            raise RuntimeError(
                "backward() a second time through a local loss: its gradients were handed over the first time. "
                "Use retain_graph=True on the first call."
            )
        present = [grad for grad in ctx.stash if grad is not None]
        where = [grad is not None for grad in ctx.stash]
        if torch._C._autograd._get_current_graph_task_keep_graph():
            present = [grad.clone() for grad in present]
        else:
            ctx.stash.clear()  # no second reference, so that the engine moves the gradients instead of copying them
        for grad in present:
            grad.mul_(grads[0])
        ctx.delivered[:] = [True]
        moved = iter(present)
        present = []
        return (None, None, None, *(next(moved) if there else None for there in where))


class LossScale(nn.Module):
    """A dynamic scale for local losses under float16 autocast, where small gradients would vanish.

    The local backward runs before the loop's GradScaler can scale the loss, so it brings its own scale: halved after
    an overflow (which also reaches the GradScaler, as infinite gradients, and makes it skip the step), doubled after
    ``interval`` good steps. Lives on the device; never synchronises.
    """

    def __init__(self, start: float = 2.0**12, interval: int = 2000) -> None:
        super().__init__()
        self.interval = interval
        self._finite: list[Tensor] = []  # one flag per local loss of the present step
        self.scale: Tensor
        self.good: Tensor
        self.register_buffer("scale", torch.tensor(start))
        self.register_buffer("good", torch.tensor(0))

    @torch.no_grad()
    def unscale(self, grads: Sequence[Tensor | None]) -> None:
        """Divide the gradients by the scale, in place."""
        present = [grad for grad in grads if grad is not None]
        inverse = self.scale.reciprocal()  # exact: a power of two
        for grad in present:
            grad.mul_(inverse)
        self._finite.extend(grad.isfinite().all() for grad in present)

    @torch.no_grad()
    def update(self) -> None:
        """Adapt the scale after a step's last local loss; nothing happens in a step without float16."""
        if not self._finite:
            return
        finite = torch.stack(self._finite).all()
        self._finite = []
        grown = torch.where(self.good + 1 >= self.interval, self.scale * 2, self.scale)
        good = torch.where(self.good + 1 >= self.interval, torch.zeros_like(self.good), self.good + 1)
        self.scale.copy_(torch.where(finite, grown, self.scale / 2).clamp(1.0, 2.0**24))
        self.good.copy_(torch.where(finite, good, torch.zeros_like(self.good)))


class LocalBackward(nn.Module):
    """Differentiates one local loss at once and returns it as a scalar that hands the gradients over later.

    trains: (root, path) of every module or parameter that this local loss trains. They are looked up at every step,
    so that frozen, replaced, pruned or newly added parameters are seen.
    """

    def __init__(self, trains: Sequence[tuple[nn.Module, str]], scale: nn.Module, name: str) -> None:
        super().__init__()
        self.__dict__["trains"] = tuple(trains)
        self.name = name
        self.delivered: list[bool] = []  # of the last step: [False], [True] after its backward, [] when there was none
        self.__dict__["scaler"] = scale  # registered once, beside the local modules

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # differentiating is eager: compiled graphs end here
    def forward(self, loss: Any, *inputs: Any) -> Tensor:
        """``inputs``: of the first module, whose loss also gives them their gradients (a stem before the model)."""
        scalar = total(loss)
        self.delivered = []
        found = [*_parameters(self.__dict__["trains"]), *(t for t in tree_leaves(inputs) if isinstance(t, Tensor))]
        parameters = list({id(p): p for p in found if p.requires_grad}.values())
        if not (torch.is_grad_enabled() and scalar.requires_grad and parameters):
            return scalar.detach()
        device = scalar.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
        scaler: LossScale = self.__dict__["scaler"]
        scaled = scalar * scaler.scale if half else scalar
        with _without_hooks(parameters):
            stash = _owned_gradients(torch.autograd.grad(scaled, parameters, allow_unused=True))
        if half:
            scaler.unscale(stash)
        self.delivered = [False]
        out: Tensor = _Replay.apply(scalar.detach(), stash, self.delivered, *parameters)
        return out

    def extra_repr(self) -> str:
        return self.name


def _parameters(trains: Sequence[tuple[nn.Module, str]]) -> Iterator[Tensor]:
    for root, path in trains:
        owner, _, name = path.rpartition(".")
        module = root.get_submodule(owner)
        if name in module._parameters:
            if (parameter := module._parameters[name]) is not None:
                yield parameter
        elif name in module._modules:
            yield from module.get_submodule(name).parameters()


@contextmanager
def _without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gradient hooks of parameters run once, when the gradients are handed over."""
    hooked = [p._backward_hooks for p in parameters if p.is_leaf and p._backward_hooks]
    kept = [dict(hooks) for hooks in hooked]
    for hooks in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in zip(hooked, kept, strict=True):
            hooks.update(before)


def _owned_gradients(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients that can be scaled in place: two parameters may get the same tensor, or an expanded one."""
    seen: set[int] = set()
    owned: list[Tensor | None] = []
    for grad in grads:
        if grad is not None and grad.layout is torch.strided:
            key = grad.untyped_storage()._cdata
            if key in seen or 0 in grad.stride():
                grad = grad.clone(memory_format=torch.contiguous_format)
            seen.add(key)
        owned.append(grad)
    return owned


@contextmanager
def private_graph() -> Iterator[None]:
    """Hide saved-tensor hooks of the caller (activation checkpointing, offloading) from the local graphs.

    A local graph lives and dies inside the forward pass, so moving or recomputing its tensors would only cost.
    """
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    with saved_tensors_hooks(lambda t: t, lambda t: t) if hooked else nullcontext():
        yield
