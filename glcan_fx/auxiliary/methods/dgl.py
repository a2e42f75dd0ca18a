"""Pass 5 by another method: the auxiliary networks of decoupled greedy learning, to compare with."""

from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.errors import PlanError
from glcan_fx.structure.nodes import tensor_of


def decoupled(build: Builder, cut: fx.Node, value: fx.Node, end: fx.Node, name: str) -> fx.Node:
    """A value of the shape of ``end`` from the module's own output alone: decoupled greedy learning's auxiliary network
    (Belilovsky et al. 2020, arXiv 1901.08164, section 4.1, "MLP-SR-aux").

    Three pointwise convolutions on a map of a quarter of the size, then on its 2 x 2 averages three layers of a
    perceptron and the classifier. Where a map is asked for, the convolutions work at its resolution, or at the module's
    own where that is coarser, and a fourth one predicts it. Weights begin at the scale of PyTorch's own initialisation,
    as in the authors' code.
    """
    structure, channels, dtype = build.structure, build.structure.channels(cut), tensor_of(cut).dtype
    small = structure.spatial(cut)
    if len(small) != 2 or cut in structure.channels_last:
        raise PlanError(f"method='dgl' is for maps (N, C, H, W), but '{cut.name}' hands on "
                        f"{'x'.join(map(str, structure.shape(cut)))}")
    large = structure.spatial(end)
    classifies = structure.positions(end) <= 1
    build.full.add(name)

    def layer(kind: Any, part: str, *sizes: Any, **options: Any) -> None:
        nonlocal value
        with structure.trace.mode if build.draft else nullcontext():
            made = kind(*sizes, **options)
        value = build.add(f"{name}.{part}", made, value)

    if classifies:
        layer(nn.AdaptiveAvgPool2d, "pool", tuple(-(-size // 4) for size in small))
    elif any(a > b for a, b in zip(small, large, strict=True)):
        layer(nn.AvgPool2d, "pool", tuple(-(-a // b) for a, b in zip(small, large, strict=True)), ceil_mode=True)
    for index in range(3):
        layer(nn.Conv2d, f"conv{index}", channels, channels, kernel_size=1, bias=False, dtype=dtype)
        layer(nn.BatchNorm2d, f"norm{index}", channels, dtype=dtype)
        layer(nn.ReLU, f"relu{index}")
    if not classifies:
        layer(nn.Conv2d, "predict", channels, structure.channels(end), kernel_size=1, dtype=dtype)
        if any(a < b for a, b in zip(small, large, strict=True)):
            scale = tuple(b / a for a, b in zip(small, large, strict=True))
            value = build.graph.call_function(F.interpolate, (value,), {"scale_factor": scale, "mode": "bilinear"})
        return value
    layer(nn.AdaptiveAvgPool2d, "average", 2)
    layer(nn.Flatten, "flatten")
    for index in range(3):
        layer(nn.Linear, f"linear{index}", 4 * channels, 4 * channels, bias=False, dtype=dtype)
        layer(nn.BatchNorm1d, f"linear_norm{index}", 4 * channels, dtype=dtype)
        layer(nn.ReLU, f"linear_relu{index}")
    layer(nn.Linear, "predict", 4 * channels, structure.channels(end), dtype=dtype)
    return value
