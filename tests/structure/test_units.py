"""Where units end: at what blocks return, not inside the next block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx


class Pair(nn.Module):
    """Returns more than a map, which is computed behind its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x)
        return y, y.mean((2, 3))


class Shifted(nn.Module):
    """Begins with operations that have no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x + 0.1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.ModuleList([Pair(), Shifted(), Pair(), Shifted()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean((2, 3)))


def test_no_cut_lies_inside_the_block_that_follows() -> None:
    model, calls = Net(), []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))  # refused on a module that a cut divides
    local = glcan_fx.transform(model, k="natural", criterion=F.cross_entropy, example_inputs=torch.empty(4, 3, 8, 8))
    assert local.plan.k == 5
    x = torch.randn(4, 3, 8, 8)
    out = local.train()(x, torch.arange(4))
    assert len(calls) == 4
    torch.testing.assert_close(out.output, model(x))
