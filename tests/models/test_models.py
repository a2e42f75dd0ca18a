"""The models of the experiments: sizes, contracts, losses and decoding; nothing may touch the network."""

import copy
import math
import socket
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models.detection import RetinaNet, retinanet_resnet50_fpn
from torchvision.ops import box_iou

from glcan_fx.models import COCO_ANCHORS, EDSR, RESNET_DEPTHS, YOLO, ResidualBlock, edsr, edsr_full, retinanet, yolo

ANCHORS = (((8, 8), (12, 12), (12, 8)), ((16, 16), (24, 24), (16, 24)), ((32, 32), (48, 48), (32, 48)))


class NetworkUsed(Exception):
    """Not an OSError, so that urllib does not wrap it."""


@pytest.fixture(autouse=True)
def _offline_single_thread(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise NetworkUsed

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no cached weights
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small_yolo(num_classes: int = 3, **kwargs) -> YOLO:
    options = {"image_size": 64, "neck_channels": (8, 16, 16), "anchors": ANCHORS, **kwargs}
    return yolo(18, num_classes=num_classes, **options)


def target(*boxes: list[float], labels: list[int]) -> dict[str, torch.Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}


# ------------------------------------------------------------------------------------------- both detectors


@pytest.mark.parametrize("build", [retinanet, yolo])
@pytest.mark.parametrize("depth", RESNET_DEPTHS)
def test_detectors_build_at_every_depth_all_trainable(build, depth):
    with torch.device("meta"):
        model = build(depth, num_classes=4)
    assert isinstance(model, RetinaNet if build is retinanet else YOLO)
    assert all(p.requires_grad for p in model.parameters())
    blocks = sum(len(getattr(model.backbone.body, f"layer{i}")) for i in range(1, 5))
    assert blocks * (2 if depth < 50 else 3) + 2 == depth  # with the first convolution and the dropped fc


@pytest.mark.parametrize("build", [retinanet, yolo])
def test_depths_are_checked_and_weights_are_fetched_only_on_demand(build):
    with pytest.raises(ValueError, match="18, 34, 50, 101, 152"):
        build(19, num_classes=4)
    with pytest.raises(NetworkUsed):  # which also shows that the guard of the other tests works
        build(18, num_classes=4, weights_backbone="IMAGENET1K_V1")


# ------------------------------------------------------------------------------------------------ RetinaNet


def test_retinanet_defaults_are_torchvisions():
    with torch.device("meta"):
        ours = retinanet(50, num_classes=91)
        theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None)
    shapes = [{name: x.shape for name, x in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert ours.anchor_generator.sizes == theirs.anchor_generator.sizes
    assert ours.anchor_generator.aspect_ratios == theirs.anchor_generator.aspect_ratios
    assert not any("Frozen" in type(m).__name__ for m in ours.modules())


def test_retinanet_small_image_detector():
    sizes = ((8, 10, 13), (16, 20, 25), (32, 40, 51))
    model = retinanet(18, num_classes=3, fpn_channels=32, extra_levels=False, anchor_sizes=sizes, min_size=128,
                      max_size=128)
    features = model.backbone(torch.rand(1, 3, 128, 128))
    assert [tuple(x.shape) for x in features.values()] == [(1, 32, n, n) for n in (16, 8, 4)]
    assert model.head.classification_head.cls_logits.in_channels == 32
    losses = model([torch.rand(3, 128, 128)], [target([20, 20, 52, 60], labels=[2])])
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval()([torch.rand(3, 128, 100)])[0]) == {"boxes", "scores", "labels"}
    with torch.device("meta"):
        model = retinanet(18, num_classes=3, extra_levels=False)
    assert model.anchor_generator.sizes == ((32, 40, 50), (64, 80, 101), (128, 161, 203))


@pytest.mark.parametrize("sizes", [((8,), (16,)), ((8,), (16,), (32,), (64,)), ((8,), (16, 20), (32,))])
def test_retinanet_refuses_anchors_that_do_not_fit(sizes):
    with torch.device("meta"), pytest.raises(ValueError, match="anchor_sizes"):
        retinanet(18, num_classes=3, extra_levels=False, anchor_sizes=sizes)


# ----------------------------------------------------------------------------------------------------- YOLO


class Given(nn.Module):
    """Returns what it was given instead of computing anything."""

    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args):
        return self.value


def scripted_yolo(size=(64, 64), images: int = 1, **kwargs) -> tuple[YOLO, list[torch.Tensor]]:
    """A YOLO of which the raw outputs (N, A, 5 + K, H, W) of the levels can be written: all background."""
    model = small_yolo(**kwargs)
    raw = [torch.zeros(images, 3, 5 + model.num_classes, size[0] // s, size[1] // s) for s in (8, 16, 32)]
    for level in raw:
        level[:, :, 4:] = -20
    model.head = nn.ModuleList(Given(level.flatten(1, 2)) for level in raw)
    return model, raw


def write_box(raw, level: int, anchor: int, box: list[float], label: int, image: int = 0) -> None:
    """Inverse of equations in section 2.1, in the cell of the centre."""
    stride, (pw, ph) = 8 * 2**level, ANCHORS[level][anchor]
    x, y = (box[0] + box[2]) / 2 / stride, (box[1] + box[3]) / 2 / stride
    cell = raw[level][image, anchor, :, int(y), int(x)]
    offsets = [math.log(t / (1 - t)) for t in (x % 1, y % 1)]
    cell[:4] = torch.tensor([*offsets, math.log((box[2] - box[0]) / pw), math.log((box[3] - box[1]) / ph)])
    cell[4] = cell[5 + label] = 20


def test_yolo_structure():
    with torch.device("meta"):
        model = yolo(50, num_classes=80)
        features = model.backbone(torch.rand(1, 3, 416, 416))
    assert isinstance(features, OrderedDict)
    shapes = {name: tuple(x.shape[1:]) for name, x in features.items()}
    assert shapes == {"0": (128, 52, 52), "1": (256, 26, 26), "2": (512, 13, 13)}
    assert [p[-1].out_channels for p in model.head] == [255] * 3  # 3 x (4 + 1 + 80): section 2.3
    biases = [p[-1].bias.view(3, 8) for p in small_yolo().head]
    assert all((bias[:, 4].sigmoid() - 0.01).abs().max() < 1e-6 and bias[:, :4].abs().max() < 1 for bias in biases)
    assert tuple(model.anchors.shape) == (3, 3, 2) and COCO_ANCHORS[2][2] == (373, 326)


def test_yolo_losses_vanish_and_detections_are_exact_on_perfect_outputs():
    model, raw = scripted_yolo(size=(64, 96), images=2, image_size=96)
    # On images of 32 x 48, which are doubled: a box for each level, one image with two boxes.
    small, tall, wide = [3, 4, 7, 8.5], [10, 3, 19, 16], [25, 6, 47, 29]
    write_box(raw, 0, 0, [2 * v for v in small], 2)
    write_box(raw, 1, 2, [2 * v for v in tall], 0)
    write_box(raw, 2, 1, [2 * v for v in wide], 1, image=1)
    images = [torch.rand(3, 32, 48)] * 2
    losses = model(images, [target(small, tall, labels=[2, 0]), target(wide, labels=[1])])
    assert set(losses) == {"loss_box", "loss_objectness", "loss_classification"}
    assert all(loss.shape == () and loss < 1e-4 for loss in losses.values())

    first, second = model.eval()(images)
    assert sorted(first["labels"].tolist()) == [0, 2] and second["labels"].tolist() == [1]
    torch.testing.assert_close(first["boxes"][first["labels"].argsort()], torch.tensor([tall, small]))
    torch.testing.assert_close(second["boxes"], torch.tensor([wide], dtype=torch.float32))
    assert first["scores"].min() > 0.99 and first["labels"].dtype == torch.int64


@pytest.mark.parametrize("wrong", ["level", "anchor", "label"])
def test_yolo_losses_see_wrong_outputs(wrong):
    model, raw = scripted_yolo()
    box = [6, 8, 14, 17]
    write_box(raw, int(wrong == "level"), int(wrong == "anchor"), box, 2 if wrong == "label" else 1)
    losses = model([torch.rand(3, 64, 64)], [target(box, labels=[1])])
    # Two logits of 20 on the wrong side; or the assigned prior silent, and maybe a false one that is heard.
    assert losses["loss_classification"] > 19
    assert (losses["loss_box"] > 0.01) == (wrong != "label")
    assert (losses["loss_objectness"] > 19) == (wrong != "label")


def test_yolo_ignores_only_unassigned_priors_that_overlap():
    model, raw = scripted_yolo()
    box, images = [22.0, 22.0, 34.0, 34.0], [torch.rand(3, 64, 64)]  # the 12 x 12 anchor of the cell 3, 3
    write_box(raw, 0, 1, box, 0)

    def objectness(anchor: int, row: int, logit: float = 20.0) -> float:
        logits = raw[0][0, anchor, 4, row]
        before = logits[3].item()
        logits[3] = logit
        loss = model(images, [target(box, labels=[0])])["loss_objectness"].item()
        logits[3] = before
        return loss

    assert objectness(2, 3) < 1e-4  # 12 x 8 in the same cell: IoU 2 / 3
    assert objectness(0, 3) > 19  # 8 x 8 in the same cell: IoU 4 / 9
    assert objectness(2, 7) > 19  # elsewhere
    assert objectness(1, 3, logit=-20.0) > 19  # the assigned prior overlaps, too, but counts


def test_yolo_sums_over_objects_and_averages_over_images():
    model, raw = scripted_yolo()
    box = [6, 8, 14, 17]
    image, nothing = torch.rand(3, 64, 64), target(labels=[])
    one = model([image], [target(box, labels=[1])])
    twice = model([image], [target(box, box, labels=[1, 1])])
    assert twice["loss_box"].item() == pytest.approx(2 * one["loss_box"].item())
    model, raw = scripted_yolo(images=2)
    half = model([image, image], [target(box, labels=[1]), nothing])
    for name in one:
        assert half[name].item() == pytest.approx(one[name].item() / 2, rel=1e-4)


@pytest.mark.parametrize("targets", [[target(labels=[])], [target(labels=[]), target([5, 5, 20, 20], labels=[0])]])
def test_yolo_accepts_images_without_objects(targets):
    model = small_yolo()
    losses = model([torch.rand(3, 64, 64)] * len(targets), targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_objectness"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_yolo_overfits_one_image():
    model = small_yolo(neck_channels=(32, 32, 32))
    image = torch.full((3, 64, 64), 0.2)
    image[:, 16:40, 8:36] = 0.9
    truth = target([8.0, 16, 36, 40], labels=[2])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history = []
    for _ in range(36):
        loss = sum(model([image], [truth]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.1 * history[0]
    found = model.eval()([image])[0]
    assert found["labels"][0] == 2 and found["scores"][0] > 0.5
    assert box_iou(found["boxes"][:1], truth["boxes"]).item() > 0.5


def test_yolo_detections_are_limited_sorted_and_inside_the_image():
    model = small_yolo(score_thresh=0.0, detections_per_img=7).eval()
    images = [torch.rand(3, 40, 100), torch.rand(3, 80, 30)]
    for image, found in zip(images, model(images), strict=True):
        assert found["boxes"].shape == (7, 4) and found["scores"].shape == found["labels"].shape == (7,)
        assert (found["scores"].diff() <= 0).all() and found["labels"].max() < 3
        height, width = image.shape[-2:]
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
    empty = small_yolo(score_thresh=0.99).eval()(images)[0]
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)


def test_yolo_computes_losses_in_float32_under_autocast():
    model = small_yolo()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([torch.rand(3, 64, 64)], [target([5, 5, 20, 20], labels=[0])])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()

    model, raw = scripted_yolo()
    outputs = [torch.randn_like(level.flatten(1, 2)).bfloat16() for level in raw]
    for dtype in (torch.bfloat16, torch.float32):
        model.head = nn.ModuleList(Given(output.to(dtype)) for output in outputs)
        losses = model([torch.rand(3, 64, 64)], [target([5, 5, 20, 20], labels=[0])])
        raw.append(torch.stack(list(losses.values())))
    torch.testing.assert_close(raw[-2], raw[-1], rtol=0, atol=0)


def test_yolo_select_levels():
    full, raw = scripted_yolo()
    box = [6, 8, 14, 17]
    images, targets = [torch.rand(3, 64, 64)], [target(box, labels=[1])]
    part = copy.deepcopy(full)
    part.select_levels([1, 2])
    assert len(part.head) == 2 and part.strides == (16, 32)
    assert part.anchors.tolist() == full.anchors[1:].tolist()
    features = full.backbone(torch.rand(1, 3, 64, 64))
    part.backbone = Given(OrderedDict(zip("01", list(features.values())[1:], strict=True)))
    # The object goes to the best prior that is left; deepcopy has cut the ties to `raw`.
    write_box([None, *(head.value.unflatten(1, (3, -1)) for head in part.head)], 1, 0, box, 1)
    assert full(images, targets)["loss_classification"] > 19
    assert all(loss < 1e-4 for loss in part(images, targets).values())
    assert len(full.eval()(images)[0]["boxes"]) == 0
    torch.testing.assert_close(part.eval()(images)[0]["boxes"], torch.tensor([box], dtype=torch.float32))

    for wrong in ([], [1, 0], [0, 0], [0, 2], [-1]):
        with pytest.raises(ValueError, match="increasing indices"):
            part.select_levels(wrong)
    part.backbone = full.backbone
    with pytest.raises(ValueError, match="strides"):
        part(images, targets)


def test_yolo_keeps_trained_predictors_on_select_levels():
    model = small_yolo()
    kept = model.head[2]
    model.select_levels([2])
    assert list(model.head) == [kept]
    features = model.backbone(torch.rand(2, 3, 64, 64))
    model.backbone = Given(OrderedDict([("0", features["2"].detach())]))
    losses = model([torch.rand(3, 64, 64)] * 2, [target([5, 5, 20, 20], labels=[0])] * 2)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.head.parameters())


@pytest.mark.parametrize(("targets", "message"), [
    (None, "targets must be given"), ([target([5, 5, 5, 9], labels=[0])], "positive width"),
    ([target([5, 5, 9, 9], labels=[3])], r"0\.\.2"), ([target([5, 5, 9, 9], labels=[0, 1])], r"\(M, 4\)"),
])
def test_yolo_refuses_bad_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        small_yolo()([torch.rand(3, 64, 64)], targets)


def test_yolo_refuses_inconsistent_levels():
    with torch.device("meta"):
        for options in ({"anchors": ANCHORS[:2]}, {"strides": (8, 16)}, {"anchors": (*ANCHORS[:2], ANCHORS[2][:2])}):
            with pytest.raises(ValueError, match="levels"):
                small_yolo(**options)
        with pytest.raises(ValueError):
            small_yolo(neck_channels=(8, 16))


# ----------------------------------------------------------------------------------------------------- EDSR


@pytest.mark.parametrize(("build", "scale", "count"), [
    # Lim et al. 2017, table 1 (x4): 1.5 M and 43 M; x2 as later papers quote it: 1.37 M and 40.7 M
    (edsr, 2, 1_369_859), (edsr, 3, 1_554_499), (edsr, 4, 1_517_571), (edsr_full, 2, 40_729_603),
    (edsr_full, 3, 43_680_003), (edsr_full, 4, 43_089_923),
])
def test_edsr_sizes(build, scale, count):
    with torch.device("meta"):
        model = build(scale)
        assert model(torch.rand(2, 3, 10, 14)).shape == (2, 3, 10 * scale, 14 * scale)
    assert isinstance(model, EDSR) and parameters(model) == count
    blocks = [m for m in model.body if isinstance(m, ResidualBlock)]
    assert len(blocks) == (32 if build is edsr_full else 16)
    assert {b.residual_scale for b in blocks} == {0.1 if build is edsr_full else 1.0}


def test_edsr_residuals_and_mean():
    block = ResidualBlock(4, residual_scale=0.1)
    x = torch.rand(1, 4, 6, 6)
    torch.testing.assert_close(block(x), x + 0.1 * block.body(x))
    assert not torch.allclose(ResidualBlock(4)(x), x)

    model = edsr(blocks=1, channels=4, rgb_mean=(0.1, 0.2, 0.3), rgb_range=255.0)
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    nn.init.zeros_(model.tail[-1].weight)
    nn.init.zeros_(model.tail[-1].bias)
    mean = torch.tensor([25.5, 51.0, 76.5]).view(1, 3, 1, 1)
    image = 255 * torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(model(image), mean.expand(1, 3, 8, 8))
    torch.testing.assert_close(seen[0], image - mean)

    # The long skip: with a silent body the tail sees what the head returned.
    for parameter in model.body.parameters():
        nn.init.zeros_(parameter)
    model.tail.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(image)
    torch.testing.assert_close(seen[2], model.head(image - mean))


@pytest.mark.parametrize("options", [{"scale": 5}, {"blocks": 0}, {"channels": 0}, {"rgb_mean": (0.5,)}])
def test_edsr_refuses_bad_sizes(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        edsr(**options)
