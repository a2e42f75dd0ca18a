"""Every torchvision detector keeps its contract: one training step, and evaluation as the original, bit for bit."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import glcan_fx
from glcan_fx.errors import PlanError
from glcan_fx.methods import GLCAN
from glcan_fx.models import retinanet, yolo
from glcan_fx.tasks import detector_copies


def small_fpn(levels: int) -> nn.Module:
    """A ResNet-18 feature pyramid with few channels, for detectors that are built around a backbone."""
    body = resnet.resnet18(weights=None)
    first = {4: 1, 3: 2}[levels]
    names = {f"layer{i}": str(i - first) for i in range(first, 5)}
    return BackboneWithFPN(body, names, [64 * 2 ** (i - 1) for i in range(first, 5)], 32,
                           extra_blocks=LastLevelP6P7(32, 32) if levels == 3 else None)


SIZE = {"min_size": 96, "max_size": 128}
FEW = {**SIZE, "box_batch_size_per_image": 8, "rpn_post_nms_top_n_train": 50}  # regions, to be quick
DETECTORS = {
    "RetinaNet": lambda: detection.RetinaNet(small_fpn(3), 3, **SIZE),
    "FCOS": lambda: detection.FCOS(small_fpn(3), 3, **SIZE),
    "FasterRCNN": lambda: detection.FasterRCNN(small_fpn(4), 3, **FEW),
    "MaskRCNN": lambda: detection.MaskRCNN(small_fpn(4), 3, **FEW),
    "KeypointRCNN": lambda: detection.KeypointRCNN(
        small_fpn(4), 2, **FEW, keypoint_head=KeypointRCNNHeads(32, (32, 32)),
        keypoint_predictor=KeypointRCNNPredictor(32, 17)),
    "SSD": lambda: detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=3),
    "SSDlite": lambda: detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3),
    "YOLO": lambda: yolo(18, num_classes=3, image_size=96, neck_channels=(16, 32, 64)),
}


def batch(detector: str) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [torch.rand(3, 96, 128), torch.rand(3, 110, 96)]
    targets = []
    for image in images:
        height, width = image.shape[1:]
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, 20:80, 20:70] = 1
        targets.append({"boxes": torch.tensor([[20.0, 20.0, 70.0, 80.0]]), "labels": torch.tensor([1]), "masks": mask,
                        "keypoints": torch.tensor([30.0, 40.0, 1.0]).expand(1, 17, 3).clone()})
    return images, targets


LARGE = {("SSD", "full"), ("SSD", "light"), ("SSDlite", "full"), ("SSDlite", "light"), ("FasterRCNN", "full"),
         ("YOLO", "full"), ("MaskRCNN", "light"), ("MaskRCNN", "full")}  # the same heads, or parts; for a fast run


@pytest.mark.parametrize(("name", "head"), [
    pytest.param(*pair, marks=[pytest.mark.slow] * (pair in LARGE))
    for pair in itertools.product(DETECTORS, ("light", "full"))])
def test_detector_trains_and_evaluates_as_before(name: str, head: str) -> None:
    model = DETECTORS[name]()
    original = copy.deepcopy(model).eval()
    natural = glcan_fx.plan(model, k="natural", task="detection").natural
    local = glcan_fx.transform(model, k=[natural[len(natural) // 2]], task="detection", method=GLCAN(head=head))
    images, targets = batch(name)

    with torch.no_grad():
        expected, found = original(images), local.eval()(images)
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)

    losses = local.train()(images, targets)
    assert "loss_local_0" in losses
    assert set(losses) - {"loss_local_0"} == set(original.train()(images, targets))
    before = {key: value.detach().clone() for key, value in local.named_parameters()}
    optimizer = torch.optim.SGD(local.parameters(), lr=1e-3)
    sum(losses.values()).backward()
    missing = [key for key, value in local.named_parameters() if value.grad is None]
    assert not missing
    # a few are zero: regression on levels without objects, dead units, biases in front of batch norm
    reached = [key for key, value in local.named_parameters() if value.grad.abs().max() > 0]
    assert len(reached) > 0.6 * len(before)
    optimizer.step()
    moved = [key for key, value in local.named_parameters() if not torch.equal(value, before[key])]
    assert any(key.startswith("aux.") for key in moved)
    assert any(key.startswith("backbone.") for key in moved)


@pytest.mark.parametrize(("depth", "modules"), [(18, 9), (34, 17), (50, 17), (101, 34), (152, 51)])
@pytest.mark.parametrize("kind", ["RetinaNet", "FCOS", "FasterRCNN"])
def test_natural_k_of_the_papers_trunks(kind: str, depth: int, modules: int) -> None:
    """GLCAN's K: stem and every residual block (arXiv 2406.00446, Table 2)."""
    if kind == "RetinaNet":
        model = retinanet(depth, num_classes=3)
    else:
        backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, trainable_layers=5)
        anchors = AnchorGenerator(((8,),) * 5, ((1.0,),) * 5)
        model = (detection.FCOS(backbone, 3, anchor_generator=anchors) if kind == "FCOS"
                 else detection.FasterRCNN(backbone, 3))
    task = glcan_fx.Detection()
    from glcan_fx.capture.ladder import trace
    from glcan_fx.structure.trunk import analyze

    structure = analyze(trace(model, task.example_inputs(model, None), path=task.network(model)))
    assert len(structure.units) == modules
    assert structure.units[2].name == "backbone.body.layer1.1"


def test_levels_are_focal_or_synthesised_by_depth() -> None:
    """Early modules synthesise the levels, late ones read them from the cache (GLCAN, section 4.1)."""
    model = retinanet(18, num_classes=3, fpn_channels=32, extra_levels=False, min_size=64, max_size=64,
                      anchor_sizes=((8,), (16,), (32,)))
    plan = glcan_fx.plan(model, k="natural", task="detection", example_inputs=torch.empty(2, 3, 64, 64))
    sources = [[feature.source for feature in module.features] for module in plan.modules[:-1]]
    assert sources[0] == ["synthesised"] * 3
    assert sources[4] == ["own", "synthesised", "synthesised"]
    assert sources[5] == ["cache", "synthesised", "synthesised"]
    assert sources[7] == ["cache", "cache", "synthesised"]


class TwoLevels(glcan_fx.Rules):
    def levels(self, module, levels):
        return [1, 2]

    def sigma(self, module, level):
        return 2.0 if level.reduction > 10 else 1.0


@pytest.mark.parametrize("name", [
    "RetinaNet", "FCOS", "FasterRCNN", pytest.param("SSDlite", marks=pytest.mark.slow), "YOLO"])
def test_rules_choose_levels_and_weights(name: str) -> None:
    model = DETECTORS[name]()
    natural = glcan_fx.plan(model, k="natural", task="detection").natural
    local = glcan_fx.transform(model, k=[natural[2]], task="detection", method=GLCAN(rules=TwoLevels()))
    assert local.plan.modules[0].levels == (1, 2)
    assert 2.0 in local.plan.modules[0].sigma
    losses = local.train()(*batch(name))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in local.parameters())


def test_sigma_scales_what_the_module_sees_and_not_the_loss() -> None:
    """Eq. 8: with every level weighted by 3, the module's gradient is tripled and the loss is the same."""

    class Tripled(glcan_fx.Rules):
        def sigma(self, module, level):
            return 3.0

    def gradients(rules: glcan_fx.Rules) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = retinanet(18, num_classes=3, fpn_channels=32, extra_levels=False, min_size=64, max_size=64,
                          anchor_sizes=((8,), (16,), (32,)))
        local = glcan_fx.transform(model, k=["backbone.body.layer2"], task="detection",
                                   example_inputs=torch.empty(2, 3, 64, 64), method=GLCAN(rules=rules)).train()
        torch.manual_seed(1)
        loss = local(*batch("RetinaNet"))["loss_local_0"]
        loss.backward()
        return loss.detach(), model.backbone.body.conv1.weight.grad

    (loss, grad), (loss3, grad3) = gradients(glcan_fx.Rules()), gradients(Tripled())
    assert torch.equal(loss, loss3)
    torch.testing.assert_close(grad3, 3 * grad)


def test_images_without_objects_are_legal() -> None:
    model = DETECTORS["RetinaNet"]()
    local = glcan_fx.transform(model, k=2, task="detection").train()
    images, targets = batch("RetinaNet")
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    losses = local(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in local.parameters())


@pytest.mark.parametrize(("name", "style", "fakes"), [
    ("RetinaNet", "lean", True), ("RetinaNet", "full", True), ("FCOS", "lean", False)])
def test_lighter_heads_cost_the_same_on_fake_features_and_on_real_ones(monkeypatch, name, style, fakes):
    """Fake features, which cost nothing, where their values decide nothing: FCOS matches what they are largest for."""
    model = DETECTORS[name]()
    features = {str(i): torch.rand(2, 32, 32 // 2**i, 32 // 2**i) for i in range(5)}
    lighten, modes, found = detector_copies._lighten, [], []

    def on(real):
        def run(*args):
            if real and args[-1] is not None:
                raise PlanError("values wanted")
            lighten(*args)
            modes.append(args[-1])
        return run

    for real in (False, True):
        monkeypatch.setattr(detector_copies, "_lighten", on(real))
        with torch.random.fork_rng():
            made = detector_copies.make_template(model, features, features, range(5), style, 0.5, (256, 256))
            copied = made.copy_of(model)
        assert sum(p.numel() for p in copied.parameters()) == made.parameters
        found.append((made.parameters, made.per_image, made.per_position, made.left_out, made.widths))
    assert found[0] == found[1]
    assert made.one_each if style == "lean" else made.widths
    assert [mode is not None for mode in modes] == [fakes, False]
