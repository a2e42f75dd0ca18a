"""Plans for several ranks of a pipeline."""

from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.optim import SGD

import glcan_fx
from glcan_fx.methods import HPFF
from glcan_fx.models import edsr, retinanet
from glcan_fx.peak_memory import PeakMemory
from glcan_fx.pytree import map_tensors
from glcan_fx.simulate.ranks import Load, balanced, bubble, parts_of_batch

IMAGES = torch.empty(16, 3, 64, 64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=10)


def plan(**options):
    return glcan_fx.plan(net(), task="classification", example_inputs=IMAGES, **options)


def test_ranks_share_the_local_modules():
    made = plan(k=6, devices=3)
    assert sum(made.ranks) == 6 and len(made.ranks) == 3
    assert made.rank_of == tuple(sorted(made.rank_of)) and set(made.rank_of) == {0, 1, 2}
    assert glcan_fx.Plan.from_json(made.to_json()).ranks == made.ranks
    assert "rank 2" in made.to_dot() and "sent to rank 1" in made.to_dot()
    one = plan(k=6)
    assert one.ranks == () and "rank" not in one.to_dot().replace("newrank", "").replace("rank=same", "").replace(
        "ranksep", "")
    with pytest.raises(glcan_fx.PlanError, match="for one device"):
        one.on_ranks()


def test_there_are_as_many_local_modules_as_devices():
    """By default a small batch is not cut at all."""
    small = {"task": "classification", "example_inputs": torch.empty(2, 3, 32, 32)}
    assert glcan_fx.plan(net(), **small).k == 1
    assert glcan_fx.plan(net(), **small, devices=2).ranks == (1, 1)
    with pytest.raises(glcan_fx.PlanError, match="3 ranks, but ResNet has 2 local modules"):
        plan(k=2, devices=3)
    with pytest.raises(glcan_fx.PlanError, match="devices=0: a number"):
        plan(devices=0)
    with pytest.raises(glcan_fx.PlanError, match="already decides devices"):
        glcan_fx.plan(net(), plan=plan(k=2).plan, devices=2)


def test_local_modules_that_need_each_other_are_on_one_rank():
    with pytest.raises(glcan_fx.PlanError, match="'hpff'.* passes through several local modules"):
        plan(k=4, devices=3, method=HPFF(base="dgl"))


NETS = {  # of the second, what arrives is a large part
    "resnet": (net, "classification", (4, 3, 64, 64), torch.arange(4)),
    "edsr": (lambda: edsr(blocks=4, channels=32), "super_resolution", (4, 3, 24, 24), torch.rand(4, 3, 48, 48)),
}


@pytest.mark.parametrize("optimizer", ["sgd", None])
@pytest.mark.parametrize("name", NETS)
def test_what_each_rank_needs(name, optimizer):
    """The memory of a rank, counted on real tensors, is what the plan foretold."""
    make, task, size, y = NETS[name]
    made = glcan_fx.plan(make(), k=4, task=task, example_inputs=torch.empty(4 * size[0], *size[1:]), devices=2)
    ranks = made.on_ranks(4, optimizer)
    assert sum(rank.share for rank in ranks) == pytest.approx(1)
    assert 0 <= bubble(ranks) < 0.5
    assert ranks[1].sent == 0
    local = made.build().train()
    batch = {"x": torch.randn(4 * size[0], *size[1:]), "targets": torch.cat([y] * 4)}
    step = local.__dict__["_step"]
    values = step.values(next(parts_of_batch(local.task, batch, 4))[1])
    for number, rank in enumerate(ranks):
        share = nn.ModuleList([local.stages[index] for index in rank.modules])
        optimizers = [SGD(share.parameters(), 0.1, momentum=0.9)] if optimizer else []
        for parameter in share.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for one in optimizers:
            one.step()
            one.zero_grad()
        share.zero_grad()
        sent: list[dict[str, Any]] = []
        memory = PeakMemory(share, *optimizers, *(v for v in values.values() if isinstance(v, torch.Tensor)))
        with memory:
            outputs: list[Any] = []
            for part in range(4):
                now = values
                values = {} if part == 3 else map_tensors(now, torch.clone) if number else dict(now)
                local.differentiate_stages(step, now, rank.modules, 0.25, {})
                outputs.append(step.outputs(now) if number else None)
                sent[:] = [{name: now[name] for name in step.passed_on(rank.modules.stop)}]
            for one in optimizers:
                one.step()
        assert memory.bytes == pytest.approx(rank.peak, rel=0.03)
        values = sent[0]
        if number == 0:
            assert rank.sent == 4 * sum(t.numel() * t.element_size() for t in values.values())


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_busiest_rank_has_the_least_to_do(ranks):
    """Against every division."""
    made = torch.Generator().manual_seed(ranks)
    loads = [Load(float(torch.rand((), generator=made)), 1.0) for _ in range(9)]

    def worst(sizes) -> float:
        ends = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        return max(sum(load.flops for load in loads[a:b]) for a, b in zip(ends, ends[1:], strict=False))

    def divisions(left, parts):
        if parts == 1:
            yield (left,)
            return
        for first in range(1, left - parts + 2):
            for rest in divisions(left - first, parts - 1):
                yield (first, *rest)

    sizes = balanced(loads, [], ranks)
    assert sum(sizes) == 9 and worst(sizes) == min(map(worst, divisions(9, ranks)))
    linked = balanced(loads, [(2, 4, "")], 2)
    assert linked[0] not in (3, 4)
    many = balanced([*loads] * 6, [], 8)  # too many divisions to try
    assert sum(many) == 54 and len(many) == 8 and min(many) > 0


@pytest.mark.parametrize("options", [{"k": 2}, {"devices": 2}])
def test_a_budget_with_a_number_of_local_modules_that_is_cut_elsewhere_by_auxiliary_networks(options):
    """Of richer auxiliary networks the cut that balances two local modules is another one."""
    blocks = [nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.GroupNorm(4, 16), nn.ReLU()) for _ in range(4)]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU())
    model = nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    made = glcan_fx.plan(model, task="classification", example_inputs=torch.empty(8, 3, 32, 32), memory_budget="1GiB",
                         **options)
    assert made.k == 2 and made.memory.plan.peak < 2**30


def test_what_the_ranks_of_a_detector_need():
    """Its example targets have values."""
    model = retinanet(18, num_classes=3, fpn_channels=32, extra_levels=False, min_size=64, max_size=64)
    made = glcan_fx.plan(model, task="detection", example_inputs=torch.empty(8, 3, 64, 64, device="meta"), devices=2)
    first, second = made.on_ranks(4)
    assert first.sent > 0 == second.sent and min(first.peak, second.peak) > 0
