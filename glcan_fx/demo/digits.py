"""Composes the demo's default detection set: real handwritten digits pasted into real photographs.

Both sources ship inside scikit-learn (`load_digits`, `load_sample_image`), so nothing is downloaded. The
result is an ordinary COCO-format folder that any detection tool can read.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from glcan_fx.demo.images import DataError

SETTINGS_FILE = "settings.json"
# What a split may use. Train and held-out images share no digit sample and no photograph pixel: the digits
# are divided by their index in `load_digits`, the two photographs (640 pixels wide) by column, with a gap
# that no crop touches. The strips let both splits show some of the pagoda, the flower and plain background.
DIGIT_RANGE = {"train": (0, 1350), "val": (1350, 1797)}
PHOTO_COLUMNS = {
    "train": {"china": (0, 260), "flower": (0, 300)},
    "val": {"china": (280, 480), "flower": (320, 520)},
}
MOST_DIGITS = 4  # in an image
HEIGHT = (0.25, 0.5)  # of a digit, as a fraction of the image's
MAX_OVERLAP = 0.1  # of the smaller of two boxes


@dataclass(frozen=True)
class DigitSettings:
    """What `compose_digits` writes; two equal settings give the same files."""

    train: int  # images
    val: int
    image_size: int  # pixels, square
    seed: int = 0
    version: int = 1  # of this file's recipe

    def __post_init__(self) -> None:
        if self.image_size < 32 or min(self.train, self.val) < 1:
            raise DataError(f"image_size={self.image_size}, train={self.train}, val={self.val}: the digit set needs "
                            "images of at least 32 pixels and at least one image per split.")


def compose_digits(folder: str | Path, settings: DigitSettings) -> bool:
    """Write the digit set to `folder` unless the same set is already there.

    The folder appears in one rename once it is complete, so an interrupted run leaves no half-written set.

    Args:
        folder: gets `images/*.jpg`, `instances_train.json`, `instances_val.json` and `settings.json`. A digit
            set with other settings is replaced; anything else found there is an error and stays untouched.
        settings: sizes and seed.

    Returns:
        True if the set was written, False if the one in `folder` was reused.
    """
    folder, wanted = Path(folder), asdict(settings)
    if folder.exists():
        try:
            found = json.loads((folder / SETTINGS_FILE).read_text())
        except (OSError, ValueError):
            found = None
        if found == wanted:
            return False
        if not isinstance(found, dict) and any(folder.iterdir()):
            raise DataError(f"{folder} exists and is not a digit set made by this demo. Choose another --out, or pass "
                            "the folder with --data if it is a COCO-format detection set.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new, old = work / "new", work / "old"
        (new / "images").mkdir(parents=True)
        _write_split(new, "train", settings.train, settings, first_id=1)
        _write_split(new, "val", settings.val, settings, first_id=settings.train + 1)
        (new / SETTINGS_FILE).write_text(json.dumps(wanted, indent=1))
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True


def _write_split(folder: Path, split: str, count: int, settings: DigitSettings, first_id: int) -> None:
    """Write `count` images of `split` and its COCO annotation file."""
    rng = np.random.default_rng([settings.seed, list(DIGIT_RANGE).index(split)])
    digits = load_digits().images
    strips = PHOTO_COLUMNS[split]
    photos = [load_sample_image(f"{name}.jpg")[:, first:last] for name, (first, last) in strips.items()]
    images: list[Any] = []
    annotations: list[Any] = []
    for image_id in range(first_id, first_id + count):
        canvas, objects = _compose(rng, photos, digits, range(*DIGIT_RANGE[split]), settings.image_size)
        name = f"{split}_{image_id:05d}.jpg"
        Image.fromarray(canvas).save(folder / "images" / name, quality=95)
        height, width = canvas.shape[:2]
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for sample, (x, y, w, h) in objects:
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": 1, "bbox": [x, y, w, h], "area": w * h,
                "iscrowd": 0, "digit_sample": sample})  # its index in load_digits
    description = f"load_digits samples {DIGIT_RANGE[split]} on photograph columns {strips} (end excluded)"
    content = {"info": {"description": description}, "images": images, "annotations": annotations,
               "categories": [{"id": 1, "name": "digit"}]}
    (folder / f"instances_{split}.json").write_text(json.dumps(content))


def _compose(
    rng: np.random.Generator, photos: list[np.ndarray], digits: np.ndarray, samples: range, size: int
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """One image, uint8 [size, size, 3], and its (sample index, (x, y, w, h) in pixels) objects."""
    canvas = _background(rng, photos[rng.integers(len(photos))], size)
    objects: list[tuple[int, tuple[int, int, int, int]]] = []
    for _ in range(rng.integers(1, MOST_DIGITS + 1)):
        sample = int(rng.choice(samples))
        ink = _ink(digits[sample], round(rng.uniform(*HEIGHT) * size), rng.uniform(0.8, 1.2))
        h, w = ink.shape
        for _attempt in range(20):
            x, y = int(rng.integers(0, size - w + 1)), int(rng.integers(0, size - h + 1))
            if all(overlap((x, y, w, h), other) <= MAX_OVERLAP for _, other in objects):
                patch = canvas[y : y + h, x : x + w]
                patch += ink[..., None] * (_colour(rng, patch) - patch)
                objects.append((sample, (x, y, w, h)))
                break
    canvas += rng.normal(0, 3, canvas.shape)
    return canvas.clip(0, 255).round().astype(np.uint8), objects


def _background(rng: np.random.Generator, photo: np.ndarray, size: int) -> np.ndarray:
    """A random square of the photograph, perhaps mirrored, other contrast: float [size, size, 3]."""
    side = int(rng.integers(100, 201))  # pixels; no wider than the held-out strips, for both splits
    y, x = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
    crop = Image.fromarray(np.ascontiguousarray(photo[y : y + side, x : x + side]))
    pixels = np.asarray(crop.resize((size, size), Image.Resampling.BICUBIC), np.float64)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    mean = pixels.mean()
    return (pixels - mean) * rng.uniform(0.6, 1.1) + mean + rng.uniform(-30, 30)


def _ink(digit: np.ndarray, height: int, stretch: float) -> np.ndarray:
    """The 8x8 digit enlarged and cut to its strokes: opacity in 0..1; the array's outline is the box."""
    framed = np.pad(digit / 16, 1)  # strokes that touch the 8x8 border get a soft edge there too
    rows = np.flatnonzero((digit >= 4).any(1))  # of 16; fainter pixels are the blur around the pen
    pixel = height / (rows[-1] - rows[0] + 1)
    size = max(round(pixel * stretch * 10), 10), round(pixel * 10)  # width, height of the frame
    grey = Image.fromarray(framed.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    ink = (np.asarray(grey, np.float64) * 2.4 - 0.7).clip(0, 1)  # steeper edges, or it would only be a blur
    rows, columns = np.flatnonzero((ink > 0.25).any(1)), np.flatnonzero((ink > 0.25).any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _colour(rng: np.random.Generator, patch: np.ndarray) -> np.ndarray:
    """A random RGB colour whose brightness stands out from the patch, [3]."""
    luma = np.array([0.299, 0.587, 0.114])
    background = float((patch @ luma).mean())
    while True:
        colour = rng.uniform(0, 255, 3)
        if abs(colour @ luma - background) > 70:
            return colour


def overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Shared area of two (x, y, w, h) boxes as a fraction of the smaller box."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])
