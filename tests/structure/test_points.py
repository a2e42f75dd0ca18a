"""Networks of what is no image: points, graphs, waves, volumes, answers that are improved again and again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx


def layer(rank: int, inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1](inputs, outputs, kernel, stride, kernel // 2)
    return nn.Sequential(conv, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](outputs), nn.ReLU())


class Points(nn.Module):
    """Points (N, 3, P), turned by a small network of their own, through layers that they share; their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(layer(1, 3, 16, kernel=1), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(16, 9))
        self.shared = nn.Sequential(*(layer(1, i, o, kernel=1) for i, o in [(3, 16), (16, 16), (16, 32), (32, 32)]))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.turn(x).view(-1, 3, 3) + torch.eye(3, device=x.device)
        return self.head(self.shared(turn @ x).amax(-1))


class EachPoint(nn.Module):
    """A class for each point (N, P, 3), of its own features and of the maximum of all."""

    class Shared(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2).relu()

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.ModuleList(self.Shared(i, o) for i, o in [(3, 16), (16, 16), (16, 32), (32, 32)])
        self.out = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.shared:
            x = block(x)
        whole = x.max(1, keepdim=True)[0].expand(-1, x.shape[1], -1)
        return self.out(torch.cat([x, whole], -1)).transpose(1, 2)


class Neighbours(nn.Module):
    """Points with the nearest ones by their features, found anew in front of every layer (DGCNN)."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.ModuleList(layer(2, 2 * i, o, kernel=1) for i, o in [(3, 8), (8, 8), (8, 16), (16, 16)])
        self.last, self.head = layer(1, 48, 32, kernel=1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for edges in self.edges:
            near = torch.cdist(x.mT, x.mT).topk(4, largest=False)[1]
            b, c, p = x.shape
            rows = (near + torch.arange(b, device=x.device)[:, None, None] * p).flatten()
            own = x.mT[:, :, None].expand(-1, -1, 4, -1)
            others = x.mT.reshape(b * p, c)[rows].view(b, p, 4, c)
            x = edges(torch.cat([others - own, own], -1).permute(0, 3, 1, 2).contiguous()).max(-1)[0]
            found.append(x)
        return self.head(self.last(torch.cat(found, 1)).amax(-1))


class Samples(nn.Module):
    """Every second point, with the nearest ones before, again and again: positions go along, beside features
    (PointNet++)."""

    class Fewer(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.shared = nn.Sequential(layer(2, inputs + 3, outputs, kernel=1), layer(2, outputs, outputs, kernel=1))

        def forward(self, places: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            fewer = places[:, ::2]
            near = torch.cdist(fewer, places).topk(4, largest=False)[1]
            batch = torch.arange(places.shape[0], device=places.device)[:, None, None]
            groups = torch.cat([places[batch, near] - fewer[:, :, None], x[batch, near]], -1)
            return fewer, self.shared(groups.permute(0, 3, 1, 2)).amax(3).mT

    def __init__(self) -> None:
        super().__init__()
        self.fewer = nn.ModuleList(self.Fewer(i, o) for i, o in [(3, 16), (16, 32), (32, 32)])
        self.head = nn.Linear(32, 5)

    def forward(self, places: Tensor) -> Tensor:
        x = places
        for fewer in self.fewer:
            places, x = fewer(places, x)
        return self.head(x.amax(1))


class Molecule(nn.Module):
    """Graphs in one list of nodes, edges with features; a class for each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.node, self.edge, self.head = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 3)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(4))

    def forward(self, x: Tensor, edges: Tensor, features: Tensor, graph: Tensor) -> Tensor:
        x, features = self.node(x), self.edge(features)
        for block in self.blocks:
            message = (x[edges[0]] + features).relu()
            x = x + block(x + torch.zeros_like(x).index_add(0, edges[1], message)).relu()
        return self.head(x.new_zeros(3, 16).index_add(0, graph, x))


class Volume(nn.Module):
    """A U-Net of volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([layer(3, 1, 4), layer(3, 4, 8, 2), layer(3, 8, 16, 2)])
        self.up, self.head = nn.ModuleList([layer(3, 24, 8), layer(3, 12, 4)]), nn.Conv3d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for down in self.down:
            x = down(x)
            maps.append(x)
        for up, skip in zip(self.up, maps[1::-1], strict=True):
            x = up(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return self.head(x)


class Refined(nn.Module):
    """A recurrent core: an answer that one cell improves several times, each time of the same map; all answers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(layer(2, 3, 8, 2), layer(2, 8, 16), layer(2, 16, 16))
        self.gate, self.new, self.out = (nn.Conv2d(i, o, 3, padding=1) for i, o in [(33, 16), (33, 16), (16, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.encoder(x)
        state, answer, answers = torch.tanh(x), torch.zeros_like(x[:, :1]), []
        for _ in range(3):
            seen = torch.cat([state, x, answer], 1)
            gate = self.gate(seen).sigmoid()
            state = (1 - gate) * state + gate * self.new(seen).tanh()
            answer = answer + self.out(state)
            answers.append(answer)
        return answers


def wave() -> nn.Module:
    """A long one-dimensional signal."""
    return nn.Sequential(layer(1, 1, 8, 4, 9), layer(1, 8, 16, 4, 9), layer(1, 16, 16, 1, 9), layer(1, 16, 32, 4, 9),
                         nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    targets: Callable[[], Tensor]
    k: int
    criterion: Callable[[Any, Tensor], Any] = F.cross_entropy


def classes() -> Tensor:
    return torch.arange(4)


def squares(answers: list[Tensor], target: Tensor) -> Tensor:
    return torch.stack([F.mse_loss(answer, target) for answer in answers]).sum()


CASES = {
    "points": Case(Points, lambda: (torch.randn(4, 3, 32),), classes, 5),
    "each point": Case(EachPoint, lambda: (torch.randn(4, 32, 3),), lambda: torch.randint(5, (4, 32)), 5),
    "neighbours": Case(Neighbours, lambda: (torch.randn(4, 3, 32),), classes, 4),
    "samples": Case(Samples, lambda: (torch.randn(4, 32, 3),), classes, 3),
    "molecule": Case(Molecule, lambda: (torch.randn(12, 8), torch.randint(12, (2, 20)), torch.randn(20, 4),
                                        torch.arange(12) % 3), lambda: torch.arange(3), 6),
    "wave": Case(wave, lambda: (torch.randn(4, 1, 512),), classes, 4),
    "volume": Case(Volume, lambda: (torch.randn(2, 1, 8, 8, 8),), lambda: torch.randint(2, (2, 8, 8, 8)), 3),
    "refined": Case(Refined, lambda: (torch.randn(2, 3, 16, 16),), lambda: torch.randn(2, 1, 8, 8), 6, squares),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_found_and_learn(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model, inputs, targets = case.build(), case.inputs(), case.targets()
    local = glcan_fx.transform(model, k="natural", criterion=case.criterion, example_inputs=inputs).train()
    assert local.plan.k >= case.k and not any("no cut" in note for note in local.plan.notes), local.plan.notes
    assert sum(module.aux_parameters for module in local.plan.modules) < 3 * sum(p.numel() for p in model.parameters())
    out = local(*inputs, targets)
    torch.testing.assert_close(out.output, model.train()(*inputs))
    out.loss.backward()
    assert not [name for name, p in local.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(map(torch.equal, local.eval()(*inputs), model.eval()(*inputs)))


def test_blocks_that_hand_on_positions_are_cut_apart() -> None:
    plan = glcan_fx.plan(Samples(), k="natural", criterion=F.cross_entropy, example_inputs=torch.empty(4, 32, 3))
    assert plan.cuts == ("fewer.0", "fewer.1")


def test_a_cut_hands_on_the_smallest_value() -> None:
    """Not the neighbours of every point, which the next layer is given, but the points."""
    plan = glcan_fx.plan(Neighbours(), k="natural", criterion=F.cross_entropy, example_inputs=torch.empty(4, 3, 32))
    assert [module.shape for module in plan.modules[:-1]] == [(4, 8, 32), (4, 8, 32), (4, 16, 32)]
