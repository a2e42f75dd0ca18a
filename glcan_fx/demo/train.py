"""Trains and measures one method of the demo; every method goes through the same loop."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock, Bottleneck
from tqdm import tqdm

from glcan_fx.demo.data import CocoFolder, Target, average_precision, held_out_batches, training_batches
from glcan_fx.demo.images import DataError
from glcan_fx.models import retinanet
from glcan_fx.peak_memory import PeakMemory
from glcan_fx.simulate.estimate import recompute

MIB = 2**20
WARM_UP_STEPS = 2  # neither timed nor measured: allocators, kernels and the optimizer state settle
MEMORY_STEPS = 2  # the next ones: measured, not timed, because counting tensors takes time
MEASURE_ONLY_STEPS = 10  # of a method that is measured but not trained

HEAD_LOSSES = ("classification", "bbox_regression")  # RetinaNet's names; a compiled model adds local losses

T = TypeVar("T")
Losses = dict[str, float]
Detections = dict[int, dict[str, Tensor]]  # image id -> boxes, scores, labels on the CPU


@dataclass(frozen=True)
class Recipe:
    """Training settings, the same for every method."""

    image_size: int  # longer side, pixels
    anchor_sizes: tuple[tuple[float, ...], ...]  # per pyramid level, pixels
    aspect_ratios: tuple[float, ...]  # height / width
    steps: int
    batch_size: int
    memory_batch: int  # of one extra step after training, whose peak memory is measured
    lr: float  # peak of the one-cycle schedule
    seed: int
    device: torch.device
    depth: int = 18
    fpn_channels: int = 64
    weight_decay: float = 0.05
    evaluations: int = 4  # spread evenly, the last one after the last step


@dataclass
class Outcome:
    """What one method cost and reached."""

    method: str
    title: str
    parameters: int
    peak_bytes: int = 0  # of one training step, everything included
    large_peak_bytes: int = 0  # the same at Recipe.memory_batch
    resident_bytes: int = 0  # parameters, buffers and optimizer state: there before the step begins
    step_seconds: float = math.nan  # median
    images_per_second: float = math.nan
    train_seconds: float = 0.0  # wall time of the whole loop, evaluations included
    losses: list[float] = field(default_factory=list)  # per step, the sum that was minimised
    head_losses: list[float] = field(default_factory=list)  # of it, what the detector's own head contributes
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)  # (step, AP, AP50)
    detections: Detections = field(default_factory=dict)  # of the last evaluation


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The RetinaNet that every method starts from; equal recipes give equal weights."""
    torch.manual_seed(recipe.seed)
    anchors = len(recipe.anchor_sizes[0]) * len(recipe.aspect_ratios)
    # Group norm in the head (torchvision's "v2" head): without it the towers, initialised with std 0.01,
    # hardly pass a signal on at first, and a run this short would end before they do.
    norm = partial(nn.GroupNorm, 32)
    return retinanet(
        recipe.depth,
        num_classes=num_classes,
        fpn_channels=recipe.fpn_channels,
        extra_levels=False,
        anchor_sizes=recipe.anchor_sizes,
        aspect_ratios=recipe.aspect_ratios,
        # Images arrive with this longer side, so the model's own resizing leaves them alone.
        min_size=recipe.image_size,
        max_size=recipe.image_size,
        head=RetinaNetHead(recipe.fpn_channels, anchors, num_classes, norm_layer=norm),
        detections_per_img=100,  # COCO's AP looks at no more
        # More anchors match than with the usual 0.5: the more there is to learn from in every step.
        fg_iou_thresh=0.4,
    )


def checkpoint_blocks(model: nn.Module) -> nn.Module:
    """Recompute every residual block of `model` in backward, in place: what one does today to save memory."""
    recompute(model, [path for path, module in model.named_modules() if isinstance(module, BasicBlock | Bottleneck)])
    return model


def train(
    method: str,
    title: str,
    model: nn.Module,
    train_set: CocoFolder,
    val_set: CocoFolder,
    recipe: Recipe,
    *,
    measure_only: bool = False,
    say: Callable[[str], None] | None = None,
) -> Outcome:
    """Train `model` with `recipe` and measure memory, time and AP on the way.

    Args:
        method: name in `results.json`.
        title: name for people.
        model: called as torchvision's detectors are: `losses = model(images, targets)` in training mode,
            `detections = model(images)` in evaluation mode. It is trained in place.
        train_set: images to train on.
        val_set: images to compute AP on.
        recipe: the settings.
        measure_only: stop after a few steps without evaluating.
        say: called with a line of text per evaluation.

    Raises:
        DataError: the loss is no longer finite.
    """
    model.to(recipe.device)
    if recipe.device.type == "cpu":  # where channels-last convolutions are the faster ones
        model.to(memory_format=torch.channels_last)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # In a run this short the second moment has to follow the gradients faster than by the usual 0.999.
    optimizer = torch.optim.AdamW(
        parameters, recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.3)
    steps = min(MEASURE_ONLY_STEPS, recipe.steps) if measure_only else recipe.steps
    batches = training_batches(train_set, steps=steps, batch_size=recipe.batch_size, seed=recipe.seed)
    evaluate_at = {math.ceil(steps * i / recipe.evaluations) for i in range(1, recipe.evaluations + 1)}
    measured = range(min(WARM_UP_STEPS, steps - 1) + 1, min(WARM_UP_STEPS + MEMORY_STEPS, steps) + 1)

    outcome = Outcome(method, title, sum(parameter.numel() for parameter in parameters))
    seconds: list[float] = []
    started = time.perf_counter()
    model.train()
    # disable=None: no bar unless stderr is a terminal.
    with tqdm(total=steps, desc=title, unit="step", file=sys.stderr, disable=None, dynamic_ncols=True) as bar:
        for step, (images, targets) in enumerate(batches, start=1):
            run_step = partial(_training_step, model, optimizer, *_to_device(images, targets, recipe.device))
            if step in measured:
                losses, peak = peak_of(run_step, model, optimizer, recipe.device)
                outcome.peak_bytes = max(outcome.peak_bytes, peak)
                outcome.resident_bytes = _resident_bytes(model, optimizer)
            else:
                _synchronize(recipe.device)
                begin = time.perf_counter()
                losses = run_step()
                _synchronize(recipe.device)
                seconds.append(time.perf_counter() - begin)
            schedule.step()
            outcome.losses.append(sum(losses.values()))
            outcome.head_losses.append(sum(losses.get(name, 0.0) for name in HEAD_LOSSES))
            if not math.isfinite(outcome.losses[-1]):
                problem = f"{title}: the loss is {outcome.losses[-1]} at step {step}."
                raise DataError(f"{problem} Choose --lr below {recipe.lr:g}.")
            steady = seconds[WARM_UP_STEPS:] or seconds
            if steady:
                outcome.step_seconds = statistics.median(steady)
                outcome.images_per_second = recipe.batch_size / outcome.step_seconds
            memory = f", peak {outcome.peak_bytes / MIB:.0f} MiB" if outcome.peak_bytes else ""
            figures = f"loss {outcome.losses[-1]:.2f}, {outcome.images_per_second:.0f} images/s{memory}"
            bar.set_postfix_str(figures, refresh=False)
            bar.update()
            if step in evaluate_at and not measure_only:
                ap, ap50 = _evaluate(model, val_set, recipe, outcome)
                outcome.evaluations.append((step, ap, ap50))
                if say:
                    with bar.external_write_mode(file=sys.stderr):
                        say(f"{title}: step {step}/{steps}, AP {ap:.3f}, AP50 {ap50:.3f}")
    outcome.train_seconds = time.perf_counter() - started
    outcome.large_peak_bytes = outcome.peak_bytes
    if recipe.memory_batch != recipe.batch_size:
        [batch] = training_batches(train_set, steps=1, batch_size=recipe.memory_batch, seed=recipe.seed)
        run_step = partial(_training_step, model, optimizer, *_to_device(batch[0], batch[1], recipe.device))
        _, outcome.large_peak_bytes = peak_of(run_step, model, optimizer, recipe.device)
    return outcome


def _training_step(
    model: nn.Module, optimizer: Optimizer, images: list[Tensor], targets: list[Target]
) -> Losses:
    losses = model(images, targets)
    sum(losses.values()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: loss.item() for name, loss in losses.items()}


def _evaluate(model: nn.Module, dataset: CocoFolder, recipe: Recipe, outcome: Outcome) -> tuple[float, float]:
    """AP and AP50 on `dataset`; the detections stay in `outcome`."""
    model.eval()
    outcome.detections = {}
    with torch.no_grad():
        for images, targets in held_out_batches(dataset, recipe.batch_size):
            found = model([image.to(recipe.device) for image in images])
            for target, detections in zip(targets, found, strict=True):
                outcome.detections[target["image_id"]] = {k: v.cpu() for k, v in detections.items()}
    model.train()
    results = [r for image_id, d in outcome.detections.items() for r in dataset.results(image_id, d)]
    scores = average_precision(dataset, results)
    return scores["AP"], scores["AP50"]


def peak_of(
    step: Callable[[], T], model: nn.Module, optimizer: Optimizer, device: torch.device
) -> tuple[T, int]:
    """What `step` returns, and its peak memory in bytes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        losses = step()
        return losses, torch.cuda.max_memory_allocated(device)
    with PeakMemory(model, optimizer) as memory:
        losses = step()
    return losses, memory.bytes


def _resident_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer state."""
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = filter(torch.is_tensor, [*model.parameters(), *model.buffers(), *state])
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _to_device(
    images: list[Tensor], targets: list[Target], device: torch.device
) -> tuple[list[Tensor], list[Target]]:
    def move(value: Any) -> Any:
        return value.to(device) if torch.is_tensor(value) else value

    return [move(image) for image in images], [{k: move(v) for k, v in t.items()} for t in targets]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def anchors_for_any_object(image_size: int) -> tuple[tuple[float, ...], ...]:
    """Nine anchor sizes in pixels, from 1/16 to 0.7 of the image in equal ratios, three per level."""
    sizes = np.geomspace(image_size / 16, image_size * 0.7, 9).reshape(3, 3)
    return tuple(tuple(round(float(size), 1) for size in level) for level in sizes)


def anchors_for_digits(image_size: int) -> tuple[tuple[float, ...], ...]:
    """Six anchor sizes in pixels around those of the composed digits, two per level."""
    shares = ((0.25, 0.31), (0.375, 0.44), (0.5, 0.58))
    return tuple(tuple(round(share * image_size, 1) for share in level) for level in shares)
