"""Modules that are hard to capture: each is compiled, trains as the plain model does, and is reported as it is."""

import functools
import gc
import linecache
import math
import random
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import gradients, summed_loss_gradients
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torchvision.models import vit_b_32

import glcan_fx
from glcan_fx.capture.ladder import trace
from glcan_fx.capture.trace import Report

CLASSES = 4
Inputs = tuple[Any, ...] | dict[str, Any]


def images(batch: int, size: int = 32) -> Inputs:
    return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)),)


def layer(inputs: int = 8, outputs: int = 8, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """Stem, three blocks and a linear head; the nasty block is blocks.1, unless the whole forward is nasty."""

    def __init__(self, block: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = layer(3, 8, 2)
        self.blocks = nn.Sequential(layer(), block or layer(), layer(8, 12, 2))
        self.fc = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A network, and what its report must say. asked: source of a line that asks for a size."""

    build: Callable[[], nn.Module]
    rung: int = 1
    opaque: tuple[str, ...] = ()
    reason: str = ""
    asked: str = ""
    lost: str = ""
    k: int = 3
    inputs: Callable[[int], Inputs] = images
    exact: bool = True  # the same operations in the same order, so that gradients can be compared


ZOO: dict[str, Case] = {}


def case(*arguments: Any, name: str = "", **expected: Any) -> Callable[[Any], Any]:
    """Put a network, or a block from 8 to 8 channels, into the zoo."""
    if "opaque" in expected or "reason" in expected:
        expected = {"rung": 3, "opaque": ("blocks.1",), **expected}
    if "asked" in expected:
        expected = {"rung": 2, **expected}

    def register(kind: Any) -> Any:
        whole = isinstance(kind, type) and issubclass(kind, Net)
        ZOO[name or kind.__name__] = Case(
            functools.partial(kind, *arguments) if whole else lambda: Net(kind(*arguments)), **expected)
        return kind

    return register


# ------------------------------------------------------------------------------------ questions about sizes


class Block(nn.Module):
    """A convolution; subclasses say what is nasty."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.conv(x)


@case(asked="if x.shape[-1] > 32:")
class AsksForSize(Block):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 32:
            x = x[..., :32]
        return self.conv(x)


@case(asked="side = int(math.sqrt(tokens.shape[1]))")
class Tokens(Block):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        side = int(math.sqrt(tokens.shape[1]))
        return x + self.conv(tokens.transpose(1, 2).reshape(x.shape[0], 8, side, side))


@case(asked="if self.early and x.size(2) < 64:")
class EarlyReturn(Block):
    early = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.early and x.size(2) < 64:
            return x
        return x * 2


@case()
class LengthOfList(Net):
    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for block in self.blocks:
            features.append(block(features[len(features) - 1]))
        return self.fc(features[-1].mean((2, 3))) / len(features)


@case()
class ForLevelInFeatures(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Linear(c, 12) for c in (8, 8, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for block in self.blocks:
            features.append(block(features[-1]))
        total = 0
        for level, lateral in zip(features, self.lateral, strict=True):
            total = total + lateral(level.mean((2, 3)))
        return self.fc(total)


@case()
class IsInstanceOfTensor(Block):
    def forward(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            x = x[0]
        return self.conv(x)


@case()
class IsInstanceOfInt(Block):
    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        size = (size, size) if isinstance(size, int) else size
        return x + F.interpolate(self.conv(F.avg_pool2d(x, 2)), size=size)


@case()
class Einops(Block):
    """Space to depth and back, with every size from the tensor."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, c * 4, h // 2, w // 2)
        y = y.view(x.shape[0], c, 2, 2, h // 2, w // 2).permute(0, 1, 4, 2, 5, 3)
        return self.conv(y.reshape(x.size()))


@case()
class Arange(Block):
    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        ramp = torch.arange(h, device=x.device)[:, None] + torch.arange(w, device=x.device)
        batch = torch.arange(n, device=x.device, dtype=x.dtype).view(-1, 1, 1, 1)
        return self.conv(x + ramp / (h + w)) * (1 + batch / n)


@case()
class PositionTable(Block):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 64 * 64, 8))
        self.coarse = nn.Parameter(torch.randn(1, 8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.table[:, : tokens.shape[1]]
        y = tokens.transpose(1, 2).reshape(x.shape)
        return x + self.conv(y + F.interpolate(self.coarse, x.shape[-2:], mode="bilinear"))


@case()
class NewZeros(Block):
    def forward(self, x: Tensor) -> Tensor:
        padding = x.new_zeros(x.shape[0], 8, 1, x.shape[3])
        return x + self.conv(torch.cat([x, padding, x.new_ones(padding.shape)], 2))[:, :, :-2]


@case(reason="batch size")
class LoopOverBatch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(x[i] / x[i].norm()) for i in range(x.shape[0])])


@case(reason="batch size")
class IterateBatch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(image) for image in x])


@case()
class ExpandedToLength(Block):
    """A number that Python made of the batch, and its multiples."""

    def forward(self, x: Tensor) -> Tensor:
        twice = torch.ones(1, 8, 1, 1).repeat(len(x) * 2, 1, 1, 1)
        return self.conv(x) + torch.ones(8, 1, 1).expand(len(x), 8, 1, 1) + twice.reshape(2, len(x), 8, 1, 1)[0]


@case(reason="batch size")
class LengthOfBatch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * (len(x) / 2)


# ------------------------------------------------------------------------------------- calls and containers


@dataclass
class Features:
    map: Tensor
    scale: Tensor | None = None
    names: tuple[str, ...] = ("map",)


class Pair(NamedTuple):
    first: Tensor
    second: Any


@case()
class DictOutput(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.blocks(self.stem(x))
        return {"logits": self.fc(x.mean((2, 3))), "features": x}


@case()
class DataclassOutput(Net):
    def forward(self, x: Tensor) -> Features:
        x = self.blocks(self.stem(x))
        return Features(self.fc(x.mean((2, 3))), x.mean())


@case()
class NestedOutput(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.blocks(self.stem(x))
        out = self.fc(x.mean((2, 3)))
        return {"all": (out, [Features(out * 2)])}, Pair(x, {"deep": Features(out + 1, x)})


@case()
class Kwargs(Net):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        out = super().forward(x)
        return out * options.pop("scale", 2.0)


def logged(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


@case()
class Decorated(Net):
    @logged
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3))) * scale


@case()
class DecoratedWithItsSignature(Net):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3))) * scale

    forward = functools.wraps(forward)(logged(forward))


@case()
class CallsWithKeywordsOnly(Block):
    class Inner(Block):
        def forward(self, *, image: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
            return self.conv(image) * scale if mask is None else self.conv(image) * mask

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(scale=2.0, image=x)
        return self.conv(self.inner(mask=y.sigmoid(), scale=1.0, image=x))


@case()
class Tuples(Net):
    """Blocks that take and return tuples."""

    class Two(Block):
        def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, skip = pair
            return self.conv(x) + skip, x

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Sequential(self.Two(), self.Two(), self.Two())

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc(self.blocks(sum(self.pairs((x, x)))).mean((2, 3)))


@case()
class DataclassesBetweenBlocks(Net):
    class Stage(Block):
        def forward(self, features: Features) -> Features:
            return Features(self.conv(features.map), features.map.mean((2, 3), keepdim=True))

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(self.Stage() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        features = Features(self.stem(x))
        for stage in self.stages:
            features = stage(features)
        return self.fc(self.blocks(features.map * features.scale).mean((2, 3)))


@case(opaque=("stages.0", "stages.1", "stages.2"), reason="(?i)data.?dependent")
class DataclassesOfOpaqueBlocks(DataclassesBetweenBlocks):
    class Stage(Block):
        def forward(self, features: Features) -> Features:
            x = features.map if features.map.mean() > 0 else -features.map
            return Features(self.conv(x), x.mean((2, 3), keepdim=True))


class TwoInputs(Net):
    def forward(self, image: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return super().forward(image if mask is None else image * mask) * scale


def named_inputs(batch: int) -> Inputs:
    (image,) = images(batch)
    return {"mask": (image > 0).float(), "image": image}


def nested_inputs(batch: int) -> Inputs:
    (image,) = images(batch)
    return ({"image": image, "others": [image.sigmoid()]},)


case(name="KeywordInputs", inputs=named_inputs)(TwoInputs)


@case(inputs=nested_inputs)
class NestedInputs(Net):
    def forward(self, batch: dict[str, Any]) -> Tensor:
        return super().forward(batch["image"] * batch["others"][0])


class LoopsOverNestedInputs(NestedInputs):
    """The batch is inside of a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1] = LoopOverBatch()


case(reason="batch size", inputs=nested_inputs)(LoopsOverNestedInputs)


@case(inputs=lambda batch: ((images(batch)[0] * 64 + 128).clamp(0, 255).to(torch.uint8),))
class Bytes(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.fc.weight.dtype) / 255 - 0.5)


# -------------------------------------------------------------------------------------- parameters, buffers


@case()
class CallsOneModuleManyTimes(Block):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.conv(x).relu()
        return x


@case(k=2)
class CallsOneBlockManyTimes(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = self.blocks[1](self.blocks[0](x))
        return self.fc(self.blocks[2](x).mean((2, 3)))


@case()
class TiedWeights(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1][0].weight = self.blocks[0][0].weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.fc(x.mean((2, 3))) + F.linear(x.mean((2, 3)), self.fc.weight)


@case()
class CountsInPlace(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3), keepdim=True), alpha=0.1)
        return self.conv(x - self.mean) / self.calls


@case()
class CountsWithoutGradients(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean((0, 2, 3), keepdim=True), 0.1)
        return self.conv(x - self.mean)


@case(reason="replaces")
class ReplacesBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3), keepdim=True)
        return self.conv(x - self.mean)


@case(opaque=("blocks.1",), exact=False)
class CountsInPython(Block):
    """A warm-up: what it computes depends on an attribute that every call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * min(1.0, self.calls / 10)


@case()
class PlainTensors(Block):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.full((1, 8, 1, 1), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) / torch.tensor([2.0] * 8).view(1, 8, 1, 1))


def normed(norm: Callable[[nn.Module], nn.Module]) -> Callable[[], Net]:
    """The first two convolutions have weights that are computed."""
    def build() -> Net:
        net = Net()
        norm(net.stem[0]), norm(net.blocks[0][0])
        return net

    return build


ZOO["WeightNorm"] = Case(normed(parametrizations.weight_norm))
ZOO["SpectralNorm"] = Case(normed(parametrizations.spectral_norm), exact=False)  # a power iteration per call
ZOO["LegacyWeightNorm"] = Case(normed(nn.utils.weight_norm))
ZOO["LegacySpectralNorm"] = Case(normed(nn.utils.spectral_norm), exact=False)


# -------------------------------------------------------------------------------------------- types, devices


@case()
class Fourier(Block):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16, 9, 2) / 8)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.weight)
        y = torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")
        return x + self.conv(y) + spectrum.abs().mean()


@case()
class ComplexParameter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 1, 1, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.fft.ifft2(torch.fft.fft2(x) * self.weight).real)


class ComplexTrunk(Net):
    """Complex values go through a cut."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        spectrum = torch.fft.fft2(self.blocks[0](x))
        x = self.blocks[1](x) + spectrum.abs() / 16
        return self.fc(self.blocks[2](x + torch.fft.ifft2(spectrum).real).mean((2, 3)))


case()(ComplexTrunk)


@case(inputs=lambda batch: (images(batch)[0].bfloat16(),))
class BFloat16(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()


@case()
class OneBFloat16Block(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.to(self.conv.weight.dtype)).to(x.dtype)


# ------------------------------------------------------------------------------------------ self.training


@case()
class FunctionalDropout(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x), 0.5, training=self.training)


@case()
class FunctionalBatchNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, training=self.training)


@case()
class ReturnsLessInEvaluation(Net):
    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.blocks[0](self.stem(x))
        early = self.early(x.mean((2, 3))) if self.training else None
        x = self.fc(self.blocks[2](self.blocks[1](x)).mean((2, 3)))
        return (x, early) if self.training else x


# -------------------------------------------------------------------------------------------------- in place


@case()
class ReluOnTap(Net):
    """The tap is rectified after later blocks have read it."""

    def forward(self, x: Tensor) -> Tensor:
        tap = self.blocks[0][0](self.stem(x))
        x = self.blocks[1](tap * 1.5)
        tap.relu_()
        return self.fc(self.blocks[2](x).mean((2, 3))) + tap.mean()


@case()
class AddsInPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        tap = self.blocks[0][0](self.stem(x))
        x = self.blocks[1](tap + 1)
        tap += x
        x = self.blocks[2](x + 0.5)
        tap -= 1
        return self.fc(x.mean((2, 3))) + tap.mean()


@case()
class AssignsSlices(Net):
    def forward(self, x: Tensor) -> Tensor:
        tap = self.blocks[0][0](self.stem(x))
        x = self.blocks[1](tap + 1)
        tap[:, :4] = x[:, 4:]
        tap[tap < 0] = 0.5
        return self.fc(self.blocks[2](x * 2).mean((2, 3))) + tap.mean()


@case()
class ChangesViewOfTap(Net):
    """A view, made in one block, is written to behind the next; the tap itself is read at the end."""

    def forward(self, x: Tensor) -> Tensor:
        tap = self.blocks[0][0](self.stem(x))
        view = tap[:, :4]
        x = self.blocks[1](tap + 1)
        view.mul_(2)
        x = self.blocks[2](x + 0.5)
        return self.fc(x.mean((2, 3))) + tap.mean()


@case()
class ChangesTapOfView(Net):
    """The other way round: the view is read at the end."""

    def forward(self, x: Tensor) -> Tensor:
        tap = self.blocks[0][0](self.stem(x))
        view = tap.flatten(1)
        x = self.blocks[1](tap + 1)
        tap.mul_(2).add_(1)
        x = self.blocks[2](x + 0.5)
        return self.fc(x.mean((2, 3))) + view.mean()


@case()
class ChangesViewInOneBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y.flatten(1)[:, :4].zero_()
        y.transpose(1, 2).add_(1)
        y.data.mul_(1)
        return y


@case()
class ChangesItsInput(Block):
    """The layer before it, a sum, is read again after its own output is rectified in place."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        y = self.conv(x * 2)
        x.clamp_(max=1).sub_(0.5)
        return y + x


# ------------------------------------------------------------------------------- gradients, contexts, randomness


@case()
class NoGradients(Block):
    @torch.no_grad()
    def gate(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3), keepdim=True).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.mean() * self.conv.weight.norm()
        return self.conv(x) * self.gate(x) / scale


@case()
class DetachesHalf(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            fixed = x.sigmoid()
        return self.conv(x) + self.conv(x.detach()) * fixed


@case(reason="autocast")
class Autocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.conv(x)
        return x.float()


class Checkpointed(Block):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.conv, x, use_reentrant=self.reentrant) + checkpoint(
            lambda y, scale: torch.tanh(y) * scale, x, 2.0, use_reentrant=self.reentrant)


case(True, name="CheckpointedReentrant", lost="'blocks.1': activation checkpointing")(Checkpointed)
case(False, name="CheckpointedNotReentrant", lost="'blocks.1': activation checkpointing")(Checkpointed)


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


@case(reason="autograd function Rounded")
class OwnFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(self.conv(x) * 4)


@case(reason="random numbers outside of torch", exact=False)
class LayerDrop(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.5 else self.conv(x)


@case(reason="random numbers outside of torch", exact=False)
class LayerDropOfNumpy(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training and np.random.rand() < 0.5 else self.conv(x) * np.random.uniform()


@case(opaque=("blocks.1",), exact=False)
class LayerDropOfTorch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.rand(()) < 0.5 else self.conv(x)


@case(exact=False)
class Noise(Block):
    def forward(self, x: Tensor) -> Tensor:
        keep = torch.empty(x.shape[0], 1, 1, 1).bernoulli_(0.5)
        return self.conv(x + torch.randn_like(x)) * keep + torch.rand(x.shape, device=x.device)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x) + x.mean()


@case(opaque=("blocks.1",))
class Scripted(Block):
    def forward(self, x: Tensor) -> Tensor:
        return scripted(self.conv(x))


@case(reason="(?i)data.?dependent")
class DataDependent(Block):
    """Two branches, each with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        nn.init.constant_(self.conv.bias, 10.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if x.mean() > 0:
            return self.left(x)
        return self.right(x) * 2


@case(opaque=("blocks.1.inner",), reason="(?i)data.?dependent")
class DataDependentInside(Block):
    """Only the innermost module is opaque."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DataDependent()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.conv(x))


@case(opaque=("blocks.1",))
class AsksForValues(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * x.mean().item() + float(x.max()) + len(x[x > 0].tolist())


# ----------------------------------------------------------------------------------------------- the checks

zoo = pytest.mark.parametrize("name", ZOO)


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def built(case: Case) -> nn.Module:
    seed(0)
    return case.build()


def leaves(value: Any) -> list[Any]:
    """What a nested value holds, in order."""
    if is_dataclass(value):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list | tuple) else [value]


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def criterion(outputs: Any, targets: Tensor) -> Tensor:
    losses = [F.cross_entropy(x.float(), targets) if x.shape == (len(targets), CLASSES) else x.square().mean()
              for x in tensors(outputs)]
    return torch.stack(losses).sum()


def copied(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: copied(value) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(map(copied, inputs))
    return inputs.clone()


def run(model: nn.Module, inputs: Inputs, targets: Tensor | None = None) -> Any:
    """One call, always with the same random numbers; the inputs are not changed."""
    seed(7)
    inputs = copied(inputs)
    if isinstance(inputs, dict):
        return model(**inputs) if targets is None else model(**inputs, targets=targets)
    return model(*inputs) if targets is None else model(*inputs, targets)


def labels(batch: int) -> Tensor:
    return torch.arange(batch) % CLASSES


@case()
class CollectsByHooks(Net):
    """Registers hooks on its own layers while it runs, and reads what they saw."""

    def forward(self, x: Tensor) -> Any:
        found: list[Tensor] = []
        handles = [block.register_forward_hook(lambda _, args, out: found.append(out)) for block in self.blocks]
        x = self.blocks(self.stem(x))
        for handle in handles:
            handle.remove()
        return self.fc(torch.cat([part.mean((2, 3)) for part in (*found, x)], 1)[:, -12:]) + found[0].mean()


@case()
class ChangesByHooks(Net):
    def forward(self, x: Tensor) -> Any:
        block = self.blocks[1]
        handles = [
            block.register_forward_pre_hook(lambda _, args: args[0] * 2),
            block.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True),
            block[0].register_forward_hook(lambda _, args, out: out * 3),
            block.register_forward_hook(lambda _, args, kwargs, out: out - 1, with_kwargs=True)]
        try:
            return super().forward(x)
        finally:
            for handle in handles:
                handle.remove()


def assert_same(found: Any, expected: Any) -> None:
    """The same classes and structure, and bit-equal tensors."""
    assert type(found) is type(expected)
    if is_dataclass(expected):
        found, expected = ([getattr(x, f.name) for f in fields(expected)] for x in (found, expected))
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, Tensor):
        assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert found == expected


def compiled(name: str, **options: Any) -> glcan_fx.LocalModel:
    model = built(ZOO[name])
    options = {"k": "natural", **options}
    return glcan_fx.transform(model, criterion=criterion, example_inputs=ZOO[name].inputs(2), **options)


@zoo
def test_training_and_evaluation_are_the_plain_models(name: str) -> None:
    local, plain = compiled(name), built(ZOO[name])
    assert local.plan.k >= ZOO[name].k
    for batch in (2, 5, 3):
        inputs = ZOO[name].inputs(batch)
        expected = run(plain, inputs)
        out = run(local, inputs, labels(batch))
        assert_same(out.output, expected)
        assert not any(t.requires_grad for t in tensors(out.output))
    assert_same(dict(local.original.named_buffers()), dict(plain.named_buffers()))

    criterion(expected, labels(3)).backward()
    out.loss.backward()
    trained = {name for name, p in plain.named_parameters() if p.grad is not None}
    assert trained <= {name for name, p in local.original.named_parameters() if p.grad is not None}
    assert_same(run(local.eval(), inputs), run(plain.eval(), inputs))


@zoo
def test_one_module_has_the_plain_models_gradients(name: str) -> None:
    local, plain = compiled(name, k=1), built(ZOO[name])
    inputs = ZOO[name].inputs(3)
    criterion(run(plain, inputs), labels(3)).backward()
    run(local, inputs, labels(3)).loss.backward()
    found, expected = gradients(local.original), gradients(plain)
    for key, grad in expected.items():
        assert_same(found[key], grad), key


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.exact])
def test_local_gradients_are_autograds(name: str) -> None:
    """The same graph without local backward passes: its losses are summed and differentiated once."""
    local = compiled(name)
    inputs = ZOO[name].inputs(3)
    if isinstance(inputs, dict):
        inputs = tuple(inputs[node.target] for node in local.graph.nodes if node.target in inputs)
    if not all(isinstance(value, Tensor) for value in inputs):
        pytest.skip("the reference takes tensors only")
    seed(7)
    expected = summed_loss_gradients(local, *inputs, labels(3))
    run(local, inputs, labels(3)).loss.backward()
    for key, grad in gradients(local).items():
        assert (grad is None) == (expected[key] is None), key
        if grad is not None:
            assert_close(grad, expected[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Nothing of a model, and no random state, is different afterwards."""
    def portrait() -> dict[str, Any]:
        parts = list(model.named_modules(remove_duplicate=False))
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        hooks = [(name, key, list(value)) for name, part in parts for key, value in vars(part).items()
                 if key.endswith("_hooks")]
        return {
            "values": [(key, value.dtype, value.tolist()) for key, value in model.state_dict().items()],
            "tensors": [(key, id(t), t._version, t.requires_grad, t.grad is None) for key, t in named],
            "modes": [(key, part.training) for key, part in parts],
            "attributes": [(key, {name: id(value) for name, value in vars(part).items()}) for key, part in parts],
            "hooks": hooks,
            "torch": torch.get_rng_state().tolist(), "python": random.getstate(), "numpy": str(np.random.get_state()),
        }

    before = portrait()
    try:
        yield
    finally:
        after = portrait()
        for key, value in before.items():
            assert after[key] == value, key


def report(name: str, model: nn.Module) -> Report:
    return trace(model, ZOO[name].inputs(2)).report


@zoo
def test_plan_leaves_the_model_alone(name: str) -> None:
    model = built(ZOO[name])
    model.blocks[2].eval()
    with untouched(model):
        glcan_fx.plan(model, criterion=criterion, example_inputs=ZOO[name].inputs(2))
    model.eval()
    with untouched(model):
        report(name, model)


@pytest.mark.parametrize("name", ["AsksForSize", "Noise", "DataDependent", "LayerDrop", "CountsInPlace"])
def test_transform_leaves_the_model_alone(name: str) -> None:
    model = built(ZOO[name])
    with untouched(model):
        glcan_fx.transform(model, criterion=criterion, example_inputs=ZOO[name].inputs(2))


@zoo
def test_report(name: str) -> None:
    expected, found = ZOO[name], report(name, built(ZOO[name]))
    assert {o.path for o in found.opaque} == set(expected.opaque), found
    assert found.rung == expected.rung, found
    for opaque in found.opaque:
        assert re.search(expected.reason, opaque.reason), opaque
    if expected.asked:
        assert expected.asked in [s.code for s in found.specialisations], found
    for place in [s.where for s in found.specialisations if s.where != "argument"]:
        path, _, line = place.rpartition(":")
        assert path == __file__
        assert linecache.getline(path, int(line)).strip() in [s.code for s in found.specialisations]
    assert bool(found.lost) == bool(expected.lost) and expected.lost in " ".join(found.lost), found.lost


# ------------------------------------------------------------------------------------------- one at a time


@pytest.mark.parametrize("name", ["FunctionalDropout", "FunctionalBatchNorm", "CountsWithoutGradients"])
def test_a_block_in_evaluation_mode_stays_in_it(name: str) -> None:
    local, plain = compiled(name), built(ZOO[name])
    inputs = ZOO[name].inputs(3)
    usual = run(built(ZOO[name]), inputs)
    for model in (local.original, plain):
        model.blocks[1].eval()
    out = run(local, inputs, labels(3)).output
    assert_same(out, run(plain, inputs).detach())
    assert not torch.equal(out, usual)
    assert_same(dict(local.original.named_buffers()), dict(plain.named_buffers()))


class MostLayers(Net):
    """A cut divides a container whose own forward depends on its mode."""

    class Body(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = F.dropout(block(x), 0.5, training=self.training)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.Body(*self.blocks)


def test_a_container_in_evaluation_mode_stays_in_it_or_is_refused() -> None:
    seed(0)
    model = MostLayers()
    local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=images(2))
    run(local, images(3), labels(3))
    model.blocks.eval()
    with pytest.raises(glcan_fx.ModelChangedError, match="'blocks.training' was True .* is False now"):
        run(local, images(3), labels(3))


@pytest.mark.parametrize("name", ["DataDependent", "DataDependentInside"])
@pytest.mark.parametrize("bias", [10.0, -10.0])
def test_both_branches_of_a_data_dependent_module(name: str, bias: float) -> None:
    local, plain = compiled(name), built(ZOO[name])
    inputs = ZOO[name].inputs(3)
    block = local.original.blocks[1] if name == "DataDependent" else local.original.blocks[1].inner
    nn.init.constant_(block.conv.bias, bias)
    plain.load_state_dict(local.original.state_dict())
    assert_same(run(local, inputs, labels(3)).output, run(plain, inputs).detach())
    plain.load_state_dict(local.original.state_dict())
    run(local, inputs, labels(3)).loss.backward()
    used, unused = (block.left, block.right) if bias > 0 else (block.right, block.left)
    assert used.weight.grad.any()
    assert unused.weight.grad is None or not unused.weight.grad.any()


class Lazy(Block):
    """torch's lazy layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(8, 3, padding=1)


class MadeInForward(Block):
    """Layers, and a parameter, that the first call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: nn.Parameter | None = None
        self.late: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = nn.Parameter(torch.ones(x.shape[1], 1, 1))
            self.late = nn.Conv2d(x.shape[1], 8, 1)
        return self.late(self.conv(x)) * self.scale


@pytest.mark.parametrize("kind", [Lazy, MadeInForward])
def test_parameters_that_the_first_call_makes(kind: type[nn.Module]) -> None:
    model = Net(kind())
    inputs = images(2)
    with untouched(nn.ModuleList([model.stem, model.fc])), pytest.raises(glcan_fx.TraceError, match="call .* once"):
        glcan_fx.plan(model, k="natural", criterion=criterion, example_inputs=inputs)
    assert kind is Lazy or model.blocks[1].late is None
    model(*inputs)
    local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=inputs)
    run(local, inputs, labels(2)).loss.backward()
    assert all(p.grad is not None for p in local.parameters())


class HandsOnSizes(Block):
    """A block that returns its value and something beside it, as attention blocks do that pool their tokens."""

    def forward(self, x: Tensor, beside: Any) -> Any:
        x = x + self.conv(x)
        return x + self.conv(x).relu(), beside


class HandsOnWeights(Block):
    def forward(self, x: Tensor, beside: Any) -> Any:
        gate = self.conv(x).sigmoid()
        x = x + gate * x
        return x + self.conv(x), gate


class HandsOnStateFirst(Block):
    def forward(self, x: Tensor, beside: Any) -> Any:
        state, x = HandsOnWeights.forward(self, x, beside)[::-1]
        return {"state": state, "x": x}


class HandsOnFromOpaque(HandsOnSizes):
    def forward(self, x: Tensor, beside: Any) -> Any:
        return super().forward(x * 2 if float(x.sum()) > 1e9 else x, beside)


class HandsOn(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.fc = layer(3, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(kind() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x, beside = self.stem(x), x.shape[2:]
        for block in self.blocks:
            out = block(x, beside)
            x, beside = (out["x"], out["state"]) if isinstance(out, dict) else out
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("kind", [HandsOnSizes, HandsOnWeights, HandsOnStateFirst, HandsOnFromOpaque])
def test_blocks_that_return_more_than_their_value_are_units(kind: type[nn.Module]) -> None:
    local = glcan_fx.transform(HandsOn(kind), k="natural", criterion=criterion, example_inputs=images(2))
    assert local.plan.cuts == ("stem", "blocks.0", "blocks.1", "blocks.2")
    run(local, images(3), labels(3)).loss.backward()
    assert all(p.grad is not None for p in local.parameters())


def test_places_in_libraries_are_named() -> None:
    *_, found = trace(vit_b_32(weights=None, image_size=64), images(2, size=64)).report.specialisations
    path, _, line = found.where.rpartition(":")
    assert path.endswith("torchvision/models/vision_transformer.py")
    assert linecache.getline(path, int(line)).strip() == found.code


def test_hooks_run_in_blocks_and_in_layers() -> None:
    model, calls = Net(Block()), []
    model.blocks[1].register_forward_hook(lambda module, args, out: calls.append("block"))
    model.blocks[1].conv.register_forward_hook(lambda module, args, out: calls.append("layer"))
    local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=images(2))
    assert not calls
    run(local, images(2), labels(2))
    assert calls == ["layer", "block"]


def test_nothing_keeps_the_model_alive() -> None:
    model = Net()
    plan = glcan_fx.plan(model, k="natural", criterion=criterion, example_inputs=images(2)).plan
    traced = trace(model, images(2)).report
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None, (plan, traced)


def test_another_image_size() -> None:
    for name in ("Einops", "Arange", "PositionTable", "NewZeros", "IsInstanceOfInt", "ForLevelInFeatures"):
        local, plain = compiled(name), built(ZOO[name])
        inputs = images(3, size=48)
        assert_same(run(local, inputs, labels(3)).output, run(plain, inputs).detach())


def test_a_model_that_runs_at_one_batch_size_only_says_so() -> None:
    class Fixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(2, 3, 32, 32))

    (lost,) = trace(Fixed(), images(2)).report.lost
    assert "batch size 3" in lost


# rungs 4 and 5: what the model's own forward does is refused for now


class Root(Net):
    pass


class BranchesOnData(Root):
    line = "if x.mean() > 0:"

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = x * 2
        return super().forward(x)


class AsksForValue(Root):
    line = "return super().forward(x / x.max().item())"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.max().item())


class OwnFunctionAtTheRoot(Root):
    line = "return super().forward(Rounded.apply(x))"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Rounded.apply(x))


class AutocastAtTheRoot(Root):
    line = 'with torch.autocast("cpu", dtype=torch.bfloat16):'

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


class RandomAtTheRoot(Root):
    line = ""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if random.random() < 0.5 else x.flip(3))


class ReplacesBufferAtTheRoot(Root):
    line = ""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3), keepdim=True)
        return super().forward(x - self.mean)


class LoopAtTheRoot(Root):
    line = ""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.stack([x[i] / x[i].norm() for i in range(x.shape[0])]))


class CountsAtTheRoot(Root):
    line = ""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * min(1.0, self.calls / 10)


roots = pytest.mark.parametrize("kind", Root.__subclasses__())


@roots
def test_what_the_root_does_is_refused(kind: type[Root]) -> None:
    model = kind()
    with untouched(model), pytest.raises(glcan_fx.TraceError) as caught:
        trace(model, images(2))
    message = str(caught.value)
    assert kind.__name__ in message
    assert kind.line in message and (not kind.line or f"{__file__}:" in message)
    assert "what to do" in message and "sub-module" in message


@roots
def test_what_the_root_does_is_refused_or_right(kind: type[Root]) -> None:
    seed(0)
    model, plain = kind(), kind()
    plain.load_state_dict(model.state_dict())
    try:
        with untouched(model):
            local = glcan_fx.transform(model, k="natural", criterion=criterion, example_inputs=images(2))
    except glcan_fx.TraceError:
        return
    for batch in (2, 3):
        out = run(local, images(batch), labels(batch))
        assert_same(out.output, run(plain, images(batch)).detach())
    out.loss.backward()
    assert all(p.grad is not None for p in local.parameters())
