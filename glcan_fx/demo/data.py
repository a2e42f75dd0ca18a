"""COCO-format detection folders: reading them for training and scoring detections with pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import tv_tensors
from torchvision.transforms import v2

from glcan_fx.demo.annotations import read
from glcan_fx.demo.images import rgb
from glcan_fx.pytree import map_tensors

Target = dict[str, Any]
Detections = dict[int, dict[str, Tensor]]  # image id -> boxes, scores, labels
MAX_CACHED_IMAGES = 2000  # decoded and resized; 256 x 256 pixels are 0.2 MB each
_SHOWN = 8  # classes of a summary


class CocoFolder(Dataset[Any]):
    """One split of a COCO-format or VOC-format detection folder, resized for fast training.

    The folder holds `instances_train.json` and `instances_val.json` (or `annotations/instances_train2017.json` ..., as
    it is downloaded); an image is looked for in `images/`, `<split>2017/`, `<split>/` and the folder itself. A Pascal
    VOC folder holds `Annotations/`, `JPEGImages/` and `ImageSets/Main/`; its "difficult" objects are crowd regions.

    Items are `(image, target)`: image float32 [3, H, W] in 0..1 with max(H, W) == image_size; target has `boxes`
    float32 [N, 4] (x1, y1, x2, y2, pixels of the new size), `labels` int64 [N] in 0..K-1 (contiguous, whatever the
    category ids) and `image_id`. N may be 0. For training, crowd regions are left out. `changed` counts labels that
    were dropped or changed when the set was read, `summary()` says them.

    Args:
        folder: the set.
        split: "train" or "val".
        image_size: length of the longer image side in pixels.
        flip: mirror half of the images at random; see `reseed`.
        limit: use only the first so many images.
    """

    def __init__(
        self, folder: str | Path, split: str, *, image_size: int, flip: bool = False, limit: int | None = None
    ) -> None:
        self.folder, self.split, self.image_size, self.flip = Path(folder), split, image_size, flip
        found = read(self.folder, split, limit)
        self.changed = found.changed
        self.category_ids: list[int] = [category["id"] for category in found.categories]
        self.classes: list[str] = [category["name"] for category in found.categories]
        self._label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        self.image_ids: list[int] = [image["id"] for image in found.images]
        self._files = [(image["path"], image["upright"]) for image in found.images]
        self.coco = COCO()
        self.coco.dataset = {"images": [{key: image[key] for key in ("id", "file_name", "width", "height")}
                                        for image in found.images],
                             "annotations": found.boxes, "categories": found.categories}
        with _silent():
            self.coco.createIndex()
        self._cache: dict[int, tuple[Tensor, Target]] = {}
        self._scale: dict[int, tuple[float, float]] = {}
        self._generator: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def summary(self) -> str:
        """What was read: images, boxes by class, and every label that was dropped or changed, counted."""
        boxes = self.coco.dataset["annotations"]
        names = dict(zip(self.category_ids, self.classes, strict=True))
        counts = Counter(names[box["category_id"]] for box in boxes)
        most = ", ".join(f"{name} {count}" for name, count in counts.most_common(_SHOWN))
        said = f"{self.split}: {len(self)} images, {len(boxes)} boxes of {len(counts)} classes ({most}"
        said += ", …)" if len(counts) > _SHOWN else ")"
        empty = len(self) - len({box["image_id"] for box in boxes})
        return "; ".join([said, *[_counted(empty, "images without objects")] * bool(empty),
                          *(_counted(count, what) for what, count in self.changed.items())])

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self._cache.get(index) or self._load(index)
        if len(self._cache) < MAX_CACHED_IMAGES:
            self._cache[index] = image, target
        if self.flip and torch.rand((), generator=self._generator) < 0.5:
            image, target = v2.functional.horizontal_flip(image), dict(target)
            target["boxes"] = v2.functional.horizontal_flip(target["boxes"])
        # Plain tensors: detectors need no image and box subclasses, and they slow every operation.
        image = v2.functional.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)
        return image, {**target, "boxes": target["boxes"].as_subclass(Tensor)}

    def decode(self, index: int) -> Image:
        """An image in RGB, at its own size. Raises DataError where it cannot be read."""
        path, upright = self._files[index]
        return rgb(path, upright=upright)

    def reseed(self, seed: int) -> None:
        """Restart the sequence of random flips, so that every method sees the same ones. Until this is called they come
        from PyTorch's global generator."""
        self._generator = torch.Generator().manual_seed(seed)

    def _load(self, index: int) -> tuple[Tensor, Target]:
        image_id = self.image_ids[index]
        image = tv_tensors.Image(v2.functional.pil_to_tensor(self.decode(index)))
        height, width = image.shape[-2:]
        scale = self.image_size / max(height, width)
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        self._scale[image_id] = size[1] / width, size[0] / height
        found = [a for a in self.coco.imgToAnns[image_id] if not a["iscrowd"]]
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4), format="XYWH",
                canvas_size=(height, width)),
            "labels": torch.tensor([self._label_of[a["category_id"]] for a in found], dtype=torch.int64),
            "image_id": image_id,
        }
        prepare = v2.Compose([v2.ConvertBoundingBoxFormat("XYXY"), v2.Resize(size, antialias=True),
                              v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1.0)])
        return prepare(image, target)

    def results(self, image_id: int, detections: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """A detector's output for one image as COCO results: original pixels and category ids.

        Args:
            image_id: the image's id in the annotation file.
            detections: `boxes` [N, 4] (x1, y1, x2, y2, resized image's pixels), `scores` [N], `labels` [N].
        """
        scale = torch.tensor(self._scale[image_id])
        boxes = detections["boxes"].detach().cpu().float() / scale.repeat(2)
        boxes[:, 2:] -= boxes[:, :2]
        columns = (boxes.tolist(), detections["scores"].tolist(), detections["labels"].tolist())
        return [
            {"image_id": image_id, "category_id": self.category_ids[label], "bbox": box, "score": score}
            for box, score, label in zip(*columns, strict=True)
        ]


def _counted(count: int, what: str) -> str:
    """A number of things; ``what`` begins with their plural."""
    many, _, rest = what.partition(" ")
    return f"{count} {({'boxes': 'box', 'images': 'image'}[many] if count == 1 else many)} {rest}"


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Lists of images and targets, as torchvision's detectors take them."""
    images, targets = zip(*batch, strict=True)
    return list(images), list(targets)


def training_batches(dataset: CocoFolder, *, steps: int, batch_size: int, seed: int) -> DataLoader[Any]:
    """A loader of exactly `steps` full batches in an order (and with flips) that depends only on `seed`."""
    dataset.reseed(seed)
    generator = torch.Generator().manual_seed(seed)
    # More samples than images: the sampler then strings permutations together, epoch after epoch.
    sampler = RandomSampler(dataset, num_samples=steps * batch_size, generator=generator)
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate)


def detected(
    model: nn.Module, dataset: CocoFolder, batch_size: int, device: torch.device
) -> Detections:
    """What a detector finds on every image, on the CPU."""
    found: Detections = {}
    training = model.training
    with torch.no_grad():
        for images, targets in DataLoader(dataset, batch_size, collate_fn=collate):
            outputs = model.eval()([image.to(device) for image in images])
            found |= {target["image_id"]: map_tensors(output, Tensor.cpu)
                      for target, output in zip(targets, outputs, strict=True)}
    model.train(training)
    return found


def average_precision(dataset: CocoFolder, detections: Mapping[int, Mapping[str, Tensor]]) -> dict[str, float]:
    """COCO's box AP (mean over IoU 0.50:0.95), AP50 and AP75, by pycocotools.

    Args:
        dataset: the held-out images.
        detections: what a detector found on each of them, by image id, as `CocoFolder.results` takes it.
    """
    results = [line for image_id, found in detections.items() for line in dataset.results(image_id, found)]
    names = ("AP", "AP50", "AP75")
    if not results:  # pycocotools does not accept an empty list
        return dict.fromkeys(names, 0.0)
    with _silent():
        evaluation = COCOeval(dataset.coco, dataset.coco.loadRes(results), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # -1 stands for "no box of any class", where no detection can be right.
    return {name: max(float(value), 0.0) for name, value in zip(names, evaluation.stats[:3], strict=True)}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """pycocotools prints its progress; stdout belongs to the demo's table."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
