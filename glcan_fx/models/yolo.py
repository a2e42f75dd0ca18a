"""One-stage detector after YOLOv3 (Redmon & Farhadi 2018, arXiv 1804.02767) on a ResNet trunk."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import WeightsEnum
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, complete_box_iou_loss
from torchvision.ops.misc import Conv2dNormActivation

from glcan_fx.models.retinanet import C3_TO_C5, resnet_trunk

COCO_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
"""(width, height) in pixels of the priors at strides 8, 16, 32: k-means on COCO, section 2.3 of the paper."""

_MAX_LOG_SCALE = math.log(1000 / 16)  # torchvision's BoxCoder bounds its exponential alike
_Norm = Callable[..., nn.Module]
_conv = partial(Conv2dNormActivation, activation_layer=partial(nn.LeakyReLU, negative_slope=0.1))


class YOLONeck(nn.Module):
    """Top-down neck of section 2.3: five convolutions per scale, then up-sampled and joined to the finer one.

    Takes an OrderedDict of maps, finest first, each half the size of the one before and ``in_channels`` wide,
    and returns an OrderedDict "0", "1", ... of maps of the same sizes, ``out_channels`` wide.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int], norm_layer: _Norm) -> None:
        super().__init__()
        self.blocks, self.routes = nn.ModuleList(), nn.ModuleList()
        for level, (lateral, out) in enumerate(zip(in_channels, out_channels, strict=True)):
            if level > 0:
                self.routes.append(_conv(out, out_channels[level - 1], 1, norm_layer=norm_layer))
            joined = lateral if level == len(out_channels) - 1 else lateral + out
            widths = [joined, out, 2 * out, out, 2 * out, out]
            convs = [_conv(widths[i], widths[i + 1], (1, 3)[i % 2], norm_layer=norm_layer) for i in range(5)]
            self.blocks.append(nn.Sequential(*convs))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        laterals = list(features.values())
        outputs = [self.blocks[-1](laterals[-1])]
        for level in reversed(range(len(self.routes))):
            above = F.interpolate(self.routes[level](outputs[0]), scale_factor=2.0, mode="nearest")
            outputs.insert(0, self.blocks[level](torch.cat([above, laterals[level]], dim=1)))
        return OrderedDict((str(level), output) for level, output in enumerate(outputs))


class YOLOBackbone(nn.Module):
    """ResNet trunk and neck: N x 3 x H x W images (H and W multiples of 32) to an OrderedDict of three maps.

    They are named "0", "1", "2", have strides 8, 16, 32 and the widths ``out_channels``.
    """

    def __init__(self, depth: int, weights: Any, out_channels: Sequence[int], norm_layer: _Norm) -> None:
        super().__init__()
        trunk, in_channels = resnet_trunk(depth, weights, norm_layer)
        self.body = IntermediateLayerGetter(trunk, return_layers=C3_TO_C5)
        self.neck = YOLONeck(in_channels, out_channels, norm_layer)
        self.out_channels = tuple(out_channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], self.neck(self.body(x)))


class _Grid(NamedTuple):
    """The P priors of an image, by level, row, column and anchor; in pixels."""

    corner: Tensor  # (P, 2) x, y of the top left corner of the cell
    stride: Tensor  # (P, 1) side of the cell
    prior: Tensor  # (P, 2) width, height of the anchor

    def boxes(self) -> Tensor:
        """(P, 4) xyxy anchors, centred on their cells."""
        centre = self.corner + self.stride / 2
        return torch.cat([centre - self.prior / 2, centre + self.prior / 2], dim=-1)

    def decode(self, outputs: Tensor, index: Tensor | slice = slice(None)) -> Tensor:
        """(..., 4) raw outputs t_x, t_y, t_w, t_h of the priors at ``index`` to xyxy boxes (section 2.1)."""
        centre = self.corner[index] + self.stride[index] * outputs[..., :2].sigmoid()
        size = self.prior[index] * outputs[..., 2:].clamp(max=_MAX_LOG_SCALE).exp()
        return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


class YOLO(nn.Module):
    """YOLOv3's head, loss and decoding on any backbone, with the interface of torchvision's ``RetinaNet``.

    In training ``model(images, targets)`` returns the scalar float32 losses ``loss_box``, ``loss_objectness``
    and ``loss_classification``; in evaluation ``model(images)`` returns for each image a dict of ``boxes``
    (D, 4), ``scores`` (D,) falling, and ``labels`` (D,). Images are 3 x H x W floats in 0..1; targets are
    dicts of ``boxes`` (M, 4) and int64 ``labels`` (M,), M may be 0. Boxes are xyxy in pixels of the given
    image. As for RetinaNet, labels are 0..``num_classes`` - 1 and there is no background class.

    Each object is assigned to the one prior of most similar shape among all levels, in the cell of its centre
    (section 2.1). The losses are sums over predictions, averaged over images as in Darknet:

    * box, assigned priors: CIoU (Zheng et al. 2020, arXiv 1911.08287), not the paper's squared error;
    * objectness: binary cross-entropy, without the unassigned priors that overlap an object by an IoU of more
      than ``ignore_thresh`` (section 2.1);
    * classification, assigned priors: binary cross-entropy for each class (section 2.2).

    A score is objectness x class probability (YOLO, arXiv 1506.02640, section 2); then NMS for each class.

    Args:
        backbone: module from N x 3 x H x W to an OrderedDict of one map per level, with their widths in its
            attribute ``out_channels``.
        num_classes: number of classes.
        anchors: per level, the (width, height) of its priors in pixels of the resized image.
        strides: per level, pixels per cell.
        image_size: images are resized to have a longer side of this many pixels, then padded as a batch to
            multiples of 32.
        image_mean: of the colours, which is subtracted: ImageNet's because of the trunk.
        image_std: what they are then divided by.
        norm_layer: normalization in the head.
        ignore_thresh: see above.
        score_thresh: least score of a candidate.
        topk_candidates: candidates kept per image before NMS.
        nms_thresh: IoU for NMS.
        detections_per_img: detections kept per image after NMS.

    Raises:
        ValueError: anchors, strides and backbone disagree on the levels; or, when called, features do not
            fit the levels, or targets are missing or malformed.
    """

    anchors: Tensor  # (levels, anchors per level, 2)

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        anchors: Sequence[Sequence[Sequence[float]]] = COCO_ANCHORS,
        strides: Sequence[int] = (8, 16, 32),
        image_size: int = 416,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        norm_layer: _Norm = nn.BatchNorm2d,
        ignore_thresh: float = 0.5,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        topk_candidates: int = 1000,
        detections_per_img: int = 300,
    ) -> None:
        super().__init__()
        widths = cast(Sequence[int], backbone.out_channels)
        if not len(widths) == len(anchors) == len(strides) or len({len(level) for level in anchors}) != 1:
            raise ValueError(
                "need as many anchors on each level, and as many levels of anchors, strides and "
                f"backbone.out_channels, got {len(anchors)}, {len(strides)} and {len(widths)} levels"
            )
        self.transform = GeneralizedRCNNTransform(image_size, image_size, list(image_mean), list(image_std))
        self.backbone = backbone
        self.head = nn.ModuleList()
        for width in widths:
            last = nn.Conv2d(2 * width, len(anchors[0]) * (5 + num_classes), kernel_size=1)
            # Nearly all priors are background: start objectness at 1 % (RetinaNet, section 3.3).
            nn.init.constant_(cast(Tensor, last.bias).detach()[4 :: 5 + num_classes], -math.log(99))
            self.head.append(nn.Sequential(_conv(width, 2 * width, 3, norm_layer=norm_layer), last))
        self.register_buffer("anchors", torch.tensor(anchors, dtype=torch.float32))
        self.strides = tuple(strides)
        self.num_classes = num_classes
        self.ignore_thresh = ignore_thresh
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.topk_candidates = topk_candidates
        self.detections_per_img = detections_per_img

    def select_levels(self, indices: Sequence[int]) -> None:
        """Keeps only these levels of the head, in place, and leaves the backbone alone.

        The features must then be an OrderedDict of just these levels, in this order. Objects are assigned to
        the best of the priors that are left.

        Raises:
            ValueError: ``indices`` is empty, not strictly increasing or out of range.
        """
        indices = list(indices)
        if not indices or indices != sorted(set(indices) & set(range(len(self.head)))):
            raise ValueError(f"need increasing indices of the {len(self.head)} levels, got {indices}")
        self.head = nn.ModuleList(self.head[index] for index in indices)
        self.anchors = self.anchors[indices]
        self.strides = tuple(self.strides[index] for index in indices)

    def select_anchor(self) -> None:
        """Keeps only the middle anchor of each level and its predictions, in place; objects are assigned to those."""
        keep, outputs = self.anchors.shape[1] // 2, 5 + self.num_classes
        for level in self.head:
            last = cast(nn.Conv2d, cast(nn.Sequential, level)[-1])
            last.out_channels = outputs
            rows = slice(keep * outputs, (keep + 1) * outputs)
            last.weight = nn.Parameter(last.weight.detach()[rows].clone())
            last.bias = nn.Parameter(cast(Tensor, last.bias).detach()[rows].clone())
        self.anchors = self.anchors[:, keep : keep + 1]

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, detections in evaluation: see the class."""
        batch, targets = self.transform(images, targets)
        features = self.backbone(batch.tensors)

        shapes = [tuple(x.shape[-2:]) for x in features.values()]
        expected = [tuple(-(-side // s) for side in batch.tensors.shape[-2:]) for s in self.strides]
        if shapes != expected:
            raise ValueError(f"strides {self.strides} need maps of sizes {expected}, got {shapes}")
        # Boxes and losses need float32 also under autocast.
        outputs = [predict(x).float() for predict, x in zip(self.head, features.values(), strict=True)]
        # (N, A * (5 + K), H, W) per level to (N, P, 5 + K), in the order of the grid.
        outputs = [x.unflatten(1, (-1, 5 + self.num_classes)).permute(0, 3, 4, 1, 2) for x in outputs]
        predictions = torch.cat([x.flatten(1, 3) for x in outputs], dim=1)
        grid = self._grid(shapes)
        if self.training:
            return self._loss(predictions, grid, shapes, targets)
        detections = self._detect(predictions, grid, batch.image_sizes)
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        return self.transform.postprocess(detections, batch.image_sizes, original_sizes)

    def _grid(self, shapes: Sequence[tuple[int, ...]]) -> _Grid:
        levels = []
        for (height, width), stride, anchors in zip(shapes, self.strides, self.anchors.float(), strict=True):
            rows, columns = (torch.arange(n, device=anchors.device) for n in (height, width))
            corner = torch.cartesian_prod(rows, columns).flip(-1).repeat_interleave(len(anchors), 0) * stride
            levels.append((corner, torch.full_like(corner[:, :1], stride), anchors.repeat(height * width, 1)))
        return _Grid(*(torch.cat(column) for column in zip(*levels, strict=True)))

    def _assign(self, boxes: Tensor, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """(M,) index among the P priors of the one responsible for each of (M, 4) boxes (section 2.1)."""
        anchors, per_cell = self.anchors.float().flatten(0, 1), self.anchors.shape[1]
        sizes = boxes[:, 2:] - boxes[:, :2]
        overlap = torch.minimum(sizes[:, None], anchors).prod(dim=-1)
        union = sizes.prod(dim=-1, keepdim=True) + anchors.prod(dim=-1) - overlap
        best = (overlap / union).argmax(dim=1)
        level = best // per_cell

        grids = torch.tensor(shapes, device=boxes.device)
        counts = grids.prod(dim=1) * per_cell
        height, width = grids[level].unbind(dim=1)
        stride = torch.tensor(self.strides, device=boxes.device)[level, None]
        column, row = ((boxes[:, :2] + boxes[:, 2:]) / (2 * stride)).long().clamp(min=0).unbind(dim=1)
        cell = torch.minimum(row, height - 1) * width + torch.minimum(column, width - 1)
        return (counts.cumsum(0) - counts)[level] + cell * per_cell + best % per_cell

    def _loss(
        self,
        predictions: Tensor,
        grid: _Grid,
        shapes: Sequence[tuple[int, ...]],
        targets: list[dict[str, Tensor]] | None,
    ) -> dict[str, Tensor]:
        if targets is None:
            raise ValueError("targets must be given in training mode")
        boxes, labels = self._check(targets)
        image = torch.cat([torch.full_like(t["labels"], i) for i, t in enumerate(targets)])
        prior = self._assign(boxes, shapes)
        assigned = predictions[image, prior]  # (M, 5 + K)

        is_object = torch.zeros_like(predictions[..., 4])
        is_object[image, prior] = 1
        prior_boxes = grid.boxes()
        iou = [box_iou(prior_boxes, target["boxes"]) for target in targets]
        ignored = torch.stack([(x > self.ignore_thresh).any(dim=1) for x in iou])
        weight = torch.where(ignored, is_object, 1.0)

        bce = partial(F.binary_cross_entropy_with_logits, reduction="sum")
        one_hot = F.one_hot(labels, self.num_classes).float()
        losses = {
            "loss_box": self.box_loss(grid.decode(assigned[:, :4], prior), boxes),
            "loss_objectness": bce(predictions[..., 4], is_object, weight=weight),
            "loss_classification": bce(assigned[:, 5:], one_hot),
        }
        return {name: loss / len(targets) for name, loss in losses.items()}

    def box_loss(self, boxes: Tensor, targets: Tensor) -> Tensor:
        """Of predicted and true boxes (M, 4), the sum: CIoU."""
        return complete_box_iou_loss(boxes, targets, reduction="sum")

    def _check(self, targets: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """All boxes (M, 4) and labels (M,) of the batch; raises ValueError if any is malformed."""
        for boxes, labels in ((target["boxes"], target["labels"]) for target in targets):
            if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
                shapes = f"{tuple(boxes.shape)} and {tuple(labels.shape)}"
                raise ValueError(f"boxes and labels must be of shapes (M, 4) and (M,), got {shapes}")
        boxes = torch.cat([target["boxes"] for target in targets]).float()
        labels = torch.cat([target["labels"] for target in targets])
        if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
            raise ValueError("boxes must be xyxy, of positive width and height")
        if not bool(((labels >= 0) & (labels < self.num_classes)).all()):
            raise ValueError(f"labels must be in 0..{self.num_classes - 1} (there is no background class)")
        return boxes, labels

    def _detect(
        self, predictions: Tensor, grid: _Grid, image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        all_boxes = grid.decode(predictions[..., :4])
        all_scores = (predictions[..., 4:5].sigmoid() * predictions[..., 5:].sigmoid()).flatten(1)
        detections = []
        for boxes, scores, size in zip(all_boxes, all_scores, image_sizes, strict=True):
            candidates = torch.where(scores > self.score_thresh)[0]
            scores, order = scores[candidates].topk(min(self.topk_candidates, len(candidates)))
            prior, labels = candidates[order] // self.num_classes, candidates[order] % self.num_classes
            boxes = clip_boxes_to_image(boxes[prior], size)
            keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
            detections.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return detections


def yolo(
    depth: int = 50,
    *,
    num_classes: int,
    weights_backbone: WeightsEnum | str | None = None,
    image_size: int = 416,
    neck_channels: Sequence[int] = (128, 256, 512),
    norm_layer: _Norm = nn.BatchNorm2d,
    **kwargs: Any,
) -> YOLO:
    """:class:`YOLO` on torchvision's ResNet of this depth; the paper's trunk is Darknet-53 instead.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: number of classes, labelled 0..``num_classes`` - 1 as for RetinaNet (no background).
        weights_backbone: torchvision weights of the trunk, e.g. ``"IMAGENET1K_V1"`` (downloaded if not
            cached), or ``None`` to initialize at random.
        image_size: longer side of the resized images, in pixels.
        neck_channels: widths of the maps at strides 8, 16, 32; the default is that of YOLOv3.
        norm_layer: normalization of trunk, neck and head.
        **kwargs: further arguments of :class:`YOLO`. The default ``anchors`` suit images near 416 pixels.

    Raises:
        ValueError: unknown depth, ``neck_channels`` that are not three, or as for :class:`YOLO`.
    """
    backbone = YOLOBackbone(depth, weights_backbone, neck_channels, norm_layer)
    return YOLO(backbone, num_classes, image_size=image_size, norm_layer=norm_layer, **kwargs)
