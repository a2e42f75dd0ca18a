"""Where no simplified copy of a remainder can be built, local modules get heads on their own output."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx
from glcan_fx import PlanError
from glcan_fx.methods import DGL


class Deciding(nn.Module):
    """Asks for values, so that it is opaque, and no copy of it runs without them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if float(x.mean()) < 1e6 else x[:, :6]


class Net(nn.Module):
    """Its tail holds such a block, which every copy of the remainder would need."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.tail, self.fc = Deciding(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x).relu()).relu()
        x = F.interpolate(x, scale_factor=2.0)  # the trunk ends here
        return self.fc(self.tail(x).mean((2, 3)))


def test_heads_on_each_modules_own_output() -> None:
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    model = Net()
    plan = glcan_fx.plan(model, k="natural", criterion=F.cross_entropy, example_inputs=x)
    assert plan.k > 1 and isinstance(plan.method, DGL) and plan.report.rung == 3
    assert any("on each module's own output, since" in note for note in plan.notes)
    out = plan.build().train()(x, y)
    torch.testing.assert_close(out.output, model.train()(x))
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_what_the_user_configured_is_not_replaced() -> None:
    with pytest.raises(PlanError, match="cannot be built"):
        glcan_fx.plan(Net(), k="natural", width=0.5, criterion=F.cross_entropy,
                      example_inputs=torch.empty(4, 3, 16, 16))
