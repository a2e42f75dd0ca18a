"""What is compared: a model, its inputs, and how it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm

from glcan_fx.bench.rows import EXACT_COMPUTE
from glcan_fx.config import Options
from glcan_fx.errors import GlcanFxError
from glcan_fx.pytree import map_tensors
from glcan_fx.tasks import AnyLoss, Task, make_task


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
    memory_budget: int | str | None = None
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

    @property
    def sizes(self) -> str:
        """Of the inputs, for people."""
        return ", ".join("x".join(map(str, size)) for size in self.inputs)

    def make_task(self) -> Task:
        """The task of that name; without one, a loss that stands for any."""
        return AnyLoss() if self.task is None else make_task(self.task, None)

    def examples(self) -> Tensor | tuple[Tensor, ...]:
        """Inputs without data."""
        made = tuple(torch.empty(size, dtype=getattr(torch, self.dtype), device="meta") for size in self.inputs)
        return made[0] if len(made) == 1 else made

    def autocast(self, device: str) -> torch.autocast:
        """Autocast to bfloat16, where the job asks for it."""
        return torch.autocast(device, torch.bfloat16, enabled=self.amp)


class Skipped(Exception):
    """A method that cannot work here; the text says why."""


def at_batch(value: Any, batch: int, new: int) -> Any:
    """Nested inputs or targets of ``batch`` images for ``new`` ones: repeated or left out; in memory of their own."""
    if isinstance(value, FakeTensor):
        return value.new_empty((new, *value.shape[1:])) if value.dim() and value.shape[0] == batch else value
    if isinstance(value, Tensor):
        return value[torch.arange(new, device=value.device) % batch] if value.dim() and len(value) == batch else value
    if isinstance(value, list) and len(value) == batch and not any(
            isinstance(item, Tensor) and item.dim() and len(item) == batch for item in value):
        return [map_tensors(value[index % batch], own) for index in range(new)]
    if isinstance(value, list | tuple):
        return type(value)([at_batch(item, batch, new) for item in value])
    return {key: at_batch(item, batch, new) for key, item in value.items()} if isinstance(value, dict) else value


def own(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape) if isinstance(tensor, FakeTensor) else tensor.clone()


def micro_notes(model: nn.Module) -> list[str]:
    """What a split batch changes."""
    norms = any(isinstance(part, _BatchNorm) and part.training for part in model.modules())
    return ["changes batch statistics: each image is normalised by its own"] if norms else []


def options_of(job: Job, method: str) -> dict[str, Any]:
    """Keyword arguments of ``plan`` and ``transform``."""
    options: dict[str, Any] = {"k": job.k, "task": job.make_task(), "example_inputs": job.examples(),
                               "compute_budget": job.compute_budget, "options": Options(optimizer=job.optimizer)}
    if method == "exact":
        options |= {"k": 1, "memory_budget": "least", "compute_budget": job.compute_budget or EXACT_COMPUTE}
    if method == "budget":
        options |= {"k": job.budget_k, "memory_budget": job.memory_budget}
    return options


def said(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    known = isinstance(error, GlcanFxError | Skipped)
    text = text if known and text else f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:297]}..."
