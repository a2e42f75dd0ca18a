"""The demo: its data, its scores, its files. Trains nothing for longer than three steps."""

import argparse
import json
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import glcan_fx
from glcan_fx.cli import demo
from glcan_fx.cli import main as cli
from glcan_fx.demo import digits as demo_digits
from glcan_fx.demo import train as demo_train
from glcan_fx.demo.data import CocoFolder, average_precision, training_batches
from glcan_fx.demo.digits import MAX_OVERLAP, PHOTO_COLUMNS, DigitSettings, compose_digits, overlap
from glcan_fx.demo.images import DataError

SETTINGS = DigitSettings(train=24, val=12, image_size=64)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "data"
    assert compose_digits(folder, SETTINGS)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Two images, three categories with gaps in their ids, and what else real annotation files contain."""
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    Image.new("L", (20, 40), 128).save(tmp_path / "b.png")
    images = [{"id": 7, "file_name": "a.png", "width": 40, "height": 20},
              {"id": 3, "file_name": "b.png", "width": 20, "height": 40}]
    boxes = [
        {"id": 0, "image_id": 7, "category_id": 90, "bbox": [10, 5, 20, 10], "area": 200, "iscrowd": 0},
        {"id": 1, "image_id": 7, "category_id": 4, "bbox": [0, 0, 8, 8]},
        {"id": 2, "image_id": 7, "category_id": 4, "bbox": [3, 3, 0, 5], "area": 0, "iscrowd": 0},
        {"id": 3, "image_id": 7, "category_id": 13, "bbox": [0, 0, 40, 20], "area": 800, "iscrowd": 1},
    ]
    categories = [{"id": 90, "name": "z"}, {"id": 4, "name": "x"}, {"id": 13, "name": "y"}]
    for split in ("train", "val"):
        content = {"images": images, "annotations": boxes, "categories": categories}
        (tmp_path / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def truth(dataset: CocoFolder) -> dict[int, dict[str, torch.Tensor]]:
    """The truth of every image as if a detector had found it."""
    assert all(image.dtype == torch.float32 and max(image.shape[1:]) == dataset.image_size for image, _ in dataset)
    return {target["image_id"]: target | {"scores": torch.ones(len(target["labels"]))} for _, target in dataset}


# --------------------------------------------------------------------------------------- composed digits


def test_composed_set_is_valid_coco(digits: Path) -> None:
    seen = set()
    for split, count in (("train", SETTINGS.train), ("val", SETTINGS.val)):
        coco = COCO(digits / f"instances_{split}.json")
        assert len(coco.imgs) == count
        seen |= set(coco.imgs)
        for image in coco.imgs.values():
            with Image.open(digits / "images" / image["file_name"]) as file:
                assert file.size == (image["width"], image["height"]) == (64, 64)
            boxes = [annotation["bbox"] for annotation in coco.imgToAnns[image["id"]]]
            assert boxes and all(overlap(a, b) <= MAX_OVERLAP for a, b in combinations(boxes, 2))
        for x, y, w, h in (annotation["bbox"] for annotation in coco.anns.values()):
            assert min(x, y) >= 0 and x + w <= 64 and y + h <= 64 and 64 * 0.2 < h < 64 * 0.65 and w >= 3
    assert len(seen) == SETTINGS.train + SETTINGS.val  # image ids are unique over the splits


def test_train_and_held_out_share_no_digit_and_no_photograph_pixel(digits: Path) -> None:
    train, val = ({a["digit_sample"] for a in COCO(digits / f"instances_{split}.json").anns.values()}
                  for split in ("train", "val"))
    assert not train & val
    for photo, (first, last) in PHOTO_COLUMNS["train"].items():
        other_first, other_last = PHOTO_COLUMNS["val"][photo]
        assert last <= other_first or other_last <= first


def test_composing_depends_only_on_the_settings(digits: Path, tmp_path: Path) -> None:
    compose_digits(tmp_path / "same", SETTINGS)
    compose_digits(tmp_path / "other", DigitSettings(train=24, val=12, image_size=64, seed=1))
    files = sorted(path.relative_to(digits) for path in digits.rglob("*") if path.is_file())
    assert len(files) == SETTINGS.train + SETTINGS.val + 3
    assert all((tmp_path / "same" / file).read_bytes() == (digits / file).read_bytes() for file in files)
    name = "instances_train.json"
    assert (tmp_path / "other" / name).read_bytes() != (digits / name).read_bytes()


def test_set_is_reused_replaced_and_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    small = DigitSettings(train=2, val=1, image_size=32)
    assert compose_digits(folder, small)
    assert not compose_digits(folder, small)
    assert compose_digits(folder, DigitSettings(train=1, val=1, image_size=32))
    assert len(list((folder / "images").iterdir())) == 2

    before = (folder / "instances_train.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(demo_digits, "_compose", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compose_digits(folder, small)
    assert (folder / "instances_train.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(DataError, match="--out"):
        compose_digits(tmp_path / "mine", small)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("wrong", [{"image_size": 8}, {"train": 0}])
def test_wrong_settings(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError):
        DigitSettings(**{"train": 1, "val": 1, "image_size": 32} | wrong)


# --------------------------------------------------------------------------------------- COCO folders


def test_tiny_folder(tiny: Path) -> None:
    dataset = CocoFolder(tiny, "train", image_size=80)
    assert dataset.category_ids == [4, 13, 90] and dataset.classes == ["x", "y", "z"]
    assert dataset.image_ids == [3, 7] and dataset.changed == {"boxes without area dropped": 1}
    empty_image, empty = dataset[0]
    assert empty_image.shape == (3, 80, 40) and empty["boxes"].shape == (0, 4) and len(empty["labels"]) == 0
    image, target = dataset[1]
    assert image.shape == (3, 40, 80)
    # Twice the size; neither the box without area nor the crowd region is trained on.
    assert target["boxes"].tolist() == [[20, 10, 60, 30], [0, 0, 16, 16]]
    assert target["labels"].tolist() == [2, 0]
    found = target | {"scores": torch.tensor([0.5, 0.25])}
    results = dataset.results(7, found)
    assert [(r["category_id"], r["bbox"]) for r in results] == [(90, [10, 5, 20, 10]), (4, [0, 0, 8, 8])]
    # The file's annotation 0 counts as found; COCOeval by itself would take its id for "no match".
    assert average_precision(dataset, {7: found})["AP"] == pytest.approx(1.0)
    assert len(CocoFolder(tiny, "val", image_size=80, limit=1)) == 1


def test_flips_are_repeatable_and_keep_boxes_on_their_objects(tiny: Path) -> None:
    dataset = CocoFolder(tiny, "train", image_size=40, flip=True)
    xs = []
    for _ in range(2):
        dataset.reseed(3)
        xs.append([dataset[1][1]["boxes"][1, 0].item() for _ in range(20)])
    assert xs[0] == xs[1] and set(xs[0]) == {0.0, 32.0}  # left edge of the 8-pixel box, and mirrored


def test_training_batches_repeat_and_span_epochs(tiny: Path) -> None:
    dataset = CocoFolder(tiny, "train", image_size=40)
    loaders = [training_batches(dataset, steps=3, batch_size=4, seed=0) for _ in range(2)]
    orders = [[[t["image_id"] for t in targets] for _, targets in loader] for loader in loaders]
    assert orders[0] == orders[1]
    assert [sorted(ids) for ids in orders[0]] == [[3, 3, 7, 7]] * 3


@pytest.mark.parametrize("layout", ["images", "split2017", "root"])
def test_image_folders(tiny: Path, layout: str) -> None:
    if layout != "root":
        target = tiny / ("images" if layout == "images" else "train2017")
        target.mkdir()
        for name in ("a.png", "b.png"):
            shutil.move(tiny / name, target / name)
    assert len(CocoFolder(tiny, "train", image_size=32)) == 2


VOC = """<annotation><filename>{name}.png</filename><size><width>40</width><height>20</height><depth>3</depth></size>
{objects}</annotation>"""
OBJECT = """<object><name>{0}</name><difficult>{1}</difficult><bndbox><xmin>{2}</xmin><ymin>{3}</ymin><xmax>{4}</xmax>
<ymax>{5}</ymax></bndbox></object>"""


def test_a_voc_folder(tmp_path: Path) -> None:
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / part).mkdir(parents=True)
    objects = {"one": OBJECT.format("dog", 0, 1, 1, 10, 20) + OBJECT.format("cat", 1, 11, 1, 40, 10),
               "two": OBJECT.format("cat", 0, 5, 6, 8, 8), "none": ""}
    for name, inside in objects.items():
        (tmp_path / "Annotations" / f"{name}.xml").write_text(VOC.format(name=name, objects=inside))
        Image.new("RGB", (40, 20)).save(tmp_path / "JPEGImages" / f"{name}.png")
    (tmp_path / "ImageSets/Main/train.txt").write_text("one\nnone\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("two\n")
    train, val = (CocoFolder(tmp_path, split, image_size=40) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog"] and len(train) == 2
    assert train[0][1]["boxes"].tolist() == [[0, 0, 10, 20]] and train[0][1]["labels"].tolist() == [1]  # not difficult
    assert train[1][1]["boxes"].shape == (0, 4)
    [found] = val.coco.dataset["annotations"]
    assert found["bbox"] == [4, 5, 4, 3] and found["category_id"] == 1
    assert [a["iscrowd"] for a in train.coco.dataset["annotations"]] == [0, 1]
    (tmp_path / "ImageSets/Main/val.txt").write_text("three\n")
    with pytest.raises(DataError, match=r"three\.xml is missing"):
        CocoFolder(tmp_path, "val", image_size=40)
    (tmp_path / "Annotations/two.xml").write_text("<annotation><object>")
    assert len(CocoFolder(tmp_path, "train", image_size=40)) == 2  # no list names it
    (tmp_path / "ImageSets/Main/train.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match=r"two\.xml is not a VOC annotation"):
        CocoFolder(tmp_path, "train", image_size=40)
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DataError, match=r"train\.txt is missing"):
        CocoFolder(tmp_path, "train", image_size=40)


def test_bad_folders_are_explained(tiny: Path) -> None:
    with pytest.raises(DataError, match=r"instances_train\.json is missing.*annotations"):
        CocoFolder(tiny / "nowhere", "train", image_size=32)
    for content, message in (
            ('{"images": [], "categories": [], "annotations": []}', r"instances_val\.json lists no images"),
            ("{", r"instances_val\.json is not valid JSON"), ("{}", "no 'images'")):
        (tiny / "instances_val.json").write_text(content)
        with pytest.raises(DataError, match=message):
            CocoFolder(tiny, "val", image_size=32)
    (tiny / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png.*is in none of .*images"):
        CocoFolder(tiny, "train", image_size=32)


def test_average_precision(digits: Path) -> None:
    dataset = CocoFolder(digits, "val", image_size=96)
    perfect = truth(dataset)
    assert average_precision(dataset, perfect) == pytest.approx({"AP": 1.0, "AP50": 1.0, "AP75": 1.0})
    following = dict(zip(perfect, [*list(perfect)[1:], next(iter(perfect))], strict=True))
    shuffled = {following[image]: found for image, found in perfect.items()}
    assert average_precision(dataset, shuffled)["AP50"] < 0.2
    assert average_precision(dataset, {}) == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}


# --------------------------------------------------------------------------------------- the whole run


SHORT = ("--steps", 3, "--batch-size", 2, "--memory-batch", 4, "--image-size", 64, "--train-images", 8)
SHORT += ("--val-images", 3, "--device", "cpu")


def call(*given: object) -> int:
    try:
        return cli.main(["demo", *map(str, given)])
    except SystemExit as end:  # argparse
        return end.code


def test_run_writes_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--methods", "bp", "--out", tmp_path, *SHORT) == 0
    printed = capsys.readouterr()
    assert "BP" in printed.out and "AP50" in printed.out and max(map(len, printed.out.splitlines())) <= 80
    assert "results.json" in printed.err and "DONE" not in printed.out  # pycocotools is silent
    for name in ("curves.png", "detections.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 400
    results = json.loads((tmp_path / "results.json").read_text())
    bp = results["methods"]["bp"]
    assert len(bp["losses"]) == 3 and bp["evaluations"][-1]["step"] == 3 and bp["AP"] is not None
    assert bp["peak_bytes"] > bp["resident_bytes"] > 4 * 3 * bp["parameters"]
    assert bp["large_peak_bytes"] >= bp["peak_bytes"] and bp["step_seconds"] > 0
    assert results["options"]["seed"] == 0 and results["options"]["image_size"] == 64
    assert {"python", "torch", "torchvision"} <= set(results["versions"]) and results["device"] == "cpu"


def test_user_data_and_a_second_method(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call("--data", tiny, "--methods", "checkpoint,bp", "--out", out, *SHORT) == 0
    shown, said = capsys.readouterr()
    assert "as BP" in shown and said.count("1 box without area dropped") == 2 and "1 image without objects" in said
    methods = json.loads((out / "results.json").read_text())["methods"]
    assert methods["checkpoint"]["AP"] is None and not methods["checkpoint"]["evaluations"]
    # The same start, the same images, exact gradients: the same losses.
    assert methods["checkpoint"]["losses"] == pytest.approx(methods["bp"]["losses"], rel=1e-3)


@pytest.mark.parametrize(("options", "code", "message"), [
    (("--methods", "sgd"), 2, "bp, checkpoint, glcan"),
    (("--methods", ""), 2, "bp, checkpoint, glcan"),
    (("--steps", 0), 2, "argument --steps: '0'"),
    (("--device", "abacus"), 2, "argument --device: 'abacus'"),
    (("--data", "no/such/folder"), 1, "instances_train.json is missing"),
    (("--out", "setup.py/demo"), 2, "setup.py/demo"),
])
def test_wrong_options(
    options: tuple, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").touch()
    assert call("--out", tmp_path / "out", *options) == code
    assert message in capsys.readouterr().err


def test_exploding_loss_names_the_learning_rate(digits: Path) -> None:
    data = CocoFolder(digits, "train", image_size=64)

    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, images: list, targets: list) -> dict[str, torch.Tensor]:
            return {"loss": self.weight * float("inf")}

    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    recipe = demo._recipe(parser.parse_args([*map(str, SHORT), "--lr", "0.1"]))
    with pytest.raises(DataError, match=r"--lr below"):
        demo_train.train("bp", "BP", Broken(), data, data, recipe)


@pytest.mark.parametrize("installed", [True, False])
def test_partition_files(
    installed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if installed and shutil.which("dot") is None:
        pytest.skip("the program dot of Graphviz is not installed")
    model = torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    plan = glcan_fx.plan(model, k=2, task="super_resolution", example_inputs=torch.empty(2, 3, 8, 8))
    if not installed:
        monkeypatch.setenv("PATH", str(tmp_path))
    files = demo._pictures(plan, tmp_path)
    assert [file.suffix for file in files] == [".dot", ".svg", ".png"][:3 if installed else 1]
    assert all(file.exists() for file in files) and ("apt-get install" in capsys.readouterr().err) == (not installed)
