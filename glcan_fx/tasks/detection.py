"""Detection in torchvision's contract: losses = model(images, targets), detections = model(images).

A detector of that contract has ``transform`` and ``backbone`` and, behind them, a forward pass that reads only the
features, the image list and the targets. So a copy of the detector in which transform and backbone hand out given
values is the self-prediction head of GLCAN (section 4.1), with the detector's own anchors, matching and loss.
"""

import copy
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetHead
from torchvision.models.detection.ssd import SSDScoringHead
from torchvision.ops import MultiScaleRoIAlign

from glcan_fx.errors import PlanError, TargetError
from glcan_fx.initialization import Moments, freshen, moments, unhooked_copy
from glcan_fx.layers import Cost, cost_of, fit, keep_outputs, not_in_place, predictors, replace, towers
from glcan_fx.tasks.base import Task
from glcan_fx.tasks.criteria import refuse_edits, state_of
from glcan_fx.tasks.focal_loss import focal_loss

_BEFORE = ("transform", "backbone")  # a detector's parts that make the features
_NO_PIXELS = ("torch", "torchvision", "glcan_fx")  # whose classes read nothing but features behind the backbone
_Targets = list[dict[str, Tensor]]

_EXAMPLE = 320  # pixels: large enough for every torchvision detector's coarsest level


class Detection(Task):
    """torchvision's detectors, and any other with the same contract and parts."""

    name = "detection"
    network_is_part = outputs_are_levels = True

    def __init__(self) -> None:
        self._templates: WeakKeyDictionary[nn.Module, dict[Any, _Template]] = WeakKeyDictionary()
        self._reads_pixels = True

    def begin(self, model: nn.Module) -> None:
        self._templates.pop(model, None)  # the model may have changed
        parts = [model, *_parts_behind(model)]
        self._reads_pixels = any(type(part).__module__.partition(".")[0] not in _NO_PIXELS for part in parts)

    def behind(self, model: nn.Module) -> list[str]:
        return [name for name in [*model._modules, *model._parameters] if name not in _BEFORE]

    def fuses_losses(self, model: nn.Module) -> bool:
        head = model._modules.get("head")
        return head is not None and _has_focal_loss(head)

    def loss(self, outputs: Any, targets: Any) -> Any:
        raise NotImplementedError("the detector's own forward computes its loss")  # see head() and last_head()

    def network(self, model: nn.Module) -> str:
        for part in _BEFORE:
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
            given = torch.empty(2, 3, _EXAMPLE, _EXAMPLE, device="meta")
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
        return [_objects(model, height, width, torch.linspace(1 / 16, 1 / 2, 8)) for _ in range(count)]

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
        new = copy.deepcopy(template.detector)
        freshen(new, template.moments)
        return DetectorHead(new)

    def head_cost(
        self, model: nn.Module, outputs: Any, source: Any, levels: Sequence[int], style: str, width: float,
        image: tuple[int, int],
    ) -> Cost:
        template = self._template(model, outputs, source, levels, style, width, image)
        images, places = next(iter(outputs.values())).shape[0], _places(outputs)

        def total(attribute: str) -> int:
            return round(images * getattr(template.per_image, attribute)
                         + places * template.per_place[attribute])

        return Cost(template.per_image.parameters, total("saved"), total("flops"))

    def _template(self, model: nn.Module, outputs: Any, *request: Any) -> "_Template":
        made = self._templates.setdefault(model, {})
        key = (tuple(value.shape[1] for value in outputs.values()), *request[1:])
        if key not in made:
            made[key] = _make_template(model, outputs, *request)
        return made[key]

    def last_head(self, model: nn.Module, fused: bool = False) -> nn.Module:
        return DetectorHead(model, register=False, fused=fused)

    def averages_images(self, model: nn.Module, levels: Any) -> bool:
        """Found by trying: two images with different objects, on small random features, together and alone."""
        if any("running_mean" in part._buffers for part in _parts_behind(model)):
            return False
        values = {key: node.meta["value"] for key, node in levels.items()}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            images, targets, scale = _example(model, values, (_EXAMPLE, _EXAMPLE))
            height, width = images.image_sizes[0]
            targets[1] = _objects(model, height, width, torch.tensor([0.3, 0.9]), images.tensors.dtype)
            detector = unhooked_copy(_view(model, transform=nn.Identity(), backbone=nn.Identity())).cpu()
            head, features = DetectorHead(detector), _features(values, scale)

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
        if self.fused and head is not None and _has_focal_loss(head):
            parts["head"] = _with_focal_loss(head)
        detector = _view(self.detector, **parts)
        detector.__dict__["training"] = True
        repeated = "detector" in self._modules and not torch.compiler.is_compiling()  # the last one is not
        before = state_of(targets) if repeated else None
        losses: dict[str, Tensor] = detector.forward(list(images.tensors), targets)
        if before is not None:
            refuse_edits(before, targets, "the detector's loss")
        return losses


def _view(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """The same module with other parts; the module itself is left as it is."""
    view = copy.copy(module)
    view.__dict__["_modules"] = {**module._modules, **parts}
    return view


def _parts_behind(model: nn.Module) -> list[nn.Module]:
    """The modules of a detector that read features."""
    return [part for name, child in model.named_children() if name not in _BEFORE for part in child.modules()]


def _has_focal_loss(head: nn.Module) -> bool:
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
        view = _view(head)
        view.__dict__["compute_loss"] = partial(_fcos_loss, head)
        return view
    classification = _view(head.get_submodule("classification_head"))
    classification.__dict__["compute_loss"] = _retinanet_classification
    return _view(head, classification_head=classification)


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


def sizes_only(images: ImageList) -> ImageList:
    """The same sizes without the pixels, which heads do not read, so that these are freed with the first module."""
    return ImageList(images.tensors.new_zeros(()).expand(images.tensors.shape), images.image_sizes)


def _item(pair: Any, index: int) -> Any:
    return pair[index]


_item.__name__ = "getitem"


@dataclass(frozen=True)
class _Template:
    """The detector behind its backbone, made lighter; what its copies are drawn from; what they cost."""

    detector: nn.Module
    moments: Moments
    per_image: Cost
    per_place: dict[str, float]  # saved, flops


def _make_template(
    model: nn.Module, outputs: dict[str, Tensor], source: dict[str, Tensor], levels: Sequence[int], style: str,
    width: float, image: tuple[int, int],
) -> _Template:
    """Copy the detector without transform and backbone, on ``levels``.

    The layers to leave out and the layers to keep are found by running the copy, on small random features.
    """
    detector = copy.copy(model)
    detector.__dict__["_modules"] = {k: v for k, v in model._modules.items() if k not in _BEFORE}
    detector = unhooked_copy(detector).cpu().train()
    not_in_place(detector)
    _select_levels(detector, levels, list(outputs))
    source_moments = moments(detector)
    head = DetectorHead(detector)
    images, targets, scale = _example(model, outputs, image)
    with torch.random.fork_rng(devices=[]):
        full, narrow = _features(source, scale), _features(outputs, scale)
        if style != "full" or width < 1:
            if style == "lean":
                _one_prediction_a_place(detector, predictors(detector, head(full, images, targets)))
                source_moments = moments(detector)
            keep = predictors(detector, head(full, images, targets))
            if style != "full":
                for path in towers(detector, lambda: head(full, images, targets)):
                    if not any(part in keep for part in detector.get_submodule(path).modules()):
                        replace(detector, path, nn.Identity())
            fit(detector, lambda: head(narrow, images, targets), width, keep)
        # a part grows with the positions, a part (sampled regions) only with the images: two sizes tell them apart
        large, _ = cost_of(detector, lambda: head(narrow, images, targets))
        smaller = _features(outputs, 2 * scale)
        images, targets, _ = _example(model, outputs, image, 2 * scale)
        small, _ = cost_of(detector, lambda: head(smaller, images, targets))
    places, fewer = _places(narrow), _places(smaller)
    per_place = {name: max(0.0, (getattr(large, name) - getattr(small, name)) / max(1, places - fewer))
                 for name in ("saved", "flops")}
    rest = {name: round(max(0.0, getattr(large, name) - per_place[name] * places) / 2) for name in per_place}
    return _Template(detector, source_moments, Cost(large.parameters, **rest), per_place)


def _one_prediction_a_place(detector: nn.Module, predictors: Set[nn.Module]) -> None:
    """Leave one anchor at each position, of middle size and nearest to a square, and its share of the predictions."""
    own: Any = getattr(detector, "select_anchor", None)
    if callable(own):
        own()
        return
    dense = set(getattr(detector, "rpn", detector).modules())  # region-based heads predict for regions, not positions
    for part in detector.modules():
        if isinstance(part, AnchorGenerator):
            count = part.num_anchors_per_location()[0]
            sizes = tuple((sorted(level)[len(level) // 2],) for level in part.sizes)
            ratios = tuple((min(level, key=lambda ratio: abs(math.log(ratio))),) for level in part.aspect_ratios)
            part.sizes, part.aspect_ratios = sizes, ratios
            part.cell_anchors = [part.generate_anchors(*pair) for pair in zip(sizes, ratios, strict=True)]
            for layer in dense & predictors if count > 1 else ():
                if isinstance(layer, nn.Conv2d) and layer.out_channels % count == 0:
                    share = layer.out_channels // count
                    keep_outputs(layer, slice(count // 2 * share, (count // 2 + 1) * share))


def _places(features: dict[str, Tensor]) -> int:
    return sum(value.shape[0] * math.prod(value.shape[2:]) for value in features.values())


def _features(like: dict[str, Tensor], scale: int) -> dict[str, Tensor]:
    return {key: torch.randn(2, value.shape[1], *(-(-size // scale) for size in value.shape[2:]), dtype=value.dtype)
            for key, value in like.items()}


def _example(
    model: nn.Module, outputs: dict[str, Tensor], image: tuple[int, int], scale: int | None = None
) -> tuple[ImageList, list[dict[str, Tensor]], int]:
    """Two images with one object each, smaller than the example's by the returned factor (at least 1)."""
    scale = scale or max(1, max(max(value.shape[2:]) for value in outputs.values()) // 20)
    height, width = (-(-size // scale) for size in image)
    dtype = next(iter(outputs.values())).dtype
    targets = [_objects(model, height, width, torch.tensor([0.5]), dtype) for _ in range(2)]
    return ImageList(torch.zeros(2, 3, height, width, dtype=dtype), [(height, width)] * 2), targets, scale


def _objects(
    model: nn.Module, height: int, width: int, sides: Tensor, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """A target with objects in the middle of an image, of the given sizes relative to it."""
    predictor = getattr(getattr(model, "roi_heads", None), "keypoint_predictor", None)
    keypoints = getattr(getattr(predictor, "kps_score_lowres", None), "out_channels", 17)
    size = torch.tensor([width, height], dtype=dtype)
    corners = (1 - sides[:, None].to(dtype)) / 2 * size
    label = 1 if hasattr(model, "roi_heads") else 0  # region-based detectors count the background as class 0
    target = {"boxes": torch.cat([corners, size - corners], 1), "labels": torch.full((len(sides),), label)}
    if getattr(getattr(model, "roi_heads", None), "mask_predictor", None) is not None:
        target["masks"] = torch.zeros(len(sides), height, width, dtype=torch.uint8)
        target["masks"][:, height // 4: 3 * height // 4, width // 4: 3 * width // 4] = 1
    if predictor is not None:
        points = torch.tensor([width / 2, height / 2, 1.0])
        target["keypoints"] = points.expand(len(sides), keypoints, 3).clone()
    return target


def _select_levels(detector: nn.Module, levels: Sequence[int], names: list[str]) -> None:
    """Keep only some feature levels: their anchors, their own predictors, their place in the RoI pooling."""
    own: Any = getattr(detector, "select_levels", None)
    if callable(own):
        own(levels)
        return
    for part in detector.modules():
        if isinstance(part, AnchorGenerator):
            for attribute in ("sizes", "aspect_ratios"):
                setattr(part, attribute, tuple(getattr(part, attribute)[index] for index in levels))
            part.cell_anchors = [part.cell_anchors[index] for index in levels]
        elif isinstance(part, DefaultBoxGenerator):
            for attribute in ("aspect_ratios", "scales", "steps", "_wh_pairs"):
                values = getattr(part, attribute)
                if values is not None:
                    setattr(part, attribute, [values[index] for index in levels])
        elif isinstance(part, SSDScoringHead):
            part.module_list = nn.ModuleList([part.module_list[index] for index in levels])
        elif isinstance(part, MultiScaleRoIAlign):
            part.featmap_names = [name for name in part.featmap_names if name in names]
            part.scales = part.map_levels = None
            if not part.featmap_names:
                raise PlanError("levels: a region-based head needs at least one of the levels that it pools from")
