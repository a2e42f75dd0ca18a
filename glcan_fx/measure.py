"""Measure training steps that really run: their time and their peak memory."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from glcan_fx.peak_memory import PeakMemory

T = TypeVar("T")


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished what was launched."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], T], device: torch.device | str = "cpu") -> tuple[T, float]:
    """What a step returns, and its seconds."""
    synchronize(device)
    begin = time.perf_counter()
    result = step()
    synchronize(device)
    return result, time.perf_counter() - begin


def medians(
    steps: Sequence[Callable[[], object]], turns: int, *, warm_up: int = 2, device: torch.device | str = "cpu"
) -> list[float]:
    """Median seconds of each step. They run in turns, so that all of them see the same machine."""
    seconds: list[list[float]] = [[timed(step, device)[1] for step in steps] for _ in range(warm_up + turns)]
    return [statistics.median(column) for column in zip(*seconds[warm_up:], strict=True)]


def peak_of(step: Callable[[], T], alive: Iterable[Any], device: torch.device) -> tuple[T, int]:
    """What a step returns, and its peak memory in bytes.

    alive: the modules, optimizers and tensors that exist before the step. On a CPU their bytes are counted; on a GPU
    the caching allocator knows.
    """
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return step(), torch.cuda.max_memory_allocated(device)
    with PeakMemory(*alive) as memory:
        result = step()
    return result, memory.bytes
