"""What a local loss trains beside its own module: windows, and blocks that it passes through."""

from typing import Any

import pytest
import torch
import torchvision
from reference import joined_gradients, restored
from test_contract import TARGET, UNet
from torch import Tensor, fx, nn

import glcan_fx
from glcan_fx import PlanError
from glcan_fx.methods import DGL, GLCAN, HPFF, MLAAN, InfoPro, Method
from glcan_fx.models import edsr, retinanet
from glcan_fx.plans.plan import Plan

CASES: dict[str, Any] = {
    "classification": (lambda: torchvision.models.resnet18(num_classes=5), torch.randn(4, 3, 64, 64),
                       torch.randint(5, (4,))),
    "segmentation": (UNet, torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))),
    "super_resolution": (lambda: edsr(blocks=5, channels=8), torch.rand(2, 3, 16, 16), torch.rand(2, 3, 32, 32)),
    "detection": (lambda: retinanet(18, num_classes=3, min_size=96, max_size=96), [torch.rand(3, 96, 96)] * 2,
                  [TARGET] * 2),
}
METHODS = {"ahead": GLCAN(ahead=1), "ahead 2": GLCAN(ahead=2), "window": GLCAN(window=2), "window 3": GLCAN(window=3),
           "both": GLCAN(ahead=1, window=2), "dgl ahead": DGL(ahead=1), "dgl window": DGL(window=2),
           "terms": InfoPro(base=DGL(ahead=1)), "patches": HPFF(base="dgl"), "twins": MLAAN()}


QUICK = ("ahead", "window", "twins")


EVERY = [pytest.param(task, kind, marks=[pytest.mark.slow] * (kind not in QUICK and task != "classification"))
         for task in CASES for kind in METHODS]


@pytest.mark.parametrize(("task", "kind"), EVERY)
def test_gradients_are_those_of_the_losses_that_reach(task: str, kind: str) -> None:
    """Each parameter's gradient is the sum over the losses that train its local module, each through all that lies
    between, and of no other loss."""
    method: Method = METHODS[kind]
    torch.manual_seed(0)
    make, x, y = CASES[task]
    model = make()
    plan = glcan_fx.plan(model, k="natural", task=task, example_inputs=x, method=method).plan
    assert Plan.from_json(plan.to_json()) == plan
    local = glcan_fx.transform(model, plan=plan).train()
    with restored(local):
        torch.manual_seed(1)
        out = local(x, y)
        (sum(out.values()) if isinstance(out, dict) else out.loss).backward()
        found = {name: None if p.grad is None else p.grad.clone() for name, p in local.named_parameters()}
        moved = {int(b) for n, b in local.named_buffers() if n.endswith("num_batches_tracked") and "aux." not in n}
    with restored(local):
        torch.manual_seed(1)
        expected = joined_gradients(local, x, y)
    assert moved <= {1}
    for name, gradient in expected.items():
        given = found[name]
        assert (given is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(given, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


def test_a_window_of_all_is_refused() -> None:
    model = torchvision.models.resnet18(num_classes=5)
    with pytest.raises(PlanError, match="window=2 of k=2"):
        glcan_fx.plan(model, k=2, task="classification", example_inputs=torch.empty(2, 3, 64, 64),
                      method=GLCAN(window=2))
    with pytest.raises(PlanError, match=r"ahead=3.*Cut earlier"):
        glcan_fx.plan(model, k=["layer4.0"], task="classification", example_inputs=torch.empty(2, 3, 64, 64),
                      method=GLCAN(ahead=3))
    for wrong in ({"window": 0}, {"ahead": -1}, {"ahead": True}):
        with pytest.raises(PlanError):
            GLCAN(**wrong)


def test_blocks_ahead_are_not_trained_by_it() -> None:
    """The next block's gradient is that of its own loss: without it there is none."""
    torch.manual_seed(0)
    local = glcan_fx.transform(torchvision.models.resnet18(num_classes=5), k=["layer1.1", "layer2.1"], method=GLCAN(
        ahead=1), task="classification", example_inputs=torch.randn(4, 3, 64, 64)).train()
    out = local(torch.randn(4, 3, 64, 64), torch.randint(5, (4,)))
    out.losses[0].backward()
    assert all(p.grad is None for p in local.layer2.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in local.layer1.parameters())


def test_memory_is_that_of_two_modules() -> None:
    """A window keeps one more local module alive, not all of them."""
    model, x = nn.Sequential(*(Block() for _ in range(12)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), \
        torch.empty(64, 8, 32, 32)
    peaks = {}
    for window in (1, 2, 4):
        peaks[window] = glcan_fx.plan(model, k="natural", task="classification", example_inputs=x,
                                      method=GLCAN(window=window)).simulate().peak
    whole = glcan_fx.estimate_memory(model, x, task="classification").peak
    assert peaks[1] < peaks[2] < peaks[4] < whole
    assert peaks[2] < peaks[1] + 2.2 * whole / 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


def test_printed_code_says_where_a_loss_comes_back() -> None:
    local = glcan_fx.transform(torchvision.models.resnet18(num_classes=5), k=3, task="classification",
                               example_inputs=torch.empty(2, 3, 64, 64), method=GLCAN(ahead=1))
    assert "loss behind" in local.code and "through" in local.code
    assert isinstance(local.graph, fx.Graph)
