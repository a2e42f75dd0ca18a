"""Decoupled greedy learning: auxiliary networks on each module's own output alone, to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.auxiliary.features import Feature, FeatureInfo
from glcan_fx.auxiliary.method import OPEN, BaseMethod
from glcan_fx.auxiliary.remainder import Remainder
from glcan_fx.auxiliary.tails import Ending, last_layers
from glcan_fx.errors import PlanError
from glcan_fx.layers import KINDS
from glcan_fx.structure.nodes import tensor_of


@dataclass(frozen=True, kw_only=True)
class DGL(BaseMethod):
    """Decoupled greedy learning (Belilovsky et al. 2020, arXiv 1901.08164): a small network on the module's own output
    alone, three pointwise convolutions on a quarter of the map's size and a perceptron of three layers (section 4.1,
    "MLP-SR-aux"); where maps are predicted, the convolutions work at their resolution."""

    name: ClassVar[str] = "dgl"

    def choices(self, ending: Ending) -> list[Self]:
        return [replace(self, head="light" if self.head is OPEN else self.head,
                        width=1.0 if self.width is OPEN else self.width)]

    def levels(self, module: FeatureInfo, levels: Sequence[FeatureInfo]) -> Sequence[int]:
        """One level: the first that is not finer than the module's own output."""
        chosen = super().levels(module, levels)
        coarse = tuple(index for index in chosen if levels[index].reduction >= module.reduction)
        return coarse[:1] or chosen[-1:]

    def features(self, remainder: Remainder) -> tuple[Feature, ...]:
        """None but the module's own output."""
        return ()

    def predict(self, build: Builder, remainder: Remainder, features: Sequence[Feature]) -> None:
        if not remainder.task.takes_targets:
            raise PlanError("method='dgl' predicts what the model returns, and this model's loss is among that: it can "
                            "only be computed by a copy of the model's own code. Use method='glcan', or a criterion.")
        build.input(remainder.end)
        nodes = [node for node in tree_leaves(remainder.outputs) if isinstance(node, fx.Node)]
        made, behind = last_layers(build.structure, nodes)
        for index, node in enumerate(made):
            build.values[node] = _predicted(build, remainder.end, node, f"local{index}")
        for node in behind:
            if node.op == "placeholder":
                build.input(node)
            else:
                build.copy(node, "tail")

    def in_words(self, levels: Sequence[int]) -> list[str]:
        return ["decoupled greedy learning's, on each module's own output"]


_FEW = {1: 4, 2: 2, 3: 2}
"""Places a side in front of the perceptron, by rank: four in all where that is possible."""


def _predicted(build: Builder, cut: fx.Node, end: fx.Node, name: str) -> fx.Node:
    """A value of the shape of ``end`` from the module's own output alone, all of what is side by side: decoupled greedy
    learning's auxiliary network (Belilovsky et al. 2020, arXiv 1901.08164, section 4.1, "MLP-SR-aux").

    Three pointwise convolutions on a map of a quarter of the size, then on its 2 x 2 averages three layers of a
    perceptron and the classifier; for tokens, sequences and volumes likewise. Where a map is asked for, the
    convolutions work at its resolution, or at the module's own where that is coarser, and a fourth one predicts it.
    Weights begin at the scale of PyTorch's own initialisation, as in the authors' code.
    """
    structure, dtype = build.structure, tensor_of(cut).dtype
    together = structure.together(cut)
    channels = len(together) * structure.channels(cut)
    small, last = structure.spatial(cut), cut in structure.channels_last
    rank = len(small)
    if rank not in KINDS:
        raise PlanError(f"method='dgl' is for maps (N, C, ...) and tokens (N, T, C), but '{cut.name}' outputs "
                        f"{'x'.join(map(str, structure.shape(cut)))}")
    large = structure.spatial(end)
    classifies = structure.positions(end) <= 1
    if not classifies and len(large) != rank:
        raise PlanError(f"method='dgl' predicts '{end.name}', {'x'.join(map(str, structure.shape(end)))}, on the "
                        f"positions of '{cut.name}', {'x'.join(map(str, structure.shape(cut)))}: choose other split "
                        "points, or method='glcan'.")
    kinds = KINDS[rank]
    build.full.add(name)
    value = build.input(cut)
    if len(together) > 1:
        value = build.graph.call_function(torch.cat, ([build.input(node) for node in together], -1 if last else 1))
    if last:
        value = build.graph.call_method("movedim", (value, -1, 1))

    def layer(kind: Any, part: str, *sizes: Any, **options: Any) -> None:
        nonlocal value
        with build.making():
            made = kind(*sizes, **options)
        value = build.add(f"{name}.{part}", made, value)

    if classifies:
        layer(kinds.adaptive, "pool", tuple(-(-size // 4) for size in small))
    elif any(a > b for a, b in zip(small, large, strict=True)):
        layer(kinds.average, "pool", tuple(-(-a // b) for a, b in zip(small, large, strict=True)), ceil_mode=True)
    for index in range(3):
        layer(kinds.conv, f"conv{index}", channels, channels, kernel_size=1, bias=False, dtype=dtype)
        layer(kinds.norm, f"norm{index}", channels, dtype=dtype)
        layer(nn.ReLU, f"relu{index}")
    if not classifies:
        layer(kinds.conv, "predict", channels, structure.channels(end), kernel_size=1, dtype=dtype)
        if any(a < b for a, b in zip(small, large, strict=True)):
            scale = tuple(b / a for a, b in zip(small, large, strict=True))
            value = build.graph.call_function(F.interpolate, (value,), {"scale_factor": scale, "mode": kinds.mode})
        return build.graph.call_method("movedim", (value, 1, -1)) if end in structure.channels_last else value
    layer(kinds.adaptive, "average", _FEW[rank])
    layer(nn.Flatten, "flatten")
    places = _FEW[rank]**rank
    for index in range(3):
        layer(nn.Linear, f"linear{index}", places * channels, places * channels, bias=False, dtype=dtype)
        layer(nn.BatchNorm1d, f"linear_norm{index}", places * channels, dtype=dtype)
        layer(nn.ReLU, f"linear_relu{index}")
    layer(nn.Linear, "predict", places * channels, structure.channels(end), dtype=dtype)
    return value
