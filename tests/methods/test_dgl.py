"""method="dgl": the auxiliary networks of decoupled greedy learning, to compare with."""

import pytest
import torch
import torchvision
from torch import nn

import glcan_fx
from glcan_fx import PlanError
from glcan_fx.models import edsr, retinanet
from glcan_fx.plans.plan import Plan

TARGET = {"boxes": torch.tensor([[10.0, 12.0, 60.0, 50.0]]), "labels": torch.tensor([1])}
CASES = {
    "classification": (lambda: torchvision.models.resnet18(num_classes=5), torch.randn(4, 3, 64, 64),
                       torch.randint(5, (4,))),
    "super_resolution": (lambda: edsr(blocks=3, channels=16), torch.rand(2, 3, 16, 16), torch.rand(2, 3, 32, 32)),
    "detection": (lambda: retinanet(18, num_classes=3, min_size=96, max_size=96), [torch.rand(3, 96, 96)] * 2,
                  [TARGET] * 2),
}


@pytest.mark.parametrize("task", CASES)
def test_trains_on_its_own_output_alone(task: str) -> None:
    torch.manual_seed(0)
    make, x, y = CASES[task]
    model = make()
    plan = glcan_fx.plan(model, k="natural", task=task, example_inputs=x, method="dgl")
    assert all(not module.features and len(module.levels) <= 1 for module in plan.modules[:-1])
    assert Plan.from_json(plan.to_json()) == plan
    local = glcan_fx.transform(model, plan=Plan.from_json(plan.to_json())).train()
    reads = [len(local.aux.get_submodule(f"{i}.network").graph.find_nodes(op="placeholder")) for i in range(plan.k - 1)]
    assert set(reads) == {1}
    before = {name: p.detach().clone() for name, p in local.named_parameters()}
    optimizer = torch.optim.SGD(local.parameters(), 0.01)
    out = local(x, y)
    (sum(out.values()) if isinstance(out, dict) else out.loss).backward()
    optimizer.step()
    moved = {name.split(".")[1] for name, p in local.named_parameters() if name.startswith("aux.")
             and not torch.equal(p, before[name])}
    assert moved >= {str(index) for index in range(plan.k - 1)}
    model.eval(), local.eval()
    with torch.no_grad():
        a, b = model(x), local(x)
    assert torch.equal(a[0]["boxes"], b[0]["boxes"]) if task == "detection" else torch.equal(a, b)


def test_is_the_published_one() -> None:
    """MLP-SR-aux: a quarter of the size, three pointwise convolutions, 2 x 2, three layers of 4 C, the classifier."""
    local = glcan_fx.transform(torchvision.models.resnet18(num_classes=5), k=2, task="classification", method="dgl",
                               example_inputs=torch.empty(2, 3, 64, 64))
    network = local.aux.get_submodule("0.network")
    shape = local.plan.modules[0].shape
    layers = [part for part in network.modules() if isinstance(part, nn.Conv2d | nn.Linear | nn.AdaptiveAvgPool2d)]
    assert layers[0].output_size == (-(-shape[2] // 4), -(-shape[3] // 4)) and layers[4].output_size == 2
    channels = shape[1]
    assert [tuple(part.weight.shape[:2]) for part in layers if not isinstance(part, nn.AdaptiveAvgPool2d)] == [
        (channels, channels)] * 3 + [(4 * channels, 4 * channels)] * 3 + [(5, 4 * channels)]
    for part in layers[1:4] + layers[5:]:  # as large as PyTorch makes them
        assert part.weight.std().item() == pytest.approx((3 * part.weight[0].numel()) ** -0.5, rel=0.15)


def test_what_it_cannot_do_is_said() -> None:
    with pytest.raises(PlanError, match="maps"):
        glcan_fx.plan(nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)), nn.Linear(8, 2)),
                      k=3, task="classification", method="dgl", example_inputs=torch.empty(2, 8))
    with pytest.raises(PlanError, match="choose one of 'glcan', .*'dgl'"):
        glcan_fx.plan(torchvision.models.resnet18(), k="natural", task="classification", method="greedy",
                      example_inputs=torch.empty(2, 3, 64, 64))
