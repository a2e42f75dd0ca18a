"""Training methods that really run."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.autograd.graph import save_on_cpu
from torch.optim import Optimizer

from glcan_fx import api
from glcan_fx.bench.job import Job, Skipped, at_batch, micro_notes, options_of
from glcan_fx.bench.peers import PREPARE
from glcan_fx.bench.rows import OURS
from glcan_fx.config import OPTIMIZERS
from glcan_fx.errors import UnusedGradientsWarning
from glcan_fx.measure import medians, peak_of, synchronize
from glcan_fx.models.load import load
from glcan_fx.pytree import map_tensors, tensors_in
from glcan_fx.simulate.estimate import backpropagated, minimised
from glcan_fx.step.local_model import LocalModel
from glcan_fx.tasks import Spec, Task, specs

WARM_UP_STEPS = 3  # neither timed nor measured: allocators, kernels and the optimizer's state settle
COMPILE_BUDGET = 0.5  # of the activations that torch.compile saves without a budget
PRECISION = 32  # the largest batch is searched to one part in so many
LEARNING_RATE = 1e-6  # the weights stay as they were initialised, so that every step costs the same


def measured(job: Job, method: str, blocks: Sequence[str]) -> dict[str, Any]:
    """Train a few steps on the device: peak memory in bytes, median time of a step in seconds."""
    device = torch.device(job.device)
    if method == "offload" and device.type == "cpu":
        raise Skipped("not measured: on a CPU, tensors are in main memory already")
    if method == "compile" and device.type == "cpu":
        raise Skipped("not measured: memory of compiled code cannot be counted on a CPU")
    torch.manual_seed(job.seed)
    model = load(job.target, job.kwargs).to(device).train()
    task = job.make_task()
    inputs, targets = batch_of(job, model, task)
    notes = micro_notes(model) if method == "accumulate" else []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    result: dict[str, Any] = {"notes": notes, "device": name}
    trained: nn.Module = model
    if method in OURS:
        trained = api.transform(model, **options_of(job, method))
        result["k"] = trained.plan.k
    if method in PREPARE:
        PREPARE[method](model, blocks)
    if method == "compile":
        functorch_config.activation_memory_budget = COMPILE_BUDGET
        model.compile()
    train = Training(job, method, trained, task)
    fits = True
    try:
        result |= train.measure(inputs, targets)
    except torch.OutOfMemoryError:
        fits, result["reasons"] = False, [f"out of memory at batch {job.batch}"]
    if job.largest_batch and method != "accumulate":
        warnings.simplefilter("ignore", UnusedGradientsWarning)  # of steps that ran out of memory
        result["largest_batch"] = largest(partial(train.fits, inputs, targets), job.batch, known=fits)
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
            with offload, self.job.autocast(self.device.type):
                if isinstance(self.model, LocalModel):
                    loss = minimised(self.model(*inputs, targets))
                else:
                    loss = minimised(backpropagated(self.task, self.model, inputs, targets))
            loss.backward()
        self.optimizer.step()

    def measure(self, inputs: list[Any], targets: Any) -> dict[str, Any]:
        """Time, and then the peak memory of one more step: counting takes time."""
        if self.method == "accumulate":  # one image at a time is on the device
            inputs, targets = at_batch(inputs, self.job.batch, 1), at_batch(targets, self.job.batch, 1)
        step = partial(self.step, inputs, targets)
        [seconds] = medians([step], self.job.steps, warm_up=WARM_UP_STEPS, device=self.device)
        self.optimizer.zero_grad()
        _, peak = peak_of(step, (self.model, self.optimizer, *tensors_in([inputs, targets])), self.device)
        reserved = torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None
        return {"step_seconds": seconds, "images_per_second": self.job.batch / seconds, "measured": peak,
                "reserved": reserved}

    def fits(self, inputs: list[Any], targets: Any, batch: int) -> bool:
        """Whether steps of so many images do not run out of memory."""
        self.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        try:
            for _ in range(2):  # the first one makes the optimizer's state
                self.step(at_batch(inputs, self.job.batch, batch), at_batch(targets, self.job.batch, batch))
            synchronize(self.device)
        except torch.OutOfMemoryError:
            return False
        return True


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
        with torch.no_grad(), job.autocast(device.type):
            outputs = model(*inputs)
    targets = task.example_targets(model, tuple(map(Spec.of, tensors_in(inputs))) if outputs is not None else sizes,
                                   outputs)
    return inputs, map_tensors(targets, lambda tensor: tensor.to(device))


def _random(like: Tensor, device: torch.device) -> Tensor:
    if like.is_floating_point():
        return torch.rand(like.shape, dtype=like.dtype, device=device)
    return torch.zeros(like.shape, dtype=like.dtype, device=device)  # 0 is an index of anything
