"""What the planner chooses: how rich auxiliary networks are, by what they may cost."""

import itertools
import math
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, fcn_resnet50, lraspp_mobilenet_v3_large

import glcan_fx
from glcan_fx import BudgetError, Options, PlanError
from glcan_fx.auxiliary.tails import Ending, ending_of
from glcan_fx.methods import GLCAN
from glcan_fx.models import edsr, retinanet
from glcan_fx.planner.costs import CostTable
from glcan_fx.planner.partition import ModuleCost, carried, costs_of, merge
from glcan_fx.structure.structure import multiply_adds
from glcan_fx.units import in_bytes

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from train_classification import CifarResNet
from unet import UNet


def test_what_is_left_open_is_to_choose() -> None:
    assert GLCAN(width=0.5, head="light").choices("maps") == [
        GLCAN(width=0.5, head="light", hidden=0, stride=s) for s in (1, 16, 32)]


class Scale(nn.Module):
    """A weight of a fixed size: what it scales cannot be made narrower."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_memory_budget_where_narrow_networks_cannot_be_built() -> None:
    model, given = cifar()
    model.fc = nn.Sequential(nn.Linear(64, 64), Scale(64), nn.ReLU(), nn.Linear(64, 10))
    natural = glcan_fx.plan(model, k="natural", **given, head="lean", width=1.0, hidden=0)
    budget = int(1.001 * natural.memory.plan.peak)
    plan = glcan_fx.plan(model, memory_budget=budget, **given)
    assert plan.memory.plan.peak <= budget and plan.method.width == 1.0


def cifar() -> tuple[nn.Module, dict[str, Any]]:
    return CifarResNet(20), {"task": "classification", "example_inputs": torch.empty(128, 3, 32, 32, device="meta")}


def test_more_compute_makes_richer_networks() -> None:
    """Each budget is kept, and the largest is used for what the smaller ones do not allow."""
    model, given = cifar()
    order = GLCAN().choices("mean")
    places = []
    for budget in (1.0, 1.1, 1.3, 3.0):
        plan = glcan_fx.plan(model, k=4, compute_budget=budget, **given)
        assert plan.memory.plan.flops <= budget * plan.memory.backpropagation.flops
        places.append(order.index(plan.method))
    assert places == sorted(places, reverse=True) and len(set(places)) == 4
    assert places[-1] == 0


def test_a_compute_budget_that_nothing_keeps() -> None:
    model, given = cifar()
    with pytest.raises(PlanError, match=r"compute_budget=0.5: with k=4 a step takes 0.9\d+ of"):
        glcan_fx.plan(model, k=4, compute_budget=0.5, **given)
    with pytest.raises(PlanError, match=r"compute_budget=1.01: .*another k"):
        glcan_fx.plan(model, k=4, compute_budget=1.01, **given, head="full", hidden=4, width=1.0)
    assert glcan_fx.plan(model, k=1, compute_budget=1.0, **given).k == 1
    with pytest.raises(BudgetError, match=r"with k=2 a step takes 1\.\d+ of"):  # a cut inside a block
        glcan_fx.plan(model, k=["stem.0"], compute_budget=1.0, **given, head="full", hidden=4, width=1.0)


class Transposed(nn.Module):
    """A U-Net of transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU())

        self.down = nn.ModuleList([block(3, 16), block(16, 32), block(32, 64)])
        self.bottom = block(64, 128)
        self.grow = nn.ModuleList([nn.ConvTranspose2d(2 * c, c, 4, 2, 1) for c in (64, 32, 16)])
        self.up = nn.ModuleList([block(2 * c, c) for c in (64, 32, 16)])
        self.out = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for part in self.down:
            x = part(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for grow, up, skip in zip(self.grow, self.up, reversed(skips), strict=True):
            x = up(torch.cat([grow(x), skip], 1))
        return self.out(x)


@pytest.mark.parametrize("budget", [1.1, 1.3, 1.5])
def test_a_compute_budget_holds_in_the_simulated_step(budget: float) -> None:
    """Whatever the planner's own count of a layer says."""
    given = {"task": "segmentation", "example_inputs": torch.empty(4, 3, 96, 96, device="meta")}
    plan = glcan_fx.plan(Transposed(), k="natural", compute_budget=budget, **given)
    assert plan.memory.plan.flops <= budget * plan.memory.backpropagation.flops
    open_ = glcan_fx.plan(Transposed(), k="natural", **given)
    assert open_.memory.plan.flops <= 1.02 * 4 / 3 * open_.memory.backpropagation.flops


def test_layers_are_counted_where_they_are_applied() -> None:
    """A transposed convolution at its input's places."""
    given = {"task": "segmentation", "example_inputs": torch.empty(4, 3, 96, 96, device="meta")}
    plan = glcan_fx.plan(Transposed(), k=1, **given)
    counted = 3 * 2 * multiply_adds(plan.captured.structure)
    assert counted == pytest.approx(plan.memory.backpropagation.flops, rel=0.02)


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
    assert GLCAN().choices("mean").index(rich.method) < GLCAN().choices("mean").index(lean.method)


def convolutions(*channels: int | str) -> nn.Sequential:
    """Layers (convolution, norm, activation) of so many channels, "pool" halves the map, and a classifier."""
    layers: list[nn.Module] = []
    last = 3
    for each in channels:
        if isinstance(each, int):
            layers.append(nn.Sequential(nn.Conv2d(last, each, 3, padding=1, bias=False), nn.BatchNorm2d(each),
                                        nn.ReLU()))
            last = each
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 10))


@given(st.data())
def test_merging_finds_the_smallest_largest_run(data: st.DataObject) -> None:
    """Against all ways to cut."""
    n = data.draw(st.integers(1, 7))
    k = data.draw(st.integers(1, n))
    sizes = st.integers(1, 9)
    costs = [[ModuleCost(data.draw(sizes), data.draw(sizes)) for _ in range(n + 1)] for _ in range(n)]

    def largest(ends: Sequence[int]) -> int:
        return max(costs[start][end][0] for start, end in pairwise((0, *ends, n)))

    ends = merge(costs, k)
    assert len(ends) == k - 1 and ends == sorted(set(ends))
    assert largest(ends) == min(map(largest, itertools.combinations(range(1, n), k - 1)))


def test_what_a_local_module_costs() -> None:
    """By hand: three units that keep 10, 20, 30, have gradients of 1, 100, 2; auxiliary networks that keep 5, 6, 7."""
    nothing: list[list[tuple[int, int]]] = [[], [], []]
    costs = costs_of([10, 20, 30], [1, 100, 2], nothing, [5, 6, 7])
    assert [[cost.kept for cost in row[index + 1:]] for index, row in enumerate(costs)] == [
        [15, 36, 67], [26, 57], [37]]
    assert costs[0][1].most == 15  # when it begins, with the auxiliary network
    assert costs[0][2].most == 10 + 100  # at the first unit, when the second has its gradients
    assert costs[0][3].most == 10 + 102
    assert costs[1][3].most == 1 + 0 + 102  # at its end, beside the gradients of the first
    assert costs[2][3].most == 101 + 37
    live = [[], [(1000, 0)], [(1000, 0), (200, 2)]]  # two values live on, the second of them counts in the last unit
    costs = costs_of([10, 20, 30], [1, 100, 2], live, [5, 6, 7])
    assert (costs[0][3].most, costs[1][2].most, costs[2][3].most) == (10 + 102, 1 + 1000 + 100, 101 + 1000 + 37)


class Bypass(nn.Module):
    """The first unit's value is read by the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Sequential(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1), nn.ReLU()) for i in range(4))
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return self.out(torch.cat([self.d(self.c(self.b(first))), first], 1))


def test_values_that_pass_modules_by_count_in_all_of_them() -> None:
    plan = glcan_fx.plan(Bypass(), k="natural", task="segmentation", example_inputs=torch.empty(2, 3, 16, 16))
    structure = plan.captured.structure
    size = 2 * 8 * 16 * 16 * 4
    assert [unit.name for unit in structure.units] == ["a", "b", "c", "d"]
    assert carried(structure, structure.units) == [[], [(size, 0)], [(size, 0), (size, 1)], [(size, 0), (size, 2)]]


@pytest.mark.parametrize(("model", "size", "task", "k"), [
    (convolutions(32, 32, "pool", 64, 64, "pool", 128, 128), (32, 3, 32, 32), "classification", 3),
    (convolutions(8, 8, 8, "pool", 64, 256, "pool", 256, 256), (4, 3, 32, 32), "classification", 2),
    (UNet(11, 16), (4, 3, 64, 64), "segmentation", 2),
])
def test_a_number_cuts_where_a_step_takes_the_least(model: nn.Module, size: tuple[int, ...], task: str, k: int) -> None:
    """No list of as many split points does with less memory, to 2 %, than the number."""
    given = {"task": task, "example_inputs": torch.empty(size, device="meta"), "head": "lean", "width": 1.0}
    given |= {"hidden": 0} if task == "classification" else {}
    plan = glcan_fx.plan(model, k=k, **given)
    lists = [glcan_fx.plan(model, k=list(cuts), **given) for cuts in itertools.combinations(plan.natural, k - 1)]
    assert plan.memory.plan.peak <= 1.02 * min(other.memory.plan.peak for other in lists)


@pytest.mark.parametrize(("model", "given"), [
    pytest.param(*cifar(), marks=pytest.mark.slow),
    (UNet(11, 16), {"task": "segmentation", "example_inputs": torch.empty(8, 3, 160, 224, device="meta")}),
    (edsr(blocks=8, channels=16),
     {"task": "super_resolution", "example_inputs": torch.empty(8, 3, 24, 24, device="meta")}),
    (torchvision.models.resnet18(num_classes=10),  # auxiliary networks become richer: memory falls and rises with k
     {"task": "classification", "example_inputs": torch.empty(8, 3, 64, 64, device="meta")}),
])
def test_the_fewest_that_save_as_much(model: nn.Module, given: dict[str, Any]) -> None:
    """The memory of the natural k; with fewer local modules it would be more."""
    natural = glcan_fx.plan(model, k="natural", **given)
    plan = glcan_fx.plan(model, **given)
    assert plan.k < natural.k and (plan.k > 1 or plan.modules[0].recompute)
    most = 1.02 * natural.memory.plan.peak
    assert plan.memory.plan.peak <= most
    assert all(glcan_fx.plan(model, k=k, **given).memory.plan.peak > most for k in range(1, plan.k))
    assert any(f"as little memory as k={natural.k}," in note for note in plan.notes)


def test_the_fewest_where_nothing_is_saved(caplog: pytest.LogCaptureFixture) -> None:
    """Backpropagation, which is said; but not where something is said of auxiliary networks."""
    model = torchvision.models.resnet18(num_classes=10)
    given = {"task": "classification", "example_inputs": torch.empty(2, 3, 32, 32, device="meta")}
    plan = glcan_fx.plan(model, **given)
    assert plan.k == 1 and plan.memory.plan.peak <= 1.02 * plan.memory.backpropagation.peak
    assert "ResNet is not cut: on batches like the example inputs" in caplog.text
    assert glcan_fx.plan(model, method="dgl", **given).k == glcan_fx.plan(model, **given, depth=1).k == 2


def test_the_fewest_within_a_compute_budget_that_many_modules_keep() -> None:
    """Every cut saves gradients."""
    model = torchvision.models.resnet18(num_classes=10)
    given = {"task": "classification", "example_inputs": torch.empty(2, 3, 32, 32, device="meta")}
    plan = glcan_fx.plan(model, compute_budget=0.9, **given)
    assert 1 < plan.k < 9 and plan.memory.plan.flops <= 0.9 * plan.memory.backpropagation.flops


@pytest.mark.parametrize("frozen", [[], ["conv1", "bn1", "layer1", "layer2"], ["layer3"], ["layer1.1", "fc"]])
def test_compute_is_foretold(frozen: list[str]) -> None:
    """Without a simulation, which would take seconds for every kind of auxiliary network; frozen layers, too."""
    model = torchvision.models.resnet18(num_classes=10)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    plan = glcan_fx.plan(model, k="natural", task="classification", example_inputs=torch.empty(2, 3, 64, 64))
    drafts = CostTable(plan.captured)
    cuts = [unit for unit in plan.captured.structure.units if unit.name in plan.cuts]
    assert plan.k > 2 and drafts.step() == plan.memory.backpropagation.flops
    assert drafts.extra(cuts, plan.method) == pytest.approx(plan.memory.plan.flops / drafts.step() - 1, abs=1e-4)


def test_a_step_that_cannot_be_simulated() -> None:
    """One local module per block then, with the reason."""
    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:  # looks at values
        return F.cross_entropy(outputs, targets) * float(outputs.detach().numpy().std())

    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    plan = glcan_fx.plan(CifarResNet(20), criterion=criterion, example_inputs=x, options=Options(example_targets=y))
    assert plan.k == len(plan.natural) + 1 == 10
    assert any(note.startswith("k=10, one local module per block: the memory of a step cannot be simulated: ")
               for note in plan.notes)


@pytest.mark.parametrize(("model", "size", "task", "ending"), [
    (CifarResNet(20), 32, "classification", "mean"),
    (UNet(11, 32), 64, "segmentation", "decoder"),
    (lraspp_mobilenet_v3_large(weights_backbone=None), 96, "segmentation", "decoder"),
    (fcn_resnet50(weights_backbone=None), 96, "segmentation", "maps"),
    (deeplabv3_mobilenet_v3_large(weights_backbone=None, aux_loss=True), 96, "segmentation", "maps"),  # two heads
    (edsr(blocks=2, channels=8), 16, "super_resolution", "maps"),
    (retinanet(18, num_classes=3), 128, "detection", "maps"),
    (torchvision.models.vgg11(num_classes=5), 64, "classification", "maps"),
])
def test_endings(model: nn.Module, size: int, task: str, ending: Ending) -> None:
    plan = glcan_fx.plan(model, k="natural", task=task, example_inputs=torch.empty(2, 3, size, size, device="meta"))
    assert ending_of(plan.captured.structure, task != "detection") == ending


def test_a_decoder_that_costs_more_than_recomputation_is_left_out() -> None:
    """The narrowest one may cost more than other auxiliary networks, with a memory budget, too, but not any price."""
    for model, head in ((UNet(11, 32), "light"), (UNet(11, 4), "lean")):
        given = {"task": "segmentation", "example_inputs": torch.empty(8, 3, 160, 224, device="meta")}
        plan = glcan_fx.plan(model, k="natural", **given)
        assert plan.method.head == head
        assert plan.memory.plan.flops <= 4 / 3 * plan.memory.backpropagation.flops
        tight = glcan_fx.plan(model, k=plan.k, memory_budget=int(1.01 * plan.memory.plan.peak), **given)
        assert tight.method.head == head
    leanest = glcan_fx.plan(model, k="natural", compute_budget=1.0, **given)
    assert leanest.method.head == "lean" and leanest.memory.plan.flops <= leanest.memory.backpropagation.flops


class Wide(nn.Module):
    """Cheap blocks and a dense decoder with skips, so that an auxiliary network for every block costs much."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(
            nn.Conv2d(i, o, 2, 2), *(nn.Sequential(nn.Conv2d(o, o, 3, 1, 1, groups=o), nn.BatchNorm2d(o), nn.ReLU())
                                     for _ in range(3))) for i, o in ((3, 16), (16, 32), (32, 64)))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, 2) for i, o in ((64, 32), (32, 16)))
        self.fuse = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * o, o, 3, 1, 1), nn.ReLU()) for o in (32, 16))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = []
        for stage in self.stages:
            features.append(x := stage(x))
        for up, fuse, skip in zip(self.ups, self.fuse, features[-2::-1], strict=True):
            x = fuse(torch.cat([up(x), skip], 1))
        return {"classes": self.head(x)}


def wide(**given: Any) -> glcan_fx.PlannedModel:
    return glcan_fx.plan(Wide(), criterion=lambda out, y: sum(value.square().mean() for value in out.values()),
                         example_inputs=torch.empty(8, 3, 48, 48, device="meta"), **given)


def test_a_compute_budget_that_one_module_per_block_does_not_keep() -> None:
    """Fewer do, and where no auxiliary network is asked for, one always does."""
    def compute(plan: glcan_fx.PlannedModel) -> float:
        return plan.memory.plan.relative_to(plan.memory.backpropagation)

    rich: dict[str, Any] = {"head": "full", "width": 1.0}
    two = compute(wide(k=2, **rich))
    assert compute(wide(k="natural", **rich)) > two + 0.2
    plan = wide(compute_budget=two + 0.05, **rich)
    assert plan.k > 1 and compute(plan) <= two + 0.055
    assert compute(wide(compute_budget=1.0)) <= 1.005
    with pytest.raises(BudgetError, match=r"with k=1 a step takes 1.000"):
        wide(compute_budget=0.5)


def test_the_least_is_no_more_than_what_is_named_as_such() -> None:
    with pytest.raises(BudgetError, match=r"the least found is ([\d.]+ [KM]iB)") as refused:
        wide(memory_budget="1MiB")
    named = re.search(r"the least found is ([\d.]+ [KM]iB)", str(refused.value))
    assert named is not None
    assert wide(memory_budget=named[1]).memory.plan.peak <= in_bytes(named[1])  # rounded up
    assert wide(memory_budget="least", compute_budget=3).memory.plan.peak <= 1.03 * in_bytes(named[1])
    exact = wide(memory_budget="least", k=1)
    assert exact.k == 1 and exact.memory.plan.peak <= 1.05 * wide(k=1, memory_budget="least",
                                                                  compute_budget=3).memory.plan.peak


class Hourglass(nn.Module):
    """An encoder, and a decoder that joins its maps: steps of several local modules take less than is foretold."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(*[layer for i in (inputs, outputs) for layer in (
                nn.Conv2d(i, outputs, 3, padding=1, bias=False), nn.GroupNorm(4, outputs), nn.SiLU())])

        self.down = nn.ModuleList(block(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(block(i + o, o) for i, o in zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps: list[Tensor] = []
        for block in self.down:
            maps.append(block(F.max_pool2d(maps[-1], 2) if maps else x))
        x = maps.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), maps.pop()], 1))
        return self.head(x)


def test_more_compute_never_takes_more_memory_at_least() -> None:
    """Nor is a budget refused that a plan keeps."""
    given: dict[str, Any] = {"task": "segmentation", "example_inputs": torch.empty(4, 3, 64, 64)}
    least = []
    for compute in (1.1, 1.3, 1.5):
        plan = glcan_fx.plan(Hourglass(), memory_budget="least", compute_budget=compute, **given)
        least.append(plan.simulated().memory.plan.peak)
        assert least[-1] <= 1.02 * min(least)
        budget = int(1.01 * min(least))
        found = glcan_fx.plan(Hourglass(), memory_budget=budget, compute_budget=compute, **given)
        assert found.memory.plan.peak <= budget
