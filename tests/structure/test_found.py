"""Blocks that are found in networks of maps and tokens, and auxiliary networks as small as those of maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(self.norm(x)).relu())


class Windowed(nn.Module):
    """Attention in windows, folded into the batch, on maps of channels last; the queries come from beside."""

    def __init__(self, width: int, side: int = 4) -> None:
        super().__init__()
        self.side, self.norm = side, nn.LayerNorm(width)
        self.kv, self.proj, self.mlp = nn.Linear(width, 2 * width), nn.Linear(width, width), Mlp(width)

    def forward(self, x: Tensor, query: Tensor) -> Tensor:
        b, h, w, c = x.shape
        s = self.side
        windows = self.norm(x).view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)
        k, v = self.kv(windows).chunk(2, -1)
        q = query.repeat_interleave(windows.shape[0] // b, 0)
        y = self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)
        y = y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.mlp(x + y)


class GlobalContext(nn.Module):
    """Windows, with queries that each stage makes from its first map and all of its blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 4, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.query = nn.ModuleList((nn.Linear(8, 8), nn.Linear(16, 16)))
        self.stages = nn.ModuleList(nn.ModuleList(Windowed(width) for _ in range(3)) for width in (8, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            x = x.permute(0, 2, 3, 1)
            pooled = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 4).flatten(2).transpose(1, 2)
            query = self.query[index](pooled)
            for block in stage:
                x = block(x, query)
            x = x.permute(0, 3, 1, 2)
            x = self.down(x) if index == 0 else x
        return self.fc(x.mean((2, 3)))


class LinearNorm(nn.Module):
    """Batch norm of tokens: they are flattened into the batch, and take the shape of what they were again."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(width, out, bias=False), nn.BatchNorm1d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class TokenBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = LinearNorm(width, 2 * width), LinearNorm(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.hardswish(self.a(x)))


class Subsample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        side = int(n**0.5)
        return x.view(b, side, side, c)[:, ::2, ::2].reshape(b, -1, c)


class Levit(nn.Module):
    """Tokens of a map whose norms are of batches, fewer behind a module without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 16, 4, 4), nn.Linear(32, 10)
        self.first = nn.Sequential(*(TokenBlock(16) for _ in range(3)))
        self.fewer, self.wider = Subsample(), LinearNorm(16, 32)
        self.second = nn.Sequential(*(TokenBlock(32) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).flatten(2).transpose(1, 2))
        return self.fc(self.second(self.wider(self.fewer(x))).mean(1))


class ClassTokens(nn.Module):
    """Stages of tokens, each with a class token of its own in front; maps between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList((nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 16, 2, 2)))
        self.token = nn.ParameterList((torch.randn(1, 1, 8), torch.randn(1, 1, 16)))
        self.attention = nn.ModuleList(nn.MultiheadAttention(w, 2, batch_first=True) for w in (8, 8, 16, 16))
        self.mlps = nn.ModuleList(Mlp(w) for w in (8, 8, 16, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for stage in range(2):
            x = self.embed[stage](x)
            b, c, h, w = x.shape
            x = torch.cat((self.token[stage].expand(b, -1, -1), x.flatten(2).transpose(1, 2)), 1)
            for block in (2 * stage, 2 * stage + 1):
                x = self.mlps[block](x + self.attention[block](x, x, x)[0])
            last = x
            x = x[:, 1:].transpose(1, 2).reshape(b, c, h, w)
        return self.fc(last[:, 0])


class Stage(nn.Module):
    """Tokens and class tokens, each made by a layer of its own, are one value in the blocks of a stage, and two
    between stages (PiT)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(width, out, 3, 2, 1), nn.Linear(width, out)
        self.blocks = nn.ModuleList(Attention(out) for _ in range(3))

    def forward(self, x: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        x, token = self.conv(x), self.fc(token)
        b, c, h, w = x.shape
        y = torch.cat((token, x.flatten(2).transpose(1, 2)), 1)
        for block in self.blocks:
            y = block(y)
        return y[:, 1:].transpose(1, 2).reshape(b, c, h, w), y[:, :1]


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(width, 2, batch_first=True), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(x, x, x)[0])


class Stages(nn.Module):
    """No cut lies where a class token stands beside the tokens that it has not looked at: it alone is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 1, 8))
        self.stages, self.fc = nn.ModuleList((Stage(8, 16), Stage(16, 32))), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x, token = self.embed(x), self.token.expand(x.shape[0], -1, -1)
        for stage in self.stages:
            x, token = stage(x, token)
        return self.fc(token[:, 0])


class Blur(nn.Module):
    """A pooling whose window is a buffer, for so many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("window", torch.ones(channels, 1, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.window, stride=2, groups=self.channels)


class Blurred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        def block(i: int, o: int, down: bool) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(),
                                 *[Blur(o)] * down)
        self.blocks = nn.Sequential(block(3, 8, True), block(8, 8, False), block(8, 16, True), block(16, 16, False))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


class CrossStage(nn.Module):
    """A stage in two halves, one of which passes by its blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.blocks, self.out = nn.Sequential(Mlp2d(width), Mlp2d(width)), nn.Conv2d(2 * width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.down(x).relu().chunk(2, 1)
        return self.out(torch.cat((a, self.blocks(b)), 1)).relu()


class Mlp2d(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(64, 10)
        self.stages = nn.Sequential(CrossStage(8), CrossStage(16), CrossStage(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.stem(x)).mean((2, 3)))


class Merging(nn.Module):
    """Patches are merged by reshaping (Swin), which no layer shows to lose positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.merge, self.fc = nn.Conv2d(3, 8, 2, 2), nn.Linear(32, 16), nn.Linear(16, 10)
        self.first = nn.Sequential(*(Mlp(8) for _ in range(3)))
        self.second = nn.Sequential(*(Mlp(16) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x).permute(0, 2, 3, 1))
        b, h, w, c = x.shape
        x = self.merge(x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3))
        return self.fc(self.second(x).mean((1, 2)))


@pytest.mark.parametrize(("kind", "k"), [
    (GlobalContext, 7), (Levit, 7), (ClassTokens, 5), (Blurred, 4), (Partial, 4), (Merging, 7),
    (Stages, 6)])
def test_blocks_are_found_and_learn(kind: type[nn.Module], k: int) -> None:
    torch.manual_seed(0)
    model, images, labels = kind(), torch.randn(4, 3, 32, 32), torch.arange(4)
    local = glcan_fx.transform(model, k="natural", task="classification", example_inputs=images).train()
    assert local.plan.k >= k, local.plan.natural
    local(images, labels).loss.backward()
    idle = [name for name, p in local.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle
    assert torch.equal(local.eval()(images), model.eval()(images))


@pytest.mark.parametrize("kind", [Merging, Partial, Levit])
def test_auxiliary_networks_have_as_many_positions_as_the_model(kind: type[nn.Module]) -> None:
    """Of the first modules, too, though nothing in them is seen to shrink."""
    plan = glcan_fx.plan(kind(), k="natural", task="classification", example_inputs=torch.empty(4, 3, 32, 32))
    model = sum(p.numel() for p in plan.captured.model.parameters())
    assert sum(module.aux_parameters for module in plan.modules) < 3 * model  # copies of stages would be many times it


class Tapped(nn.Module):
    """A plain transformer whose tokens, of several depths, become maps of a pyramid (DPT)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.ModuleList(Mlp(16) for _ in range(8))
        self.up, self.same, self.down = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(16, 8, 1), nn.Conv2d(
            16, 8, 3, 2, 1)
        self.fuse = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, c, h, w = x.shape
        tokens, taps = x.flatten(2).transpose(1, 2), []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in (2, 5, 7):
                taps.append(tokens.transpose(1, 2).reshape(b, c, h, w))
        value = self.fuse[0](self.down(taps[2]))
        value = self.fuse[1](F.interpolate(value, scale_factor=2) + self.same(taps[1]))
        value = self.fuse[2](F.interpolate(value, scale_factor=2) + self.up(taps[0]))
        return F.interpolate(self.head(value), scale_factor=4)


def test_taps_of_a_plain_transformer() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(5, (2, 32, 32))
    local = glcan_fx.transform(Tapped(), k="natural", task="segmentation", example_inputs=images).train()
    assert local.plan.k >= 9
    local(images, labels).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in local.parameters())


class TwoStreams(nn.Module):
    """Two values pass from block to block; crossed: each of them is made of both (TNT, CrossViT), so that there is no
    single one to end a local module with."""

    class Block(nn.Module):
        def __init__(self, crossed: bool) -> None:
            super().__init__()
            self.a, self.b, self.crossed = Mlp2d(8), Mlp2d(8), crossed

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            given = y.mean((2, 3), keepdim=True)
            x = self.a(x + given if self.crossed else x)
            return x, self.b(y + x.mean((2, 3), keepdim=True))

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.stem, self.other, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Linear(8, 10)
        self.blocks = nn.ModuleList(self.Block(crossed) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.other(x)
        for block in self.blocks:
            x, y = block(x, y)
        return self.fc(y.mean((2, 3)))


def test_a_stream_that_another_only_reads() -> None:
    torch.manual_seed(0)
    images, labels, model = torch.randn(4, 3, 32, 32), torch.arange(4), TwoStreams(crossed=False)
    local = glcan_fx.transform(model, k="natural", task="classification", example_inputs=images).train()
    assert local.plan.k >= 6
    local(images, labels).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert torch.equal(local.eval()(images), model.eval()(images))


class Margins(nn.Module):
    """Maps lose a margin before they are halved (YOLOv9's AConv), and by layers without padding."""

    class Down(nn.Module):
        def __init__(self, width: int, out: int, padding: int) -> None:
            super().__init__()
            self.conv, self.block = nn.Conv2d(width, out, 3, 2, padding), Mlp2d(out)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.conv(F.avg_pool2d(x, 2, 1)))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), self.Down(8, 16, 1), self.Down(16, 16, 1)
        self.lateral, self.up = nn.Conv2d(16, 16, 1), nn.ConvTranspose2d(16, 16, 2, 2)
        self.head = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(self.stem(x))
        b = self.b(a)
        return F.interpolate(self.head(torch.cat([self.lateral(a), self.up(b)], 1)), x.shape[-2:])


def test_maps_that_lose_a_margin() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(2, 3, 34, 34), torch.randint(5, (2, 34, 34))
    local = glcan_fx.transform(Margins(), k="natural", task="segmentation", example_inputs=images).train()
    assert local.plan.k >= 3 and not any("no cut" in note for note in local.plan.notes), local.plan.notes
    local(images, labels).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in local.parameters())


def test_blocks_that_cannot_be_told_apart_are_said() -> None:
    images = torch.empty(4, 3, 32, 32)
    plan = glcan_fx.plan(TwoStreams(crossed=True), k="natural", task="classification", example_inputs=images)
    assert plan.k < 6
    assert any("'blocks.0' … 'blocks.4' (5 of class Block): more than one value" in note for note in plan.notes)
    for kind in (Merging, Partial, Levit):
        found = glcan_fx.plan(kind(), k="natural", task="classification", example_inputs=images)
        assert not any("no cut between" in note for note in found.notes)
