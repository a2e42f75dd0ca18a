"""Trains and measures one method of the demo; every method goes through the same loop."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.resnet import BasicBlock, Bottleneck
from tqdm import tqdm

from glcan_fx.demo.data import CocoFolder, Detections, Target, average_precision, detected, training_batches
from glcan_fx.demo.images import DataError
from glcan_fx.measure import peak_of, timed
from glcan_fx.models import retinanet
from glcan_fx.pytree import map_tensors, tensors_in
from glcan_fx.simulate.estimate import recompute

MIB = 2**20
WARM_UP_STEPS = 2  # neither timed nor measured: allocators, kernels and the optimizer state settle
MEMORY_STEPS = 2  # the next ones: measured, not timed, because counting tensors takes time
MEASURE_ONLY_STEPS = 10  # of a method that is measured but not trained

HEAD_LOSSES = ("classification", "bbox_regression")  # RetinaNet's names; a compiled model adds local losses

Losses = dict[str, float]


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
    step_seconds: float | None = None  # median
    train_seconds: float = 0.0  # wall time of the whole loop, evaluations included
    losses: list[float] = field(default_factory=list)  # per step, the sum that was minimised
    head_losses: list[float] = field(default_factory=list)  # of it, what the detector's own head contributes
    evaluations: list[dict[str, float]] = field(default_factory=list)  # step, AP, AP50, AP75
    detections: Detections = field(default_factory=dict)  # of the last evaluation, on the CPU


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The RetinaNet that every method starts from; equal recipes give equal weights."""
    torch.manual_seed(recipe.seed)
    anchors = len(recipe.anchor_sizes[0]) * len(recipe.aspect_ratios)
    # Group norm in the head (torchvision's "v2" head): without it the towers, initialised with std 0.01,
    # hardly pass a signal on at first, and a run this short would end before they do.
    norm = partial(nn.GroupNorm, 32)
    return retinanet(
        recipe.depth, num_classes=num_classes, fpn_channels=recipe.fpn_channels, extra_levels=False,
        anchor_sizes=recipe.anchor_sizes, aspect_ratios=recipe.aspect_ratios,
        # Images arrive with this longer side, so the model's own resizing leaves them alone.
        min_size=recipe.image_size, max_size=recipe.image_size,
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
    method: str, title: str, model: nn.Module, train_set: CocoFolder, val_set: CocoFolder, recipe: Recipe, *,
    measure_only: bool = False, say: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Train `model` with `recipe`, in place, and measure memory, time and AP on the way.

    Args:
        method: name in `results.json`.
        title: name for people.
        model: called as torchvision's detectors are: `losses = model(images, targets)` in training mode,
            `detections = model(images)` in evaluation mode.
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
        parameters, recipe.lr, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.3)
    steps = min(MEASURE_ONLY_STEPS, recipe.steps) if measure_only else recipe.steps
    batches = training_batches(train_set, steps=steps, batch_size=recipe.batch_size, seed=recipe.seed)
    evaluate_at = {math.ceil(steps * i / recipe.evaluations) for i in range(1, recipe.evaluations + 1)}
    outcome = Outcome(method, title, sum(parameter.numel() for parameter in parameters))
    meter = _Meter(outcome, model, optimizer, recipe, steps)
    started = time.perf_counter()
    model.train()
    # disable=None: no bar unless stderr is a terminal.
    with tqdm(total=steps, desc=title, unit="step", file=sys.stderr, disable=None, dynamic_ncols=True) as bar:
        for step, (images, targets) in enumerate(batches, start=1):
            meter.step(step, images, targets)
            schedule.step()
            memory = f", peak {outcome.peak_bytes / MIB:.0f} MiB" if outcome.peak_bytes else ""
            bar.set_postfix_str(f"loss {outcome.losses[-1]:.2f}{memory}", refresh=False)
            bar.update()
            if step in evaluate_at and not measure_only:
                outcome.detections = detected(model, val_set, recipe.batch_size, recipe.device)
                scores = average_precision(val_set, outcome.detections)
                outcome.evaluations.append({"step": step, **scores})
                with bar.external_write_mode(file=sys.stderr):
                    say(f"{title}: step {step}/{steps}, AP {scores['AP']:.3f}, AP50 {scores['AP50']:.3f}")
    outcome.train_seconds = time.perf_counter() - started
    outcome.large_peak_bytes = outcome.peak_bytes
    if recipe.memory_batch != recipe.batch_size:
        [batch] = training_batches(train_set, steps=1, batch_size=recipe.memory_batch, seed=recipe.seed)
        _, outcome.large_peak_bytes = meter.peak(*batch)
    return outcome


class _Meter:
    """Training steps, measured: the first ones warm up, the next ones' memory is counted, the others are timed."""

    def __init__(
        self, outcome: Outcome, model: nn.Module, optimizer: Optimizer, recipe: Recipe, steps: int
    ) -> None:
        self.outcome, self.model, self.optimizer, self.recipe = outcome, model, optimizer, recipe
        self.counted = range(min(WARM_UP_STEPS, steps - 1) + 1, min(WARM_UP_STEPS + MEMORY_STEPS, steps) + 1)
        self.seconds: list[float] = []

    def step(self, number: int, images: list[Tensor], targets: list[Target]) -> None:
        """Train on a batch, and note what that cost. Raises DataError where the loss is no longer finite."""
        outcome, device = self.outcome, self.recipe.device
        if number in self.counted:
            losses, peak = self.peak(images, targets)
            outcome.peak_bytes = max(outcome.peak_bytes, peak)
            outcome.resident_bytes = _resident_bytes(self.model, self.optimizer)
        else:
            losses, seconds = timed(self._step_on(images, targets), device)
            self.seconds.append(seconds)
            outcome.step_seconds = statistics.median(self.seconds[WARM_UP_STEPS:] or self.seconds)
        outcome.losses.append(sum(losses.values()))
        outcome.head_losses.append(sum(losses.get(name, 0.0) for name in HEAD_LOSSES))
        if not math.isfinite(outcome.losses[-1]):
            raise DataError(f"{outcome.title}: the loss is {outcome.losses[-1]} at step {number}. Choose --lr below "
                            f"{self.recipe.lr:g}.")

    def peak(self, images: list[Tensor], targets: list[Target]) -> tuple[Losses, int]:
        """Train on a batch; its losses, and the peak memory in bytes."""
        return peak_of(self._step_on(images, targets), (self.model, self.optimizer), self.recipe.device)

    def _step_on(self, images: list[Tensor], targets: list[Target]) -> Callable[[], Losses]:
        given = map_tensors((images, targets), lambda tensor: tensor.to(self.recipe.device))
        return partial(_training_step, self.model, self.optimizer, *given)


def _training_step(
    model: nn.Module, optimizer: Optimizer, images: list[Tensor], targets: list[Target]
) -> Losses:
    losses = model(images, targets)
    sum(losses.values()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: loss.item() for name, loss in losses.items()}


def _resident_bytes(model: nn.Module, optimizer: Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer state."""
    return sum(tensor.nbytes for tensor in tensors_in([
        list(model.parameters()), list(model.buffers()), list(optimizer.state.values())]))


def anchors_for_any_object(image_size: int) -> tuple[tuple[float, ...], ...]:
    """Nine anchor sizes in pixels, from 1/16 to 0.7 of the image in equal ratios, three per level."""
    sizes = np.geomspace(image_size / 16, image_size * 0.7, 9).reshape(3, 3)
    return tuple(tuple(round(float(size), 1) for size in level) for level in sizes)


def anchors_for_digits(image_size: int) -> tuple[tuple[float, ...], ...]:
    """Six anchor sizes in pixels around those of the composed digits, two per level."""
    shares = ((0.25, 0.31), (0.375, 0.44), (0.5, 0.58))
    return tuple(tuple(round(share * image_size, 1) for share in level) for level in shares)
