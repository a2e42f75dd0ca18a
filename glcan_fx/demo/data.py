"""COCO-format detection folders: reading them for training and scoring detections with pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import tv_tensors
from torchvision.datasets import VOCDetection
from torchvision.transforms import v2

from glcan_fx.errors import GlcanFxError

Target = dict[str, Any]
MAX_CACHED_IMAGES = 2000  # decoded and resized; 256 x 256 pixels are 0.2 MB each


class DemoError(GlcanFxError):
    """Something about the demo's data or options that the user can put right."""


class CocoFolder(Dataset[Any]):
    """One split of a COCO-format or VOC-format detection folder, resized for fast training.

    The folder holds `instances_train.json` and `instances_val.json` (or `annotations/instances_train2017.json` ..., as
    it is downloaded); an image is looked for in `images/`, `<split>2017/`, `<split>/` and the folder itself. A Pascal
    VOC folder holds `Annotations/`, `JPEGImages/` and `ImageSets/Main/`; its "difficult" objects are crowd regions.

    Items are `(image, target)`: image float32 [3, H, W] in 0..1 with max(H, W) == image_size; target has `boxes`
    float32 [N, 4] (x1, y1, x2, y2, pixels of the new size), `labels` int64 [N] in 0..K-1 (contiguous, whatever the
    category ids) and `image_id`. N may be 0. Boxes without area and, for training, crowd regions are left out.

    Args:
        folder: the set.
        split: "train" or "val".
        image_size: length of the longer image side in pixels.
        flip: mirror half of the images at random; see `reseed`.
        limit: use only the first so many images.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        *,
        image_size: int,
        flip: bool = False,
        limit: int | None = None,
    ) -> None:
        self.folder, self.split, self.image_size, self.flip = Path(folder), split, image_size, flip
        self.coco, self.dropped_boxes = _read(self.folder, split, limit)
        # Labels come from the training file in every split: the files may list their categories differently.
        categories = self.coco.dataset["categories"]
        if split != "train":
            categories = _load(self.folder, "train")["categories"]
        categories = sorted(categories, key=lambda category: category["id"])
        self.category_ids: list[int] = [category["id"] for category in categories]
        self.classes: list[str] = [str(category.get("name", category["id"])) for category in categories]
        self._label_of = {category_id: label for label, category_id in enumerate(self.category_ids)}
        unknown = {a["category_id"] for a in self.coco.dataset["annotations"]} - set(self._label_of)
        if unknown:
            raise DemoError(
                f"{self.folder / f'instances_{split}.json'} has boxes of category {min(unknown)}, which"
                " instances_train.json does not list under 'categories'. Add it there."
            )
        self.image_ids: list[int] = [image["id"] for image in self.coco.dataset["images"]]
        self._paths = _find_images(self.folder, split, self.coco.dataset["images"])
        self._cache: dict[int, tuple[Tensor, Target]] = {}
        self._scale: dict[int, tuple[float, float]] = {}
        self._generator: torch.Generator | None = None

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        if index not in self._cache:
            item = self._load(index)
            if len(self._cache) < MAX_CACHED_IMAGES:
                self._cache[index] = item
        else:
            item = self._cache[index]
        image, target = item
        if self.flip and torch.rand((), generator=self._generator) < 0.5:
            image, target = v2.functional.horizontal_flip(image), dict(target)
            target["boxes"] = v2.functional.horizontal_flip(target["boxes"])
        # Plain tensors: detectors need no image and box subclasses, and they slow every operation.
        image = v2.functional.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True)
        return image, {**target, "boxes": target["boxes"].as_subclass(Tensor)}

    def reseed(self, seed: int) -> None:
        """Restart the sequence of random flips, so that every method sees the same ones. Until this is called they come
        from PyTorch's global generator."""
        self._generator = torch.Generator().manual_seed(seed)

    def _load(self, index: int) -> tuple[Tensor, Target]:
        image_id, path = self.image_ids[index], self._paths[index]
        try:
            with Image.open(path) as file:
                image = tv_tensors.Image(v2.functional.pil_to_tensor(file.convert("RGB")))
        except OSError as error:
            raise DemoError(f"cannot read image {path}: {error}. Replace it or remove its entry.") from error
        height, width = image.shape[-2:]
        scale = self.image_size / max(height, width)
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        self._scale[image_id] = size[1] / width, size[0] / height
        found = [a for a in self.coco.imgToAnns[image_id] if not a["iscrowd"]]
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor([a["bbox"] for a in found], dtype=torch.float32).reshape(-1, 4),
                format="XYWH",
                canvas_size=(height, width),
            ),
            "labels": torch.tensor([self._label_of[a["category_id"]] for a in found], dtype=torch.int64),
            "image_id": image_id,
        }
        prepare = v2.Compose(
            [
                v2.ConvertBoundingBoxFormat("XYXY"),
                v2.Resize(size, antialias=True),
                v2.ClampBoundingBoxes(),
                v2.SanitizeBoundingBoxes(min_size=1.0),
            ]
        )
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


def _load(folder: Path, split: str) -> dict[str, Any]:
    """A split's annotations in COCO's format."""
    if (folder / "Annotations").is_dir() and (folder / "ImageSets" / "Main").is_dir():
        return _load_voc(folder, split)
    path = folder / f"instances_{split}.json"
    downloaded = folder / "annotations" / f"instances_{split}2017.json"  # as COCO's own archives are unpacked
    if downloaded.is_file() and not path.is_file():
        path = downloaded
    if not path.is_file():
        raise DemoError(
            f"{path} is missing. A COCO-format detection set has instances_train.json and instances_val.json"
            " (keys 'images', 'annotations', 'categories') and the images in images/, in train2017/ and"
            " val2017/, or beside these files; a VOC-format one Annotations/, JPEGImages/ and ImageSets/Main/."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DemoError(f"{path} is not valid JSON: {error}.") from error
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise DemoError(f"{path} has no {missing[0]!r}: it is not a COCO detection annotation file.")
    if not content["images"] or not content["categories"]:
        raise DemoError(f"{path} lists no images or no categories: nothing to train on.")
    return content


def _load_voc(folder: Path, split: str) -> dict[str, Any]:
    """The same of a Pascal VOC folder; categories are all that its annotations name, in alphabetical order."""
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listed.is_file():
        raise DemoError(f"{listed} is missing: it names the images of the split, one a line.")
    names = [line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise DemoError(f"{listed} lists no images: nothing to train on.")
    found = {}
    for path in sorted((folder / "Annotations").glob("*.xml")):
        try:
            found[path.stem] = _voc_image(path)
        except (ElementTree.ParseError, KeyError, TypeError, ValueError) as error:
            raise DemoError(f"{path} is not a VOC annotation: {error!r}.") from error
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise DemoError(f"{folder / 'Annotations' / missing}.xml is missing, but {listed} lists it.")
    kinds = sorted({kind for _, boxes in found.values() for kind, _, _ in boxes})
    number = {kind: index for index, kind in enumerate(kinds, 1)}
    return {"images": [{"id": index, **found[name][0]} for index, name in enumerate(names, 1)],
            "annotations": [{"image_id": index, "category_id": number[kind], "bbox": box, "iscrowd": difficult}
                            for index, name in enumerate(names, 1) for kind, box, difficult in found[name][1]],
            "categories": [{"id": index, "name": kind} for kind, index in number.items()]}


def _voc_image(path: Path) -> tuple[dict[str, Any], list[tuple[str, list[float], int]]]:
    """An image's entry, and (class, box, difficult) of its objects; VOC's pixels count from 1 and include the last."""
    content = VOCDetection.parse_voc_xml(ElementTree.parse(path).getroot())["annotation"]
    name = content.get("filename", path.stem)
    entry = {"file_name": name if Path(name).suffix else f"{name}.jpg",
             **{side: int(content["size"][side]) for side in ("width", "height")}}
    objects = []
    for thing in content.get("object", []):
        left, top, right, bottom = (float(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax"))
        left, top = max(left - 1, 0.0), max(top - 1, 0.0)
        objects.append((thing["name"], [left, top, right - left, bottom - top], int(thing.get("difficult", 0))))
    return entry, objects


def _read(folder: Path, split: str, limit: int | None) -> tuple[COCO, int]:
    """The annotation file in the form pycocotools needs, and the number of boxes left out of it."""
    content = _load(folder, split)
    images = sorted(content["images"], key=lambda image: image["id"])[:limit]
    kept_ids = {image["id"] for image in images}
    annotations: list[dict[str, Any]] = []
    dropped = 0
    for annotation in content["annotations"]:
        if annotation["image_id"] not in kept_ids:
            continue
        box = annotation.get("bbox")
        if not box or len(box) != 4 or min(box[2:]) <= 0:
            dropped += 1
            continue
        annotations.append(
            {
                # Numbered anew from 1: COCOeval takes a match with annotation 0 for no match.
                "id": len(annotations) + 1,
                "image_id": annotation["image_id"],
                "category_id": annotation["category_id"],
                "bbox": [float(value) for value in box],
                "area": float(annotation.get("area") or box[2] * box[3]),
                "iscrowd": int(annotation.get("iscrowd", 0)),
            }
        )
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": content["categories"]}
    with _silent():
        coco.createIndex()
    return coco, dropped


def _find_images(folder: Path, split: str, images: Sequence[Mapping[str, Any]]) -> list[Path]:
    places = [folder / "images", folder / "JPEGImages", folder / f"{split}2017", folder / split, folder]
    paths = []
    for image in images:
        path = next((p / image["file_name"] for p in places if (p / image["file_name"]).is_file()), None)
        if path is None:
            raise DemoError(
                f"{image['file_name']}, listed in the annotations of '{split}' in {folder}, is in none of"
                f" {', '.join(str(place) for place in places)}."
            )
        paths.append(path)
    return paths


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


def held_out_batches(dataset: CocoFolder, batch_size: int) -> DataLoader[Any]:
    """Every image once, in the order of the annotation file."""
    return DataLoader(dataset, batch_size, collate_fn=collate)


def average_precision(dataset: CocoFolder, results: list[dict[str, Any]]) -> dict[str, float]:
    """COCO's box AP (mean over IoU 0.50:0.95), AP50 and AP75 of `results` on all of `dataset`, by pycocotools.

    Args:
        dataset: the held-out images.
        results: COCO results as `CocoFolder.results` gives them, of all images together.
    """
    if not results:  # pycocotools does not accept an empty list
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    with _silent():
        evaluation = COCOeval(dataset.coco, dataset.coco.loadRes(results), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # -1 stands for "no box of any class", where no detection can be right.
    return {name: max(float(value), 0.0)
            for name, value in zip(("AP", "AP50", "AP75"), evaluation.stats[:3], strict=True)}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """pycocotools prints its progress; stdout belongs to the demo's table."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
