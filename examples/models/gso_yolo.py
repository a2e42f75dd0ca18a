"""GSO-YOLO (arXiv 2407.00906) as a model to compile: attention around spatial pyramid pooling, and another box loss.

    python examples/train_detection.py --data DIR --model gso-yolo --method glcan --k natural

A global attention block stands in front of the pooling of the coarsest map, an attention block that captures several
scales behind it, and the box loss joins CIoU and EIoU. The paper builds on YOLOv8; this is built on the YOLO of this
repository, a ResNet trunk with YOLOv3's neck and head. What is not public is chosen here, and said where it is:
which attention the block behind the pooling is, and how the two losses are joined.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import complete_box_iou_loss
from torchvision.ops.misc import Conv2dNormActivation

from glcan_fx.models.yolo import YOLO, YOLOBackbone


class GlobalAttention(nn.Module):
    """Global attention mechanism (Liu et al. 2021, arXiv 2112.05561): weights for channels by a perceptron at each
    position, then for positions by two 7 x 7 convolutions. (N, C, H, W) to the same."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        few = max(1, channels // reduction)
        self.channel = nn.Sequential(nn.Conv2d(channels, few, 1), nn.ReLU(), nn.Conv2d(few, channels, 1))
        self.spatial = nn.Sequential(
            nn.Conv2d(channels, few, 7, padding=3, bias=False), nn.BatchNorm2d(few), nn.ReLU(),
            nn.Conv2d(few, channels, 7, padding=3, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.channel(x).sigmoid()
        return x * self.spatial(x).sigmoid()


class SteadyCapture(nn.Module):
    """The attention block behind the pooling. The paper does not describe it in public: taken here for efficient
    multi-scale attention (Ouyang et al. 2023, arXiv 2305.13563). (N, C, H, W) to the same; C a multiple of groups."""

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(f"channels={channels} is no multiple of groups={groups}")
        self.groups, each = groups, channels // groups
        self.lines = nn.Conv2d(each, each, 1)
        self.local = nn.Conv2d(each, each, 3, padding=1)
        self.norm = nn.GroupNorm(each, each)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        x = x.reshape(n * self.groups, channels // self.groups, height, width)
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
        both = self.lines(torch.cat([rows, columns], 2)).sigmoid()
        rows, columns = both[:, :, :height], both[:, :, height:].transpose(2, 3)
        coarse, fine = self.norm(x * rows * columns), self.local(x)
        weights = _across(coarse, fine) + _across(fine, coarse)
        return (x * weights.sigmoid()).reshape(n, channels, height, width)


def _across(pooled: Tensor, map_: Tensor) -> Tensor:
    """How much each position of a map is like the average of another: (N, 1, H, W)."""
    weights = pooled.mean((2, 3)).softmax(1)
    return (weights[:, :, None, None] * map_).sum(1, keepdim=True)


class PooledPyramid(nn.Module):
    """Fast spatial pyramid pooling (SPPF of YOLOv5): three poolings of 5 x 5, one behind the other, joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = Conv2dNormActivation(channels, channels // 2, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.join = Conv2dNormActivation(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.reduce(x)]
        for _ in range(3):
            levels.append(self.pool(levels[-1]))
        return self.join(torch.cat(levels, 1))


class GSOBackbone(YOLOBackbone):
    """The trunk, and between it and the neck, on the coarsest map: attention, pooling, attention."""

    def __init__(self, depth: int, weights: Any, out_channels: Sequence[int], norm_layer: Any) -> None:
        super().__init__(depth, weights, out_channels, norm_layer)
        channels = 512 if depth in (18, 34) else 2048
        self.attend = GlobalAttention(channels)
        self.pool = PooledPyramid(channels)
        self.capture = SteadyCapture(channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        *finer, (name, coarsest) = maps.items()
        coarsest = self.capture(self.pool(self.attend(coarsest)))
        result: dict[str, Tensor] = self.neck(OrderedDict([*finer, (name, coarsest)]))
        return result


class GSOYOLO(YOLO):
    """YOLO whose box loss is the mean of CIoU and EIoU: the paper joins both, by a formula that is not public."""

    def box_loss(self, boxes: Tensor, targets: Tensor) -> Tensor:
        """Of predicted and true boxes (M, 4), the sum."""
        return (complete_box_iou_loss(boxes, targets, reduction="sum") + efficient_box_iou_loss(boxes, targets)) / 2


def efficient_box_iou_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """EIoU (Zhang et al. 2022, arXiv 2101.08158) of pairs of boxes (M, 4) xyxy, the sum: 1 - IoU, and the
    squared distances of centres, widths and heights, relative to the box around both."""
    low, high = torch.minimum(boxes, targets), torch.maximum(boxes, targets)
    shared = (low[:, 2:] - high[:, :2]).clamp(min=0).prod(1)
    sizes, others = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    tiny = torch.finfo(boxes.dtype).eps
    iou = shared / (sizes.prod(1) + others.prod(1) - shared + tiny)
    around = high[:, 2:] - low[:, :2]
    centres = ((boxes[:, :2] + boxes[:, 2:]) - (targets[:, :2] + targets[:, 2:])) / 2
    distance = centres.square().sum(1) / (around.square().sum(1) + tiny)
    shape = ((sizes - others).square() / (around.square() + tiny)).sum(1)
    return (1 - iou + distance + shape).sum()


def gso_yolo(
    depth: int = 34, *, num_classes: int, weights_backbone: Any = None, image_size: int = 416,
    neck_channels: Sequence[int] = (128, 256, 512), norm_layer: Any = nn.BatchNorm2d, **kwargs: Any,
) -> GSOYOLO:
    """:class:`GSOYOLO` on torchvision's ResNet of this depth; arguments are those of ``glcan_fx.models.yolo``."""
    backbone = GSOBackbone(depth, weights_backbone, neck_channels, norm_layer)
    return GSOYOLO(backbone, num_classes, image_size=image_size, norm_layer=norm_layer, **kwargs)
