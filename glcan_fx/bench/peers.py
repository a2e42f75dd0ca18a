"""The training methods that glcan_fx is compared with, as changes to a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from glcan_fx.bench.job import Skipped
from glcan_fx.simulate.estimate import recompute

_aten = torch.ops.aten
_EXPENSIVE: list[Any] = [
    _aten.convolution.default, _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default,
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default, _aten._scaled_dot_product_flash_attention_for_cpu.default,
]


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
        raise Skipped("no block of the model is a single call of a sub-module that has children")
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
