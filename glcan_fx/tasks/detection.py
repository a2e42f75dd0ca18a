"""Detection in torchvision's contract: losses = model(images, targets), detections = model(images).

A detector of that contract has ``transform`` and ``backbone`` and, behind them, a forward pass that reads only the
features, the image list and the targets. So a copy of the detector in which transform and backbone hand out given
values is the self-prediction head of GLCAN (section 4.1), with the detector's own anchors, matching and loss.
"""

import copy
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torchvision.models.detection.image_list import ImageList

from glcan_fx.errors import PlanError, TargetError
from glcan_fx.initialization import unhooked_copy
from glcan_fx.layers import Cost
from glcan_fx.tasks.base import Task
from glcan_fx.tasks.detector_copies import (
    EXAMPLE,
    Template,
    example_objects,
    example_of,
    make_template,
    positions_of,
    random_features,
)
from glcan_fx.tasks.detector_head import BEFORE, DetectorHead, has_focal_loss, parts_behind, view_of

_NO_PIXELS = ("torch", "torchvision", "glcan_fx")  # whose classes read nothing but features behind the backbone


class Detection(Task):
    """torchvision's detectors, and any other with the same contract and parts."""

    name = "detection"
    network_is_part = outputs_are_levels = True

    def __init__(self) -> None:
        self._templates: WeakKeyDictionary[nn.Module, dict[Any, Template]] = WeakKeyDictionary()
        self._reads_pixels = True

    def begin(self, model: nn.Module) -> None:
        self._templates.pop(model, None)  # the model may have changed
        parts = [model, *parts_behind(model)]
        self._reads_pixels = any(type(part).__module__.partition(".")[0] not in _NO_PIXELS for part in parts)

    def behind(self, model: nn.Module) -> list[str]:
        return [name for name in [*model._modules, *model._parameters] if name not in BEFORE]

    def fuses_losses(self, model: nn.Module) -> bool:
        head = model._modules.get("head")
        return head is not None and has_focal_loss(head)

    def loss(self, outputs: Any, targets: Any) -> Any:
        raise NotImplementedError("the detector's own forward computes its loss")  # see head() and last_head()

    def network(self, model: nn.Module) -> str:
        for part in BEFORE:
            if not isinstance(getattr(model, part, None), nn.Module):
                raise PlanError(
                    f"task 'detection' expects torchvision's contract, but {type(model).__name__} has no module "
                    f"'{part}'. Pass criterion=(outputs, targets) -> loss instead of task=, or subclass "
                    "glcan_fx.Task."
                )
        return "backbone"

    def example_inputs(self, model: nn.Module, given: Any) -> tuple[Any, ...]:
        """The batch (N, 3, H, W) that the detector's transform makes of a list of images, or a batch; of two images of
        320 x 320 by default."""
        parameters = model.get_submodule("backbone").parameters()
        dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
        if given is None:
            given = torch.empty(2, 3, EXAMPLE, EXAMPLE, device="meta")
        if isinstance(given, tuple | list) and given and isinstance(given[0], tuple | list):
            given = given[0]  # (images, targets)
        images = list(given) if isinstance(given, tuple | list | Tensor) else []
        if not images or not all(isinstance(image, Tensor) and image.dim() == 3 for image in images):
            raise PlanError("example_inputs= for detection: a list of (3, H, W) images, or one (N, 3, H, W) batch")
        transform = copy.copy(model.get_submodule("transform"))
        transform.__dict__["training"] = False  # the largest of several sizes
        batch, _ = transform([torch.empty(image.shape, dtype=torch.float32, device="meta") for image in images])
        return (torch.empty(batch.tensors.shape, dtype=dtype, device="meta"),)

    def example_targets(self, model: nn.Module, inputs: Any, outputs: Any) -> Any:
        """Eight objects per image, of sizes from a sixteenth to a half of it."""
        count, _, height, width = inputs[0].shape
        return [example_objects(model, height, width, torch.linspace(1 / 16, 1 / 2, 8)) for _ in range(count)]

    def prepare(self, graph: fx.Graph, placeholders: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        images = graph.placeholder("images")
        targets = graph.placeholder("targets", default_value=None)
        prepared = graph.create_node("call_module", "transform", (images, targets), name="prepared")
        batch = graph.create_node("call_function", _item, (prepared, 0), name="image_list")
        boxes = graph.create_node("call_function", _item, (prepared, 1), name="prepared_targets")
        pixels = graph.create_node("call_function", getattr, (batch, "tensors"), name="pixels")
        if self._reads_pixels:
            return [pixels], [batch, boxes]
        sizes = graph.create_node("call_function", sizes_only, (batch,), name="image_sizes")
        return [pixels], [sizes, boxes]

    def check(self, inputs: Any, targets: Any) -> None:
        if targets is None:
            raise TargetError("a training step needs targets: local(images, targets), one dict of boxes and labels "
                              "per image; call local.eval() first to predict.")
        if not isinstance(targets, list | tuple):
            raise TargetError(f"targets must be a list, one dict per image, not {type(targets).__name__}")
        if len(targets) != len(inputs):
            raise TargetError(f"{len(targets)} targets for {len(inputs)} images: one dict per image")
        for index, target in enumerate(targets):
            _check_target(index, target)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Detection":
        new = copy.copy(self)
        new._templates = WeakKeyDictionary()  # made again when they are needed
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_templates"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _templates=WeakKeyDictionary())

    def head(
        self, model: nn.Module, outputs: Any, source: Any, levels: Sequence[int], style: str, width: float,
        image: tuple[int, int],
    ) -> nn.Module:
        template = self._template(model, outputs, source, levels, style, width, image)
        return DetectorHead(template.copy_of(model))

    def head_cost(
        self, model: nn.Module, outputs: Any, source: Any, levels: Sequence[int], style: str, width: float,
        image: tuple[int, int],
    ) -> Cost:
        template = self._template(model, outputs, source, levels, style, width, image)
        return template.cost(next(iter(outputs.values())).shape[0], positions_of(outputs))

    def _template(self, model: nn.Module, outputs: Any, *request: Any) -> "Template":
        made = self._templates.setdefault(model, {})
        key = (tuple(value.shape[1] for value in outputs.values()), *request[1:])
        if key not in made:
            made[key] = make_template(model, outputs, *request)
        return made[key]

    def last_head(self, model: nn.Module, fused: bool = False) -> nn.Module:
        return DetectorHead(model, register=False, fused=fused)

    def averages_images(self, model: nn.Module, levels: Any) -> bool:
        """Found by trying: two images with different objects, on small random features, together and alone."""
        if any("running_mean" in part._buffers for part in parts_behind(model)):
            return False
        values = {key: node.meta["value"] for key, node in levels.items()}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            images, targets, scale = example_of(model, values, (EXAMPLE, EXAMPLE))
            height, width = images.image_sizes[0]
            targets[1] = example_objects(model, height, width, torch.tensor([0.3, 0.9]), images.tensors.dtype)
            detector = unhooked_copy(view_of(model, transform=nn.Identity(), backbone=nn.Identity())).cpu()
            head, features = DetectorHead(detector), random_features(values, scale)

            def loss(start: int, stop: int) -> Tensor:
                given = self.part((features, images, targets), start, stop, 2)
                return torch.stack(list(head(*given).values())).sum()

            return torch.allclose(loss(0, 2), (loss(0, 1) + loss(1, 2)) / 2, rtol=1e-4)

    def part(self, value: Any, start: int, stop: int, images: int) -> Any:
        if isinstance(value, ImageList):
            return ImageList(value.tensors[start:stop], value.image_sizes[start:stop])
        return super().part(value, start, stop, images)

    def result(self) -> str:
        return "dict"


def _check_target(index: int, target: Any) -> None:
    """Raise TargetError unless a target has (N, 4) boxes and N labels; N may be 0."""
    where = f"targets[{index}]"
    if not isinstance(target, dict):
        raise TargetError(f"{where} must be a dict with 'boxes' and 'labels', not {type(target).__name__}")
    for key in ("boxes", "labels"):
        if key not in target:
            raise TargetError(f"{where} has no '{key}': its keys are {', '.join(map(repr, target))}")
        if not isinstance(target[key], Tensor):
            raise TargetError(f"{where}['{key}'] must be a tensor, boxes (N, 4), labels (N,), not a "
                              f"{type(target[key]).__name__}")
    boxes, labels = target["boxes"], target["labels"]
    if boxes.dim() != 2 or boxes.shape[-1] != 4:
        raise TargetError(f"{where}['boxes'] must be (N, 4), x1 y1 x2 y2 in pixels, not {tuple(boxes.shape)}")
    if len(labels) != len(boxes):
        raise TargetError(f"{where} has {len(boxes)} boxes and {len(labels)} labels")


def sizes_only(images: ImageList) -> ImageList:
    """The same sizes without the pixels, which heads do not read, so that these are freed with the first module."""
    return ImageList(images.tensors.new_zeros(()).expand(images.tensors.shape), images.image_sizes)


def _item(pair: Any, index: int) -> Any:
    return pair[index]


_item.__name__ = "getitem"
