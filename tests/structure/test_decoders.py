"""Encoders below decoders of many kinds: the encoder is the trunk, however large the decoder's maps are."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx

WIDTHS = 8, 16, 32


def conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = conv(width, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(self.a(x)))


class Encoder(nn.Module):
    """Six blocks in three stages behind a stem at full resolution; returns the stem's map and the stages'."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.stages = nn.ModuleList(
            nn.Sequential(conv(before, width, 2), Block(width), Block(width))
            for before, width in zip((8, *WIDTHS), WIDTHS, strict=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps


def up(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:])


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class Nested(nn.Module):
    """UNet++: a triangle of decoders, most of them at the highest resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        widths = (8, *WIDTHS)
        self.up = nn.ModuleDict({
            f"{row}_{column}": conv(widths[row] * column + widths[row + 1], widths[row])
            for row in range(3) for column in range(1, 4 - row)})
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = {(row, 0): value for row, value in enumerate(self.encoder(x))}
        for column in range(1, 4):
            for row in range(4 - column):
                row_before = [maps[row, before] for before in range(column)]
                below = up(maps[row + 1, column - 1], row_before[0])
                maps[row, column] = self.up[f"{row}_{column}"](torch.cat([*row_before, below], 1))
        return self.head(maps[0, 3])


class Gated(nn.Module):
    """A U-Net whose decoder gates its skips by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        widths = (8, *WIDTHS)
        self.gates = nn.ModuleList(Gate(width) for width in widths[:3])
        self.up = nn.ModuleList(conv(a + b, a) for a, b in zip(widths[:3], widths[1:], strict=True))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        *skips, y = self.encoder(x)
        for index in reversed(range(3)):
            y = self.up[index](torch.cat([self.gates[index](skips[index]), up(y, skips[index])], 1))
        return self.head(y)


class WideHead(nn.Module):
    """All maps, projected and enlarged, meet in one wide map of high resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.project = nn.ModuleList(nn.Conv2d(width, 64, 1) for width in (8, *WIDTHS))
        self.fuse, self.head = conv(4 * 64, 64), nn.Conv2d(64, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.encoder(x)
        same = [up(project(value), maps[0]) for project, value in zip(self.project, maps, strict=True)]
        return self.head(self.fuse(torch.cat(same, 1)))


class PooledCentre(nn.Module):
    """A pyramid of pooled maps, an average of the whole map among them, gates what a top-down path enlarges."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.average, self.middle, self.down = conv(32, 16), conv(32, 16), conv(32, 16, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(width, 16, 1) for width in (8, *WIDTHS[:2]))
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        *maps, deep = self.encoder(x)
        y = up(self.average(F.adaptive_avg_pool2d(deep, 1)), deep) + up(self.down(deep), deep) * self.middle(deep)
        for index in reversed(range(3)):
            y = self.lateral[index](maps[index]) * y.mean((2, 3), keepdim=True) + up(y, maps[index])
        return self.head(y)


@pytest.mark.parametrize("kind", [Nested, Gated, WideHead, PooledCentre])
def test_the_encoder_is_cut_by_blocks(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(2, 3, 32, 32)
    local = glcan_fx.transform(model, k="natural", task="segmentation", example_inputs=x)
    names = " ".join(module.name for module in local.plan.modules)
    for stage in range(3):
        for block in (1, 2):
            last = stage == 2 and block == 2  # the last one may be named by what the decoder makes of it
            assert last or f"stages.{stage}.{block}" in names, names
    local.train()(x, torch.randint(5, (2, 32, 32))).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle
