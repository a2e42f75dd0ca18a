"""What a network does to what its last layer makes (a softmax, a shift) is done in every auxiliary network."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx


class Network(nn.Module):
    """Three blocks on maps, tokens or the steps of a sequence, a last layer, and what follows it."""

    def __init__(self, kind: str, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.kind, self.end = kind, end
        sizes = (6, 16), (16, 16), (16, 16)
        if kind == "maps":
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU()) for i, o in sizes)
        elif kind == "tokens":
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(i, o), nn.LayerNorm(o), nn.ReLU()) for i, o in sizes)
        else:
            self.blocks = nn.ModuleList(nn.GRU(i, o, batch_first=True) for i, o in sizes)
        self.last: nn.Module = nn.Conv2d(16, 5, 1) if kind == "maps" else nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)[0] if self.kind == "steps" else block(x)
        return self.end(self.last(x))


class Classifier(nn.Module):
    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.end, self.fc = end, nn.Linear(8, 5)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(6 if i == 0 else 8, 8, 3, padding=1), nn.BatchNorm2d(8),
                                                    nn.ReLU()) for i in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.fc(self.blocks(x).mean((2, 3))))


def is_probability(x: Tensor) -> bool:
    return torch.allclose(x.sum(1), torch.ones(()), atol=1e-5) or torch.allclose(x.sum(-1), torch.ones(()), atol=1e-5)


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * torch.tanh(x) + 100


ENDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], bool]]] = {
    "softmax": (nn.Softmax(1), is_probability),
    "log_softmax": (lambda x: F.log_softmax(x, -1), lambda x: is_probability(x.exp())),
    "sigmoid": (torch.sigmoid, lambda x: bool(((x > 0) & (x < 1)).all())),
    "a shift": (Shift(), lambda x: bool(((x >= 98) & (x <= 102)).all())),
    "laid out otherwise": (lambda x: x.transpose(0, 1).softmax(-1), is_probability),
}


@pytest.mark.parametrize(("kind", "method"), [
    ("maps", "glcan"), ("tokens", "glcan"), ("steps", "glcan"), ("a vector", "glcan"), ("maps", "dgl"),
    ("a vector", "dgl")])
@pytest.mark.parametrize("end", ENDS)
def test_predictions_end_as_the_models_do(end: str, kind: str, method: str) -> None:
    function, right = ENDS[end]
    torch.manual_seed(0)
    x = torch.randn(4, 10, 6) if kind in ("tokens", "steps") else torch.randn(4, 6, 12, 12)
    model = Classifier(function) if kind == "a vector" else Network(kind, function)
    seen: list[Tensor] = []

    def criterion(output: Tensor, _: Tensor) -> Tensor:
        seen.append(output.detach())
        return (output * torch.arange(output.numel()).view(output.shape)).mean()

    local = glcan_fx.transform(model, k="natural", method=method, criterion=criterion, example_inputs=x).train()
    assert local.plan.k == (3 if kind == "a vector" else 4)
    seen.clear()
    local(x, x).loss.backward()
    assert len(seen) == local.plan.k and all(output.shape == model(x).shape and right(output) for output in seen)
    assert all(p.grad is not None for p in local.parameters())


class MeanAndDeviation(nn.Module):
    """Two layers side by side."""

    def __init__(self, layer: type[nn.Module], *sizes: int) -> None:
        super().__init__()
        self.mean, self.deviation = layer(16, 3, *sizes), layer(16, 3, *sizes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mean(x), F.softplus(self.deviation(x))], 1)


class Gated(MeanAndDeviation):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.mean(x)) * torch.sigmoid(self.deviation(x))


class Halves(nn.Module):
    """One layer, of whose halves different things become."""

    def __init__(self, layer: type[nn.Module], *sizes: int) -> None:
        super().__init__()
        self.both = layer(16, 6, *sizes)

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.both(x).chunk(2, 1)
        return torch.cat([mean, deviation.exp()], 1)


class Prototypes(nn.Module):
    """Cosines with vectors that are parameters."""

    def __init__(self, layer: type[nn.Module], *sizes: int) -> None:
        super().__init__()
        self.layer, self.vectors = layer(16, 8, *sizes), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bc...,kc->bk...", F.normalize(self.layer(x), dim=1), F.normalize(self.vectors, dim=1))


class Backbone(nn.Module):
    def __init__(self, head: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.head, self.pooled = head, pooled
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(6 if i == 0 else 16, 16, 3, padding=1),
                                                    nn.BatchNorm2d(16), nn.ReLU()) for i in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.head(x.mean((2, 3)) if self.pooled else x)


@pytest.mark.parametrize("method", ["glcan", "dgl"])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(("head", "right"), [
    (MeanAndDeviation, lambda x: (x[:, 3:] > 0).all()), (Gated, lambda x: ((x >= 0) & (x <= 1)).all()),
    (Halves, lambda x: (x[:, 3:] > 0).all()), (Prototypes, lambda x: (x.abs() < 1.001).all())])
def test_heads_of_several_layers(
    head: type[nn.Module], right: Callable[[Tensor], Tensor], pooled: bool, method: str
) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(4, 6, 12, 12), Backbone(head(nn.Linear) if pooled else head(nn.Conv2d, 1), pooled)
    seen: list[Tensor] = []

    def criterion(output: Tensor, _: Tensor) -> Tensor:
        seen.append(output.detach())
        return (output * torch.arange(output.numel()).view(output.shape)).mean()

    local = glcan_fx.transform(model, k="natural", method=method, criterion=criterion, example_inputs=x).train()
    seen.clear()
    local(x, x).loss.backward()
    assert len(seen) == local.plan.k >= 3 and all(right(output) for output in seen)
    assert all(p.grad is not None and p.grad.any() for p in local.parameters())
