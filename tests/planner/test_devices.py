"""Plans for several ranks of a pipeline."""

import pytest
import torch
import torchvision
from torch import nn

import glcan_fx
from glcan_fx.methods import HPFF
from glcan_fx.models import edsr, retinanet
from glcan_fx.simulate.ranks import Load, balanced, bubble

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


def test_what_each_rank_needs():
    """Its memory is counted in tests/distributed."""
    made = glcan_fx.plan(edsr(blocks=4, channels=32), k=4, task="super_resolution",
                         example_inputs=torch.empty(16, 3, 24, 24), devices=2)
    first, second = made.on_ranks(4)
    assert first.share + second.share == pytest.approx(1)
    assert 0 <= bubble((first, second)) < 0.5
    # a block's output, what the long skip adds, and targets
    assert first.sent == 16 * 4 * (2 * 32 * 24 * 24 + 3 * 48 * 48)
    assert second.sent == 0
    assert made.on_ranks(4, None)[1].peak < second.peak


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
