"""GSO-YOLO, a detector to compile: its blocks, its box loss, and that it trains."""

from typing import Any

import pytest
import torch
from test_training import program
from torchvision.ops import complete_box_iou_loss

import glcan_fx

TARGET = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 50.0]]), "labels": torch.tensor([1])}


@pytest.fixture(scope="module")
def gso() -> Any:
    program("train_detection")
    import models.gso_yolo

    return models.gso_yolo


def test_the_box_loss_joins_both(gso: Any) -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
    targets = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
    # the first pair: IoU 4 / 8, centres 1 apart in a box of 4 x 2, widths 2 apart in 4
    expected = 1 - 0.5 + 1 / (4**2 + 2**2) + 2**2 / 4**2
    assert gso.efficient_box_iou_loss(boxes, targets).item() == pytest.approx(expected, abs=1e-5)
    model = gso.gso_yolo(18, num_classes=3, image_size=64)
    both = (complete_box_iou_loss(boxes, targets, reduction="sum") + expected) / 2
    torch.testing.assert_close(model.box_loss(boxes, targets), both, rtol=1e-4, atol=1e-5)


def test_attention_weighs_channels_and_positions(gso: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 5, 7, requires_grad=True)
    for block, channels in ((gso.GlobalAttention(16), 16), (gso.SteadyCapture(16), 2)):  # all, or those of a group
        out = block(x)
        assert out.shape == x.shape
        assert (out.abs() <= x.abs() + 1e-6).all() and not torch.allclose(out, x)
        grad = torch.autograd.grad(out[0, 0, 0, 0], x)[0]
        assert int((grad[0].abs().sum((1, 2)) > 0).sum()) == channels
    with pytest.raises(ValueError, match="multiple"):
        gso.SteadyCapture(12)


@pytest.mark.slow
def test_is_cut_by_blocks_and_trains(gso: Any) -> None:
    torch.manual_seed(0)
    model = gso.gso_yolo(18, num_classes=3, image_size=96)
    local = glcan_fx.transform(model, k="natural", task="detection", example_inputs=torch.empty(2, 3, 96, 96)).train()
    assert {"backbone.attend", "backbone.body.layer4.1"} <= set(local.plan.cuts) and local.plan.k >= 10
    optimizer = torch.optim.SGD(local.parameters(), 0.001)
    data = [torch.rand(3, 96, 96) for _ in range(2)], [TARGET, TARGET]
    totals = []
    for _ in range(4):
        optimizer.zero_grad()
        losses = local(*data)
        sum(losses.values()).backward()
        optimizer.step()
        own = [name for name in losses if not name.startswith("loss_local")]
        totals.append(float(sum(losses[name].detach() for name in own)))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert totals[-1] < totals[0]
    model.eval(), local.eval()
    with torch.no_grad():
        assert torch.equal(model(data[0])[0]["scores"], local(data[0])[0]["scores"])
