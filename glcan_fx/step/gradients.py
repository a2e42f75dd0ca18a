"""Local gradients inside the forward pass, handed over when the loop's own ``loss.backward()`` asks for them.

Each local loss is differentiated as soon as it exists, so that the module's activations are freed before the next
module starts. What stays are gradients, parameter-sized, behind a scalar: its backward multiplies them by whatever
arrives (1 / accumulation steps, a GradScaler's scale, a weight) and hands them to the autograd engine, so that
``.grad``, hooks, DistributedDataParallel and clipping see what they would see after a summed loss.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from glcan_fx.errors import CriterionError, UnsupportedError
from glcan_fx.pytree import tensors_in
from glcan_fx.step.learning import Watch, is_half
from glcan_fx.step.output import total

Passed = Sequence[Sequence[tuple[Any, Any]]]
"""By what a loss comes back to earlier local modules, of each of them, the last one first: pairs of a value and what
later modules read in its place, which has no history."""


Sides = tuple[Tensor | None, Tensor | None]
"""What a local module is given, and what it outputs."""


class Agreement:
    """Lets the gradient of a local loss at what its module is given agree with that of the loss before, at that cut.

    A term of the loss: ``weight`` times the squared distance of both, relative to the sum of their squared lengths,
    which counts as a number. SGR (arXiv 2406.05222); its weight and scale are not known.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._before: Tensor | None = None

    def added(self, loss: Tensor, sides: Sides, name: str) -> Tensor:
        """A local loss with the term; notes its own gradient for the next one. Raises UnsupportedError where a layer
        cannot be differentiated twice."""
        given, own = sides
        before = self._before
        self._before = None
        if own is not None:
            [gradient] = torch.autograd.grad(loss, [own], retain_graph=True, allow_unused=True)
            self._before = gradient
        if given is None or before is None:
            return loss
        try:
            [here] = torch.autograd.grad(loss, [given], create_graph=True, allow_unused=True)
            if here is None or not here.requires_grad:
                return loss
            a, b = here.float(), before.float()
            lengths = (a.detach().square().sum() + b.square().sum()).clamp_min(torch.finfo(torch.float32).tiny)
            return loss + self.weight * (a - b).square().sum() / lengths
        except RuntimeError as error:
            raise UnsupportedError(f"method='sgr' differentiates local module '{name}' twice, which one of its layers "
                                   f"does not allow: {error}. Choose another method.") from error


class Stepping(Protocol):
    """An optimizer that steps a local module's parameters as soon as their gradients exist."""

    def refuse_used_again(self, losses: Sequence[Tensor]) -> None: ...

    def take(
        self, part: "LocalBackward", parameters: Sequence[Tensor], gradients: list[Tensor | None]
    ) -> list[bool]: ...

    def arrived(self, part: "LocalBackward", gradient: Tensor) -> None: ...


class Reducing(Protocol):
    """Averages gradients over the ranks of a distributed run while the forward pass goes on."""

    def start(
        self, parameters: Sequence[Tensor], stash: list[Tensor | None]
    ) -> Callable[[Tensor], None] | None: ...


class HandOver(torch.autograd.Function):
    """A scalar whose backward hands over gradients that already exist."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, stash: list[Tensor | None], delivered: list[bool],
        arrived: Callable[[Tensor], None] | None, *parameters: Tensor
    ) -> Tensor:
        ctx.stash, ctx.delivered, ctx.arrived = stash, delivered, arrived
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
        if ctx.arrived is not None:
            ctx.arrived(grads[0])
        present = [grad for grad in ctx.stash if grad is not None]
        where = [grad is not None for grad in ctx.stash]
        if torch._C._autograd._get_current_graph_task_keep_graph():
            present = [grad.clone() for grad in present]
        else:
            ctx.stash.clear()  # no second reference, so that the engine moves the gradients instead of copying them
        multiply(present, grads[0])
        ctx.delivered[:] = [True]
        moved = iter(present)
        present = []
        return (None, None, None, None, *(next(moved) if there else None for there in where))


def multiply(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients in place, in few kernels where a device has such."""
    dense = [grad for grad in grads if grad.layout is torch.strided]
    if dense:
        torch._foreach_mul_(dense, factor)
    for grad in grads:
        if grad.layout is not torch.strided:
            grad.mul_(factor)


class LossScale(nn.Module):
    """A dynamic scale for local losses under float16 autocast, where small gradients would vanish.

    The local backward runs before the loop's GradScaler can scale the loss, so it brings its own scale: halved after
    an overflow (which also reaches the GradScaler, as infinite gradients, and makes it skip the step), doubled after
    ``interval`` good steps. Lives on the device; never synchronises. kept: in the state dict.
    """

    def __init__(self, kept: bool = True, start: float = 2.0**12, interval: int = 2000) -> None:
        super().__init__()
        self.interval = interval
        self._finite: list[Tensor] = []  # one flag per local loss of the present step
        self.scale: Tensor
        self.good: Tensor
        self.register_buffer("scale", torch.tensor(start), persistent=kept)
        self.register_buffer("good", torch.tensor(0), persistent=kept)

    @torch.no_grad()
    def unscale(self, grads: Sequence[Tensor | None]) -> None:
        """Divide the gradients by the scale, in place."""
        present = [grad for grad in grads if grad is not None]
        inverse = self.scale.reciprocal()  # exact: a power of two
        multiply(present, inverse)
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
    so that frozen, replaced, pruned or newly added parameters are seen. passes: those that it reads on its way and does
    not train. shared: whether later losses need the graphs of all its local modules.
    """

    def __init__(
        self, trains: Sequence[tuple[nn.Module, str]], scale: nn.Module, name: str, model: nn.Module,
        *, alone: bool = True, passes: Sequence[tuple[nn.Module, str]] = (), shared: bool = False,
        agreement: Agreement | None = None,
    ) -> None:
        super().__init__()
        self.__dict__.update(trains=tuple(trains), passes=tuple(passes), model=model)
        self.shared = shared
        self.__dict__["agreement"] = agreement
        self.alone = alone  # whether a local loss may read no other parameters of the model
        self.name = name
        self.watch = Watch(name)
        self.delivered: list[bool] = []  # of the last step: [False], [True] after its backward, [] when there was none
        self.__dict__["scaler"] = scale  # registered once, beside the local modules
        self.optimizer: Stepping | None = None  # during a forward pass that steps
        self.__dict__["reducer"] = None  # a Reducing, where gradients are sent to other ranks at once

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "reducer": None}  # a copy is not the one that is wrapped

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # differentiating is eager: compiled graphs end here
    def forward(self, loss: Any, *inputs: Any, through: Passed = (), sides: Sides = (None, None)) -> Tensor:
        """``inputs``: of the first module, whose loss also gives them their gradients (a stem before the model)."""
        scalar = total(loss)
        self.delivered = []
        found = [*parameters_of(self.__dict__["trains"]), *(t for t in tree_leaves(inputs) if isinstance(t, Tensor))]
        parameters = list({id(p): p for p in found if p.requires_grad}.values())
        if not (torch.is_grad_enabled() and parameters):
            return scalar.detach()
        if not scalar.requires_grad:
            raise CriterionError(f"the loss of the local module '{self.name}' depends on none of its parameters: the "
                                 "criterion detaches the outputs, or does not read them.")
        if self.optimizer is not None:
            self.optimizer.refuse_used_again([scalar])
        if self.watch.on:
            self._refuse_others(scalar, parameters)
        agreement: Agreement | None = self.__dict__["agreement"]
        whole = scalar if agreement is None else agreement.added(scalar, sides, self.name)
        stash = differentiate(whole, parameters, self.__dict__["scaler"], through=through, retain=self.shared)
        if self.watch.on:
            self.watch.look(scalar, self._groups(parameters), dict(zip(map(id, parameters), stash, strict=True)))
        self.delivered = [False]
        reducer: Reducing | None = self.__dict__["reducer"]
        arrived = None if reducer is None else reducer.start(parameters, stash)
        if self.optimizer is not None:
            own = self.optimizer.take(self, parameters, stash)
            if any(own):  # the rest waits as always, and a number, so that backward passes here in any case
                parameters = [*(p for p, mine in zip(parameters, own, strict=True) if not mine),
                              torch.zeros_like(scalar, requires_grad=True)]
                stash = [*(g for g, mine in zip(stash, own, strict=True) if not mine), torch.zeros_like(scalar)]
                arrived = partial(self.optimizer.arrived, self)
        out: Tensor = HandOver.apply(scalar.detach(), stash, self.delivered, arrived, *parameters)
        return out

    def _refuse_others(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Raise CriterionError where a local loss reads parameters of the model that its module does not train."""
        model = self.__dict__["model"]
        if not self.alone:
            return
        own = {id(p) for p in (*parameters, *parameters_of(self.__dict__["passes"]))}
        others = {id(p): name for name, p in model.named_parameters() if id(p) not in own}
        read = list({id(leaf): leaf for leaf in leaves_of([loss]) if id(leaf) in others}.values())
        try:
            grads = torch.autograd.grad(loss, read, allow_unused=True, retain_graph=True) if read else ()
        except RuntimeError:  # by way of what other modules left behind, whose graphs are freed: a loss of their own
            return
        names = [others[id(p)] for p, grad in zip(read, grads, strict=True) if grad is not None]
        if names:
            raise CriterionError(
                f"the criterion reads the model's parameter '{names[0]}' itself, not only outputs and targets. It is "
                "called once for each local loss, so that would count as often. Add a penalty on weights to the sum of "
                "the losses, (out.loss + penalty).backward(), or use the optimizer's weight_decay.")

    def _groups(self, parameters: Sequence[Tensor]) -> dict[str, list[int]]:
        """The model's parameters and those of the auxiliary network and criterion, by what they are called."""
        own = {id(p) for p in parameters_of(
            [(root, path) for root, path in self.__dict__["trains"] if root is self.__dict__["model"]])}
        beside = {id(p) for p in parameters_of(
            [(root, path) for root, path in self.__dict__["trains"]
             if root is not self.__dict__["model"] and path != "task"])} - own  # a criterion may have reasons to wait
        given = [id(p) for p in parameters]
        return {"the local module": [key for key in given if key in own],
                "the auxiliary network of the local module": [key for key in given if key in beside]}

    def extra_repr(self) -> str:
        return self.name


def leaves_of(losses: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaves of the autograd graph behind some losses."""
    stack: list[Any] = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            yield node.variable
        new = {source for source, _ in node.next_functions if source is not None} - seen
        seen |= new
        stack += new


def differentiate(
    loss: Tensor, sources: Sequence[Tensor], scaler: LossScale, *, through: Passed = (), retain: bool = False,
    widen: bool = False,
) -> list[Tensor | None]:
    """Gradients of a local loss that can be changed in place; under float16 autocast by way of the scale.

    through: by what it comes back to earlier local modules. widen: gradients are then float32, whatever the sources
    are.
    """
    half = is_half(loss.device.type)
    with _without_hooks(sources):
        grads = _owned_gradients(_gradients(loss * scaler.scale if half else loss, sources, through, retain))
    if half:
        grads = [None if grad is None else grad.float() for grad in grads] if widen else grads
        scaler.unscale(grads)
    return grads


def _gradients(
    loss: Tensor, sources: Sequence[Tensor], through: Passed, retain: bool
) -> list[Tensor | None]:
    """Gradients of a loss, which passes from one local module to the one before it by values without history. All
    graphs but the last one are needed again by later losses; that one, too, with ``retain``."""
    left = [[(value, leaf) for pair in pairs for value, leaf in zip(*map(tensors_in, pair), strict=True)
             if value.requires_grad] for pairs in through]
    outputs: list[Tensor] = [loss]
    given: list[Tensor] | None = None
    found: list[Tensor | None] = [None] * len(sources)
    waiting: dict[int, Tensor] = {}
    while outputs:
        leaves = [leaf for pairs in left for _, leaf in pairs]
        grads = torch.autograd.grad(outputs, [*sources, *leaves], given, allow_unused=True,
                                    retain_graph=retain or bool(left))
        found = [_sum(a, b) for a, b in zip(found, grads, strict=False)]
        for leaf, grad in zip(leaves, grads[len(sources):], strict=True):
            if grad is not None:
                waiting[id(leaf)] = _sum(waiting.get(id(leaf)), grad)
        outputs = []
        while left and not outputs:
            reached = [(value, waiting.pop(id(leaf))) for value, leaf in left.pop(0) if id(leaf) in waiting]
            outputs, given = [value for value, _ in reached], [grad for _, grad in reached]
    return found


def _sum(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def parameters_of(trains: Sequence[tuple[nn.Module, str]]) -> Iterator[Tensor]:
    """The parameters at some paths, or of the modules there, as they are now."""
    for root, path in trains:
        owner, _, name = path.rpartition(".")
        try:
            module = root.get_submodule(owner)
        except AttributeError:  # the module that had it was replaced
            continue
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
    with saved_tensors_hooks(Tensor.detach, lambda t: t) if hooked else nullcontext():
        yield
