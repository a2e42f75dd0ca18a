"""Random small vision networks, for property tests: one dataclass says what to build, hypothesis draws it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

CLASSES = 4


def criterion(outputs: Any, targets: Tensor) -> Any:
    """A loss for any outputs: cross-entropy on logits, squared distance on maps. Dict in, dict out."""
    if isinstance(outputs, dict):
        return {f"loss_{key}": criterion(value, targets) for key, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return sum(criterion(value, targets) for value in outputs)
    if outputs.dim() == 2:
        return F.cross_entropy(outputs, targets)
    return (outputs - targets.reshape(-1, *[1] * (outputs.dim() - 1)).to(outputs) / CLASSES).square().mean()


@dataclass(frozen=True)
class Architecture:
    """A network to build. ``blocks`` holds one tuple (channels, stride) per block behind the stem."""

    family: str
    stem: int
    blocks: tuple[tuple[int, int], ...]
    norm: str = "batch"
    act: str = "inplace"
    size: tuple[int, int] = (16, 16)
    variant: int = 0

    def build(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return FAMILIES[self.family](self)

    def example(self, batch: int = 2) -> Tensor:
        return torch.empty(batch, 3, *self.size)

    def batch(self, batch: int = 3, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(batch, 3, *(size or self.size), generator=generator)
        return images, torch.arange(batch) % CLASSES

    @property
    def resizable(self) -> bool:
        return self.family != "transformer"


# ---------------------------------------------------------------------------------------------------- layers


def _relu_method(x: Tensor) -> Tensor:
    return x.relu_()


ACTIVATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "module": nn.ReLU,
    "inplace": lambda: nn.ReLU(inplace=True),
    "functional": lambda: F.relu,
    "functional_inplace": lambda: partial(F.relu, inplace=True),
    "method_inplace": lambda: _relu_method,
    "silu_inplace": lambda: nn.SiLU(inplace=True),
    "gelu": lambda: F.gelu,
}


class LayerNorm2d(nn.LayerNorm):
    """ConvNeXt's: over the channels of an NCHW map."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(2, channels),
    "layer": LayerNorm2d,
    "none": lambda channels: nn.Identity(),
}


class ConvNorm(nn.Sequential):
    def __init__(
        self, net: Architecture, inputs: int, outputs: int, stride: int = 1, kernel: int = 3, groups: int = 1
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=net.norm == "none")
        super().__init__(conv, NORMS[net.norm](outputs))


class ConvNormAct(nn.Module):
    def __init__(
        self, net: Architecture, inputs: int, outputs: int, stride: int = 1, kernel: int = 3, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = ConvNorm(net, inputs, outputs, stride, kernel, groups)
        self.act = ACTIVATIONS[net.act]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Stem(nn.Sequential):
    """Convolution at stride 2, and a max-pooling for odd variants, as in a ResNet."""

    def __init__(self, net: Architecture, *, act: bool = True) -> None:
        pool = nn.MaxPool2d(3, 1 + net.variant // 2 % 2, 1) if net.variant % 2 else nn.Identity()
        super().__init__((ConvNormAct if act else ConvNorm)(net, 3, net.stem, 2), pool)


# ---------------------------------------------------------------------------------------------------- blocks


class Chain(ConvNormAct):
    def __init__(self, net: Architecture, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(net, inputs, outputs, stride)


class Residual(nn.Module):
    """A basic block; the projection is a module, or None where shapes agree, as in torchvision."""

    def __init__(self, net: Architecture, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = self.make_body(net, inputs, outputs, stride)
        self.act = ACTIVATIONS[net.act]()
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else ConvNorm(net, inputs, outputs, stride, 1)

    def make_body(self, net: Architecture, inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(ConvNormAct(net, inputs, outputs, stride), ConvNorm(net, outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.body(x)
        out += identity
        return self.act(out)


class Bottleneck(Residual):
    def make_body(self, net: Architecture, inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(
            ConvNormAct(net, inputs, 4, kernel=1),
            ConvNormAct(net, 4, 4, stride),
            ConvNorm(net, 4, outputs, kernel=1),
        )


class Grouped(Residual):
    """ResNeXt's grouped convolution, or depthwise for odd variants."""

    def make_body(self, net: Architecture, inputs: int, outputs: int, stride: int) -> nn.Module:
        groups = outputs if net.variant % 2 else 2
        return nn.Sequential(
            ConvNormAct(net, inputs, outputs, kernel=1),
            ConvNormAct(net, outputs, outputs, stride, groups=groups),
            ConvNorm(net, outputs, outputs, kernel=1),
        )


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)
        return x * self.expand(F.relu(self.reduce(gate))).sigmoid()


class Gated(Residual):
    def make_body(self, net: Architecture, inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(super().make_body(net, inputs, outputs, stride), SqueezeExcitation(outputs))


class PreActivation(nn.Module):
    """norm-act-conv twice; without norms it begins with the (perhaps in-place) activation of its input."""

    def __init__(self, net: Architecture, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = NORMS[net.norm](inputs), NORMS[net.norm](outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.act = ACTIVATIONS[net.act]()
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm1(x))
        h = self.conv2(self.act(self.norm2(self.conv1(h))))
        return self.shortcut(x) + h


class Inception(nn.Module):
    """Parallel branches, one of them a pooling, concatenated."""

    def __init__(self, net: Architecture, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.one = ConvNormAct(net, inputs, half, stride, 1)
        self.three = nn.Sequential(
            ConvNormAct(net, inputs, 4, kernel=1), ConvNormAct(net, 4, outputs - half, stride)
        )
        self.pool = nn.MaxPool2d(3, stride, 1)
        self.project = ConvNormAct(net, inputs, half, kernel=1)
        self.merge = ConvNormAct(net, outputs + half, outputs, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.one(x), self.three(x), self.project(self.pool(x))]
        return self.merge(torch.cat(branches, dim=1))


class Dense(nn.Module):
    """Two layers that each read everything before them, and a transition."""

    def __init__(self, net: Architecture, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = ConvNormAct(net, inputs, 4), ConvNormAct(net, inputs + 4, 4)
        self.transition = ConvNormAct(net, inputs + 8, outputs, kernel=1)
        self.pool = nn.AvgPool2d(2, ceil_mode=bool(net.variant % 2)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in (self.first, self.second):
            features.append(layer(torch.cat(features, 1)))
        return self.pool(self.transition(torch.cat(features, 1)))


# -------------------------------------------------------------------------------------------------- networks


def _make_blocks(net: Architecture, block: Callable[..., nn.Module]) -> list[nn.Module]:
    channels, made = net.stem, []
    for outputs, stride in net.blocks:
        made.append(block(net, channels, outputs, stride))
        channels = outputs
    return made


class Classifier(nn.Module):
    """Stem, blocks, global pooling, linear layer."""

    def __init__(self, net: Architecture, block: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.stem = Stem(net, act=block is not PreActivation)
        self.blocks = nn.Sequential(*_make_blocks(net, block))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(net.blocks[-1][0], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class Inline(nn.Module):
    """Layers that only ``forward`` connects: no block is a module, one activation serves all of them."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, net.stem, 3, 2, 1)
        self.act = ACTIVATIONS[net.act]()
        self.convs, self.norms, self.others = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = net.stem
        for outputs, stride in net.blocks:
            self.convs.append(nn.Conv2d(channels, outputs, 3, stride, 1))
            self.norms.append(NORMS[net.norm](outputs))
            self.others.append(nn.Conv2d(channels, outputs, 1, stride))
            channels = self.width(channels, outputs)
        self.fc = nn.Linear(channels, CLASSES)

    def width(self, inputs: int, outputs: int) -> int:
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm, other in zip(self.convs, self.norms, self.others, strict=True):
            x = self.connect(x, conv, norm, other)
        return self.fc(x.mean((2, 3)))

    def connect(self, x: Tensor, conv: nn.Module, norm: nn.Module, other: nn.Module) -> Tensor:
        return self.act(norm(conv(x)) * other.bias.view(1, -1, 1, 1).sigmoid() + other(x))


class InlineChain(Inline):
    def __init__(self, net: Architecture) -> None:
        super().__init__(net)
        self.others = nn.ModuleList(nn.Conv2d(channels, channels, 1) for channels, _ in net.blocks)

    def connect(self, x: Tensor, conv: nn.Module, norm: nn.Module, other: nn.Module) -> Tensor:
        x = self.act(norm(conv(x)))
        return self.act(other(x))


class InlineDense(Inline):
    def width(self, inputs: int, outputs: int) -> int:
        return 2 * outputs

    def connect(self, x: Tensor, conv: nn.Module, norm: nn.Module, other: nn.Module) -> Tensor:
        y = self.act(norm(conv(x)))
        return torch.cat([y, other(x)], 1)


class UNet(nn.Module):
    """Encoder, decoder, skips by concatenation; every block with stride 2 is a level."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.stem = ConvNormAct(net, 3, net.stem)
        self.encoder = nn.ModuleList(_make_blocks(net, Residual if net.variant % 2 else Chain))
        widths = [net.stem, *(channels for channels, _ in net.blocks)]
        self.decoder = nn.ModuleList(
            ConvNormAct(net, below + above, above)
            for below, above in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.predict = nn.Conv2d(net.stem, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for stage in self.encoder:
            skips.append(x)
            x = stage(x)
        for stage in self.decoder:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = stage(torch.cat([x, skip], 1))
        return self.predict(x)


class Pyramid(nn.Module):
    """Feature pyramid over every resolution; returns a dict, a list or a tuple of maps."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.kind = (dict, list, tuple)[net.variant % 3]
        self.stem = Stem(net)
        self.blocks = nn.ModuleList(_make_blocks(net, Residual))
        last = [i for i, _ in enumerate(net.blocks) if i + 1 == len(net.blocks) or net.blocks[i + 1][1] > 1]
        self.last = last
        self.lateral = nn.ModuleList(nn.Conv2d(net.blocks[i][0], 4, 1) for i in last)
        self.smooth = nn.ModuleList(ConvNormAct(net, 4, 4) for _ in last)
        self.predict = nn.Conv2d(4, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        taps = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.last:
                taps.append(x)
        maps: list[Tensor] = []
        for tap, lateral in zip(taps[::-1], list(self.lateral)[::-1], strict=True):
            merged = lateral(tap)
            if maps:
                merged = merged + F.interpolate(maps[-1], size=merged.shape[-2:])
            maps.append(merged)
        found = [self.predict(smooth(level)) for smooth, level in zip(self.smooth, maps[::-1], strict=True)]
        return {f"p{i}": level for i, level in enumerate(found)} if self.kind is dict else self.kind(found)


class Supervised(nn.Module):
    """Deep supervision: a classifier in the middle as well as at the end."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.stem = Stem(net)
        self.blocks = nn.ModuleList(_make_blocks(net, Residual))
        self.middle = len(net.blocks) // 2
        self.early = nn.Linear(net.blocks[self.middle][0], CLASSES)
        self.late = nn.Linear(net.blocks[-1][0], CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        out = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == self.middle:
                out["early"] = self.early(x.mean((2, 3)))
        out["late"] = self.late(x.mean((2, 3)))
        return out


class SuperResolution(nn.Module):
    """EDSR's shape: a long skip around all blocks, then pixel shuffle."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, net.stem, 3, padding=1)
        self.body = nn.Sequential(*(Residual(net, net.stem, net.stem, 1) for _ in net.blocks))
        self.last = nn.Conv2d(net.stem, net.stem, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(net.stem, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.up(x + self.last(self.body(x)))


class Denoiser(nn.Module):
    """Nothing grows or is pooled before the output. Odd variants predict the noise, as DnCNN does."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.stem = ConvNormAct(net, 3, net.stem)
        self.body = nn.Sequential(*_make_blocks(net, Chain))
        self.last = nn.Conv2d(net.blocks[-1][0], 3, 3, padding=1)
        self.subtract = net.variant % 2 and all(stride == 1 for _, stride in net.blocks)

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(self.body(self.stem(x)))
        return x - out if self.subtract else out


class Recurrent(nn.Module):
    """The same block several times: its parameters belong to several local modules."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        self.stem = Stem(net)
        self.block = Residual(net, net.stem, net.stem, 1)
        self.times = len(net.blocks)
        self.fc = nn.Linear(net.stem, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(self.times):
            x = self.block(x)
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """A pre-norm transformer block, with hand-written or torch's attention."""

    def __init__(self, width: int, *, own: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width) if own else None
        self.attention = None if own else nn.MultiheadAttention(width, 2, batch_first=True)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        if self.qkv is not None:
            batch, tokens, width = h.shape
            q, k, v = self.qkv(h).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        else:
            h = self.attention(h, h, h, need_weights=False)[0]
        x = x + self.project(h)
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Patches, position table, blocks; reads a class token or the mean token."""

    def __init__(self, net: Architecture) -> None:
        super().__init__()
        height, width = (size // 4 for size in net.size)
        self.embed = nn.Conv2d(3, net.stem, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, net.stem)) if net.variant % 2 else None
        self.position = nn.Parameter(torch.randn(1, height * width + net.variant % 2, net.stem) / 4)
        own = net.variant // 2 % 2 == 0
        self.blocks = nn.ModuleList(Attention(net.stem, own=own) for _ in net.blocks)
        self.norm = nn.LayerNorm(net.stem)
        self.head = nn.Linear(net.stem, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.position
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x.mean(1) if self.token is None else x[:, 0])


def _classifier(block: Callable[..., nn.Module]) -> Callable[[Architecture], nn.Module]:
    return lambda net: Classifier(net, block)


FAMILIES: dict[str, Callable[[Architecture], nn.Module]] = {
    "chain": _classifier(Chain),
    "residual": _classifier(Residual),
    "bottleneck": _classifier(Bottleneck),
    "grouped": _classifier(Grouped),
    "gated": _classifier(Gated),
    "preactivation": _classifier(PreActivation),
    "inception": _classifier(Inception),
    "dense": _classifier(Dense),
    "inline_chain": InlineChain,
    "inline_residual": Inline,
    "inline_dense": InlineDense,
    "recurrent": Recurrent,
    "supervised": Supervised,
    "unet": UNet,
    "pyramid": Pyramid,
    "super_resolution": SuperResolution,
    "denoiser": Denoiser,
    "transformer": Transformer,
}


@st.composite
def architectures(draw: st.DrawFn, family: str) -> Architecture:
    """Two to four blocks with at most two reductions, on images of 12 to 19 pixels."""
    stem = draw(st.sampled_from([4, 8]))
    blocks: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(2, 4))):
        stride = draw(st.sampled_from([1, 2])) if sum(s > 1 for _, s in blocks) < 2 else 1
        before = blocks[-1][0] if blocks else stem
        keep = stride == 1 and draw(st.booleans())
        blocks.append((before if keep else draw(st.sampled_from([4, 8, 12])), stride))
    pixels = st.sampled_from([12, 16]) if family == "transformer" else st.integers(12, 19)
    return Architecture(
        family,
        stem,
        tuple(blocks),
        norm=draw(st.sampled_from(list(NORMS))),
        act=draw(st.sampled_from(list(ACTIVATIONS))),
        size=(draw(pixels), draw(pixels)),
        variant=draw(st.integers(0, 5)),
    )
