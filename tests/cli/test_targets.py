"""Models named on the command line: what is found, and what is said where nothing is."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from glcan_fx.errors import LoadError
from glcan_fx.models.load import load
from glcan_fx.presets import PRESETS
from glcan_fx.tasks import make_task

MODELS = """
from __future__ import annotations
import torch
from torch import nn
from torch.nn import Linear          # not of this file: no candidate
from helpers import WIDTH

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.layer = nn.Linear(WIDTH, classes)

class Settings:
    class inner:
        net = nn.Linear(2, 3)

def build(classes=4): return Net(classes)
def wrong(): return 3
def fails(classes=1): raise ValueError("no weights")
def train() -> None: raise RuntimeError("nobody asked")
def main(): raise RuntimeError("nobody asked")
ready = nn.Linear(5, 6)
number = 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "helpers.py").write_text("WIDTH = 7\n")
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "helpers", raising=False)
    return path


def write(folder: Path, text: str) -> str:
    path = folder / "one.py"
    path.write_text(f"import torch\nfrom torch import nn\n{text}")
    return str(path)


@pytest.mark.parametrize(("attribute", "kwargs", "shape"), [
    ("Net", {"classes": 2}, (2, 7)), ("build", {}, (4, 7)), ("build", {"classes": 5}, (5, 7)), ("ready", {}, (6, 5)),
    ("Settings.inner.net", {}, (3, 2)),
])
def test_an_attribute_of_a_file(file, attribute, kwargs, shape):
    model = load(f"{file}:{attribute}", kwargs)
    assert next(model.parameters()).shape == shape


def test_an_attribute_of_a_package(tmp_path, monkeypatch):
    assert isinstance(load("torch.nn:Linear", {"in_features": 2, "out_features": 3}), nn.Linear)
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "nets.py").write_text("from torch import nn\nmodel = nn.Linear(8, 9)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert load("my_package.nets:model", {}).out_features == 9


@pytest.mark.parametrize(("text", "kwargs"), [
    ("model = nn.Linear(1, 2)", {}),
    ("class Net(nn.Linear):\n    def __init__(self): super().__init__(1, 3)\nmodel = nn.Linear(1, 2)", {}),
    ("class Net(nn.Linear):\n    def __init__(self): super().__init__(1, 2)\nclass Other(nn.Module):\n"
     "    def __init__(self, needed): super().__init__()", {}),
    ("def build(out): return nn.Linear(1, out)\ndef helper(image): return image\ndef train() -> None: 1 / 0\n"
     "def count() -> int: return 1\ndef main(): 1 / 0\n", {"out": 2}),
])
def test_a_bare_file_with_one_candidate(tmp_path, text, kwargs):
    assert load(write(tmp_path, text), kwargs).out_features == 2


@pytest.mark.parametrize(("target", "kwargs", "message"), [
    ("{file}", {}, r"4 things in it .*models.py:build, .*models.py:wrong.*"),
    ("{file}:nothing", {}, "there is no 'nothing' in it; it has .*build"),
    ("{file}:Net", {}, "called with no arguments raised TypeError.*classes"),
    ("{file}:Net", {"channels": 1}, "channels=1 raised TypeError"),
    ("{file}:fails", {}, "raised ValueError: no weights"),
    ("{file}:wrong", {}, "returned a int, not a torch.nn.Module"),
    ("{file}:number", {}, "is a int, not a model"),
    ("{file}:ready", {"classes": 2}, "is a model already"),
    ("resnet99", {}, "is not a model"),
    ("retinanet-r5", {}, "Did you mean the preset retinanet-r50"),
    ("resnet50", {}, r"torchvision.models:resnet50 --input 8x3x224x224 --task classification"),
    ("fasterrcnn_resnet50", {}, r"torchvision.models.detection:fasterrcnn_resnet50_fpn --input .* --task detection"),
    ("no.such.package:net", {}, "'no.such.package' cannot be imported: ModuleNotFoundError.*looked for in"),
])
def test_errors_say_what_to_do(file, target, kwargs, message):
    if target == "{file}":  # leave out what fails; of two models none is meant
        file.write_text(MODELS.replace("def fails(classes=1)", "def fails(classes)") + "\nother = nn.Linear(1, 1)\n")
    with pytest.raises(LoadError, match=message):
        load(target.format(file=file), kwargs)


@pytest.mark.parametrize(("text", "message"), [
    ("number = 3", "neither a model in it nor"),
    ("import sys; sys.exit(2)", "SystemExit: 2.*__main__"),
    ("model = nn.Linear(1)", "cannot be imported: TypeError"),
])
def test_files_that_do_not_help(tmp_path, text, message):
    with pytest.raises(LoadError, match=message):
        load(write(tmp_path, text), {})


def test_a_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match="nowhere.py: there is no such file"):
        load("nowhere.py:net", {})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        model = load(preset.target, preset.kwargs)
    make_task(preset.task, None).network(model)
