"""Estimate: simulate a training step on fake tensors, and say what its memory is made of.

A simulated step runs the real code (the model's forward, autograd, the losses, the optimizer) without memory or
arithmetic, so it needs no GPU and a second or two. It is the second step: the optimizer's state exists, gradients do
not (``zero_grad(set_to_none=True)``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glcan_fx.capture.random_numbers import kept_python_random
from glcan_fx.capture.trace import quiet
from glcan_fx.config import OPTIMIZERS, OptimizerLike, check_optimizer
from glcan_fx.devices import OPERATIONS, Device, Work, device_of
from glcan_fx.errors import GlcanFxError, PlanError
from glcan_fx.peak_memory import Log, PeakMemory
from glcan_fx.progress import advance
from glcan_fx.pytree import tensors_in
from glcan_fx.step.local_model import LocalModel
from glcan_fx.step.output import LocalOutput, total
from glcan_fx.step.sliced import SlicedHead
from glcan_fx.tasks import Task

_POINTS = 400

class Phase(NamedTuple):
    """A part of a training step: what ran, for which local module (None: for all, or there are none), the most bytes
    that were live meanwhile, its floating-point operations, and when it began, from 0 to 1 on the axis of
    ``Estimate.live``."""

    name: str
    module: int | None
    peak: int
    flops: int
    start: float


@dataclass(frozen=True)
class Estimate:
    """Memory and compute of one training step.

    peak: bytes of live tensors at most, without library workspaces. when: what ran then. parts: what the peak is made
    of, in bytes; they add up to it. timeline: the step's phases in order. flops: floating-point operations of
    convolutions, matrix products and attention, forward and backward. live: live bytes over the step, thinned out: the
    most in each of 400 parts in which equally many bytes are allocated and released, which stands for time. kept: of
    each local module, the bytes of its own activations and those of its auxiliary network and loss that are live when
    its backward begins; its input counts for the module that made it. start: bytes that are live when the step
    begins. work: what operators do, flops among it.
    """

    peak: int
    when: str
    parts: dict[str, int]
    timeline: tuple[Phase, ...]
    flops: int
    live: tuple[int, ...] = field(default=(), compare=False, repr=False)
    kept: tuple[tuple[int, int], ...] = ()
    start: int = 0
    work: Work = field(default=Work(), compare=False, repr=False)

    def seconds(self, device: str | Device) -> float:
        """About how long the step takes on a device, in float32: one of ``glcan_fx.devices.DEVICES`` by name, "cpu" or
        "cuda" at hand (measured in two seconds, once), or a ``Device``. Good for the ratio of two steps; no step
        reaches a device's rates. Raises PlanError for another name."""
        return device_of(device).seconds(self.work)

    def relative_to(self, plain: "Estimate", device: str | Device | None = None) -> float:
        """The compute of this step relative to that of another one: seconds on a device, or floating-point operations.
        """
        rates = device_of(device)
        return rates.seconds(self.work) / (rates.seconds(plain.work) or 1.0)

    def share(self, module: int) -> float:
        """A local module's part of the step's operations, its auxiliary network's included; from 0 to 1."""
        return sum(phase.flops for phase in self.timeline if phase.module == module) / max(1, self.flops)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in self.parts.items())
        return f"{self.peak / 2**20:.1f} MiB, during {self.when} ({parts}), {self.flops / 1e9:.1f} GFLOP"


@dataclass(frozen=True)
class Memory:
    """A plan beside what it replaces: backpropagation, plain and with activation checkpointing of every block. device:
    on which the plan is to be fast, or ``OPERATIONS``."""

    plan: Estimate
    backpropagation: Estimate
    checkpointing: Estimate | None
    device: Device = OPERATIONS

    def named(self) -> list[tuple[str, Estimate]]:
        """The steps that are known, in words."""
        rows = [("backpropagation", self.backpropagation),
                ("activation checkpointing, every block", self.checkpointing),
                ("this plan", self.plan)]
        return [(name, estimate) for name, estimate in rows if estimate is not None]

    def compute(self, step: Estimate) -> str:
        """The compute of a step relative to backpropagation's, and its time where the device is known, in words."""
        text = f"compute {step.relative_to(self.backpropagation):.2f}"
        if self.device is OPERATIONS:
            return text
        return f"{text}, time {step.relative_to(self.backpropagation, self.device):.2f}"


def simulate(
    model: nn.Module, inputs: Sequence[Any], step: Callable[[], Tensor], optimizer: OptimizerLike = "sgd",
    names: Sequence[str] = (), watch: Callable[[PeakMemory], None] = lambda memory: None,
) -> Estimate:
    """Run one training step of a model of fake tensors and account for its memory.

    step: returns the loss to minimise. names: of the local modules. watch: tells the memory's phases, by hooks.
    """
    check_optimizer(optimizer)
    try:
        return _simulate(model, inputs, step, optimizer, names, watch)
    except GlcanFxError:
        raise
    except Exception as error:  # whatever the user's model or criterion raises on tensors without values
        text = (str(error).strip().splitlines() or [""])[0]
        raise PlanError(f"the memory of a step cannot be simulated: {type(error).__name__}: {text}") from error


def _simulate(
    model: nn.Module, inputs: Sequence[Any], step: Callable[[], Tensor], optimizer: OptimizerLike,
    names: Sequence[str], watch: Callable[[PeakMemory], None],
) -> Estimate:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    made = optimizers_of(optimizer, parameters)
    model.zero_grad()
    memory = PeakMemory(model, *made, *tensors_in(inputs), repeats=True)
    with torch.random.fork_rng(devices=[]), kept_python_random(), quiet(), torch.enable_grad(), memory:
        advance()
        watch(memory)
        loss = step()
        memory.enter_phase("backward")
        loss.backward()
        memory.retag((p.grad for p in parameters if p.grad is not None), "gradients")
        memory.enter_phase("optimizer step")
        for one in made:
            one.step()
        del loss
        model.zero_grad()
    return _account(memory, names)


def optimizers_of(optimizer: OptimizerLike, parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """The optimizer, if there is one, as it is after a step; gradients are None."""
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    made = [make(parameters)] if make is not None and parameters else []
    with PeakMemory():  # on fake tensors, it is also the fastest
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        for one in made:
            one.step()
            one.zero_grad()
    for parameter in parameters:
        parameter.grad = None
    return made


def simulate_local(
    local: LocalModel, inputs: Sequence[Any], targets: Any, optimizer: OptimizerLike = "sgd", in_forward: bool = False
) -> Estimate:
    """``simulate`` for a compiled model of fake tensors; in_forward: with ``optimizer_in_forward``."""
    last = local.plan.k - 1
    for part in local.modules():
        if isinstance(part, SlicedHead):
            part.checks = 0  # by the numbers, which fake tensors do not have

    def watch(memory: PeakMemory) -> None:
        enter = partial(_entering, memory)
        memory.enter_phase("0 forward")
        for index in range(last):
            part = local.aux.get_submodule(str(index))
            for child, phase in (("network", "auxiliary"), ("head", "loss"), ("backward", "backward")):
                if child in part._modules:
                    part.get_submodule(child).register_forward_pre_hook(enter(f"{index} {phase}"))
            part.get_submodule("backward").register_forward_hook(enter(f"{index + 1} forward"))
        local.aux.get_submodule("last.head").register_forward_pre_hook(enter(f"{last} loss"))
        if "backward" in local.aux.get_submodule("last")._modules:
            local.aux.get_submodule("last.backward").register_forward_pre_hook(enter(f"{last} backward"))

    def step() -> Tensor:
        return minimised(local(*inputs, targets) if local.task.takes_targets else local(*inputs))

    if in_forward:
        inner = OPTIMIZERS.get(optimizer) if isinstance(optimizer, str) else optimizer
        if inner is None:
            raise PlanError(f"in_forward=True steps an optimizer: 'sgd', 'adam', or a function, not {optimizer!r}")
        stepping = local.optimizer_in_forward(inner)
        stepping.checks = -1  # by the numbers, again
        optimizer = lambda parameters: stepping  # noqa: E731
    return simulate(local, inputs, step, optimizer, [module.name for module in local.plan.modules], watch)


def simulate_plain(
    model: nn.Module, inputs: Sequence[Any], forward: Callable[[nn.Module], Any], optimizer: OptimizerLike = "sgd",
    units: Mapping[str, str] | None = None, recomputed: Sequence[str] = (),
) -> Estimate:
    """``simulate`` for backpropagation. units: of every layer's path, the block it belongs to; recomputed: paths of the
    modules under activation checkpointing."""
    recompute(model, recomputed)

    def watch(memory: PeakMemory) -> None:
        memory.enter_phase("forward")
        for path, unit in ({} if recomputed else units or {}).items():
            model.get_submodule(path).register_forward_pre_hook(_entering(memory, unit))

    return simulate(model, inputs, lambda: minimised(forward(model)), optimizer, (), watch)


def _entering(memory: PeakMemory, phase: str) -> Callable[..., None]:
    """A hook: from now on, ``phase`` runs."""
    return lambda *_: memory.enter_phase(phase)


def recompute(model: nn.Module, paths: Sequence[str], **options: Any) -> None:
    """Put sub-modules under activation checkpointing, in place; options: those of ``torch.utils.checkpoint``."""
    for path in paths:
        module = model.get_submodule(path)
        module.forward = partial(checkpoint, module.forward, use_reentrant=False, **options)


def backpropagated(task: Task, model: nn.Module, inputs: Any, targets: Any) -> Any:
    """The losses of a plain training step. inputs: a list of positional or a dict of keyword arguments; a detector's is
    a list of images."""
    if task.result() == "dict":
        return model(inputs[0], targets)
    outputs = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return task.loss(outputs, targets)


def minimised(result: Any) -> Tensor:
    """The loss that a training loop minimises: of a LocalOutput, a dict of losses, or a scalar."""
    return result.loss if isinstance(result, LocalOutput) else total(result)


_KINDS = {"forward": "activations", "auxiliary": "auxiliary network", "loss": "loss", "backward": "temporaries"}


def _account(memory: PeakMemory, names: Sequence[str]) -> Estimate:
    log, flops = memory.log, memory.flops
    live = log.live()
    peak = max(live, default=0)
    at = live.index(peak) if live else 0
    when = log.phase_at(at)
    parts: dict[str, int] = {}
    for tag, size in log.at([at])[0].items():
        name = _part(tag, when, bool(names))
        parts[name] = parts.get(name, 0) + size
    begin = log.phases[0][0] if log.phases else 0
    moved = _moved(live[begin:])
    timeline: list[Phase] = []
    for (start, phase, before), (end, _, after) in pairwise([*log.phases, (len(live), "", flops)]):
        if end > start or after > before:
            timeline.append(Phase(_readable(phase, names), _module(phase, names), max(live[start:end], default=0),
                                  after - before, moved[min(start - begin, len(moved) - 1)] / max(1, moved[-1])))
    return Estimate(peak, _readable(when, names), parts, tuple(timeline), flops, curve(live[begin:]),
                    _kept(log, names), live[begin - 1] if begin else 0, memory.work)


def _kept(log: Log, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    starts: dict[int, int] = {}
    for start, phase, _ in log.phases:
        index = _module(phase, names)
        if index is not None and phase.endswith("backward"):
            starts.setdefault(index, start - 1)
    order = sorted(starts, key=starts.__getitem__)
    found = dict(zip(order, log.at([starts[index] for index in order]), strict=True))
    return tuple(
        (tags.get(f"{index} forward", 0), tags.get(f"{index} auxiliary", 0) + tags.get(f"{index} loss", 0))
        for index in range(len(names)) for tags in [found.get(index, {})])


def _moved(live: Sequence[int]) -> list[int]:
    """Bytes that were allocated and released up to every event."""
    return [0, *accumulate(abs(after - before) for before, after in pairwise(live))]


def curve(live: Sequence[int]) -> tuple[int, ...]:
    """Live bytes after every event, thinned out as ``Estimate.live`` is."""
    moved = _moved(live)
    points = [0] * _POINTS
    for now, at in zip(live, moved, strict=False):
        index = min(_POINTS - 1, at * _POINTS // max(1, moved[-1]))
        points[index] = max(points[index], now)
    for index in range(1, _POINTS):
        points[index] = points[index] or points[index - 1]
    return tuple(points)


def _part(tag: str, when: str, local: bool) -> str:
    """What a block of memory is for, seen from the moment of the peak."""
    if tag in ("backward", "optimizer step"):
        return "temporaries"
    if not local:
        own = tag in ("parameters", "optimizer state", "input", "gradients")
        return tag if own else "activations" if tag == "forward" else f"activations of {tag}"
    owner, _, kind = tag.partition(" ")
    now = when.partition(" ")[0]
    if not owner.isdecimal():
        return tag
    return "cache" if now.isdecimal() and int(owner) < int(now) and kind != "backward" else _KINDS[kind]


def _readable(phase: str, names: Sequence[str]) -> str:
    owner, _, kind = phase.partition(" ")
    return f"{kind} of {names[int(owner)]}" if names and owner.isdecimal() else phase


def _module(phase: str, names: Sequence[str]) -> int | None:
    """The local module that a phase belongs to: what the loop differentiates is the last one's."""
    owner = phase.partition(" ")[0]
    return None if not names else int(owner) if owner.isdecimal() else len(names) - 1 if phase == "backward" else None
