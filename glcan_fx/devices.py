"""What devices can do, to estimate how long a training step takes."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from glcan_fx.errors import PlanError


class Work(NamedTuple):
    """What operators do. flops: floating-point operations of convolutions, matrix products and attention; moved: bytes
    that they read and write, without views; operators: how many there are, without views."""

    flops: float = 0
    moved: float = 0
    operators: float = 0

    def plus(self, other: "Work", times: float = 1) -> "Work":
        """With ``times`` as much as ``other``."""
        return Work(*(mine + times * more for mine, more in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Device:
    """Rates of a device.

    flops: operations per second in float32, as PyTorch's defaults run convolutions (TF32 where the device has it);
    bandwidth: bytes per second of its memory; launch: seconds that an operator takes at least, in Python and all below.
    """

    name: str
    flops: float
    bandwidth: float
    launch: float = 1e-5

    def seconds(self, work: Work) -> float:
        """About how long operators take: their arithmetic, their traffic and their launches, one after the other.

        Good for the ratio of two steps: no step reaches these rates. (Of the arithmetic and the traffic of an operator
        the longer one would be the roofline of Williams et al., CACM 2009; their sum agrees with measured ratios as
        well, see docs/performance.md, and can be added up.)
        """
        return work.flops / self.flops + work.moved / self.bandwidth + work.operators * self.launch


OPERATIONS = Device("operations", flops=1, bandwidth=math.inf, launch=0)
"""Counts floating-point operations alone: what a step takes where nothing is known of the device."""


def _gpu(name: str, flops: float, bandwidth: float) -> Device:
    return Device(name, flops * 1e12, bandwidth * 1e9)


DEVICES: Mapping[str, Device] = {device.name: device for device in (
    # dense TFLOP/s (TF32, or float32 where there is none), GB/s: those of NVIDIA's data sheets
    _gpu("gtx1080ti", 11.3, 484), _gpu("rtx2080ti", 13.4, 616), _gpu("t4", 8.1, 320), _gpu("v100", 15.7, 900),
    _gpu("rtx3060", 12.7, 360), _gpu("rtx3090", 35.6, 936), _gpu("rtx4070", 29, 504), _gpu("rtx4090", 82.6, 1008),
    _gpu("a10", 62.5, 600), _gpu("l4", 60, 300), _gpu("a100", 156, 1555), _gpu("h100", 495, 3350),
)}
"""Published rates of some GPUs, by name."""


def check_device(device: str | Device | None) -> None:
    """Raise PlanError for a name that is not a device's, or where there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise PlanError(f"device='cuda': there is no GPU here. Name one: {', '.join(DEVICES)}.")
    if not (device is None or isinstance(device, Device) or device in ("cpu", "cuda") or device in DEVICES):
        raise PlanError(f"device={device!r}: choose {', '.join(DEVICES)}, 'cpu' or 'cuda' (the one at hand, measured), "
                        "or pass a glcan_fx.Device with its rates")


def device_of(device: str | Device | None) -> Device:
    """A device by its name: one of ``DEVICES``, or "cpu" or "cuda", the one at hand, whose rates are measured once,
    which takes about two seconds; None: ``OPERATIONS``. Raises PlanError for another name, or where there is no GPU."""
    check_device(device)
    if device is None:
        return OPERATIONS
    if isinstance(device, Device):
        return device
    return DEVICES[device] if device in DEVICES else measured(device)


@cache
def measured(kind: str) -> Device:
    """The rates of the device at hand, with the threads that there are: of a convolution, of the sum of large tensors,
    and of training steps of a network that is too small for its arithmetic to count."""
    large = kind == "cuda"
    wait: Callable[[], None] = torch.cuda.synchronize if large else lambda: None
    x = torch.ones(32 if large else 4, 64, 56, 56, device=kind)
    weight = torch.ones(64, 64, 3, 3, device=kind)
    values = torch.ones(2**26 if large else 2**23, device=kind)
    with torch.random.fork_rng():
        small = nn.Sequential(*(layer for _ in range(_LAYERS) for layer in (
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))).to(kind)
    one = torch.ones(2, 4, 4, 4, device=kind)
    with torch.no_grad():
        arithmetic = _median(lambda: torch.conv2d(x, weight, padding=1), wait)
        traffic = _median(lambda: values + values, wait)
    with torch.enable_grad():
        launches = _median(lambda: small(one).sum().backward(), wait)
    operations = 2 * weight.numel() * x.shape[0] * 56 * 56
    return Device(kind, operations / arithmetic, 3 * 4 * values.numel() / traffic, launches / (6 * _LAYERS))


_LAYERS = 10  # each of three operators, and three in backward


def _median(run: Callable[[], object], wait: Callable[[], None], seconds: float = 0.4) -> float:
    """Seconds of a run, after warming up."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 8 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times[len(times) // 4:])
