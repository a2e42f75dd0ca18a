"""Data as people have them: read as it was meant, or refused with the file, the entry and what to do."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glcan_fx.demo.data import CocoFolder
from glcan_fx.demo.images import DataError, rgb

EXAMPLES = Path(__file__).parents[2] / "examples"


def program(name: str) -> Any:
    """A training program of examples/, to call its parts."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def written(folder: Path, images: list[dict[str, Any]], boxes: list[Any], names: tuple[str, ...] = ("dog", "cat"), *,
            val: Any = None) -> Path:
    content = {"images": images, "annotations": boxes,
               "categories": [{"id": index, "name": name} for index, name in enumerate(names, 1)]}
    (folder / "instances_train.json").write_text(json.dumps(content))
    (folder / "instances_val.json").write_text(json.dumps(val or content))
    return folder


def picture(folder: Path, name: str = "a.png", size: tuple[int, int] = (40, 20), number: int = 1) -> dict[str, Any]:
    Image.new("RGB", size, "red").save(folder / name)
    return {"id": number, "file_name": name, "width": size[0], "height": size[1]}


def box(*numbers: float, image: Any = 1, category: Any = 1) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": list(numbers)}


def read(folder: Path, split: str = "train") -> CocoFolder:
    return CocoFolder(folder, split, image_size=40)


class TestImages:
    def test_exif_orientation(self, tmp_path: Path) -> None:
        """Boxes of the upright image: it is turned. Boxes of the image as it is stored: it is not, and that is said."""
        file = Image.new("RGB", (20, 40), "black")  # stored upright as 20 x 40, shown as 40 x 20
        file.paste("red", (0, 0, 20, 10))
        exif = Image.Exif()
        exif[0x0112] = 6
        file.save(tmp_path / "a.jpg", exif=exif)
        upright = written(tmp_path, [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 20}], [box(30, 0, 10, 20)])
        image, target = read(upright)[0]
        assert image.shape == (3, 20, 40) and target["boxes"].tolist() == [[30, 0, 40, 20]]
        assert image[0, :, 32:].mean() > 0.9 and image[0, :, :28].mean() < 0.1  # the red is in the box
        stored = written(tmp_path, [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 40}], [box(0, 0, 20, 10)])
        dataset = read(stored)
        image, target = dataset[0]
        assert image.shape == (3, 40, 20) and target["boxes"].tolist() == [[0, 0, 20, 10]]
        assert image[0, :8].mean() > 0.9 and "1 image kept as stored" in dataset.summary()

    def test_sixteen_bits_are_scaled_evenly(self, tmp_path: Path) -> None:
        ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
        Image.fromarray(ramp).save(tmp_path / "a.png")
        values = np.asarray(rgb(tmp_path / "a.png"))[0, :, 0].astype(int)
        assert abs(values - np.arange(256)).max() <= 1

    @pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "CMYK", "RGBA", "1"])
    def test_modes(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / ("a.tif" if mode in ("CMYK", "PA") else "a.png")
        Image.new("RGB", (4, 4), "white").convert("L" if mode == "PA" else mode).save(path)
        image = rgb(path)
        assert image.mode == "RGB" and np.asarray(image).min() > 250

    @pytest.mark.parametrize("content", [b"", b"not a picture", None], ids=["empty", "text", "truncated"])
    def test_broken_files_are_named(self, tmp_path: Path, content: bytes | None) -> None:
        entry = picture(tmp_path, "a.jpg", (64, 64))
        data = (tmp_path / "a.jpg").read_bytes()[:-200] if content is None else content
        (tmp_path / "a.jpg").write_bytes(data)
        with pytest.raises(DataError, match=r"a\.jpg"):
            read(written(tmp_path, [entry], [box(0, 0, 4, 4)]))[0]

    def test_too_many_pixels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        entry = picture(tmp_path)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(DataError, match=r"a\.png has more pixels.*MAX_IMAGE_PIXELS"):
            read(written(tmp_path, [entry], [box(0, 0, 4, 4)]))


class TestBoxes:
    def test_what_is_changed_is_counted(self, tmp_path: Path) -> None:
        given = [box(30, 10, 20, 20), box(5, 5, 0, 4), box(5, 5, -3, 4), box(100, 5, 4, 4), box(1, 1, 4, 4), {
            **box(0, 0, 1, 1), "bbox": None}, {**box(0, 0, 1, 1), "bbox": [1, 2, 3]}, box(0, 0, 4, 4, image=99)]
        dataset = read(written(tmp_path, [picture(tmp_path)], given))
        assert dataset.changed == {
            "boxes clipped to the image": 1, "boxes without area dropped": 2,
            "boxes outside the image dropped": 1, "boxes without four numbers dropped": 2,
            "boxes of unlisted images dropped": 1}
        assert dataset[0][1]["boxes"].tolist() == [[30, 10, 40, 20], [1, 1, 5, 5]]
        said = dataset.summary()
        assert "1 box clipped to the image" in said and "2 boxes without area dropped" in said
        assert all(f"{count} {what.replace('boxes', 'box', count == 1)}" in said
                   for what, count in dataset.changed.items())

    @pytest.mark.parametrize(("change", "message"), [
        ({"images": "twice"}, r"a\.png and b\.png have the same id, 1"),
        ({"boxes": [box(0.1, 0.2, 0.5, 0.5)]}, "fractions of the image"),
        ({"size": (80, 40)}, "is 40 x 20, but its entry says 80 x 40"),
        ({"boxes": [box(0, 0, 4, 4, image="x"), box(0, 0, 4, 4, image="y")]}, "no annotation belongs to an image"),
        ({"boxes": [box(0, 0, 4, 4, category=7)]}, "category 7"),
        ({"boxes": [box(0, 0, 4, 4, category=None)]}, "category None"),
        ({"boxes": ["box"]}, "is not an object"),
        ({"name": None}, "'file_name'"),
    ], ids=["same id", "fractions", "sizes", "no image", "category", "no category", "no object", "no name"])
    def test_what_cannot_be_meant_is_refused(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        images = [picture(tmp_path)]
        if "images" in change:
            images.append(picture(tmp_path, "b.png"))
        if "size" in change:
            images[0].update(zip(("width", "height"), change["size"], strict=True))
        if "name" in change:
            images[0]["file_name"] = None
        with pytest.raises(DataError, match=message) as caught:
            read(written(tmp_path, images, change.get("boxes", [box(0, 0, 4, 4)])))
        assert "instances_train.json" in str(caught.value)

    def test_numbers_as_text_and_missing_keys(self, tmp_path: Path) -> None:
        entry = {**picture(tmp_path), "id": "1"}
        entry.pop("width")
        given = [{**box(1, 1, 4, 4, image="1", category="2"), "iscrowd": None, "area": "text", "id": None}]
        dataset = read(written(tmp_path, [entry], given))
        assert dataset[0][1]["labels"].tolist() == [1] and not dataset.changed

    def test_a_byte_order_mark_and_odd_names(self, tmp_path: Path) -> None:
        entry = picture(tmp_path, "ein Bild ü.png")
        entry["file_name"] = f"C:\\photos\\{entry['file_name']}"
        folder = written(tmp_path, [entry], [box(0, 0, 4, 4)])
        path = folder / "instances_train.json"
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert len(read(folder)) == 1

    def test_classes_of_another_split_are_mapped_by_name(self, tmp_path: Path) -> None:
        entry = picture(tmp_path)
        other = {"images": [entry], "annotations": [box(0, 0, 4, 4, category=1)],
                 "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]}
        folder = written(tmp_path, [entry], [box(0, 0, 4, 4, category=1)], val=other)
        train, val = read(folder), read(folder, "val")
        assert [train.classes[train[0][1]["labels"][0]], val.classes[val[0][1]["labels"][0]]] == ["dog", "cat"]
        assert "mapped by name" in val.summary()
        written(tmp_path, [entry], [], val={**other, "categories": [{"id": 1, "name": "cow"}]})
        with pytest.raises(DataError, match="'cow'"):
            read(folder, "val")


def test_random_folders_are_read_as_they_were_meant(tmp_path: Path) -> None:
    """Whatever faults a folder has that can be repaired: exactly the boxes that were meant, and every other counted."""
    for seed in range(12):
        draw = random.Random(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        images, boxes, meant, dropped = [], [], {}, 0
        for number in draw.sample(range(1, 100), 4):
            entry = picture(folder, f"{number}.png", (40, 40), number)
            if draw.random() < 0.3:
                entry["id"] = str(number)
            images.append(entry)
            meant[number] = []
            for _ in range(draw.randrange(4)):
                x, y, w, h = (draw.randint(2, 15) for _ in range(4))
                kind = draw.choice(["right", "right", "flat", "outside", "nothing", "text", "orphan"])
                one = box(x, y, w, h, image=number, category=draw.choice([1, "2"]))
                if kind == "flat":
                    one["bbox"][2] = 0
                elif kind == "outside":
                    one["bbox"][0] = 50
                elif kind == "nothing":
                    del one["bbox"]
                elif kind == "text":
                    one["bbox"] = "1 2 3 4"
                elif kind == "orphan":
                    one["image_id"] = 1000
                if kind == "right":
                    meant[number].append(([x, y, x + w, y + h], int(one["category_id"]) - 1))
                dropped += kind != "right"
                boxes.append(one)
        if not any(meant.values()):
            continue
        dataset = read(written(folder, images, boxes))
        assert sum(dataset.changed.values()) == dropped
        for index, number in enumerate(dataset.image_ids):
            target = dataset[index][1]
            found = list(zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True))
            assert sorted(found) == sorted((list(map(float, corners)), label) for corners, label in meant[number])


@pytest.fixture
def classification() -> Any:
    return program("train_classification")


class TestClassFolders:
    def make(self, folder: Path, counts: dict[str, int]) -> Path:
        for name, count in counts.items():
            (folder / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / name / f"{index}.png")
        return folder

    def test_classes_are_told_by_name(self, tmp_path: Path, classification: Any, capsys: pytest.CaptureFixture[str]
                                      ) -> None:
        self.make(tmp_path / "train", {"ant": 2, "bee": 2, "cow": 2, ".hidden": 1})
        self.make(tmp_path / "test", {"bee": 3, "cow": 1})
        (tmp_path / "test" / "cow" / "._0.png").write_bytes(b"")
        assert classification.classes_of(tmp_path) == ["ant", "bee", "cow"]
        pixels, labels = classification.read(tmp_path, train=False)
        assert sorted(labels.tolist()) == [1, 1, 1, 2] and pixels.shape == (4, 3, 32, 32)
        assert "no images of the class ant" in capsys.readouterr().err
        assert sorted(classification.read(tmp_path, train=True)[1][:3].tolist()) == [0, 1, 2]  # the first of each

    def test_nothing_to_read(self, tmp_path: Path, classification: Any) -> None:
        self.make(tmp_path / "train", {"ant": 0})
        with pytest.raises(DataError, match="no images"):
            classification.read(tmp_path, train=True)

    def test_as_many_outputs_as_classes(self, classification: Any) -> None:
        assert classification.CifarResNet(8, 12)(torch.zeros(1, 3, 32, 32)).shape == (1, 12)


@pytest.fixture
def segmentation() -> Any:
    return program("train_segmentation")


class TestMasks:
    def folder(self, folder: Path, mask: Any, name: str = "a", size: tuple[int, int] = (8, 8)) -> Path:
        for part in ("train", "trainannot"):
            (folder / part).mkdir(exist_ok=True)
        Image.new("RGB", size).save(folder / "train" / "a.jpg")
        mask.save(folder / "trainannot" / f"{name}.png")
        return folder

    def test_white_is_the_second_of_two_classes(self, tmp_path: Path, segmentation: Any) -> None:
        mask = Image.new("L", (8, 8))
        mask.paste(255, (0, 0, 4, 8))
        read_masks = segmentation.Masks(self.folder(tmp_path, mask), True, (8, 8), 2)
        labels = read_masks.items[0][1]
        assert labels.unique().tolist() == [0, 1] and "255 is taken for class 1" in read_masks.said[0]
        assert segmentation.Masks(tmp_path, True, (8, 8), 3).items[0][1].unique().tolist() == [0, 255]

    @pytest.mark.parametrize("mode", ["P", "LA", "RGB", "RGBA"])
    def test_modes(self, tmp_path: Path, segmentation: Any, mode: str) -> None:
        values = Image.new("L", (8, 8), 1)
        mask = values.convert(mode) if mode != "P" else Image.new("P", (8, 8), 1)
        if mode == "P":
            mask.putpalette([0, 0, 0, 200, 30, 90] + [0] * 762)
        assert segmentation.Masks(self.folder(tmp_path, mask), True, (8, 8), 2).items[0][1].unique().tolist() == [1]

    def test_what_is_refused_or_said(self, tmp_path: Path, segmentation: Any) -> None:
        colours = Image.new("RGB", (8, 8), (10, 20, 30))
        with pytest.raises(DataError, match=r"a\.png is in colours"):
            segmentation.Masks(self.folder(tmp_path, colours), True, (8, 8), 2)
        with pytest.raises(DataError, match=r"a\.jpg is 8 x 8, its mask a\.png 4 x 4"):
            segmentation.Masks(self.folder(tmp_path, Image.new("L", (4, 4))), True, (8, 8), 2)
        with pytest.raises(DataError, match="values are 77"):
            segmentation.Masks(self.folder(tmp_path, Image.new("L", (8, 8), 77)), True, (8, 8), 2)
        mask = Image.new("L", (8, 8))
        mask.putpixel((0, 0), 5)
        made = segmentation.Masks(self.folder(tmp_path, mask), True, (8, 8), 2)
        assert made.said == ["train: pixels of the value 5 are ignored, in 1 masks"]
        (tmp_path / "trainannot" / "a.png").unlink()
        assert len(segmentation.Masks(self.folder(tmp_path, mask, "a_mask"), True, (8, 8), 2)) == 1
        (tmp_path / "train" / "a.jpg").unlink()
        with pytest.raises(DataError, match=r"no image for the mask a_mask\.png"):
            segmentation.Masks(tmp_path, True, (8, 8), 2)

    def test_a_batch_without_labels_contributes_nothing(self) -> None:
        from glcan_fx import Segmentation

        logits = torch.randn(2, 3, 4, 4, requires_grad=True)
        loss = Segmentation().loss(logits, torch.full((2, 4, 4), 255))
        loss.backward()
        assert loss.item() == 0 and not logits.grad.any()
        labels = torch.randint(3, (2, 4, 4))
        labels[0, 0] = 255
        expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255)
        torch.testing.assert_close(Segmentation().loss(logits, labels), expected)


class TestSuperResolution:
    @pytest.fixture
    def restoring(self) -> Any:
        return program("train_super_resolution")

    def test_pairs(self, tmp_path: Path, restoring: Any, capsys: pytest.CaptureFixture[str]) -> None:
        for part in ("HR", "LRx2"):
            (tmp_path / part).mkdir()
        Image.new("RGB", (21, 16)).save(tmp_path / "HR" / "0801.png")
        Image.new("RGB", (10, 8)).save(tmp_path / "LRx2" / "0801x2.png")
        (tmp_path / "LRx2" / "._0801.png").write_bytes(b"")
        [(high, low)] = restoring.test_pairs(tmp_path, 2)
        assert high.size == (20, 16) and low.size == (10, 8) and "cut to 20 x 16" in capsys.readouterr().err
        Image.new("RGB", (20, 16)).save(tmp_path / "LRx2" / "0801x2.png")
        with pytest.raises(DataError, match=r"0801\.png is 21 x 16"):
            restoring.test_pairs(tmp_path, 2)
        (tmp_path / "HR" / "0801.png").unlink()
        with pytest.raises(DataError, match=r"no 0801x2\.png or 0801\.png"):
            restoring.test_pairs(tmp_path, 2)

    def test_small_images_are_counted(self, tmp_path: Path, restoring: Any, capsys: pytest.CaptureFixture[str]) -> None:
        for index, size in enumerate(((64, 64), (8, 8))):
            Image.new("RGB", size).save(tmp_path / f"{index}.png")
        assert len(restoring.Patches(restoring.images_in(tmp_path), 2, 16, 3)) == 3
        assert "1 of 2 training images are smaller than a patch" in capsys.readouterr().err
