"""Annotations of a detection set, from COCO's or Pascal VOC's format: read, repaired, or refused before training.

What is dropped or changed is counted by what it was; what cannot be what the user means is a ``DataError`` that names
the file and the entry.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

from torchvision.datasets import VOCDetection

from glcan_fx.demo.images import DataError, image_named, sizes

_SLACK = 1.0  # pixels by which a box may be outside without a word


@dataclass
class Annotations:
    """A split: ``images`` with their path, and whether they are read upright; ``boxes`` and ``categories`` as COCO has
    them. changed: how many labels were dropped or changed, by what was done."""

    images: list[dict[str, Any]]
    boxes: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    changed: Counter[str] = field(default_factory=Counter)


def read(folder: Path, split: str, limit: int | None = None) -> Annotations:
    """A split of a folder; ``limit``: its first so many images alone. Categories are the training split's, whose ids
    those of another split are mapped to by name. Raises DataError."""
    path, content = load(folder, split)
    categories = _categories(path, content)
    found = Annotations([], [], categories)
    listed = _images(found, path, folder, split, content["images"], limit)
    _boxes(found, path, content["annotations"], listed)
    if split != "train":
        _map_categories(found, path, _categories(*load(folder, "train")))
    _check_sizes(found, path)
    return found


def load(folder: Path, split: str) -> tuple[Path, dict[str, Any]]:
    """A split's file, and its content in COCO's format."""
    if (folder / "Annotations").is_dir() and (folder / "ImageSets" / "Main").is_dir():
        return _load_voc(folder, split)
    path = folder / f"instances_{split}.json"
    downloaded = folder / "annotations" / f"instances_{split}2017.json"  # as COCO's own archives are unpacked
    if downloaded.is_file() and not path.is_file():
        path = downloaded
    if not path.is_file():
        raise DataError(
            f"{path} is missing. A COCO-format detection set has instances_train.json and instances_val.json"
            " (keys 'images', 'annotations', 'categories') and the images in images/, in train2017/ and"
            " val2017/, or beside these files; a VOC-format one Annotations/, JPEGImages/ and ImageSets/Main/."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error
    missing = [key for key in ("images", "annotations", "categories")
               if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{path} has no {missing[0]!r}: it is not a COCO detection annotation file.")
    if not content["images"] or not content["categories"]:
        raise DataError(f"{path} lists no images or no categories: nothing to train on.")
    return path, content


def _categories(path: Path, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    names: set[str] = set()
    for entry in content["categories"]:
        number = _number(entry.get("id"))
        if number is None:
            raise DataError(f"{path}: the category {entry} has no number as its 'id'.")
        name = str(entry.get("name", number))
        if number in found or name in names:
            raise DataError(f"{path} lists the category {number} {name!r} twice.")
        found[number] = {"id": number, "name": name}
        names.add(name)
    return [found[number] for number in sorted(found)]


def _images(
    found: Annotations, path: Path, folder: Path, split: str, entries: Sequence[Any], limit: int | None
) -> set[int]:
    """Images that are used, with their files; returns the ids of all that are listed."""
    known: dict[int, Any] = {}
    for entry in entries:
        number, name = _number(entry.get("id")), entry.get("file_name")
        if number is None or not name:
            raise DataError(f"{path}: the image {entry} needs a number 'id' and a 'file_name'.")
        if number in known:
            raise DataError(f"{path}: the images {known[number]['file_name']} and {name} have the same id, {number}: "
                            "their boxes cannot be told apart. Renumber the images of one file before merging.")
        known[number] = {**entry, "id": number, "file_name": str(name)}
    places = [folder / "images", folder / "JPEGImages", folder / f"{split}2017", folder / split, folder]
    for number in sorted(known)[:limit]:
        entry = known[number]
        names = dict.fromkeys((entry["file_name"], PureWindowsPath(entry["file_name"]).name))
        files = [place / name for name in names for place in places if (place / name).is_file()]
        if not files and not Path(entry["file_name"]).suffix:
            files = [file for place in places if (file := image_named(place, entry["file_name"]))]
        if not files:
            raise DataError(f"{entry['file_name']}, listed in {path}, is in none of {', '.join(map(str, places))}.")
        found.images.append({**entry, "path": files[0], "upright": True})
    return set(known)


def _boxes(found: Annotations, path: Path, entries: Sequence[Any], listed: set[int]) -> None:
    """Boxes of the images that are used, with the keys that pycocotools needs."""
    kept = {image["id"] for image in found.images}
    numbers = {category["id"] for category in found.categories}
    orphans: list[Any] = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise DataError(f"{path}: the annotation {entry!r} is not an object with 'image_id', 'category_id' and "
                            "'bbox'.")
        image, category = _number(entry.get("image_id")), _number(entry.get("category_id"))
        if image is None or image not in listed:
            orphans.append(entry.get("image_id"))
            continue
        if image not in kept:
            continue
        if category not in numbers:
            raise DataError(f"{path}: a box of image {image} has the category {entry.get('category_id')!r}, which is "
                            "not listed under 'categories'. Add it there.")
        box = entry.get("bbox")
        numeric = isinstance(box, list | tuple) and len(box) == 4 and all(
            isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 for value in box)
        if not numeric or box is None:
            found.changed["boxes without four numbers dropped"] += 1
            continue
        if min(box[2:]) <= 0:
            found.changed["boxes without area dropped"] += 1
            continue
        found.boxes.append({
            "image_id": image, "category_id": category, "bbox": [float(value) for value in box],
            "area": float(_number(entry.get("area")) or box[2] * box[3]),
            "iscrowd": int(bool(_number(entry.get("iscrowd"))))})
    if orphans and len(orphans) == len(entries):
        raise DataError(f"{path}: no annotation belongs to an image: image_id is {orphans[0]!r}, for example, and the "
                        f"images' ids are {min(listed)}, for example. Both must be the same numbers.")
    if orphans:
        found.changed["boxes of unlisted images dropped"] += len(orphans)


def _number(value: Any) -> int | None:
    """A whole number, also as text."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _map_categories(found: Annotations, path: Path, trained: list[dict[str, Any]]) -> None:
    """Give a split's boxes the training split's categories, by name."""
    number = {category["name"]: category["id"] for category in trained}
    name = {category["id"]: category["name"] for category in found.categories}
    for box in found.boxes:
        own = name[box["category_id"]]
        if own not in number:
            raise DataError(f"{path} has boxes of the class {own!r}, which the training split does not list under "
                            "'categories'. Add it there, or remove them.")
        if number[own] != box["category_id"]:
            found.changed["boxes whose category has another id in training mapped by name"] += 1
            box["category_id"] = number[own]
    found.categories = trained


def _check_sizes(found: Annotations, path: Path) -> None:
    """Compare sizes and boxes with the files: take an image as it is stored where its boxes are of that; clip boxes;
    refuse those that are in other units."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for box in found.boxes:
        by_image.setdefault(box["image_id"], []).append(box)
    if found.boxes and all(max(box["bbox"]) <= 1 for box in found.boxes):
        raise DataError(f"{path}: no box has a number above 1, for example {found.boxes[0]['bbox']}: they seem to be "
                        "fractions of the image. COCO's are pixels, x, y, width, height.")
    for image in found.images:
        upright, stored = sizes(image["path"])
        said = _number(image.get("width")), _number(image.get("height"))
        if None not in said and said not in (upright, stored):
            raise DataError(f"{path}: {image['file_name']} is {upright[0]} x {upright[1]}, but its entry says "
                            f"{said[0]} x {said[1]}: its boxes would be wrong, too. Correct the entry and its "
                            "boxes, or replace the file.")
        if said == stored and stored != upright:
            image["upright"] = False
            found.changed["images kept as stored, to match their boxes"] += 1
        image["width"], image["height"] = stored if not image["upright"] else upright
        for box in by_image.get(image["id"], ()):
            _clip(found, box, image["width"], image["height"])
    found.boxes = [box for box in found.boxes if box["bbox"] is not None]
    for number, box in enumerate(found.boxes, 1):
        box["id"] = number  # from 1: COCOeval takes a match with annotation 0 for no match


def _clip(found: Annotations, box: dict[str, Any], width: int, height: int) -> None:
    left, top, wide, high = box["bbox"]
    right, bottom = min(left + wide, width), min(top + high, height)
    inside = [max(left, 0.0), max(top, 0.0), right - max(left, 0.0), bottom - max(top, 0.0)]
    if min(inside[2:]) <= 0:
        found.changed["boxes outside the image dropped"] += 1
        box["bbox"] = None
    elif max(abs(a - b) for a, b in zip((left, top, left + wide, top + high), (
            inside[0], inside[1], right, bottom), strict=True)) > _SLACK:
        found.changed["boxes clipped to the image"] += 1
        box.update(bbox=inside, area=inside[2] * inside[3])


def _load_voc(folder: Path, split: str) -> tuple[Path, dict[str, Any]]:
    """The same of a Pascal VOC folder; categories are all that the annotations of its lists name, in alphabetical
    order."""
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listed.is_file():
        raise DataError(f"{listed} is missing: it names the images of the split, one a line.")
    names = _listed(listed)
    if not names:
        raise DataError(f"{listed} lists no images: nothing to train on.")
    others = [name for part in ("train", "val") if (other := listed.with_name(f"{part}.txt")).is_file()
              for name in _listed(other)]  # whose classes count, too
    found = {}
    for name in dict.fromkeys((*names, *others)):
        path = folder / "Annotations" / f"{name}.xml"
        if not path.is_file() and name not in names:
            continue
        if not path.is_file():
            raise DataError(f"{path} is missing, but {listed} lists it.")
        try:
            found[name] = _voc_image(path)
        except (ElementTree.ParseError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a VOC annotation: {error!r}.") from error
    kinds = sorted({kind for _, boxes in found.values() for kind, _, _ in boxes})
    number = {kind: index for index, kind in enumerate(kinds, 1)}
    return listed, {
        "images": [{"id": index, **found[name][0]} for index, name in enumerate(names, 1)],
        "annotations": [{"image_id": index, "category_id": number[kind], "bbox": box, "iscrowd": difficult}
                        for index, name in enumerate(names, 1) for kind, box, difficult in found[name][1]],
        "categories": [{"id": index, "name": kind} for kind, index in number.items()]}


def _listed(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _voc_image(path: Path) -> tuple[dict[str, Any], list[tuple[str, list[float], int]]]:
    """An image's entry, and (class, box, difficult) of its objects; VOC's pixels count from 1 and include the last. The
    image is the one that is called as the XML file is."""
    content = VOCDetection.parse_voc_xml(ElementTree.parse(path).getroot())["annotation"] or {}
    given, images = content.get("filename"), path.parent.parent / "JPEGImages"
    entry: dict[str, Any] = {"file_name": path.stem}
    if given and image_named(images, path.stem) is None:
        entry["file_name"] = given
    size = content.get("size")
    if isinstance(size, dict) and size.get("width") and int(float(size["width"])) > 0:
        entry.update({side: int(float(size[side])) for side in ("width", "height")})
    objects = []
    for thing in content.get("object", []):
        left, top, right, bottom = (float(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax"))
        left, top = max(left - 1, 0.0), max(top - 1, 0.0)
        objects.append((thing["name"], [left, top, right - left, bottom - top], int(thing.get("difficult", 0) or 0)))
    return entry, objects
