"""Training methods simulated on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glcan_fx import api
from glcan_fx.bench.job import Job, Skipped, at_batch, micro_notes, options_of, said
from glcan_fx.bench.peers import PREPARE, Elsewhere
from glcan_fx.bench.rows import OURS
from glcan_fx.models.load import load
from glcan_fx.peak_memory import PeakMemory
from glcan_fx.planned import PlannedModel
from glcan_fx.simulate.estimate import Estimate, backpropagated, minimised, simulate, simulate_local, simulate_plain
from glcan_fx.simulate.simulator import Simulator
from glcan_fx.units import size


def estimates(job: Job, methods: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Simulate every method; first of all, the paths of the blocks that other jobs recompute."""
    model = load(job.target, job.kwargs)
    task = job.make_task()
    task.network(model)  # whether the task fits at all
    plans: dict[str, PlannedModel | Exception] = {
        name: _attempt(partial(api.plan, model, **options_of(job, name))) for name in OURS if name in methods}
    usable = [plan for plan in plans.values() if isinstance(plan, PlannedModel)]
    base = usable[0] if usable else _attempt(
        partial(api.plan, model, k=1, task=task, example_inputs=job.examples()))
    yield {"blocks": [] if isinstance(base, Exception) else base.blocks}
    for name in methods:
        yield row(name, partial(_estimated, job, name, base, plans.get(name)))


def row(method: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The message of a method: its figures, or the reason why there are none."""
    made = _attempt(function)
    return {"method": method, **({"reasons": [said(made)]} if isinstance(made, Exception) else made)}


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


def _estimated(
    job: Job, method: str, base: PlannedModel | Exception, plan: PlannedModel | Exception | None
) -> dict[str, Any]:
    """base: of the same model, whatever it is cut into; plan: of this method, where it has one."""
    if method == "compile":
        raise Skipped("not estimated: what torch.compile saves for backward is known only where it runs")
    draft: Simulator = _given(base).simulator
    optimizer = job.optimizer
    if method in OURS:
        local = _given(plan).simulator.local(_given(plan).plan)
        local.forward = job.autocast("cpu")(local.forward)
        return {**_message(simulate_local(local, draft.inputs, draft.targets, optimizer)), "k": local.plan.k}
    if method == "accumulate":
        return _accumulated(job, draft)

    def losses(model: nn.Module) -> Any:
        with job.autocast("cpu"):
            return backpropagated(draft.loss, model, draft.inputs, draft.targets)

    shadow, (units, blocks) = draft.shadow(), draft.blocks
    if method == "offload":
        moved = Elsewhere()

        def offloaded(model: nn.Module) -> Any:
            with moved:
                return losses(model)

        return _message(simulate_plain(shadow, draft.inputs, offloaded, optimizer),
                        [f"{size(moved.bytes)} per step move to main memory and back; only what stays on the "
                         "device is counted"])
    if method in PREPARE:
        PREPARE[method](shadow, blocks)
    return _message(simulate_plain(shadow, draft.inputs, losses, optimizer, units if method == "bp" else None))


def _accumulated(job: Job, draft: Simulator) -> dict[str, Any]:
    """A micro-batch of one image, with the gradients of those before it."""
    model = draft.shadow().train()
    inputs, targets = at_batch(draft.inputs, job.batch, 1), at_batch(draft.targets, job.batch, 1)

    def step() -> Tensor:
        with job.autocast("cpu"):
            return minimised(backpropagated(draft.loss, model, inputs, targets))

    def begun(memory: PeakMemory) -> None:
        memory.enter_phase("gradients")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        memory.enter_phase("forward")

    made = _message(simulate(model, inputs, step, job.optimizer, watch=begun), micro_notes(model))
    return {**made, "flops": made["flops"] * job.batch, "curve": None}


def _message(made: Estimate, notes: Sequence[str] = ()) -> dict[str, Any]:
    return {"estimated": made.peak, "flops": made.flops, "parts": made.parts, "when": made.when,
            "curve": list(made.live), "notes": list(notes)}
