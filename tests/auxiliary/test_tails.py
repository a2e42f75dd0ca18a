"""In-place operations around a cut must not change what a module outputs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import glcan_fx
from glcan_fx.methods import GLCAN


class LongSkip(nn.Module):
    """A body under a long skip that is added in place; the tail also rectifies in place."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(Block() for _ in range(3)))
        self.up = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x):
        x = self.head(x)
        out = self.body(x)
        out += x
        return self.up(out)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.b(F.relu(self.a(x), inplace=True))


class EarlyBranch(nn.Module):
    """A side head reads a value that the next block then overwrites in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.side = nn.Linear(8, 4)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        side = self.side(x.mean((2, 3)))
        x = self.conv(self.relu(x))
        return self.fc(x.mean((2, 3))), side


@pytest.mark.parametrize("head", ["full", "light"])
@pytest.mark.parametrize("model", [LongSkip, EarlyBranch])
def test_training_output_is_the_models(model, head):
    torch.manual_seed(0)
    net = model()
    reference = copy.deepcopy(net).train()
    local = glcan_fx.transform(
        net, criterion=lambda out, y: sum(o.square().mean() for o in (out if isinstance(out, tuple) else (out,))),
        k="natural", example_inputs=torch.empty(2, 3, 8, 8), method=GLCAN(head=head),
    )
    assert local.plan.k > 1
    x = torch.randn(2, 3, 8, 8)
    out = local.train()(x.clone(), 0)
    torch.testing.assert_close(out.output, reference(x.clone()), rtol=0, atol=0)
    out.loss.backward()
    assert all(p.grad is not None for p in local.parameters())


def test_features_are_what_the_auxiliary_network_reads() -> None:
    """Found by looking at a U-Net's report: a lean auxiliary network predicts from the module's own output."""
    from test_invariants import UNet

    from glcan_fx.models import edsr

    for model, task, size in ((UNet(), "segmentation", (2, 3, 64, 64)),
                              (edsr(blocks=3, channels=16), "super_resolution", (2, 3, 16, 16))):
        for head in ("lean", "light"):
            plan = glcan_fx.plan(model, k="natural", task=task, example_inputs=torch.empty(size),
                                 method=GLCAN(head=head))
            local = glcan_fx.transform(model, plan=plan)
            for index, module in enumerate(plan.modules[:-1]):
                network = local.aux.get_submodule(f"{index}.network")
                read = [f.tap for f in module.features if f.source != "synthesised" and f.tap != module.cut]
                inputs = [node for node in network.graph.find_nodes(op="placeholder")
                          if not all(user.target is getattr for user in node.users)]  # whose sizes alone are read
                assert len(inputs) == 1 + len(read), (task, head, index)
