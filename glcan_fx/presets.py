"""Models that the command line knows by name; data only. Sizes are those of the experiments of GLCAN, section 5."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A model and how it is trained. target, kwargs: as ``models.load`` takes them; inputs: sizes of a batch."""

    target: str
    inputs: tuple[tuple[int, ...], ...]
    task: str | None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    k: int | str = "fewest"
    optimizer: str = "sgd"


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset("torchvision.models:mobilenet_v2", ((16, 3, 96, 96),), "classification",
                   {"num_classes": 10, "width_mult": 0.25}, k="natural"),
    "resnet34": Preset("torchvision.models:resnet34", ((256, 3, 224, 224),), "classification"),
    **{f"retinanet-r{depth}": Preset("glcan_fx.models:retinanet", ((8, 3, 800, 1066),), "detection",
                                     {"depth": depth, "num_classes": 91}, k)
       for depth, k in ((34, 17), (50, 17), (101, 34), (152, 51))},
    **{f"yolo-r{depth}": Preset("glcan_fx.models:yolo", ((16, 3, 640, 640),), "detection",
                                {"depth": depth, "num_classes": 80, "image_size": 640})
       for depth in (34, 50, 101, 152)},
    "edsr": Preset("glcan_fx.models:edsr", ((16, 3, 96, 96),), "super_resolution", {"scale": 2}, optimizer="adam"),
    "edsr-full": Preset("glcan_fx.models:edsr_full", ((16, 3, 96, 96),), "super_resolution", {"scale": 2},
                        optimizer="adam"),
}
