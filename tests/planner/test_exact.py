"""Exact plans: blocks that run again, chosen for a memory limit; budgets, and what a larger one buys."""

import copy
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import glcan_fx
from glcan_fx import BudgetError, PlanError
from glcan_fx.models import edsr, retinanet
from glcan_fx.plans.plan import Run
from glcan_fx.report.frontier import frontier_text
from glcan_fx.units import in_bytes

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from train_classification import CifarResNet
from unet import UNet


class Block(nn.Module):
    """A part of a chain: a residual block, or one that makes its input smaller."""

    def __init__(self, channels: int, out: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride, 1, bias=not norm)
        self.norm = nn.BatchNorm2d(out) if norm else nn.Identity()
        self.last = nn.Conv2d(out, out, 1)
        self.same = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.relu(self.norm(self.conv(x))))
        return torch.relu(x + y) if self.same else torch.relu(y)


def chain(widths: list[tuple[int, int, bool]]) -> nn.Sequential:
    """A classifier: of each block its width (in steps of 4), stride, and whether it normalizes."""
    blocks, channels = [], 3
    for width, stride, norm in widths:
        blocks.append(Block(channels, 4 * width, stride, norm))
        channels = 4 * width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


CHAINS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 1, 2]), st.booleans()), min_size=3, max_size=6)
GIVEN: dict[str, Any] = {"task": "classification", "example_inputs": torch.empty(8, 3, 32, 32, device="meta")}


def nested(names: list[str], data: st.DataObject, depth: int = 2) -> tuple[Run, ...]:
    """Some runs of neighbours, with runs inside."""
    runs, start = [], 0
    while start < len(names):
        length = data.draw(st.integers(1, len(names) - start))
        if data.draw(st.booleans()):
            part = names[start: start + length]
            runs.append(Run(tuple(part), nested(part, data, depth - 1) if depth else ()))
        start += length
    return tuple(runs)


def step(model: nn.Module, loss: Any) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients and buffers after a training step."""
    model.train()
    loss(model).backward()
    return [p.grad for p in model.parameters()], [b for name, b in model.named_buffers() if name != "aux.plan"]


def same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return all(a is b or a is not None and b is not None and torch.equal(a, b)
               for a, b in zip(one, other, strict=True))


@settings(max_examples=4, deadline=None)
@given(widths=CHAINS, data=st.data())
def test_blocks_that_run_again_change_no_gradient(widths: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    """With one local module they are backpropagation's, to the last bit, and so are the statistics of norms; with more
    they are those of the same modules without runs."""
    torch.manual_seed(0)
    model = chain(widths)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    for k in (1, 2):
        planned = glcan_fx.plan(model, k=k, **GIVEN)
        modules = tuple(replace(module, recompute=nested([name for run in module.each for name in run.blocks], data))
                        for module in planned.modules)
        torch.manual_seed(1)
        plain = copy.deepcopy(planned.build(verify=False))
        torch.manual_seed(1)
        again = copy.deepcopy(planned.replace(modules=modules).build(verify=False))
        expected, statistics = step(plain, lambda model: model(x, y).loss)
        found, of_norms = step(again, lambda model: model(x, y).loss)
        assert same(expected, found) and same(list(statistics), list(of_norms))
        if k == 1:
            bare = copy.deepcopy(model)
            gradients, _ = step(bare, lambda model: nn.functional.cross_entropy(model(x), y))
            named = dict(zip([name for name, _ in bare.named_parameters()], gradients, strict=True))
            assert all(torch.equal(named[name], p.grad) for name, p in again.original.named_parameters())


class Moody(nn.Module):
    """What a forward draws and counts in Python decides what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls, self.last = nn.Conv2d(8, 8, 3, 1, 1), 0, 1.0
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = random.random() + float(numpy.random.rand())
        y = self.conv(x) * self.last * (1 + self.calls)
        self.mean.mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3)))
        return torch.tanh(y + self.mean[:, None, None])


def test_what_draws_or_counts_in_python_does_not_run_again() -> None:
    """Nor do budgets make it: a loop sees what one run leaves, and gradients are backpropagation's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Moody(), Moody(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 5))
    planned = glcan_fx.plan(model, k=1, **GIVEN)
    again = planned.replace(modules=tuple(replace(module, recompute=module.each) for module in planned.modules))
    least = glcan_fx.plan(model, k=1, memory_budget="least", compute_budget=2.0, **GIVEN)
    assert not {"1", "2"} & set(least.modules[0].again)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    found = []
    for plan in (planned, again, least):
        local = copy.deepcopy(plan.build(verify=False))
        random.seed(3)
        numpy.random.seed(3)
        results = [step(local, lambda local: local(x, y).loss) for _ in range(2)]
        moody = [part for part in local.original.modules() if isinstance(part, Moody)]
        assert all(part.calls == 2 for part in moody)
        found.append((results, [part.last for part in moody], random.random(), numpy.random.rand()))
    (plain, *rest), *others = found
    for other, *numbers in others:
        assert rest == numbers
        for (expected, buffers), (gradients, statistics) in zip(plain, other, strict=True):
            assert same(expected, gradients) and same(list(buffers), list(statistics))


@settings(max_examples=3, deadline=None)
@given(widths=CHAINS, share=st.floats(0.3, 1.0), compute=st.sampled_from([None, 1.1, 1.35]))
def test_budgets_hold_in_a_simulated_step(
    widths: list[tuple[int, int, bool]], share: float, compute: float | None
) -> None:
    model = chain(widths)
    budget = int(share * glcan_fx.estimate_memory(model, **GIVEN).peak)
    try:
        plan = glcan_fx.plan(model, memory_budget=budget, compute_budget=compute, **GIVEN)
    except BudgetError:
        return
    assert plan.memory.plan.peak <= budget
    over = any("nothing fits it and" in note for note in plan.notes)
    relative = plan.memory.plan.flops / plan.memory.backpropagation.flops
    assert over or compute is None or relative <= compute + 1e-3


@settings(max_examples=2, deadline=None)
@given(widths=CHAINS, compute=st.sampled_from([None, 1.2]))
def test_a_larger_budget_never_gives_a_less_exact_plan(
    widths: list[tuple[int, int, bool]], compute: float | None
) -> None:
    model = chain(widths)
    whole = glcan_fx.estimate_memory(model, **GIVEN).peak
    numbers = []
    for share in (0.6, 0.8, 1.02):  # some bytes more than backpropagation: a scale of the loss
        try:
            plan = glcan_fx.plan(model, memory_budget=int(share * whole), compute_budget=compute, **GIVEN)
        except BudgetError:
            assert not numbers
            continue
        if not any("nothing fits it and" in note for note in plan.notes):
            numbers.append(plan.k)
    assert numbers == sorted(numbers, reverse=True) and numbers[-1] == 1


@pytest.mark.parametrize(("model", "task", "size"), [
    (torchvision.models.resnet18(num_classes=10), "classification", (16, 3, 64, 64)),
    (edsr(blocks=8, channels=16), "super_resolution", (4, 3, 24, 24)),
    (retinanet(18, num_classes=3), "detection", (2, 3, 160, 160)),
])
def test_no_worse_than_checkpointing(model: nn.Module, task: str, size: tuple[int, ...]) -> None:
    """At the compute of checkpointing every block, exact gradients in no more memory; and at no more memory, with no
    more compute."""
    given: dict[str, Any] = {"task": task, "example_inputs": torch.empty(size, device="meta")}
    known = glcan_fx.plan(model, k=1, **given).memory
    assert known.checkpointing is not None
    compute = known.checkpointing.flops / known.backpropagation.flops
    plan = glcan_fx.plan(model, k=1, memory_budget=known.checkpointing.peak, compute_budget=compute + 1e-6, **given)
    assert plan.k == 1 and plan.memory.plan.peak <= known.checkpointing.peak
    assert plan.memory.plan.flops <= (compute + 1e-3) * known.backpropagation.flops
    assert not any("nothing fits" in note for note in plan.notes)


@pytest.mark.slow
def test_the_least_memory() -> None:
    """Less than any number of bytes that is asked for by hand finds."""
    model = torchvision.models.resnet18(num_classes=10)
    given = {"task": "classification", "example_inputs": torch.empty(16, 3, 64, 64, device="meta")}
    least = glcan_fx.plan(model, memory_budget="least", compute_budget=1.2, **given)
    assert least.memory.plan.flops <= 1.201 * least.memory.backpropagation.flops
    fewer = int(0.93 * least.memory.plan.peak)
    try:
        lower = glcan_fx.plan(model, memory_budget=fewer, compute_budget=1.2, **given)
    except BudgetError:
        return
    assert any("nothing fits it and compute_budget=1.2" in note for note in lower.notes)


@pytest.mark.parametrize("budget", [6, 6.5, 1000])
def test_a_number_without_its_unit(budget: float) -> None:
    with pytest.raises(PlanError, match=f"memory_budget='{budget:g}GiB' or '{budget:g}MiB'"):
        glcan_fx.plan(chain([(1, 1, True)] * 3), memory_budget=budget, **GIVEN)


@pytest.mark.parametrize(("model", "task", "size", "fits"), [
    pytest.param(CifarResNet(20), "classification", (128, 3, 32, 32), False, marks=pytest.mark.slow),
    (UNet(11, 16), "segmentation", (8, 3, 160, 224), True),
])
def test_what_an_exact_plan_would_take_is_said(
    model: nn.Module, task: str, size: tuple[int, ...], fits: bool
) -> None:
    """And what is said is so."""
    given: dict[str, Any] = {"task": task, "example_inputs": torch.empty(size, device="meta")}
    plan = glcan_fx.plan(model, **given)
    note = next(note for note in plan.notes if note.startswith("exact gradients (k=1)"))
    if fits:
        memory, compute = re.search(r"memory_budget='(\d+MiB)', compute_budget=([\d.]+)", note).groups()
        assert in_bytes(memory) <= 1.03 * plan.memory.plan.peak
    else:
        memory, compute = re.search(r"need ([\d.]+ MiB) at least, at ([\d.]+) of", note).groups()
        memory, compute = in_bytes(memory) + 2**17, float(compute) + 0.01
        assert memory > plan.memory.plan.peak
    exact = glcan_fx.plan(model, memory_budget=memory, compute_budget=float(compute), **given)
    assert plan.k > 1 and exact.k == 1 and exact.memory.plan.peak <= in_bytes(memory)


def test_the_frontier(tmp_path: Path) -> None:
    """Points are simulated plans that can be built, no one is better than another, and no peer is better than the exact
    ones."""
    model = edsr(blocks=8, channels=16)
    plan = glcan_fx.plan(model, task="super_resolution", example_inputs=torch.empty(8, 3, 24, 24, device="meta"))
    points = plan.frontier
    plain, again = [point for point in points if point.plan is None]
    assert plain.compute == 1 and plain.peak == plan.memory.backpropagation.peak and again.exact
    (chosen,) = [point for point in points if point.chosen]
    assert chosen.plan == plan.plan and chosen.peak == plan.memory.plan.peak
    assert [point.exact for point in points] == [point.k == 1 for point in points]
    assert list(points) == sorted(points, key=lambda point: (point.k, point.compute))
    ours = [point for point in points if point.plan is not None and not point.chosen]
    for point in ours:
        assert not any(other.k <= point.k and other.compute <= point.compute and other.peak <= point.peak
                       for other in points if other is not point), point.name
    assert sum(point.exact for point in ours) >= 4 and sum(not point.exact for point in ours) >= 3
    as_cheap = [point.peak for point in ours if point.exact and point.compute < again.compute + 0.005]
    assert min(as_cheap) < 1.03 * again.peak

    point = next(point for point in ours if point.exact)
    local = glcan_fx.transform(model, task="super_resolution", plan=point.plan)
    assert local.plan.memory.plan.peak == point.peak

    exact = [point for point in ours if point.exact]
    for point in exact[::2]:  # what a budget buys costs a block more, at most, than the frontier says
        cheapest = glcan_fx.plan(model, task="super_resolution", memory_budget=point.peak, compute_budget=1.6,
                                 example_inputs=torch.empty(8, 3, 24, 24, device="meta"))
        assert cheapest.k == 1
        assert cheapest.memory.plan.relative_to(cheapest.memory.backpropagation) < point.compute + 0.03, point.name

    plan.save(tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert '"frontier":{"title":"Trade-offs' in page and point.name in page
    text = frontier_text(points)
    assert f"▶ {chosen.name}" in text and "activation checkpointing, every" in text
    assert max(map(len, frontier_text(points, 80).splitlines())) <= 80


def test_auxiliary_networks_that_are_too_large_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """With figures, once; not where they are small."""
    model = CifarResNet(20)
    given: dict[str, Any] = {"task": "classification", "example_inputs": torch.empty(4, 3, 32, 32, device="meta")}
    glcan_fx.plan(model, k=6, **given, head="full", width=1.0)
    (told,) = [text for text in caplog.messages if "auxiliary networks are large" in text]
    assert re.search(r"for k=6: [\d,]+ parameters beside the model's [\d,]+, .* add \d+% to", told)
    caplog.clear()
    glcan_fx.plan(model, k=6, **given)
    assert not caplog.messages


def test_what_a_user_would_do_instead_is_said() -> None:
    """Beside the simulated steps: train the model as it is, or checkpoint it."""
    model = torchvision.models.resnet18(num_classes=10)
    small: dict[str, Any] = {"task": "classification", "example_inputs": torch.empty(2, 3, 32, 32, device="meta")}
    plan = glcan_fx.plan(model, k=2, **small)
    assert plan.memory.plan.peak > 0.95 * plan.memory.backpropagation.peak
    assert "backpropagation's memory: train the model as it is." in str(plan.simulated())
    assert "train the model" not in str(glcan_fx.plan(model, k=1, **small).simulated())
    cifar: dict[str, Any] = {"task": "classification", "example_inputs": torch.empty(128, 3, 32, 32, device="meta")}
    plan = glcan_fx.plan(CifarResNet(20), k=2, **cifar)
    assert plan.memory.plan.peak > plan.memory.checkpointing.peak
    assert "exact plan, pass memory_budget= and compute_budget=1.33." in " ".join(str(plan.simulated()).split())
    assert "train the model" not in str(plan.simulated()) and "exact plan pass" not in str(glcan_fx.plan(
        CifarResNet(20), k=6, **cifar).simulated())
