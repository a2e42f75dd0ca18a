"""Run: local gradients inside the forward pass, handed over when the loop's own ``loss.backward()`` asks for them.

Each local loss is differentiated as soon as it exists, so that the module's activations are freed before the next
module starts. What stays are gradients, parameter-sized, behind a scalar: its backward multiplies them by whatever
arrives (1 / accumulation steps, a GradScaler's scale, a weight) and hands them to the autograd engine, so that
``.grad``, hooks, DistributedDataParallel and clipping see what they would see after a summed loss.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from glcan_fx.capture.shadow import python_random
from glcan_fx.errors import CriterionError, NotLearningError, UnsupportedError
from glcan_fx.pytree import map_tensors, tensors_in
from glcan_fx.tasks.criteria import NamedLoss, named, reports_of, scalar_of

if TYPE_CHECKING:
    from glcan_fx.step.optimizer_in_forward import OptimizerInForward


class LocalOutput(NamedTuple):
    """What a training step returns outside the detection contract.

    loss: scalar, the sum of the local losses: what to minimise. output: the model's own training output, detached,
    for metrics. losses: one scalar per local module; every one but the last is already differentiated. Where the
    criterion returns a dict, its values can be read from them by name, detached: ``losses[-1]["ce"]``.
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
    """A local loss as one scalar: what is minimised of what the criterion returns (``criteria.py`` has the rules)."""
    return scalar_of(loss)


def parts_of_loss(loss: Any) -> dict[str, Tensor] | None:
    """The values of a dict of losses by name, detached, for reports; None for a plain tensor."""
    return reports_of(loss)


def collect(losses: Sequence[Any], output: Any) -> LocalOutput:
    """Assemble the result of a training step. losses: per local module a scalar, or (scalar, its parts by name)."""
    scalars = tuple(named(*loss) if isinstance(loss, tuple) else total(loss) for loss in losses)
    loss = scalars[0].as_subclass(Tensor) if type(scalars[0]) is NamedLoss else scalars[0]  # still made from it
    return LocalOutput(loss if len(scalars) == 1 else torch.stack(scalars).sum(), detach(output), scalars)


def merge(losses: Sequence[Tensor], last: dict[str, Tensor]) -> dict[str, Tensor]:
    """Assemble a detector's dict of losses: its own keys from the last module, one key per other local module."""
    return {**{f"loss_local_{index}": loss for index, loss in enumerate(losses)}, **last}


class _Replay(torch.autograd.Function):
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
        for grad in present:
            grad.mul_(grads[0])
        ctx.delivered[:] = [True]
        moved = iter(present)
        present = []
        return (None, None, None, None, *(next(moved) if there else None for there in where))


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

    def __init__(
        self, trains: Sequence[tuple[nn.Module, str]], scale: nn.Module, name: str, model: nn.Module,
        *, alone: bool = True,
    ) -> None:
        super().__init__()
        self.__dict__.update(trains=tuple(trains), model=model)
        self.alone = alone  # whether a local loss may read no other parameters of the model
        self.name = name
        self.watch = Watch(name)
        self.delivered: list[bool] = []  # of the last step: [False], [True] after its backward, [] when there was none
        self.__dict__["scaler"] = scale  # registered once, beside the local modules
        self.optimizer: OptimizerInForward | None = None  # during a forward pass that steps

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # differentiating is eager: compiled graphs end here
    def forward(self, loss: Any, *inputs: Any) -> Tensor:
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
        stash = _differentiate(scalar, parameters, self.__dict__["scaler"])
        if self.watch.on:
            self.watch.look(scalar, self._groups(parameters), dict(zip(map(id, parameters), stash, strict=True)))
        self.delivered = [False]
        arrived = None
        if self.optimizer is not None:
            own = self.optimizer.take(self, parameters, stash)
            if any(own):  # the rest waits as always, and a number, so that backward passes here in any case
                parameters = [*(p for p, mine in zip(parameters, own, strict=True) if not mine),
                              torch.zeros_like(scalar, requires_grad=True)]
                stash = [*(g for g, mine in zip(stash, own, strict=True) if not mine), torch.zeros_like(scalar)]
                arrived = partial(self.optimizer.arrived, self)
        out: Tensor = _Replay.apply(scalar.detach(), stash, self.delivered, arrived, *parameters)
        return out

    def _refuse_others(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Raise CriterionError where a local loss reads parameters of the model that its module does not train."""
        model = self.__dict__["model"]
        if not self.alone:
            return
        own = {id(p) for p in parameters}
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


class Watch:
    """Looks, in the first steps, whether what a local loss trains gets gradients at all.

    drew: whether the local module drew random numbers in this step, and so may have dropped itself.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.steps = 0
        self.on = True
        self.drew = False
        self._learned: set[str] = set()
        self._waiting: list[str] = []

    @torch.no_grad()
    def look(self, loss: Tensor, groups: dict[str, list[int]], grads: dict[int, Tensor | None]) -> None:
        """Raise NotLearningError where gradients are not finite though the loss is, or were all zero in the first
        steps. One synchronisation per group, until it has learned."""
        if isinstance(loss, FakeTensor) or is_half(loss.device.type):  # no values; a scale that is still to be found
            return
        if not torch.isfinite(loss):
            return
        self.steps += 1
        waiting = {kind: keys for kind, keys in groups.items() if keys and kind not in self._learned}
        for kind, keys in waiting.items():
            present = [grad for key in keys if (grad := grads[key]) is not None]
            norm = sum(float(torch.linalg.vector_norm(g.to_dense() if g.is_sparse else g)) for g in present)
            if not math.isfinite(norm):
                raise NotLearningError(
                    f"gradients of {kind} '{self.name}' are not finite, though its loss is ({float(loss):.6g}). Look "
                    "for a division by zero, a square root or a logarithm of zero in the model or the criterion.")
            if norm > 0:
                self._learned.add(kind)
            elif self.steps >= (_PATIENCE if self.drew else _STEPS):
                raise NotLearningError(
                    f"{kind} '{self.name}' does not learn: all of its gradients were exactly zero in the first steps. "
                    "Either its local loss does not depend on it (choose other split points, k or method), or "
                    "something in front of the loss gives no gradient (a scale of zero, a dead activation, targets "
                    "without labels). Freeze it with requires_grad_(False) if it is not to be trained.")
        self._waiting = [kind for kind in waiting if kind not in self._learned]
        self.on = bool(self._waiting)

    def idle(self) -> list[str]:
        """What has had no gradient that was not zero, though nothing was drawn at random."""
        return [] if self.drew else self._waiting


_STEPS = 3
_PATIENCE = 20  # steps: a module that is dropped at random, with stochastic depth, waits for its turn


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

    def forward(self, *values: Any, context: tuple[Any, ...] = (), inputs: tuple[Any, ...] = ()) -> Any:
        state = self._note_draws(values)
        loss = self._loss(values, context)
        if state is not None and not self.last:
            set_random_state(*state)
        if isinstance(self.head, SlicedHead):
            loss, outputs = loss
            return self._finished(loss, inputs), outputs
        return self._finished(loss, inputs)

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

    def _finished(self, loss: Any, inputs: tuple[Any, ...]) -> Any:
        if "backward" not in self._modules:
            return loss if not self.reports else reported(total(loss), loss)
        made = self._modules["backward"](loss, *inputs)  # type: ignore[misc]
        return reported(made, loss) if self.reports else made


def reported(scalar: Tensor, loss: Any) -> Any:
    """A local loss beside its parts, where it has some."""
    parts = parts_of_loss(loss)
    return scalar if parts is None else (scalar, parts)


class _OfModel(nn.Module):
    """Runs parts of the model that it does not own; whoever copies or loads the compiled model makes it anew."""

    def __reduce__(self) -> Any:
        return nn.Identity, ()


def shape_of(value: Any) -> tuple[int, ...] | None:
    """The shape of the first tensor of a nested value, but for the batch."""
    tensor = next(tensors_in(value), None)
    return None if tensor is None else tuple(tensor.shape[1:])


class SizeCheck(_OfModel):
    """Sees the inputs of a compiled part whose own forward asks about sizes; ``bind`` says whose. Sizes that have not
    been seen are checked once: raises ModelChangedError where the part would go another way."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(check=None, known=set())

    def bind(self, check: Callable[[tuple[Any, ...]], None]) -> None:
        self.__dict__["check"] = check

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *values: Any) -> None:
        key = tuple((tuple(t.shape[1:]), t.dtype) for t in tensors_in(values))
        if key not in self.__dict__["known"] and not any(isinstance(t, FakeTensor) for t in tensors_in(values)):
            self.__dict__["check"](values)
            self.__dict__["known"].add(key)


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


def _differentiate(
    loss: Tensor, sources: Sequence[Tensor], scaler: LossScale, *, retain: bool = False, widen: bool = False
) -> list[Tensor | None]:
    """Gradients of a local loss that can be changed in place; under float16 autocast by way of the scale.

    widen: they are then float32, whatever the sources are.
    """
    half = is_half(loss.device.type)
    with _without_hooks(sources):
        grads = _owned_gradients(torch.autograd.grad(
            loss * scaler.scale if half else loss, sources, allow_unused=True, retain_graph=retain))
    if half:
        grads = [None if grad is None else grad.float() for grad in grads] if widen else grads
        scaler.unscale(grads)
    return grads


def is_half(device: str) -> bool:
    """Whether float16 autocast is on, which needs loss scaling."""
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


class Whole(_OfModel):
    """The model itself, called as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["model"](*args, **kwargs)


class ReadOnly(_OfModel):
    """A layer of the model, by its path, on the weights that it has at the moment: gradients pass through to what is in
    front of it, and do not train it. ``bind`` says whose."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.__dict__.update(path=path, model=None)

    def __reduce__(self) -> Any:
        return ReadOnly, (self.__dict__["path"],)

    def bind(self, model: nn.Module) -> None:
        self.__dict__["model"] = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.__dict__["model"].get_submodule(self.__dict__["path"])
        weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        return functional_call(layer, weights, args, kwargs)


class Recomputed(_OfModel):
    """A block of the model that keeps only its inputs, and runs again in backward (activation checkpointing).

    run: the block, on the model's own layers, whose paths are ``layers``. Buffers move once a step, and both runs begin
    with the same.
    """

    def __init__(self, run: Callable[..., Any], model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.__dict__.update(run=run, model=model, layers=tuple(layers))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *values: Any) -> Any:
        run = self.__dict__["run"]
        if not torch.is_grad_enabled():
            return run(*values)
        modules = dict(self.__dict__["model"].named_modules())
        parts = [part for path in self.__dict__["layers"] if path in modules for part in modules[path].modules()]
        first = [(part, {name: None if b is None else b.clone() for name, b in part._buffers.items()})
                 for part in parts if part._buffers]
        return checkpoint(run, *values, use_reentrant=False, context_fn=lambda: (nullcontext(), self._with(first)))

    @contextmanager
    def _with(self, others: Sequence[tuple[nn.Module, dict[str, Tensor | None]]]) -> Iterator[None]:
        """Let what runs inside begin with, and change, these buffers."""
        kept = [(part, dict(part._buffers)) for part, _ in others]
        try:
            for part, buffers in others:
                part._buffers.update(buffers)
            yield
        finally:
            for part, buffers in kept:
                part._buffers.update(buffers)


class SlicedHead(_OfModel):
    """(values, *context) -> (loss, outputs): the end of the last module, run and differentiated slice by slice.

    For what treats every image alone and averages its losses: the gradients are those of the whole batch, and only a
    slice's activations are alive at a time. ``tail`` (*values) -> outputs is what follows the values in the network,
    ``head`` (outputs, *context) -> loss; ``part`` takes images from a context. behind: paths of the ``model``'s modules
    and parameters that both use; trains: what the loss itself trains, as for ``LocalBackward``. The first steps
    compare the loss of some images together with that of each alone.
    """

    def __init__(
        self, tail: Callable[..., Any] | None, head: nn.Module, slices: int,
        part: Callable[[Any, int, int, int], Any], model: nn.Module, behind: Sequence[str],
        trains: Sequence[tuple[nn.Module, str]], scale: nn.Module,
    ) -> None:
        super().__init__()
        self.slices = slices
        self.checks = 5  # steps that are still to be checked
        self.__dict__.update(tail=tail, head=head, part=part, model=model, behind=tuple(behind), trains=tuple(trains),
                             scaler=scale)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, values: Any, *context: Any) -> Any:
        images = max((t.shape[0] for t in tensors_in(values) if t.dim() > 1), default=1)
        if self.checks and len(self._bounds(images)) > 1:
            self._check(values, context, images)
        given = [t for t in tensors_in(values) if t.requires_grad]
        behind = [(self.__dict__["model"], path) for path in self.__dict__["behind"]]
        trained = {id(p): p for p in parameters_of([*behind, *self.__dict__["trains"]]) if p.requires_grad}
        sources = [*given, *trained.values()] if torch.is_grad_enabled() else []
        stashes: dict[str, list[Tensor | None]] = {}
        losses: dict[str, Tensor] = {}
        outputs = []
        single = True
        for start, stop in self._bounds(images):
            piece = _fresh(self._slice(values, start, stop, images))
            with torch.enable_grad() if sources else nullcontext():
                loss, out = self._run(piece, self._slice(context, start, stop, images))
            single = not isinstance(loss, dict)
            terms = {"": total(loss)} if single else {key: total(term) for key, term in loss.items()}
            outputs.append(detach(out))
            own = [t for t in tensors_in(piece) if t.requires_grad]
            share = (stop - start) / images
            for index, (name, term) in enumerate(terms.items()):
                losses[name] = losses.get(name, 0) + term.detach() * share
                if sources and term.requires_grad:
                    stash = stashes.setdefault(name, [None] * len(sources))
                    self._add(stash, term * share, own, given, list(trained.values()), start, stop,
                              index < len(terms) - 1)
        made = {name: _Replay.apply(value, stashes[name], [], None, *sources) if name in stashes else value
                for name, value in losses.items()}
        return made[""] if single else made, _joined(outputs)

    def _run(self, values: Any, context: Any) -> tuple[Any, Any]:
        tail, head = self.__dict__["tail"], self.__dict__["head"]
        outputs = values if tail is None else tail(*values)
        return head(outputs, *context), outputs

    def _bounds(self, images: int) -> list[tuple[int, int]]:
        size = -(-images // min(self.slices, images))
        return [(start, min(start + size, images)) for start in range(0, images, size)]

    def _slice(self, value: Any, start: int, stop: int, images: int) -> Any:
        return self.__dict__["part"](value, start, stop, images)

    def _add(
        self, stash: list[Tensor | None], loss: Tensor, own: Sequence[Tensor], given: Sequence[Tensor],
        trained: Sequence[Tensor], start: int, stop: int, retain: bool,
    ) -> None:
        """Differentiate a slice's loss and add to the stash: rows of the values' gradients, the parameters'."""
        # features are half themselves under float16: their gradients would vanish without the scale
        grads = _differentiate(loss, [*own, *trained], self.__dict__["scaler"], retain=retain, widen=True)
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            if index >= len(given):
                before = stash[index]
                stash[index] = grad if before is None else before.add_(grad)
                continue
            whole = stash[index]
            if whole is None:
                whole = stash[index] = grad.new_zeros(given[index].shape)
            if whole.shape == grad.shape:
                whole.add_(grad)
            else:
                whole[start:stop].copy_(grad)

    @torch.no_grad()
    def _check(self, values: Any, context: Any, images: int) -> None:
        """Raise UnsupportedError unless the loss of a batch is the mean of its images' losses."""
        self.checks -= 1
        modules = dict(self.__dict__["model"].named_modules())
        layers = [part for path in self.__dict__["behind"] if path in modules for part in modules[path].modules()]
        random = [(part, part.training) for part in layers if isinstance(part, nn.modules.dropout._DropoutNd)]
        statistics = next((part for part in layers if part.training and "running_mean" in part._buffers), None)
        if statistics is not None:
            raise UnsupportedError(f"slices={self.slices}: behind the last block stands a {type(statistics).__name__}, "
                                   "whose statistics are those of the whole batch. Use slices=1.")
        start, stop = self._bounds(images)[0]
        some = min(images, max(2, stop - start))  # no more than a slice, so that the check needs no more than a step

        def loss(first: int, last: int) -> Tensor:
            return total(self._run(self._slice(values, first, last, images),
                                   self._slice(context, first, last, images))[0])

        for part, _ in random:
            part.training = False
        try:
            whole, alone = loss(0, some), torch.stack([loss(index, index + 1) for index in range(some)]).mean()
        finally:
            for part, mode in random:
                part.training = mode
        if not torch.allclose(alone, whole, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise UnsupportedError(
                f"slices={self.slices}: the loss of a batch ({whole.item():.6g}) is not the mean of its images' losses "
                f"({alone.item():.6g}): it counts over the whole batch. Use slices=1.")


def _fresh(value: Any) -> Any:
    """The same tensors as leaves."""
    return map_tensors(value, lambda t: t.detach().requires_grad_() if t.requires_grad else t)


def _joined(outputs: Sequence[Any]) -> Any:
    """The outputs of all slices as those of one batch."""
    columns = zip(*map(tensors_in, outputs), strict=True)
    return map_tensors(outputs[0], lambda tensor: torch.cat(next(columns)) if tensor.dim() else next(columns)[0])


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
    with saved_tensors_hooks(lambda t: t, lambda t: t) if hooked else nullcontext():
        yield
