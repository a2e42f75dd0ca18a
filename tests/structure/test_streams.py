"""Networks of several streams: values side by side are one cut, so that blocks are found as in one stream."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import isolation, owners_of
from torch import Tensor, nn

import glcan_fx
from glcan_fx.peak_memory import PeakMemory


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Encoder(nn.Sequential):
    def __init__(self, channels: int = 3) -> None:
        super().__init__(conv(channels, 8, 2), conv(8, 8), conv(8, 16, 2), conv(16, 16))


class Siamese(nn.Module):
    """The distance of two images."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder, self.dropout, self.fc = Encoder(), nn.Dropout(dropout), nn.Linear(16, 4, bias=False)

    def embed(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.encoder(x)).mean((2, 3)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.pairwise_distance(self.embed(x), self.embed(y))


class Views(Siamese):
    """The distance of an image from its mirror image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, 0.5 * x.flip(3) + 1)


class Triplet(Siamese):
    """All embeddings; the other images come as one tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = x.unbind(1)
        return self.embed(a), self.embed(b), self.embed(c)


class Stereo(nn.Module):
    """The correlation of two maps, which a trunk goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Conv2d(16, 1, 3, padding=1)
        self.decoder = nn.Sequential(conv(4, 16), conv(16, 16), conv(16, 16))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.encoder(left), self.encoder(right)
        volume = torch.stack([(a * b.roll(shift, -1)).mean(1) for shift in range(4)], 1)
        return F.interpolate(self.head(self.decoder(volume)), scale_factor=4)


class TwoStream(nn.Module):
    """Two networks of one kind, each with weights of its own; their maps are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.flow, self.fc = Encoder(3), Encoder(2), nn.Linear(16, 5)
        self.fuse = nn.Sequential(conv(32, 16), conv(16, 16))

    def forward(self, image: Tensor, flow: Tensor) -> Tensor:
        y = self.flow(flow)  # the streams are in the order in which they are read
        return self.fc(self.fuse(torch.cat([self.image(image), y], 1)).mean((2, 3)))


class Frames(nn.Module):
    """A video: one encoder for each frame, and a recurrent cell over them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell, self.fc = Encoder(), nn.GRUCell(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 8)
        for index in range(x.shape[1]):
            state = self.cell(self.encoder(x[:, index]).mean((2, 3)), state)
        return self.fc(state)


class Template(nn.Module):
    """A small image is looked for in a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.scale = Encoder(), nn.Parameter(torch.ones(1))

    def forward(self, small: Tensor, large: Tensor) -> Tensor:
        small, large = self.encoder(small), self.encoder(large)
        n, c, h, w = large.shape
        found = F.conv2d(large.reshape(1, n * c, h, w), small, groups=n)
        return found.transpose(0, 1) * self.scale


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.mlp(x).relu()


class Tokens(nn.Module):
    """Two transformers, each read at its class token, which depends on no image in front of the first attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Conv2d(3, 16, 4, 4) for _ in range(2))
        self.blocks = nn.ModuleList(nn.ModuleList(Attention(16) for _ in range(3)) for _ in range(2))
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(32, 5)

    def read(self, x: Tensor, stream: int) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        x = torch.cat([token, self.embed[stream](x).flatten(2).transpose(1, 2)], 1)
        for block in self.blocks[stream]:
            x = block(x)
        return x[:, 0]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(torch.cat([self.read(x, 0), self.read(y, 1)], 1))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    criterion: Callable[[Any, Tensor], Tensor]
    targets: Callable[[], Tensor]
    cuts: str

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        return tuple(torch.randn(*shape, generator=generator) for shape in self.shapes)

    def compiled(self, **options: Any) -> glcan_fx.LocalModel:
        torch.manual_seed(0)
        return glcan_fx.transform(self.build(), k=options.pop("k", "natural"), criterion=self.criterion,
                                  example_inputs=self.inputs(), **options).train()


def classes() -> Tensor:
    return torch.arange(4)


IMAGE = (4, 3, 16, 16)
ENCODER = "encoder.0 encoder.1 encoder.2"
CASES = {
    "siamese": Case(Siamese, (IMAGE, IMAGE), F.mse_loss, lambda: torch.rand(4), ENCODER),
    "views": Case(Views, (IMAGE,), F.mse_loss, lambda: torch.rand(4), ENCODER),
    "triplet": Case(Triplet, ((4, 3, 3, 16, 16),), lambda out, _: F.triplet_margin_loss(*out), classes, ENCODER),
    "stereo": Case(Stereo, ((2, 3, 16, 32),) * 2, F.smooth_l1_loss, lambda: torch.randn(2, 1, 16, 32),
                   f"{ENCODER} stack decoder.0 decoder.1 decoder.2"),
    "two streams": Case(TwoStream, (IMAGE, (4, 2, 16, 16)), F.cross_entropy, classes,
                        "flow.0 flow.1 flow.2 cat fuse.0"),
    "frames": Case(Frames, ((4, 3, 3, 16, 16),), F.cross_entropy, classes, ENCODER),
    "template": Case(Template, (IMAGE, (4, 3, 32, 32)), F.mse_loss, lambda: torch.randn(4, 1, 5, 5), ENCODER),
    "tokens": Case(Tokens, (IMAGE, IMAGE), F.cross_entropy, classes, "cat blocks.0.0 blocks.0.1"),
}


@pytest.mark.parametrize("name", CASES)
def test_several_streams_are_cut_by_blocks(name: str) -> None:
    case = CASES[name]
    local, inputs, targets = case.compiled(), case.inputs(), case.targets()
    assert " ".join(local.plan.cuts) == case.cuts
    assert not any("no cut" in note for note in local.plan.notes)
    assert any("streams are side by side" in note for note in local.plan.notes)
    assert {"cut_0", "cut_0_1"} <= {*local.stages[1].reads}
    owners = owners_of(local)
    for index, reached in enumerate(isolation(local, *inputs, targets)):  # its own module, of all streams
        mine = {name for name, modules in owners.items() if index in modules and name in reached}
        assert {name for name in reached if not name.startswith("aux.")} == mine
        whole = {name for name, modules in owners.items() if modules == {index}}
        assert whole <= reached

    out = local(*inputs, targets)
    torch.testing.assert_close(out.output, local.original.train()(*inputs))
    out.loss.backward()
    assert not [name for name, p in local.named_parameters() if p.grad is None or not p.grad.any()]
    expected, found = local.original.eval()(*inputs), local.eval()(*inputs)
    assert all(map(torch.equal, expected, found))
    assert glcan_fx.Plan.from_json(local.plan.to_json()) == local.plan


@pytest.mark.parametrize("name", ["stereo", "two streams"])
def test_memory_of_several_streams_is_foretold(name: str) -> None:
    case = CASES[name]
    local, inputs, targets = case.compiled(k=3), case.inputs(), case.targets()
    plan = glcan_fx.plan(case.build(), plan=local.plan)
    optimizer = torch.optim.SGD(local.parameters(), lr=1e-4, momentum=0.9)
    for _ in range(2):
        with PeakMemory(local, optimizer, *inputs) as memory:
            local(*inputs, targets).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert plan.memory.plan.peak == pytest.approx(memory.bytes, rel=0.02)


@pytest.mark.parametrize("method", ["dgl", "hpff", "man"])
def test_methods_read_all_streams(method: str) -> None:
    """Without weights in common, what does not read the other stream would not train it."""
    case = CASES["two streams"]
    if method == "man":
        plan = glcan_fx.plan(case.build(), k="natural", criterion=case.criterion, example_inputs=case.inputs(),
                             method=method)
        assert any("several blocks side by side" in note for note in plan.notes)
        return
    local = case.compiled(method=method, k=["flow.0", "flow.1", "flow.2"])
    local(*case.inputs(), case.targets()).loss.backward()
    assert not [name for name, p in local.named_parameters() if p.grad is None or not p.grad.any()]


def test_streams_share_auxiliary_layers_where_they_share_layers() -> None:
    shared, own = CASES["stereo"].compiled(k=["encoder.0"]), CASES["two streams"].compiled(k=["flow.0"])
    layers = [name for name, _ in shared.aux.get_submodule("0.network").named_modules() if name.endswith(".conv")]
    calls = [node for node in shared.aux.get_submodule("0.network").graph.nodes if node.target in layers]
    assert len(layers) < len(calls)
    convs = dict(own.aux.get_submodule("0.network").named_modules())
    pairs = [(part, convs[name.replace("_1.", ".")]) for name, part in convs.items() if name.endswith("_1.conv")]
    assert pairs and all(a.weight.shape == b.weight.shape and not torch.equal(a.weight, b.weight) for a, b in pairs)


class Texts(nn.Module):
    """How alike two texts are: streams begin with ids. ``asks``: its blocks are called whole, as they ask about values.
    """

    class Block(nn.Module):
        def __init__(self, asks: bool) -> None:
            super().__init__()
            self.norm, self.mlp, self.asks = nn.LayerNorm(16), nn.Linear(16, 16), asks

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            if self.asks and y.mean() > 100:
                y = y / 2
            return x + self.mlp(y).relu()

    def __init__(self, asks: bool = False) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, 16), nn.ModuleList(self.Block(asks) for _ in range(3))

    def read(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x.mean(1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.cosine_similarity(self.read(a), self.read(b))


def test_streams_of_ids() -> None:
    torch.manual_seed(0)
    ids, targets = (torch.randint(50, (4, 6)), torch.randint(50, (4, 6))), torch.rand(4)
    local = glcan_fx.transform(Texts(), k="natural", criterion=F.mse_loss, example_inputs=ids).train()
    assert local.plan.cuts == ("embed", "blocks.0", "blocks.1")
    local(*ids, targets).loss.backward()
    assert not [name for name, p in local.named_parameters() if p.grad is None or not p.grad.any()]


def test_what_may_draw_random_numbers_is_not_side_by_side() -> None:
    ids = torch.randint(50, (4, 6)), torch.randint(50, (4, 6))
    plan = glcan_fx.plan(Texts(asks=True), k="natural", criterion=F.mse_loss, example_inputs=ids)
    assert not any("side by side" in note for note in plan.notes)


def test_random_numbers_keep_their_order() -> None:
    """Dropout in both streams would be drawn in another order: such networks are cut where one value is left."""
    torch.manual_seed(0)
    images = CASES["siamese"].inputs()
    plan = glcan_fx.plan(Siamese(0.5), k="natural", criterion=F.mse_loss, example_inputs=images)
    assert plan.k == 1 and any("no cut between 'encoder.0' … 'encoder.3'" in note for note in plan.notes)


@pytest.mark.parametrize("kind", ["statistics", "random numbers"])
def test_no_cut_changes_the_order(kind: str) -> None:
    """A step computes what only a later local module reads behind the cuts before it: not where the model counts or
    draws it first."""
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.encoder, self.fc = conv(3, 8), Encoder(8), nn.Linear(24, 5)
            self.norm = nn.BatchNorm1d(8) if kind == "statistics" else nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            aside = self.norm((2 * x).mean((2, 3)))
            for index, block in enumerate(self.encoder):
                x = block(x)
                if index == 1:
                    x = x + self.norm(x.mean((2, 3)))[:, :, None, None]
            return self.fc(torch.cat([x.mean((2, 3)), aside], 1))

    torch.manual_seed(0)
    model, x, y = Aside(), torch.randn(4, 3, 16, 16), torch.arange(4)
    local = glcan_fx.transform(model, k="natural", criterion=F.cross_entropy, example_inputs=x).train()
    assert local.plan.cuts[0] == "stem"
    assert any("in another order than the model's" in note and kind in note for note in local.plan.notes)
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    torch.testing.assert_close(local(x, y).output, expected)
    for found, buffer in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, buffer)
