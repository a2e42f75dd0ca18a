"""The methods that `glcan-fx bench` compares, simulated on fake tensors and measured on a device.

Runs in a process of its own, ``python -m glcan_fx.bench.methods``: a job as JSON on stdin, one message per method as a
line of JSON on stdout. So a method starts from a fresh allocator, and one that dies takes no other with it.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from glcan_fx import api
from glcan_fx.config import OPTIMIZERS, Options
from glcan_fx.errors import GlcanFxError, UnusedGradientsWarning
from glcan_fx.models.load import load
from glcan_fx.peak_memory import PeakMemory
from glcan_fx.planned import PlannedModel
from glcan_fx.pytree import map_tensors, tensors_in
from glcan_fx.simulate.estimate import (
    Estimate,
    backpropagated,
    minimised,
    recompute,
    simulate,
    simulate_local,
    simulate_plain,
)
from glcan_fx.simulate.simulator import Simulator
from glcan_fx.step.local_model import LocalModel
from glcan_fx.tasks import AnyLoss, Spec, Task, make_task, specs
from glcan_fx.units import size

WARM_UP_STEPS = 3  # neither timed nor measured: allocators, kernels and the optimizer's state settle
COMPILE_BUDGET = 0.5  # of the activations that torch.compile keeps without a budget
PRECISION = 32  # the largest batch is searched to one part in so many
LEARNING_RATE = 1e-6  # the weights stay as they were initialised, so that every step costs the same

_aten = torch.ops.aten
_EXPENSIVE: list[Any] = [
    _aten.convolution.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default,
]


@dataclass(frozen=True)
class Job:
    """What to compare. inputs: sizes of the model's tensors; k: local modules; memory_budget: bytes, budget_k: local
    modules within it; compute_budget: see ``plan()``; device: "estimate", "cpu" or "cuda"; steps: timed ones; amp:
    autocast to bfloat16."""

    target: str
    kwargs: dict[str, Any]
    inputs: list[list[int]]
    dtype: str = "float32"
    task: str | None = None
    k: int | str = "fewest"
    memory_budget: int | None = None
    budget_k: int | str = "fewest"
    compute_budget: float | None = None
    device: str = "estimate"
    optimizer: str = "sgd"
    amp: bool = False
    steps: int = 10
    seed: int = 0
    largest_batch: bool = False

    @property
    def batch(self) -> int:
        """Images of a step."""
        return self.inputs[0][0]

    def make_task(self) -> Task:
        """The task of that name; without one, a loss that stands for any."""
        return AnyLoss() if self.task is None else make_task(self.task, None)

    def examples(self) -> Tensor | tuple[Tensor, ...]:
        """Inputs without data."""
        made = tuple(torch.empty(size, dtype=getattr(torch, self.dtype), device="meta") for size in self.inputs)
        return made[0] if len(made) == 1 else made


class Skipped(Exception):
    """A method that cannot work here; the text says why."""


# ---------------------------------------------------------------------------------------------- changes to a model


def checkpointed(model: nn.Module, blocks: Sequence[str]) -> None:
    """Recompute every block in backward."""
    recompute(model, _some(blocks))


def selectively_checkpointed(model: nn.Module, blocks: Sequence[str]) -> None:
    """Keep the results of convolutions, matrix products and attention, and recompute the rest of every block."""
    recompute(model, _some(blocks), context_fn=partial(create_selective_checkpoint_contexts, _EXPENSIVE))


def nested_checkpointed(model: nn.Module, blocks: Sequence[str]) -> None:
    """Recompute groups of sqrt(n) of the n blocks, and every block inside again.

    Groups are made of consecutive children of containers that are plain ``nn.Sequential``.
    """
    size = max(2, round(len(_some(blocks)) ** 0.5))
    members = [model.get_submodule(path) for path in blocks]
    found = False
    for parent in model.modules():
        if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
            groups: list[list[nn.Module]] = []
            for child in parent:
                full = not groups or len(groups[-1]) == size or groups[-1][-1] not in members
                if child not in members or full:
                    groups.append([child])
                else:
                    groups[-1].append(child)
            if any(len(group) > 1 for group in groups):
                found = True
                parent.forward = partial(_in_groups, groups)  # type: ignore[method-assign]
    if not found:
        raise Skipped("no two blocks of the model are consecutive children of an nn.Sequential")
    recompute(model, blocks)


def _in_groups(groups: Sequence[Sequence[nn.Module]], value: Any) -> Any:
    for group in groups:
        call = partial(_in_turn, group)
        value = checkpoint(call, value, use_reentrant=False) if len(group) > 1 else call(value)
    return value


def _in_turn(group: Sequence[nn.Module], value: Any) -> Any:
    for module in group:
        value = module(value)
    return value


def _some(blocks: Sequence[str]) -> Sequence[str]:
    if not blocks:
        raise Skipped("no block of the model was found that is one call of a sub-module with parts")
    return blocks


PREPARE: Mapping[str, Callable[[nn.Module, Sequence[str]], None]] = {
    "checkpoint": checkpointed,
    "nested": nested_checkpointed,
    "selective": selectively_checkpointed,
}


class Elsewhere(saved_tensors_hooks):
    """``save_on_cpu`` for fake tensors: what is saved for backward is no memory until backward reads it.

    bytes: what was moved away. Like ``save_on_cpu``, it moves a tensor that is saved twice twice.
    """

    def __init__(self) -> None:
        self.bytes = 0

        def pack(tensor: Tensor) -> Any:
            if not isinstance(tensor, FakeTensor):  # its values count: see PeakMemory
                return tensor
            self.bytes += tensor.numel() * tensor.element_size()
            return tensor.new_empty(0), tensor.size()

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else packed[0].new_empty(packed[1])

        super().__init__(pack, unpack)


def at_batch(value: Any, batch: int, new: int) -> Any:
    """Nested inputs or targets of ``batch`` images for ``new`` ones: repeated or left out; in memory of their own."""
    if isinstance(value, FakeTensor):
        return value.new_empty((new, *value.shape[1:])) if value.dim() and value.shape[0] == batch else value
    if isinstance(value, Tensor):
        return value[torch.arange(new, device=value.device) % batch] if value.dim() and len(value) == batch else value
    if isinstance(value, list) and len(value) == batch and not any(
            isinstance(item, Tensor) and item.dim() and len(item) == batch for item in value):
        return [map_tensors(value[index % batch], _own) for index in range(new)]
    if isinstance(value, list | tuple):
        return type(value)([at_batch(item, batch, new) for item in value])
    return {key: at_batch(item, batch, new) for key, item in value.items()} if isinstance(value, dict) else value


def _own(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape) if isinstance(tensor, FakeTensor) else tensor.clone()


def batch_statistics(model: nn.Module) -> bool:
    """Whether a module normalises by the batch, so that a split batch gives other results."""
    return any(isinstance(part, _BatchNorm) and part.training for part in model.modules())


def _autocast(job: Job, device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if job.amp else nullcontext()


# ---------------------------------------------------------------------------------------------- simulated


def estimates(job: Job, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Simulate every method; first of all, the paths of the blocks that other jobs recompute."""
    model = load(job.target, job.kwargs)
    task = job.make_task()
    task.network(model)  # whether the task fits at all
    plans: dict[str, PlannedModel | Exception] = {}
    for name in ("glcan", "budget"):
        if name in methods:
            plans[name] = _attempt(partial(_plan, job, model, name))
    usable = [plan for plan in plans.values() if isinstance(plan, PlannedModel)]
    base = usable[0] if usable else _attempt(
        lambda: api.plan(model, k=1, task=job.make_task(), example_inputs=job.examples()))
    yield {"blocks": [] if isinstance(base, Exception) else base.blocks}
    for name in methods:
        yield _row(name, partial(_estimated, job, name, base, plans.get(name)))


def _row(method: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The message of a method: its figures, or the reason why there are none."""
    made = _attempt(function)
    return {"method": method, **({"reason": said(made)} if isinstance(made, Exception) else made)}


def _attempt(function: Callable[[], Any]) -> Any:
    """What a function returns, or the exception that it raises."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - whatever the user's model raises becomes the reason of a row
        return error


def _given(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def _plan(job: Job, model: nn.Module, method: str) -> PlannedModel:
    return api.plan(model, **_options(job, method))


def _options(job: Job, method: str) -> dict[str, Any]:
    """Keyword arguments of ``plan`` and ``transform``."""
    options: dict[str, Any] = {"k": job.k, "task": job.make_task(), "example_inputs": job.examples(),
                               "compute_budget": job.compute_budget, "options": Options(optimizer=job.optimizer)}
    if method == "budget":
        options |= {"k": job.budget_k, "memory_budget": job.memory_budget}
    return options


def _estimated(
    job: Job, method: str, base: PlannedModel | Exception, plan: PlannedModel | Exception | None
) -> dict[str, Any]:
    """base: of the same model, whatever it is cut into; plan: of this method, where it has one."""
    if method == "compile":
        raise Skipped("not estimated: what torch.compile keeps is known only where it runs")
    draft: Simulator = _given(base).simulator
    optimizer = job.optimizer
    if method in ("glcan", "budget"):
        local = _given(plan).simulator.local(_given(plan).plan)
        _under_autocast(local, job, "cpu")
        return {**_message(simulate_local(local, draft.inputs, draft.targets, optimizer)), "k": local.plan.k}
    if method == "accumulate":
        return _accumulated(job, draft)

    def losses(model: nn.Module) -> Any:
        with _autocast(job, "cpu"):
            return backpropagated(draft.loss, model, draft.inputs, draft.targets)

    shadow, (units, blocks) = draft.shadow(), draft.blocks
    if method == "offload":
        moved = Elsewhere()

        def offloaded(model: nn.Module) -> Any:
            with moved:
                return losses(model)

        return _message(simulate_plain(shadow, draft.inputs, offloaded, optimizer),
                        [f"{size(moved.bytes)} a step go to main memory and back; only what stays on the device "
                         "counts"])
    if method in PREPARE:
        PREPARE[method](shadow, blocks)
    return _message(simulate_plain(shadow, draft.inputs, losses, optimizer, units if method == "bp" else None))


def _accumulated(job: Job, draft: Simulator) -> dict[str, Any]:
    """A micro-batch of one image, with the gradients of those before it."""
    model = draft.shadow().train()
    inputs, targets = at_batch(draft.inputs, job.batch, 1), at_batch(draft.targets, job.batch, 1)

    def step() -> Tensor:
        with _autocast(job, "cpu"):
            return minimised(backpropagated(draft.loss, model, inputs, targets))

    def begun(memory: PeakMemory) -> None:
        memory.enter_phase("gradients")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        memory.enter_phase("forward")

    made = _message(simulate(model, inputs, step, job.optimizer, watch=begun), _micro_notes(model))
    return {**made, "flops": made["flops"] * job.batch, "curve": None}


def _micro_notes(model: nn.Module) -> list[str]:
    return ["changes batch statistics: each image is normalised by its own"] if batch_statistics(model) else []


def _under_autocast(model: nn.Module, job: Job, device: str) -> None:
    if job.amp:
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)


def _message(made: Estimate, notes: Sequence[str] = ()) -> dict[str, Any]:
    return {"estimated": made.peak, "flops": made.flops, "parts": made.parts, "when": made.when,
            "curve": list(made.live), "notes": list(notes)}


# ---------------------------------------------------------------------------------------------- measured


def measured(job: Job, method: str, blocks: Sequence[str]) -> dict[str, Any]:
    """Train a few steps on the device: peak memory in bytes, median time of a step in seconds."""
    device = torch.device(job.device)
    if method == "offload" and device.type == "cpu":
        raise Skipped("not measured: on a CPU there is nowhere else to move to")
    if method == "compile" and device.type == "cpu":
        raise Skipped("not measured: memory of compiled code cannot be counted on a CPU")
    torch.manual_seed(job.seed)
    model = load(job.target, job.kwargs).to(device).train()
    task = job.make_task()
    inputs, targets = batch_of(job, model, task)
    notes = _micro_notes(model) if method == "accumulate" else []
    result: dict[str, Any] = {"notes": notes, "device": device_name(device)}
    trained: nn.Module = model
    if method in ("glcan", "budget"):
        trained = api.transform(model, **_options(job, method))
        result["k"] = trained.plan.k
    if method in PREPARE:
        PREPARE[method](model, blocks)
    if method == "compile":
        functorch_config.activation_memory_budget = COMPILE_BUDGET
        model.compile()
    train = Training(job, method, trained, task)
    try:
        result |= train.measure(inputs, targets)
    except torch.OutOfMemoryError:
        result["reason"] = f"out of memory at batch {job.batch}"
    if job.largest_batch and method != "accumulate":
        warnings.simplefilter("ignore", UnusedGradientsWarning)  # of steps that ran out of memory
        result["largest_batch"] = largest(partial(train.fits, inputs, targets), job.batch, known="reason" not in result)
    return result


class Training:
    """Training steps of one method."""

    def __init__(self, job: Job, method: str, model: nn.Module, task: Task) -> None:
        self.job, self.method, self.model, self.task = job, method, model, task
        self.device = torch.device(job.device)
        self.optimizer: Optimizer = OPTIMIZERS[job.optimizer](p for p in model.parameters() if p.requires_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE

    def step(self, inputs: list[Any], targets: Any) -> None:
        """Forward, backward, optimizer."""
        self.optimizer.zero_grad()
        for _ in range(self.job.batch if self.method == "accumulate" else 1):
            offload = save_on_cpu(pin_memory=True) if self.method == "offload" else nullcontext()
            with offload, _autocast(self.job, self.device.type):
                if isinstance(self.model, LocalModel):
                    loss = minimised(self.model(*inputs, targets))
                else:
                    loss = minimised(backpropagated(self.task, self.model, inputs, targets))
            loss.backward()
        self.optimizer.step()

    def measure(self, inputs: list[Any], targets: Any) -> dict[str, Any]:
        """Peak memory and time, after the warm-up."""
        if self.method == "accumulate":  # one image at a time is on the device
            inputs, targets = at_batch(inputs, self.job.batch, 1), at_batch(targets, self.job.batch, 1)
        for _ in range(WARM_UP_STEPS):
            self.step(inputs, targets)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = []
        for _ in range(self.job.steps):
            self._wait()
            start = time.perf_counter()
            self.step(inputs, targets)
            self._wait()
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        result = {"step_seconds": median, "images_per_second": self.job.batch / median}
        if cuda:
            return {**result, "measured": torch.cuda.max_memory_allocated(self.device),
                    "reserved": torch.cuda.max_memory_reserved(self.device)}
        self.optimizer.zero_grad()
        # counting takes time, so this step is not one of the timed
        with PeakMemory(self.model, self.optimizer, *tensors_in([inputs, targets])) as memory:
            self.step(inputs, targets)
        return {**result, "measured": memory.bytes, "flops": memory.flops}

    def fits(self, inputs: list[Any], targets: Any, batch: int) -> bool:
        """Whether steps of so many images do not run out of memory."""
        self.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        try:
            for _ in range(2):  # the first one makes the optimizer's state
                self.step(at_batch(inputs, self.job.batch, batch), at_batch(targets, self.job.batch, batch))
            self._wait()
        except torch.OutOfMemoryError:
            return False
        return True

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def largest(fits: Callable[[int], bool], batch: int, *, known: bool) -> int:
    """The most images that fit, to one part in PRECISION: doubled until they do not, then bisected; 0 where not even
    one fits. known: whether ``batch`` itself fits."""
    low, high = (batch, None) if known else (0, batch)
    while high is None or high - low > max(1, low // PRECISION):
        middle = 2 * low if high is None else (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def batch_of(job: Job, model: nn.Module, task: Task) -> tuple[list[Any], Any]:
    """Random inputs on the device, and the task's example targets for them."""
    device = torch.device(job.device)
    sizes = specs(task.example_inputs(model, job.examples()))
    inputs: list[Any] = [_random(spec.empty(), device) for spec in sizes]
    outputs = None
    if task.result() == "dict":
        inputs = [list(inputs[0])]
    else:
        with torch.no_grad(), _autocast(job, device.type):
            outputs = model(*inputs)
    targets = task.example_targets(model, tuple(map(Spec.of, tensors_in(inputs))) if outputs is not None else sizes,
                                   outputs)
    return inputs, map_tensors(targets, lambda tensor: tensor.to(device))


def _random(like: Tensor, device: torch.device) -> Tensor:
    if like.is_floating_point():
        return torch.rand(like.shape, dtype=like.dtype, device=device)
    return torch.zeros(like.shape, dtype=like.dtype, device=device)  # 0 is an index of anything


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---------------------------------------------------------------------------------------------- the process


def said(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    known = isinstance(error, GlcanFxError | Skipped)
    text = text if known and text else f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:297]}..."


def main() -> int:
    """Do the job on stdin."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the user's model prints is none of the messages

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=channel, flush=True)

    given = json.load(sys.stdin)
    job = Job(**given["job"])
    try:
        if given["measure"]:
            [method] = given["methods"]
            send(_row(method, partial(measured, job, method, given["blocks"])))
        else:
            for message in estimates(job, given["methods"]):
                send(message)
    except (GlcanFxError, OSError) as error:
        send({"fatal": str(error), "code": 2 if isinstance(error, OSError) else 1})
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
