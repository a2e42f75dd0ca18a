"""`glcan-fx check`: read a detection data set as the training programs do, every image of it, and summarise it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glcan_fx.demo.data import CocoFolder

SPLITS = ("train", "val")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `glcan-fx check` to `parser`."""
    parser.add_argument("data", type=Path, metavar="DIR", help="a COCO-format detection folder "
                        "(instances_train.json, instances_val.json, images), or a Pascal VOC one")
    parser.add_argument("--no-images", action="store_true", help="check annotations and sizes only; decode no image")


def run(args: argparse.Namespace) -> int:
    """Run the command with the options of `add_arguments`; returns the exit status: 1 where the set is refused."""
    from glcan_fx.demo.data import CocoFolder
    from glcan_fx.demo.images import DataError

    sets = [CocoFolder(args.data, split, image_size=64) for split in SPLITS]
    for found in sets:
        print(found.summary())
        print(f"  {_sizes(found)}")
    print(_differences(*sets))
    broken = [] if args.no_images else [error for found in sets for error in _undecoded(found)]
    for error in broken:
        print(f"glcan-fx check: {error}", file=sys.stderr)
    if broken:
        raise DataError(f"{len(broken)} images cannot be decoded")
    return 0


def _sizes(found: CocoFolder) -> str:
    """The smallest, the median and the largest image, and box."""
    images = sorted((image["width"] * image["height"], image["width"], image["height"])
                    for image in found.coco.dataset["images"])
    boxes = sorted((box["bbox"][2] * box["bbox"][3]) ** 0.5 for box in found.coco.dataset["annotations"])
    said = "images " + ", ".join(f"{width} x {height}" for _, width, height in _three(images))
    if boxes:
        said += "; boxes, root of area, " + ", ".join(f"{side:.0f}" for side in _three(boxes)) + " pixels"
    return f"{said} (smallest, median, largest)"


def _three(values: list[Any]) -> list[Any]:
    return [values[0], values[len(values) // 2], values[-1]]


def _differences(train: CocoFolder, val: CocoFolder) -> str:
    """Classes that only one split has objects of."""
    seen = [Counter(box["category_id"] for box in found.coco.dataset["annotations"]) for found in (train, val)]
    names = dict(zip(train.category_ids, train.classes, strict=True))
    lines = [f"only in {split}: {', '.join(names[key] for key in sorted(mine.keys() - other.keys()))}"
             for split, mine, other in (("train", seen[0], seen[1]), ("val", seen[1], seen[0]))
             if mine.keys() - other.keys()]
    return "; ".join(lines) or "both splits have objects of the same classes"


def _undecoded(found: CocoFolder) -> list[Exception]:
    from tqdm import tqdm

    from glcan_fx.demo.images import DataError

    errors: list[Exception] = []
    for index in tqdm(range(len(found)), desc=f"decoding {found.split}", file=sys.stderr, leave=False, disable=None):
        try:
            found.decode(index)
        except DataError as error:
            errors.append(error)
    return errors
