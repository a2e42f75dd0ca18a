"""RetinaNet (Lin et al. 2017, arXiv 1708.02002) on ResNet-18 to -152: torchvision's class, more options."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

RESNET_DEPTHS = (18, 34, 50, 101, 152)
C3_TO_C5 = {"layer2": "0", "layer3": "1", "layer4": "2"}
"""ResNet stages of strides 8, 16 and 32 and their names among the features."""


def resnet_trunk(
    depth: int, weights: WeightsEnum | str | None, norm_layer: Callable[..., nn.Module]
) -> tuple[nn.Module, list[int]]:
    """torchvision's ResNet of this depth, all layers trainable, and the channels of its C3, C4 and C5.

    Raises:
        ValueError: unknown depth.
    """
    if depth not in RESNET_DEPTHS:
        raise ValueError(f"depth must be one of {RESNET_DEPTHS}, got {depth!r}")
    trunk = get_model(f"resnet{depth}", weights=weights, norm_layer=norm_layer)
    c5 = trunk.inplanes  # the width a next stage would see
    return trunk, [c5 // 4, c5 // 2, c5]


class _NoExtraLevels(ExtraFPNBlock):
    """Leaves the pyramid as it is; given ``None``, BackboneWithFPN would add a max-pooled level."""

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        return results, names


def retinanet(
    depth: int = 50,
    *,
    num_classes: int,
    weights_backbone: WeightsEnum | str | None = None,
    fpn_channels: int = 256,
    extra_levels: bool = True,
    anchor_sizes: Sequence[Sequence[float]] | None = None,
    aspect_ratios: Sequence[float] | Sequence[Sequence[float]] = (0.5, 1.0, 2.0),
    min_size: int = 800,
    max_size: int = 1333,
    norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
    **kwargs: Any,
) -> RetinaNet:
    """Builds torchvision's ``RetinaNet`` on a ResNet-FPN with trainable normalization and no frozen layer.

    With the defaults it is ``torchvision.models.detection.retinanet_resnet50_fpn`` without weights. Images
    are C x H x W floats in 0..1, boxes (M, 4) xyxy in pixels, labels 0..``num_classes`` - 1 (no background).

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: number of classes.
        weights_backbone: torchvision weights of the trunk, e.g. ``"IMAGENET1K_V1"`` (downloaded if not
            cached), or ``None`` to initialize at random.
        fpn_channels: width of the pyramid, and so of the towers of the head.
        extra_levels: True for P3 to P7 (strides 8 to 128), False for P3 to P5 only, for small images.
        anchor_sizes: per level, the sides in pixels of the square anchors; by default 32 at P3, doubling per
            level, each at three scales per octave (Lin et al., section 4, "Anchors").
        aspect_ratios: height / width of the anchors, the same for all levels or one sequence per level.
        min_size: the shorter side of the images is resized to this, in pixels,
        max_size: unless the longer one would exceed this.
        norm_layer: normalization of the trunk.
        **kwargs: further arguments of torchvision's ``RetinaNet`` (``score_thresh``, ``image_mean``, ...).

    Raises:
        ValueError: unknown depth, or anchors that do not fit the levels: one sequence is needed per level,
            and the same number of anchors on all, because they share the head.
    """
    trunk, channels = resnet_trunk(depth, weights_backbone, norm_layer)
    extra = LastLevelP6P7(fpn_channels, fpn_channels) if extra_levels else _NoExtraLevels()
    backbone = BackboneWithFPN(trunk, C3_TO_C5, channels, fpn_channels, extra_blocks=extra)
    levels = 5 if extra_levels else 3
    if anchor_sizes is None:
        bases = [32 * 2**level for level in range(levels)]
        anchor_sizes = [[int(base * 2 ** (octave / 3)) for octave in range(3)] for base in bases]
    anchors = AnchorGenerator(tuple(map(tuple, anchor_sizes)), tuple(aspect_ratios))
    counts = anchors.num_anchors_per_location()
    if not len(anchor_sizes) == len(counts) == levels or len(set(counts)) != 1:
        raise ValueError(
            f"anchor_sizes and aspect_ratios must give as many anchors on each of {levels} levels, "
            f"got {len(anchor_sizes)} levels of sizes and {counts} anchors"
        )
    return RetinaNet(
        backbone, num_classes, min_size=min_size, max_size=max_size, anchor_generator=anchors, **kwargs
    )
