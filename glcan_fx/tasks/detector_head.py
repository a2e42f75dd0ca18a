"""A detector behind its backbone, as the head of a local module: it computes the detector's own losses."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetHead

from glcan_fx.tasks.criteria import refuse_edits, state_of
from glcan_fx.tasks.focal_loss import focal_loss

BEFORE = ("transform", "backbone")  # a detector's parts that make the features
_Targets = list[dict[str, Tensor]]


class DetectorHead(nn.Module):
    """(features, image list, targets) -> dict of losses, by the detector's own forward behind its backbone.

    fused: a dense focal loss is computed from class ids (``losses.focal_loss``): the same value and gradient.
    """

    def __init__(self, detector: nn.Module, *, register: bool = True, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        if register:
            self.detector = detector
        else:  # the model's own head: its parameters belong to the model
            self.__dict__["detector"] = detector

    def forward(self, features: Any, images: ImageList, targets: list[dict[str, Tensor]] | None) -> dict[str, Tensor]:
        parts: dict[str, nn.Module] = {"transform": _Given((images, targets)), "backbone": _Given(features)}
        head = self.detector._modules.get("head")
        if self.fused and head is not None and has_focal_loss(head):
            parts["head"] = _with_focal_loss(head)
        detector = view_of(self.detector, **parts)
        detector.__dict__["training"] = True
        repeated = "detector" in self._modules and not torch.compiler.is_compiling()  # the last one is not
        before = state_of(targets) if repeated else None
        losses: dict[str, Tensor] = detector.forward(list(images.tensors), targets)
        if before is not None:
            refuse_edits(before, targets, "the detector's loss")
        return losses


def view_of(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """The same module with other parts; the module itself is left as it is."""
    view = copy.copy(module)
    view.__dict__["_modules"] = {**module._modules, **parts}
    return view


def parts_behind(model: nn.Module) -> list[nn.Module]:
    """The modules of a detector that read features."""
    return [part for name, child in model.named_children() if name not in BEFORE for part in child.modules()]


def has_focal_loss(head: nn.Module) -> bool:
    """Whether a head computes torchvision's own dense focal loss: a subclass may compute another."""
    own: Any = type(head)
    if isinstance(head, RetinaNetHead):
        kind: Any = type(head.classification_head)
        return (own.compute_loss is RetinaNetHead.compute_loss
                and kind.compute_loss is RetinaNetClassificationHead.compute_loss)
    return isinstance(head, FCOSHead) and own.compute_loss is FCOSHead.compute_loss


def _with_focal_loss(head: nn.Module) -> nn.Module:
    """A dense head whose classification loss is computed from class ids."""
    if isinstance(head, FCOSHead):
        view = view_of(head)
        view.__dict__["compute_loss"] = partial(_fcos_loss, head)
        return view
    classification = view_of(head.get_submodule("classification_head"))
    classification.__dict__["compute_loss"] = _retinanet_classification
    return view_of(head, classification_head=classification)


def _retinanet_classification(targets: _Targets, outputs: dict[str, Tensor], matched: list[Tensor]) -> Tensor:
    """torchvision's: per image, the sum over anchors by the number of matched ones; the mean over images."""
    classes = _classes(targets, matched)
    count = (classes >= 0).sum(1, keepdim=True).clamp(min=1)
    return focal_loss(outputs["cls_logits"], classes, weight=1 / (count * len(targets)))


def _fcos_loss(
    head: nn.Module, targets: _Targets, outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]
) -> dict[str, Tensor]:
    """torchvision's: sums over the batch by the number of matched positions in it."""
    own: Any = head
    losses: dict[str, Tensor] = own.compute_loss(
        targets, {**outputs, "cls_logits": outputs["cls_logits"].detach()}, anchors, matched)
    classes = _classes(targets, matched)
    count = (classes >= 0).sum().clamp(min=1)
    weight = (1 / count).expand(len(targets), 1)
    return {**losses, "classification": focal_loss(outputs["cls_logits"], classes, weight=weight)}


def _classes(targets: _Targets, matched: list[Tensor]) -> Tensor:
    """(images, anchors) class ids; torchvision's matcher marks background and ignored as ``losses`` does."""
    return torch.stack([
        torch.where(index >= 0, target["labels"][index.clamp(min=0)], index) if len(target["labels"]) else index
        for target, index in zip(targets, matched, strict=True)])


class _Given(nn.Module):
    """Stands for a part whose result is already known."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.__dict__["value"] = value

    def forward(self, *_: Any) -> Any:
        return self.__dict__["value"]

    def postprocess(self, detections: Any, *_: Any) -> Any:
        return detections  # R-CNNs call it while training, on empty detections
