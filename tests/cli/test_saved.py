"""`glcan-fx export` and `glcan-fx check`."""

import argparse
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import glcan_fx
from glcan_fx.cli import main as cli


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
                                      for channels in (3, 8, 8)))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


@pytest.fixture(scope="module")
def local():
    return glcan_fx.transform(Net(), k=2, criterion=F.cross_entropy, example_inputs=torch.empty(4, 3, 32, 32))


@pytest.mark.parametrize("output", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize("content", [
    lambda local: local.state_dict(),
    lambda local: {"model": local.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 3},
    lambda local: {"state_dict": nn.DataParallel(local).state_dict()}], ids=["bare", "in a dict", "wrapped"])
def test_any_checkpoint_is_exported(local, content, output, tmp_path, capfd):
    torch.save(content(local), tmp_path / "checkpoint.pth.tar")
    assert cli.main(["export", str(tmp_path / "checkpoint.pth.tar"), "-o", str(tmp_path / output)]) == 0
    assert "tensors of Net, which was trained in 2 local modules" in capfd.readouterr().err
    read = load_file if output.endswith("safetensors") else torch.load
    plain = Net()
    plain.load_state_dict(read(tmp_path / output))
    assert all(torch.equal(value, local.state_dict()[name]) for name, value in plain.state_dict().items())


def test_safetensors_are_exported(local, tmp_path):
    save_file(local.state_dict(), tmp_path / "all.safetensors")
    assert cli.main(["export", str(tmp_path / "all.safetensors"), "-o", str(tmp_path / "model.pt")]) == 0
    Net().load_state_dict(torch.load(tmp_path / "model.pt"))


def test_of_two_state_dicts_one_is_chosen(local, tmp_path, capfd):
    averaged = {name: value + 1 if value.is_floating_point() else value for name, value in local.state_dict().items()}
    torch.save({"state_dict": local.state_dict(), "ema": {"module": averaged}}, tmp_path / "both.pt")
    assert cli.main(["export", str(tmp_path / "both.pt"), "-o", str(tmp_path / "model.pt")]) == 2
    assert "--entry state_dict, --entry ema.module" in capfd.readouterr().err
    assert not (tmp_path / "model.pt").exists()
    options = ["-o", str(tmp_path / "model.pt"), "--entry", "ema.module"]
    assert cli.main(["export", str(tmp_path / "both.pt"), *options]) == 0
    assert torch.equal(torch.load(tmp_path / "model.pt")["head.bias"], local.state_dict()["head.bias"] + 1)


def test_a_plain_models_state_dict_is_exported_too(tmp_path, capfd):
    """So that a script may go over runs with any k."""
    local = glcan_fx.transform(Net(), k=1, criterion=F.cross_entropy, example_inputs=torch.empty(4, 3, 32, 32))
    torch.save({"model": local.state_dict(), "optimizer": torch.optim.SGD(local.parameters()).state_dict()},
               tmp_path / "one.pt")
    for entry in ([], ["--entry", "model"]):
        assert cli.main(["export", str(tmp_path / "one.pt"), "-o", str(tmp_path / "model.pt"), *entry]) == 0
        Net().load_state_dict(torch.load(tmp_path / "model.pt"))


def test_an_average_is_exported_though_its_plan_is_gone(local, tmp_path, capfd):
    averaged = AveragedModel(local, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        averaged.update_parameters(local)
    torch.save(averaged.state_dict(), tmp_path / "ema.pt")
    assert cli.main(["export", str(tmp_path / "ema.pt"), "-o", str(tmp_path / "model.pt")]) == 0
    assert "wrote" in capfd.readouterr().err
    Net().load_state_dict(torch.load(tmp_path / "model.pt"))


def test_what_cannot_be_exported(local, tmp_path, capfd):
    torch.save({"model": local.state_dict(), "object": Net()}, tmp_path / "objects.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for file, output, code, said in [("none.pt", "a.pt", 1, "there is no state dict in it"),
                                     (".", "a.pt", 2, "a folder"),
                                     ("nowhere.pt", "a.pt", 2, "no such file"), ("none.pt", "a.txt", 2, "must end in"),
                                     ("objects.pt", "a.pt", 2, "--unsafe")]:
        try:
            found = cli.main(["export", str(tmp_path / file), "-o", str(tmp_path / output)])
        except SystemExit as end:  # argparse's
            found = end.code
        assert found == code
        assert said in capfd.readouterr().err
    assert cli.main(["export", str(tmp_path / "objects.pt"), "-o", str(tmp_path / "a.pt"), "--unsafe"]) == 0


@pytest.fixture
def folder(tmp_path):
    """Two images a split; the second category is only in training."""
    (tmp_path / "images").mkdir()
    for name in ("a", "b", "c", "d"):
        Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for split, names, kinds in (("train", "ab", (1, 2)), ("val", "cd", (1, 1))):
        content = {"categories": categories, "images": [
            {"id": index, "file_name": f"{name}.png", "width": 40, "height": 30} for index, name in enumerate(names)],
            "annotations": [{"id": index, "image_id": index, "category_id": kind, "bbox": [1, 1, 10, 10 * (index + 1)]}
                            for index, kind in enumerate(kinds)]}
        (tmp_path / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


def test_a_data_set_is_summed_up(folder, capfd):
    assert cli.main(["check", str(folder)]) == 0
    out = capfd.readouterr().out
    assert "train: 2 images, 2 boxes of 2 classes (cat 1, dog 1)" in out and "val: 2 images, 2 boxes of 1 class" in out
    assert "images 40 x 30, 40 x 30, 40 x 30; boxes, root of area, 10, 14, 14 pixels" in out
    assert "only in train: dog" in out


@pytest.mark.parametrize(("kind", "without_decoding"), [("JPEG", 0), ("PNG", 1)])
def test_images_that_cannot_be_decoded_are_named(folder, capfd, kind, without_decoding):
    path = folder / "images" / "c.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8)).save(path, kind)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    assert cli.main(["check", str(folder), "--no-images"]) == without_decoding  # a PNG's orientation is at its end
    assert cli.main(["check", str(folder)]) == 1
    assert "c.png" in capfd.readouterr().err
