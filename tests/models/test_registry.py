"""torchvision's whole registry: every network plans, trains a step at k=4 and evaluates as before, bit for bit.

Some small networks run by default, all of them with ``-m slow``.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_builder

import glcan_fx

sys.path.insert(0, str(Path(__file__).parents[2] / "docs"))
from make_models import flow_criterion, kind_of, names  # noqa: E402

SMALL = (  # the quickest of each kind; optical flow and windows of tokens take longer
    "alexnet", "fcos_resnet50_fpn", "lraspp_mobilenet_v3_large", "mobilenet_v3_small", "r3d_18", "regnet_y_400mf",
    "resnet18", "squeezenet1_1", "vit_b_32",
)
SIDES = {  # of the smallest images that a family takes, where 32 is too small
    "alexnet": 63, "googlenet": 64, "inception": 75, "maxvit": 224, "optical_flow": 128, "mvit": 224, "s3d": 224,
    "regnet": 64,  # batch norm of two values explodes
}
FRAMES = {"s3d": 16, "mvit": 16, "swin3d": 4}
LIMIT = 700e6  # parameters, auxiliary ones included: larger networks are only planned
OPTIONS = {
    "detection": {"num_classes": 3, "weights_backbone": None},
    "segmentation": {"num_classes": 3, "weights_backbone": None},
    "optical_flow": {},
}
REGIONS = {"min_size": 64, "max_size": 64}  # of detectors that resize to any size


def family(name: str) -> str:
    return get_model_builder(name).__module__.rpartition(".")[2]


def side(name: str) -> int:
    if family(name) == "vision_transformer":
        return 2 * int(name.rpartition("_")[2])  # two by two patches
    return SIDES.get(family(name), SIDES.get(kind_of(name), 32))


def build(name: str) -> nn.Module:
    options = dict(OPTIONS.get(kind_of(name), {"num_classes": 5}))
    if kind_of(name) == "detection" and not name.startswith("ssd"):
        options.update(REGIONS)
    if family(name) == "inception":
        options["aux_logits"] = False  # needs images of 299; GoogLeNet has such outputs, too
    if family(name) == "vision_transformer":
        options["image_size"] = side(name)
    torch.manual_seed(0)
    return get_model(name, weights=None, **options)


def batch(name: str) -> tuple[tuple[Any, ...], Any]:
    """Two inputs, and their targets."""
    size, labels, kind = side(name), torch.tensor([1, 2]), kind_of(name)
    if kind == "detection":
        mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
        mask[:, 8:50, 8:40] = 1
        target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1]), "masks": mask,
                  "keypoints": torch.tensor([20.0, 30.0, 1.0]).expand(1, 17, 3)}
        return ([torch.rand(3, 64, 64), torch.rand(3, 64, 64)],), [target, target]
    if kind == "segmentation":
        return (torch.randn(2, 3, size, size),), labels[:, None, None].expand(2, size, size)
    if kind == "optical_flow":
        return (torch.rand(2, 3, size, size), torch.rand(2, 3, size, size)), torch.rand(2, 2, size, size)
    if kind == "video":
        return (torch.randn(2, 3, FRAMES.get(family(name), 8), size, size),), labels
    return (torch.randn(2, 3, size, size),), labels


def task(name: str, inputs: tuple[Any, ...]) -> dict[str, Any]:
    kind = kind_of(name)
    if kind == "detection":
        return {"task": kind, "example_inputs": None if name.startswith("ssd") else inputs[0]}
    if kind == "optical_flow":
        return {"criterion": flow_criterion, "example_inputs": inputs}
    return {"task": "classification" if kind == "video" else kind, "example_inputs": inputs}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(equal, a, b))


@torch.no_grad()
def predicted(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    torch.manual_seed(1)
    return model.eval()(*inputs)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SMALL else pytest.mark.slow) for n in names()])
def test_network(name: str) -> None:
    model = build(name).train()
    inputs, targets = batch(name)
    given = task(name, inputs)
    try:
        plan = glcan_fx.plan(model, k=4, **given)
    except glcan_fx.PlanError:  # fewer places to cut
        plan = glcan_fx.plan(model, k="natural", **given)
        assert plan.k < 4
    if kind_of(name) != "optical_flow":  # a loop of refinements has no blocks to cut between
        assert plan.k == 4, plan
    if sum(part.parameters + part.aux_parameters for part in plan.modules) > LIMIT:
        return

    expected = predicted(model, inputs)
    local = glcan_fx.transform(model, plan=plan)
    assert equal(predicted(local, inputs), expected)

    optimizer = torch.optim.SGD(local.parameters(), lr=1e-4)
    out = local.train()(*inputs, targets)
    losses = out if isinstance(out, dict) else out.losses
    assert len(losses) >= plan.k
    loss = sum(losses.values()) if isinstance(out, dict) else out.loss
    assert loss.isfinite()
    loss.backward()
    missing = {key for key, p in local.named_parameters() if p.requires_grad and p.grad is None}
    assert not {key for key in missing if key.startswith("aux.")}
    assert not missing or missing <= untrained(model, inputs, targets, given)
    optimizer.step()


def untrained(model: nn.Module, inputs: tuple[Any, ...], targets: Any, given: dict[str, Any]) -> set[str]:
    """Parameters that the plain model's own training step does not reach."""
    model.zero_grad()
    if given.get("task") == "detection":
        losses = model.train()(*inputs, targets)
        sum(losses.values()).backward()
    else:
        criterion = given.get("criterion") or {
            "classification": glcan_fx.Classification, "segmentation": glcan_fx.Segmentation}[given["task"]]().loss
        criterion(model.train()(*inputs), targets).backward()
    return {key for key, p in model.named_parameters() if p.grad is None}
