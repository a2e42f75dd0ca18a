"""Restorers as people write them: padded inputs, groups of blocks with skips, attention of several kinds."""

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx

WIDTH = 16


class TokenBlock(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.a(self.norm(x))))


@lru_cache
def as_map(shape: tuple[int, int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Of tokens. The sizes come from a first call of that shape, in another block (einops does that)."""
    return shape[0], shape[2], height, width


class Group(nn.Module):
    """Blocks of tokens, and a convolution of their map, under a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TokenBlock() for _ in range(3))
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        y = self.conv(y.transpose(1, 2).reshape(as_map(tuple(x.shape), height, width)))
        return x + y.flatten(2).transpose(1, 2)


class Groups(nn.Module):
    """The input is mirrored to whole windows; the network is cut back behind (SwinIR's successors)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.groups, self.norm = nn.ModuleList(Group() for _ in range(2)), nn.LayerNorm(WIDTH)
        self.up = nn.Conv2d(WIDTH, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        x = torch.cat([x, x.flip(2)], 2)[:, :, : h + h % 8]
        x = torch.cat([x, x.flip(3)], 3)[:, :, :, : w + w % 8]
        skip = self.first(x)
        b, c, height, width = skip.shape
        y = skip.flatten(2).transpose(1, 2)
        for group in self.groups:
            y = group(y, height, width)
        y = self.norm(y).transpose(1, 2).reshape(b, c, height, width)
        return F.pixel_shuffle(self.up(skip + self.last(y)), 2)[:, :, : 2 * h, : 2 * w]


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) + x


class Partition(nn.Module):
    """Leaves its map in windows."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TokenBlock()

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return self.block(x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1))


class Merge(nn.Module):
    """Lays windows out as a map again."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TokenBlock()

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, s, _, c = x.shape
        return self.block(x).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h * s, w * s)


class Gate(nn.Module):
    """Spatial attention on a pooled map (ESA)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        small = self.b(F.max_pool2d(self.a(x), 4, 4))
        return x * self.c(F.interpolate(small, x.shape[-2:], mode="bilinear")).sigmoid()


class Gated(nn.Module):
    """A long skip around blocks in windows, and a gate at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 12, 3, padding=1)
        self.body = nn.Sequential(*(part() for _ in range(3) for part in (Conv, Partition, Merge)))
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return F.pixel_shuffle(self.up(y + self.gate(self.body(y))), 2)


@pytest.mark.parametrize(("kind", "blocks", "largest"), [
    (Groups, [f"groups.{g}.blocks.{b}" for g in range(2) for b in range(3)], 0.25),
    (Gated, ["first", *(f"body.{i}" for i in range(9)), "gate"], 0.15),
])
def test_restorers_are_cut_by_blocks(kind: type[nn.Module], blocks: list[str], largest: float) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(2, 3, 20 if kind is Groups else 16, 16)
    target = torch.rand(2, 3, 2 * x.shape[2], 32)
    local = glcan_fx.transform(model, k="natural", task="super_resolution", example_inputs=x)
    found = [name for module in local.plan.modules for name in (module.name, *(b.name for b in module.blocks))]
    assert not [name for name in blocks if name not in found and f"{name}.block" not in found], found
    assert sum(p.numel() for p in local.aux.parameters()) / (local.plan.k - 1) < largest * sum(
        p.numel() for p in model.parameters())
    local.train()(x, target).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert torch.equal(local.eval()(x), model.eval()(x))


class Blind(nn.Module):
    """A model without any weight matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.norm = nn.Parameter(torch.ones(3, 1, 1)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * self.scale).mean((2, 3))


def test_a_model_without_layers_is_one_local_module() -> None:
    x = torch.rand(4, 3, 8, 8)
    for k in ("natural", "fewest", 1):
        local = glcan_fx.transform(Blind(), k=k, task="classification", example_inputs=x)
        assert local.plan.k == 1
        local(x, torch.arange(4) % 3).loss.backward()
        assert local.norm.weight.grad is not None
    with pytest.raises(glcan_fx.PlanError, match="offers 1 to 1"):
        glcan_fx.transform(Blind(), k=2, task="classification", example_inputs=x)


class Narrowing(nn.Module):
    """The last layers differ, so that auxiliary networks behind values of one shape are not alike."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.Mish())
              for width, out in ((3, 32), (32, 32), (32, 48), (48, 32), (32, 32))))
        self.shortcut = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Mish())
        self.up = nn.Conv2d(32, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.up(self.blocks(x) + self.shortcut(x) - 0.5), 2)


def test_what_is_planned_can_be_built() -> None:
    x = torch.rand(2, 3, 16, 16)
    for width in (1.0, 0.5, 0.25):
        try:
            planned = glcan_fx.plan(Narrowing(), k="natural", task="super_resolution", example_inputs=x, head="light",
                                    width=width)
        except glcan_fx.PlanError:
            assert width < 1  # a narrow copy of the shortcut does not fit the module's own output: said when planned
            continue
        planned.build()(x, torch.rand(2, 3, 32, 32)).loss.backward()
