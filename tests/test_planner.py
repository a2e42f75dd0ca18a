"""What the planner chooses: how rich auxiliary networks are, by what they may cost."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.segmentation import fcn_resnet50, lraspp_mobilenet_v3_large

import glcan_fx
from glcan_fx import PlanError
from glcan_fx.builder import Ending, Options
from glcan_fx.models import edsr, retinanet
from glcan_fx.planner import candidates, richest, with_richest
from glcan_fx.synthesize import ending_of

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from train_classification import CifarResNet
from unet import UNet


@pytest.mark.parametrize("ending", ["mean", "decoder", "maps"])
def test_the_richest_networks_that_fit(ending: Ending) -> None:
    choices = candidates(ending)
    for best in range(len(choices)):
        assert richest(choices, lambda options, best=best: choices.index(options) < best) == choices[best]
    assert richest(choices, lambda options: 1.0) == choices[-1]
    assert richest(choices, lambda options: math.inf) == choices[0]
    assert candidates(width=0.5, head="light") == [Options(width=0.5, stride=s) for s in (1, 16, 32)]


def test_leaner_lists_where_the_richest_fit_nothing() -> None:
    """The plan of the longest list that works; the leanest is tried at once, and says why nothing does."""
    choices = candidates("mean")
    asked: list[int] = []

    def plan(most: int) -> Any:
        def made(left: Any) -> Any:
            asked.append(len(left))
            if len(left) > most:
                raise PlanError(f"{len(left)}")
            return len(left)
        return with_richest(choices, made)

    assert plan(len(choices)) == len(choices) and asked == [len(choices)]
    assert 1 < plan(len(choices) - 1) < len(choices)
    assert plan(1) == 1
    asked.clear()
    with pytest.raises(PlanError, match="^1$"):
        plan(0)
    assert asked == [len(choices), 1]


def cifar() -> tuple[nn.Module, dict[str, Any]]:
    return CifarResNet(20), {"task": "classification", "example_inputs": torch.empty(128, 3, 32, 32, device="meta")}


def test_more_compute_makes_richer_networks() -> None:
    """Each budget is kept, and the largest is used for what the smaller ones do not allow."""
    model, given = cifar()
    order = candidates("mean")
    places = []
    for budget in (1.0, 1.1, 1.3, 3.0):
        plan = glcan_fx.plan(model, k=4, compute_budget=budget, **given)
        assert plan.memory.plan.flops <= budget * plan.memory.backpropagation.flops
        places.append(order.index(plan.options))
    assert places == sorted(places, reverse=True) and len(set(places)) == 4
    assert order[places[-1]] == Options(head="full", hidden=4)


def test_a_compute_budget_that_nothing_keeps() -> None:
    model, given = cifar()
    with pytest.raises(PlanError, match=r"compute_budget=0.5: with k=4 a step takes at least 0.9\d of"):
        glcan_fx.plan(model, k=4, compute_budget=0.5, **given)
    with pytest.raises(PlanError, match=r"compute_budget=1.01: .*fewer local modules"):
        glcan_fx.plan(model, k=4, head="full", aux_hidden=4, aux_width=1.0, compute_budget=1.01, **given)
    assert glcan_fx.plan(model, k=1, compute_budget=1.0, **given).k == 1


@pytest.mark.parametrize("wrong", [0, -1.0, math.nan, True, "1.3"])
def test_compute_budgets_that_are_none(wrong: Any) -> None:
    model, given = cifar()
    with pytest.raises(PlanError, match="compute_budget=.*such as 1.3"):
        glcan_fx.plan(model, k=4, compute_budget=wrong, **given)


def test_both_budgets() -> None:
    """Memory decides how many local modules there are, compute how rich their auxiliary networks."""
    model, given = cifar()
    half = int(0.5 * glcan_fx.estimate_memory(model, **given).peak)
    lean = glcan_fx.plan(model, memory_budget=half, **given)
    rich = glcan_fx.plan(model, memory_budget=half, compute_budget=1.3, **given)
    assert max(lean.memory.plan.peak, rich.memory.plan.peak) <= half
    assert rich.memory.plan.flops <= 1.3 * rich.memory.backpropagation.flops
    assert candidates("mean").index(rich.options) < candidates("mean").index(lean.options)


@pytest.mark.parametrize(("model", "given"), [
    cifar(), (UNet(11, 16), {"task": "segmentation", "example_inputs": torch.empty(8, 3, 160, 224, device="meta")}),
    (edsr(blocks=8, channels=16),
     {"task": "super_resolution", "example_inputs": torch.empty(8, 3, 24, 24, device="meta")}),
])
def test_the_fewest_that_save_as_much(model: nn.Module, given: dict[str, Any]) -> None:
    """The memory of the natural k; with one local module less it would be more."""
    natural = glcan_fx.plan(model, **given)
    plan = glcan_fx.plan(model, k="fewest", **given)
    assert 1 < plan.k < natural.k
    most = 1.02 * natural.memory.plan.peak
    assert plan.memory.plan.peak <= most < glcan_fx.plan(model, k=plan.k - 1, **given).memory.plan.peak
    assert any(f"no more memory than k={natural.k}," in note for note in plan.notes)


def test_the_fewest_where_nothing_is_saved() -> None:
    """Backpropagation, as local modules cost memory here."""
    given = {"task": "classification", "example_inputs": torch.empty(1, 3, 64, 64, device="meta"), "aux_depth": 2,
             "head": "full", "aux_width": 1.0}
    plan = glcan_fx.plan(torchvision.models.resnet18(), k="fewest", **given)
    assert plan.k == 1 and plan.memory.plan.peak <= plan.memory.backpropagation.peak


@pytest.mark.parametrize(("model", "size", "task", "ending"), [
    (CifarResNet(20), 32, "classification", "mean"),
    (UNet(11, 32), 64, "segmentation", "decoder"),
    (lraspp_mobilenet_v3_large(weights_backbone=None), 96, "segmentation", "decoder"),
    (fcn_resnet50(weights_backbone=None), 96, "segmentation", "maps"),
    (edsr(blocks=2, channels=8), 16, "super_resolution", "maps"),
    (retinanet(18, num_classes=3), 128, "detection", "maps"),
    (torchvision.models.vgg11(num_classes=5), 64, "classification", "maps"),
])
def test_endings(model: nn.Module, size: int, task: str, ending: Ending) -> None:
    plan = glcan_fx.plan(model, task=task, example_inputs=torch.empty(2, 3, size, size, device="meta"))
    assert ending_of(plan.draft.structure, task != "detection") == ending


def test_a_decoder_that_costs_more_than_recomputation_is_left_out() -> None:
    """The narrowest one may cost more than other auxiliary networks, with a memory budget, too, but not any price."""
    for model, head in ((UNet(11, 32), "light"), (UNet(11, 4), "lean")):
        given = {"task": "segmentation", "example_inputs": torch.empty(8, 3, 160, 224, device="meta")}
        plan = glcan_fx.plan(model, **given)
        assert plan.options.head == head
        assert plan.memory.plan.flops <= 4 / 3 * plan.memory.backpropagation.flops
        tight = glcan_fx.plan(model, k=plan.k, memory_budget=int(1.01 * plan.memory.plan.peak), **given)
        assert tight.options.head == head
        leanest = glcan_fx.plan(model, compute_budget=1.0, **given)
        assert leanest.options.head == "lean" and leanest.memory.plan.flops <= leanest.memory.backpropagation.flops
