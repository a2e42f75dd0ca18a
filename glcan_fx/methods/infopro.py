"""InfoPro: local losses that also keep what is needed to reconstruct the input."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glcan_fx.auxiliary.builder import Builder, Term
from glcan_fx.auxiliary.features import Feature
from glcan_fx.auxiliary.method import Extension
from glcan_fx.auxiliary.remainder import Remainder
from glcan_fx.auxiliary.tails import is_map
from glcan_fx.errors import PlanError
from glcan_fx.layers import KINDS
from glcan_fx.structure.nodes import tensor_of

Weights = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class InfoPro(Extension):
    """InfoPro (Wang et al. 2021, arXiv 2101.10832): beside the task's loss, a small decoder reconstructs
    the input from the local module's output, so that early modules do not throw away what later ones need.

    Args:
        base: the method whose auxiliary networks compute the task's loss.
        reconstruction: weight of the reconstruction in the first and in the last local module with an auxiliary
            network, in between by a straight line. Published, of ResNet-32 on CIFAR-10: (6, 1) at k=4, (5, 0) at k=8,
            (5, 0.2) at k=16.
        task: weight of the task's loss, likewise. Published: (0, 2) at k=4 and k=8, (0.05, 0.5) at k=16.
        pixels: longest side of what is reconstructed: of larger inputs, averages. (Published: the image itself.)

    The published loss is the binary cross entropy with the image before normalisation, which is not known here: it is
    taken between the least and the largest value of each channel in the batch. The published classifier has one
    convolution and two linear layers: here it is the base's. The published decoder enlarges the map before its first
    convolution; here behind it, which costs less. The contrastive loss is left out.
    """

    name: ClassVar[str] = "infopro"
    title: ClassVar[str] = "InfoPro: reconstructs the input"

    reconstruction: Weights = (5.0, 0.2)
    task: Weights = (0.05, 0.5)
    pixels: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("reconstruction", "task"):
            value: Any = getattr(self, option)
            right = isinstance(value, tuple | list) and len(value) == 2 and all(
                isinstance(weight, int | float) and weight >= 0 for weight in value)
            self._check(right, option, "two weights, of the first and the last module, 0 or more")
            object.__setattr__(self, option, tuple(map(float, value)))
        self._check(isinstance(self.pixels, int) and self.pixels >= 4, "pixels", "a number of pixels, 4 or more")

    def share(self, remainder: Remainder) -> float:
        return super().share(remainder) * _between(self.task, remainder.depth)

    def predict(self, build: Builder, remainder: Remainder, features: Sequence[Feature]) -> None:
        structure, end, image = remainder.structure, remainder.end, remainder.structure.chain[0]
        own = build.input(end)
        super().predict(build, remainder, features)
        rank, last = len(structure.spatial(image)) if is_map(image) else 0, end in structure.channels_last
        if image.op != "placeholder" or rank not in KINDS or len(structure.spatial(end)) not in (1, rank):
            raise PlanError(f"InfoPro reconstructs an image from a map or from tokens, but '{end.name}' is "
                            f"{structure.shape(end)} and the input '{image.name}' {structure.shape(image)}. Choose "
                            "another method.")
        with build.making():
            decoder = Decoder(structure.channels(end), structure.channels(image), rank, last, self.pixels,
                              tensor_of(end).dtype)
        build.full.add("decoder")
        build.terms["reconstruction"] = (
            Term(Reconstruction(), _between(self.reconstruction, remainder.depth)),
            build.add("decoder", decoder, own, build.input(image)))


def _between(weights: Weights, depth: float) -> float:
    return weights[0] + (weights[1] - weights[0]) * depth


_CHANNELS = 12


class Decoder(nn.Module):
    """(a map (N, C, ...), or with channels last, or tokens (N, T, C); image) -> logits of the reconstruction, and what
    they are to be, of the same shape."""

    def __init__(
        self, channels: int, colours: int, rank: int, channels_last: bool, pixels: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        kinds = KINDS[rank]
        self.mode, self.pixels, self.channels_last = kinds.mode, pixels, channels_last
        self.conv = kinds.conv(channels, _CHANNELS, 3, padding=1, bias=False, dtype=dtype)
        self.norm = kinds.norm(_CHANNELS, dtype=dtype)
        self.predict = kinds.conv(_CHANNELS, colours, 3, padding=1, dtype=dtype)

    def forward(self, features: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        sides = image.shape[2:]
        scale = min(1.0, self.pixels / max(sides))
        size = [max(1, round(side * scale)) for side in sides]
        with torch.no_grad():
            target = image if scale == 1.0 else F.interpolate(image, size=size, mode="area")
            axes = [0, *range(2, image.dim())]
            low, high = target.amin(axes, keepdim=True), target.amax(axes, keepdim=True)
            target = (target - low) / (high - low).clamp_min(torch.finfo(target.dtype).tiny)
        small = F.relu(self.norm(self.conv(self._map(features, sides))))
        return self.predict(F.interpolate(small, size=size, mode=self.mode, align_corners=False)), target

    def _map(self, features: Tensor, sides: Sequence[int]) -> Tensor:
        """Features as a map (N, C, ...): of tokens the last ones, which stand for positions (class tokens come first).
        """
        if self.channels_last:
            features = features.movedim(-1, 1)
        if features.dim() == len(sides) + 2:
            return features
        share = (features.shape[2] / math.prod(sides)) ** (1 / len(sides))
        grid = [max(1, round(side * share)) for side in sides]
        while math.prod(grid) > features.shape[2]:
            grid[grid.index(max(grid))] -= 1
        return features[:, :, features.shape[2] - math.prod(grid):].unflatten(2, grid)


class Reconstruction(nn.Module):
    """The binary cross entropy of a reconstruction."""

    def forward(self, made: tuple[Tensor, Tensor], *context: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(made[0].float(), made[1].float())
