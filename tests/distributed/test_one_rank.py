"""What is prepared in one process for several: synchronised batch norm, random numbers."""

from collections.abc import Iterator
from typing import Any

import divided_networks as networks
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import glcan_fx


def compiled(model: nn.Module) -> glcan_fx.LocalModel:
    torch.manual_seed(1)
    images = networks.batch_of("resnet", 0)[0]
    return glcan_fx.transform(model, k=3, task="classification", example_inputs=images).train()


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.1), nn.Linear(8, 5))


def trained(local: glcan_fx.LocalModel) -> dict[str, Any]:
    optimizer = torch.optim.SGD(local.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        local(*networks.batch_of("resnet", step)).loss.backward()
        optimizer.step()
    return local.state_dict()


def synchronised(model: Any) -> Any:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.parametrize("make", [lambda: compiled(synchronised(network())), lambda: synchronised(compiled(network()))],
                         ids=["before", "after"])
def test_synchronised_batch_norm_in_one_process(make):
    """Converted before or after it is compiled, it trains as batch norm does."""
    local = make()
    assert all(isinstance(part, nn.SyncBatchNorm) for part in local.modules() if hasattr(part, "running_mean"))
    found, expected = trained(local), trained(compiled(network()))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_synchronised_batch_norm_is_compiled_within_a_process_group(group):
    """Where it runs on GPUs only; the copies that a model is recorded and verified on do not synchronise."""
    local = compiled(synchronised(network()))
    assert not any("forward" in vars(part) for part in local.modules())
    assert local.plan.memory.plan.peak > 0
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
        local(*networks.batch_of("resnet", 0))


class Asking(nn.Sequential):
    """Asks for a value, so that it is recorded by running it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


@pytest.mark.parametrize("make", [network, lambda: Asking(*network())])
def test_compiling_seeds_no_gpu(monkeypatch, make):
    """All ranks would draw the same random numbers afterwards."""
    seeded: list[int] = []
    net, state = make(), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    glcan_fx.transform(net, k=2, task="classification", example_inputs=torch.empty(4, 3, 32, 32))
    assert torch.equal(torch.get_rng_state(), state)
    assert seeded == []
