"""Lighter copies of a detector behind its backbone: fewer levels, towers, channels and predictions."""

import copy
import math
from collections.abc import Sequence, Set
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSDScoringHead
from torchvision.ops import MultiScaleRoIAlign

from glcan_fx.capture.shadow import fake_copy, real_copy, replicate
from glcan_fx.devices import Work
from glcan_fx.errors import PlanError
from glcan_fx.fakes import Fakes
from glcan_fx.initialization import Moments, freshen, moments, unhooked_copy
from glcan_fx.layers import (
    Cost,
    Widths,
    cost_of,
    fit,
    keep_outputs,
    not_in_place,
    predictors,
    replace,
    set_width,
    towers,
)
from glcan_fx.peak_memory import Counting
from glcan_fx.tasks.detector_head import BEFORE, DetectorHead

EXAMPLE = 320  # pixels: large enough for every torchvision detector's coarsest level


class Template:
    """How the detector behind its backbone is made lighter, and what a copy costs: parameters, and, for each image and
    for each position, bytes kept for backward and ``Work``."""

    def __init__(self, names: Sequence[str], levels: Sequence[int]) -> None:
        self.names, self.levels = list(names), levels
        self.one_each: list[str] | None = None  # paths of the layers that predict, where they do so for one anchor
        self.left_out: list[str] = []
        self.widths: Widths = {}
        self.parameters = 0
        self.per_image: tuple[float, ...] = ()
        self.per_position: tuple[float, ...] = ()
        self._made: tuple[nn.Module, Moments] | None = None

    def cost(self, images: int, positions: int) -> Cost:
        """What a copy costs."""
        saved, *work = (round(images * image + positions * position)
                        for image, position in zip(self.per_image, self.per_position, strict=True))
        return Cost(self.parameters, saved, Work(*work))

    def copy_of(self, model: nn.Module) -> nn.Module:
        """A lighter detector, drawn from what the model's weights are."""
        if self._made is None:
            detector = unhooked_copy(_behind(model)).cpu().train()
            not_in_place(detector)
            _select_levels(detector, self.levels, self.names)
            if self.one_each is not None:
                _one_prediction_each(detector, {detector.get_submodule(path) for path in self.one_each})
            source = moments(detector)
            for path in self.left_out:
                replace(detector, path, nn.Identity())
            for path, (inputs, outputs) in self.widths.items():
                set_width(detector.get_submodule(path), inputs, outputs)
            self._made = detector, source
        new = copy.deepcopy(self._made[0])
        freshen(new, self._made[1])
        return new


def make_template(
    model: nn.Module, outputs: dict[str, Tensor], source: dict[str, Tensor], levels: Sequence[int], style: str,
    width: float, image: tuple[int, int],
) -> Template:
    """How the detector without transform and backbone is made lighter, on ``levels``.

    The layers to leave out and the layers to keep are found by running a copy, on small features: fake ones, or random
    ones where their values decide what is computed.
    """
    modes = [None, Fakes(exact=True)]
    while True:
        mode = modes.pop()
        detector = replicate(_behind(model), real_copy if mode is None else partial(_fake_parameter, mode)).train()
        not_in_place(detector)
        _select_levels(detector, levels, list(outputs))
        template = Template(list(outputs), levels)
        try:
            with torch.random.fork_rng(devices=[]), Counting():
                _lighten(template, detector, model, outputs, source, style, width, image, mode)
            return template
        except Exception:
            if mode is not None:
                continue
            raise


def _lighten(
    template: Template, detector: nn.Module, model: nn.Module, outputs: dict[str, Tensor], source: dict[str, Tensor],
    style: str, width: float, image: tuple[int, int], mode: Fakes | None,
) -> None:
    """Make a copy of the detector lighter, and write down how."""
    head = DetectorHead(detector)
    *large, scale = example_of(model, outputs, image)
    *small, scale = example_of(model, outputs, image, 2 * scale)
    full, narrow, wider = (random_features(*of, mode) for of in (
        (source, scale), (outputs, scale), (outputs, scale // 2)))
    if style != "full" or width < 1:
        if style == "lean":
            keep = predictors(detector, head(full, *small))
            template.one_each = [path for path, part in detector.named_modules() if part in keep]
            _one_prediction_each(detector, keep)
        losses: list[Any] = []
        found = towers(detector, lambda: losses.append(head(full, *small)))
        keep = predictors(detector, losses)
        for path in found if style != "full" else ():
            if not any(part in keep for part in detector.get_submodule(path).modules()):
                replace(detector, path, nn.Identity())
                template.left_out.append(path)
        template.widths = fit(detector, lambda: head(narrow, *small), width, keep)
    # a part grows with the positions, a part (sampled regions) only with the images: two sizes tell them apart
    costs = [cost_of(detector, lambda: head(wider, *large))[0], cost_of(detector, lambda: head(narrow, *small))[0]]
    count, fewer = positions_of(wider), positions_of(narrow)
    figures = [(cost.saved, *cost.work) for cost in costs]
    template.parameters = costs[0].parameters
    template.per_position = tuple(
        max(0.0, (more - less) / max(1, count - fewer)) for more, less in zip(*figures, strict=True))
    template.per_image = tuple(max(0.0, (more - count * each) / 2)  # of two images
                               for more, each in zip(figures[0], template.per_position, strict=True))


def _behind(model: nn.Module) -> nn.Module:
    """The detector without what makes the features."""
    detector = copy.copy(model)
    detector.__dict__["_modules"] = {k: v for k, v in model._modules.items() if k not in BEFORE}
    return detector


def _fake_parameter(mode: Fakes, tensor: Tensor) -> Tensor:
    """Other tensors may decide what is computed: anchors."""
    return fake_copy(mode)(tensor) if isinstance(tensor, nn.Parameter) else real_copy(tensor)


def _one_prediction_each(detector: nn.Module, predictors: Set[nn.Module]) -> None:
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


def positions_of(features: dict[str, Tensor]) -> int:
    return sum(value.shape[0] * math.prod(value.shape[2:]) for value in features.values())


def random_features(like: dict[str, Tensor], scale: int, mode: Fakes | None = None) -> dict[str, Tensor]:
    """Smaller features of two images; fake ones with a mode."""
    with mode or nullcontext():
        return {key: torch.randn(2, value.shape[1], *(-(-size // scale) for size in value.shape[2:]), dtype=value.dtype)
                for key, value in like.items()}


def example_of(
    model: nn.Module, outputs: dict[str, Tensor], image: tuple[int, int], scale: int | None = None
) -> tuple[ImageList, list[dict[str, Tensor]], int]:
    """Two images with one object each, smaller than the example's by the returned factor (at least 1)."""
    scale = scale or max(1, max(max(value.shape[2:]) for value in outputs.values()) // 20)
    height, width = (-(-size // scale) for size in image)
    dtype = next(iter(outputs.values())).dtype
    targets = [example_objects(model, height, width, torch.tensor([0.5]), dtype) for _ in range(2)]
    return ImageList(torch.zeros(2, 3, height, width, dtype=dtype), [(height, width)] * 2), targets, scale


def example_objects(
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
