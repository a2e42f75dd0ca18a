"""What a compiled training step must compute, by other means: plain autograd and one backward pass."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from glcan_fx import LocalModel
from glcan_fx.step.output import leaf

Gradients = dict[str, Tensor | None]


def scalar(loss: Any) -> Tensor:
    """A tensor, or the sum over a dict or list of tensors; what has no gradient is only reported."""
    if isinstance(loss, dict):
        loss = [value for value in loss.values() if value.requires_grad]
    return sum(tree_leaves(loss)[1:], tree_leaves(loss)[0])


class RawLosses(fx.Interpreter):
    """Runs the training graph node by node without any local backward; ``losses`` keep their whole graph, and the
    result holds them.

    Detached values are copied as well: with one backward pass at the end, the next module's in-place layers
    would otherwise overwrite what this module's backward needs.
    """

    def __init__(self, local: LocalModel) -> None:
        super().__init__(local)
        self.losses: list[Tensor] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not re.fullmatch(r"aux\.(\d+|last)", target):
            return super().call_module(target, args, kwargs)
        part, state = self.fetch_attr(target), torch.get_rng_state()
        loss = part._loss(args, kwargs["context"])
        loss = getattr(loss, "loss", loss)  # of several terms
        if target != "aux.last":  # what it draws moves no random state of the model's
            torch.set_rng_state(state)
        self.losses.append(scalar(loss))
        return loss if target == "aux.last" else self.losses[-1]

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_method(target, args, kwargs)
        return result.clone() if target == "detach" else result


@contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Start without gradients; put parameters and buffers back afterwards, and drop the gradients."""
    module.zero_grad()
    state = {key: value.clone() for key, value in module.state_dict().items()}
    try:
        yield
    finally:
        module.load_state_dict(state)
        module.zero_grad()


def gradients(module: nn.Module) -> Gradients:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def raw_losses(local: LocalModel, *inputs: Tensor) -> list[Tensor]:
    run = RawLosses(local)
    run.run(*(x.clone() for x in inputs))
    return run.losses


def summed_loss_gradients(local: LocalModel, *inputs: Tensor) -> Gradients:
    """Gradients of the sum of all raw local losses on the training graph."""
    with restored(local):
        sum(raw_losses(local, *inputs)).backward()
        return gradients(local)


def hooked_gradients(
    local: LocalModel, images: Tensor, targets: Tensor, criterion: Callable[[Any, Any], Any]
) -> Gradients:
    """The same from the original model itself: forward hooks cut it and apply the auxiliary networks.

    Nothing of the training graph is used. For networks whose split points are modules, called once, and whose
    local losses read nothing but their own module's output.
    """
    losses, handles = [], []

    def cut_behind(part: nn.Module) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            losses.append(scalar(part.head(part.network(out), targets)))
            return out.detach().clone()

        return hook

    for index, cut in enumerate(local.plan.cuts):
        part = local.aux.get_submodule(str(index))
        handles.append(local.original.get_submodule(cut).register_forward_hook(cut_behind(part)))
    try:
        with restored(local):
            losses.append(scalar(criterion(local.original(images.clone()), targets)))
            sum(losses).backward()
            return gradients(local)
    finally:
        for handle in handles:
            handle.remove()


def isolation(local: LocalModel, *inputs: Tensor) -> list[set[str]]:
    """For each raw local loss, the names of the parameters that autograd reaches from it."""
    parameters = {name: p for name, p in local.named_parameters() if p.requires_grad}
    with restored(local):
        reached = []
        for loss in raw_losses(local, *inputs):
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
            reached.append({name for name, grad in zip(parameters, found, strict=True) if grad is not None})
        return reached


class Joined(RawLosses):
    """Runs a step in which what a loss comes back by is no boundary, and from which no gradient is taken."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[0].clone() if target is leaf else super().call_function(target, args, kwargs)


def owners_of(local: LocalModel) -> dict[str, set[int]]:
    """The local modules that use each parameter of the model, by its name."""
    found: dict[str, set[int]] = {}
    for node in local.graph.nodes:
        index = node.meta.get("local_module")
        if index is not None and node.op in ("call_module", "get_attr") and not str(node.target).startswith("aux."):
            for name, _ in local.named_parameters():
                if name == node.target or name.startswith(f"{node.target}."):
                    found.setdefault(name, set()).add(index)
    return found


def joined_gradients(local: LocalModel, *given: Any) -> Gradients:
    """Each parameter's gradient: the sum over the losses that train its local module, each through all that lies
    between, and no other loss. ``given``: the arguments of the step."""
    run = Joined(local)
    run.run(*given)
    parameters, owners = dict(local.named_parameters()), owners_of(local)
    expected: Gradients = dict.fromkeys(parameters)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    for index, reach in enumerate(local.plan.reaches):
        if not run.losses[index].requires_grad:
            continue
        grads = torch.autograd.grad(run.losses[index], list(trained.values()), allow_unused=True, retain_graph=True)
        for name, grad in zip(trained, grads, strict=True):
            modules = set(range(reach.first, reach.last + 1))
            own = name.startswith(f"aux.{index}.") if name.startswith("aux.") else bool(
                owners.get(name, {local.plan.k - 1}) & modules)
            if own and grad is not None:
                before = expected[name]
                expected[name] = grad if before is None else before + grad
    return expected
