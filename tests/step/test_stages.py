"""Local modules as modules of their own."""

import copy
import pickle
from typing import Any

import loops_ddp
import pytest
import torch
from test_contract import NETS, compiled
from torch import Tensor, nn

import glcan_fx
from glcan_fx.fx_utils import function_of
from glcan_fx.peak_memory import PeakMemory


def loss_of(out: Any) -> Tensor:
    return sum(out.values()) if isinstance(out, dict) else out.loss


@pytest.mark.parametrize("net", NETS)
def test_every_key_of_the_state_dict_is_in_one_stage(net):
    _, local, _ = compiled(net, "glcan")
    keys = [key for stage in local.stages for key in stage.state_dict()]
    assert sorted(keys) == sorted(local.state_dict())
    assert {id(p) for stage in local.stages for p in stage.parameters()} == {id(p) for p in local.parameters()}


@pytest.mark.parametrize("net", NETS)
def test_stages_one_by_one_are_the_step(net):
    """What each reads is among the arguments and what those before it have made; gradients are the step's."""
    _, local, [batch, *_] = compiled(net, "glcan")
    other = copy.deepcopy(local)
    torch.manual_seed(3)
    loss_of(other(*batch)).backward()
    values = dict(zip(local.names(), batch, strict=True))
    torch.manual_seed(3)
    for stage in local.stages:
        made = dict(zip(stage.makes, stage(*(values[name] for name in stage.reads)), strict=True))
        for name, value in made.items():
            if name.startswith("loss_"):
                value = value[0] if isinstance(value, tuple) else value
                loss_of(value).backward() if isinstance(value, dict) else value.backward()
        values |= made
    for (name, p), q in zip(local.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_hooks_run_in_order_once_a_step():
    local = loops_ddp.build()
    seen: list[Any] = []
    for index, stage in enumerate(local.stages):
        stage.register_forward_pre_hook(lambda stage, args, index=index: seen.append((index, len(args))))
        stage.register_forward_hook(lambda stage, args, out, index=index: seen.append((index, len(out))))
    local(*loops_ddp.batch())
    assert [index for index, _ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert seen[2] == (1, 2)  # the block before, and targets
    local.eval()(loops_ddp.batch()[0])
    assert len(seen) == 8


def test_a_change_of_a_model_is_seen():
    local = loops_ddp.build()
    local.double()
    assert {p.dtype for stage in local.stages for p in stage.parameters()} == {torch.float64}
    local.fc = nn.Linear(16, 5)
    assert any(part is local.fc for part in local.stages[-1].modules())
    for copied in (copy.deepcopy(local), pickle.loads(pickle.dumps(local))):
        assert {id(p) for stage in copied.stages for p in stage.parameters()} == {id(p) for p in copied.parameters()}


class Divided(loops_ddp.Net):
    """A network that has a parameter and a buffer itself, in its first and in its last local module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.register_buffer("shift", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.stem(x) * self.scale)))
        return self.fc(self.pool(x).flatten(1) + self.shift)


def test_what_moves_with_a_stage_moves_in_the_model():
    torch.manual_seed(0)
    local = glcan_fx.transform(Divided(), k=3, task="classification", example_inputs=loops_ddp.EXAMPLE).train()
    assert "scale" in local.stages[0].state_dict() and "shift" in local.stages[-1].state_dict()
    local.stages[-1].double()
    assert local.shift.dtype == local.fc.weight.dtype == torch.float64
    assert local.scale.dtype == local.stem[0].weight.dtype == torch.float32
    local.stages[0].double()
    assert local.scale.dtype == torch.float64


class WithStages(loops_ddp.Net):
    """A model that has stages of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([self.block1, self.block2])

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(self.stem(x) if stage is self.stages[0] else x)
        return self.fc(self.pool(self.block3(x)).flatten(1))


def test_a_model_with_stages_of_its_own_keeps_them():
    torch.manual_seed(0)
    model = WithStages()
    local = glcan_fx.transform(model, k=3, task="classification", example_inputs=loops_ddp.EXAMPLE).train()
    assert local.stages is model.stages
    assert len(local.own_stages()) == 3
    local(*loops_ddp.batch()).loss.backward()


def test_what_a_local_module_is_given_is_freed_after_its_last_use():
    """As in one function: blocks that begin with what keeps nothing of its input."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Hardtanh(), nn.Conv2d(16, 16, 3, 1, 1), nn.GroupNorm(4, 16)) for _ in range(4)]
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    local = glcan_fx.transform(net, k=4, task="classification", example_inputs=x).train()
    whole, found = function_of(local.graph, "<whole>"), []
    for run in (lambda: whole(local, x, y), lambda: local(x, y)):
        with PeakMemory() as memory:
            run()
        found.append(memory.bytes)
    assert found[1] <= found[0]
