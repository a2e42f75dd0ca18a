"""Compute budgets in estimated time, for a device."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import glcan_fx
from glcan_fx import BudgetError, Device, Options, PlanError, Work
from glcan_fx.cli.main import main
from glcan_fx.devices import DEVICES, device_of

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from train_classification import CifarResNet

LAUNCHES = Device("launches", flops=1e30, bandwidth=1e30, launch=1.0)
GIVEN = {"task": "classification", "example_inputs": torch.empty(32, 3, 32, 32, device="meta")}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(20)


def test_arithmetic_traffic_and_launches_add_up() -> None:
    device = Device("slow", flops=10, bandwidth=100, launch=0.5)
    assert device.seconds(Work(flops=20, moved=300, operators=4)) == 2 + 3 + 2
    assert Work(1, 2, 3).plus(Work(10, 10, 10), 2) == Work(21, 22, 23)


def test_rates_at_hand_are_measured_once() -> None:
    device = device_of("cpu")
    assert device is device_of("cpu")
    assert 1e8 < device.flops < 1e14 and 1e8 < device.bandwidth < 1e12 and 1e-7 < device.launch < 1e-2


@pytest.mark.parametrize("device", ["gtx", "cuda" if not torch.cuda.is_available() else "tpu"])
def test_a_device_that_is_not_known(device: str) -> None:
    with pytest.raises(PlanError, match="rtx4090"):
        Options(device=device)


def test_what_a_step_does_is_counted(model: nn.Module) -> None:
    """Twice the batch: twice the arithmetic, and the same operators."""
    steps = [glcan_fx.plan(model, k=2, task="classification", example_inputs=torch.empty(size, 3, 32, 32, device="meta")
                           ).simulate() for size in (8, 16)]
    small, large = (step.work for step in steps)
    assert large.flops == 2 * small.flops == 2 * steps[0].flops and large.operators == small.operators
    assert small.moved < large.moved < 2 * small.moved  # weights are as large


def test_a_budget_of_time_is_kept_by_simulation(model: nn.Module) -> None:
    """Where launches are all that counts, the same memory takes another plan: auxiliary networks are many operators."""
    plain = glcan_fx.plan(model, k=1, **GIVEN).backpropagation()
    asked = {"memory_budget": int(0.6 * plain.peak), "compute_budget": 1.4, **GIVEN}
    for device in (None, LAUNCHES, DEVICES["rtx4090"]):
        step = glcan_fx.plan(model, options=Options(device=device), **asked).simulate()
        assert step.peak <= asked["memory_budget"] and step.relative_to(plain, device) <= 1.405
    with pytest.raises(BudgetError, match=r"backpropagation's time on launches\. Give at least"):
        glcan_fx.plan(model, k="natural", compute_budget=1.02, options=Options(device=LAUNCHES), **GIVEN)
    glcan_fx.plan(model, k="natural", compute_budget=1.02, **GIVEN)


def test_time_is_shown_beside_compute(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "report.html"
    command = ["inspect", "torchvision.models:resnet18", "--input", "8x3x64x64", "--task", "classification",
               "--device", "rtx4090", "-k", "2"]
    assert main([*command, "--frontier", "-o", str(saved)]) == 0
    text = capsys.readouterr().out
    assert "compute and time on rtx4090, estimated, relative to backpropagation's" in " ".join(text.split())
    assert "compute 1.00, time 1.00" in text
    head = next(line for line in text.splitlines() if line.split()[:3] == ["plan", "gradients", "peak"])
    assert head.split()[-4:] == ["compute", "time", "auxiliary", "networks"]
    assert '"axis":"time"' in saved.read_text(encoding="utf-8")
    assert main([*command[:-4], "--device", "gtx"]) == 1
    assert "device='gtx': choose" in capsys.readouterr().err
