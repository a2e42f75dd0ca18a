"""aux_hidden: layers in front of global average pooling, where a classifier's tail begins with one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import glcan_fx
from glcan_fx import PlanError
from glcan_fx.methods import GLCAN
from glcan_fx.models import edsr
from glcan_fx.plans.plan import Plan


class Net(nn.Module):
    """Convolutions of any rank; the mean as a method."""

    def __init__(self, rank: int = 2, norm: bool = True) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
        batch_norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
        self.blocks = nn.Sequential(*(
            nn.Sequential(conv(a, b, 3, stride, 1), batch_norm(b) if norm else nn.Identity(), nn.GELU())
            for a, b, stride in ((3, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 16, 1))))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean(tuple(range(2, x.dim()))))


class Pooled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


class Window(Net):
    """As CIFAR's ResNets are often written: a window of the map's size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.avg_pool2d(self.blocks(x), 12).flatten(1))


class Flat(Net):
    """The mean of another rank than the norm layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).flatten(2).mean(-1))


class Slopes(nn.Module):
    """Activations that cannot be made narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(width, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.PReLU(16))
                                      for width in (3, 16, 16, 16)))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


class Tokens(nn.Module):
    """Channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU()) for _ in range(3)))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((1, 2)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "method": (Net, (3, 24, 24)), "function": (Pooled, (3, 24, 24)), "window": (Window, (3, 24, 24)),
    "flat": (Flat, (3, 24, 24)), "no norm": (lambda: Net(norm=False), (3, 24, 24)),
    "rank 1": (lambda: Net(1), (3, 48)),
    "rank 3": (lambda: Net(3), (3, 12, 12, 12)),
    "channels last": (Tokens, (3, 32, 32)), "small": (Net, (3, 4, 4)),
    "module": (lambda: torchvision.models.resnet18(num_classes=5), (3, 96, 96)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [4, 1])
def test_hidden_layers_are_trained(name: str, batch: int) -> None:
    """Whatever kind of mean follows, and with one image, too, where batch norms have statistics of the rest."""
    torch.manual_seed(0)
    make, size = MODELS[name]
    model = make()
    x, y = torch.randn(batch, *size), torch.randint(5, (batch,))
    plan = glcan_fx.plan(model, k="natural", task="classification", example_inputs=x,
                         method=GLCAN(hidden=3, width=0.5, head="lean"))
    assert plan.method.hidden == 3 and "3 hidden layers" in str(plan) and Plan.from_json(plan.to_json()) == plan
    local = glcan_fx.transform(model, plan=plan).train()
    hidden = {n: p for n, p in local.named_parameters() if ".hidden_" in n and n.endswith("conv.weight")}
    assert len(hidden) == 3 * (plan.k - 1)
    before = {n: p.detach().clone() for n, p in hidden.items()}
    optimizer = torch.optim.SGD(local.parameters(), 0.1)
    local(x, y).loss.backward()
    optimizer.step()
    assert not any(torch.equal(p, before[n]) for n, p in hidden.items())


def test_what_they_are() -> None:
    """3x3 on half the size, then a perceptron that begins with a few places; of the auxiliary network's width."""
    x = torch.empty(2, 3, 24, 24, device="meta")
    local = glcan_fx.transform(Net(), k=2, task="classification", example_inputs=x, method=GLCAN(hidden=3, width=0.5))
    shapes = []
    network = local.aux.get_submodule("0.network").train()
    for name, part in network.named_modules():
        if "hidden_" in name and isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda part, args, out: shapes.append(
                (part.kernel_size, tuple(args[0].shape[1:]), tuple(out.shape[1:]))))
    network(torch.randn(2, *local.plan.modules[0].shape[1:]))
    assert shapes == [((3, 3), (8, 6, 6), (8, 6, 6)), ((2, 2), (8, 3, 3), (8, 2, 2)), ((1, 1), (8, 2, 2), (8, 2, 2))]
    kinds = [type(part) for name, part in network.named_modules() if "hidden_" in name and not list(part.children())]
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.GELU) == 3


@pytest.mark.parametrize(("model", "size", "task"), [
    (torchvision.models.vgg11(num_classes=5), 64, "classification"),  # its mean keeps 7 x 7 places
    (torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5), 32, "classification"),  # class token
    (edsr(blocks=2, channels=8), 16, "super_resolution"),
])
def test_without_a_mean_there_are_none(model: nn.Module, size: int, task: str) -> None:
    given = {"task": task, "example_inputs": torch.empty(2, 3, size, size, device="meta")}
    assert glcan_fx.plan(model, k="natural", **given).method.hidden == 0
    with pytest.raises(PlanError, match="hidden=2.*no global average pooling"):
        glcan_fx.plan(model, k="natural", **given, hidden=2)


@pytest.mark.parametrize("make", [Slopes, Flat, Window, Net])
def test_a_plan_takes_what_can_be_built(make: Callable[[], nn.Module]) -> None:
    """Where hidden layers or narrow ones cannot be built, the others are looked at."""
    x = torch.empty(64, 3, 24, 24, device="meta")
    plan = glcan_fx.plan(make(), k="natural", task="classification", example_inputs=x)
    assert plan.k > 2
    if make is not Flat:  # flattened maps cost more to make than such a small network has
        assert plan.memory.plan.flops <= 1.05 * plan.memory.backpropagation.flops
    narrow = glcan_fx.plan(make(), k="natural", task="classification", example_inputs=x, method=GLCAN(width=0.5))
    assert narrow.method.width == 0.5


def test_rich_networks_do_not_cost_the_memory_that_is_saved() -> None:
    """A copy of VGG's classifier for each module would be larger than everything else together."""
    plan = glcan_fx.plan(torchvision.models.vgg11_bn(), k="natural", task="classification",
                         example_inputs=torch.empty(16, 3, 224, 224, device="meta"))
    assert plan.memory.plan.peak < 0.9 * plan.memory.backpropagation.peak
    assert plan.memory.plan.flops <= 1.05 * plan.memory.backpropagation.flops
