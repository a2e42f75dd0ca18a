"""`glcan-fx inspect`: what it prints and writes, and that it changes nothing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import glcan_fx
from glcan_fx import cli, targets

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels=8):
        super().__init__()
        self.a = nn.Conv2d(3, channels, 3, 2, 1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.c = nn.Conv2d(channels, 16, 3, 2, 1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.a(x)
        if x.shape[-1] > 8:
            x = self.b(x)
        return self.fc(self.c(x).mean((2, 3)))

model = Net()
"""
OPTIONS = ["--input", "4x3x32x32", "--task", "classification"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def test_text(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", f"{file}:model", *OPTIONS]) == 0
    out, notes = capsys.readouterr()
    assert "3 local modules of 3 possible" in out and "backpropagation: " in out and "this plan: " in out
    assert "rung 2 of 5" in notes and "x.shape[-1] > 8" in notes and "model.py" in notes
    rows = [float(number) for number in re.findall(r"^ +\d +[abc] .*?(\d+\.?\d*) k?  +(?:\d+|0) ", out, re.MULTILINE)]
    assert len(rows) == 3


def test_json_and_the_plan_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "out" / "plan.json"
    assert cli.main(["inspect", f"{file}:Net", "--kwargs", '{"channels": 12}', "-k", "2", *OPTIONS, "--json", "-o",
                     str(kept)]) == 0
    text = capsys.readouterr().out
    plan = glcan_fx.Plan.from_json(text)
    assert plan.k == 2 and plan.modules[0].channels == 12 and json.loads(kept.read_text()) == json.loads(text)
    assert cli.main(["inspect", f"{file}:Net", "--kwargs", '{"channels": 12}', "--plan", str(kept), "--json"]) == 0
    assert glcan_fx.Plan.from_json(capsys.readouterr().out) == plan


def test_without_a_task(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", f"{file}:model", "--input", "4x3x32x32"]) == 0
    assert "backpropagation: " in capsys.readouterr().out


def test_pictures(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
                  ) -> None:
    assert cli.main(["inspect", f"{file}:model", *OPTIONS, "-o", str(tmp_path / "plan.dot")]) == 0
    assert (tmp_path / "plan.dot").read_text().startswith("digraph")
    if shutil.which("dot"):
        assert cli.main(["inspect", f"{file}:model", *OPTIONS, "-o", str(tmp_path / "plan.svg")]) == 0
        assert b"<svg" in (tmp_path / "plan.svg").read_bytes()
    monkeypatch.setenv("PATH", "")
    assert cli.main(["inspect", f"{file}:model", *OPTIONS, "-o", str(tmp_path / "plan.png")]) == 2
    assert "apt-get install" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code", "match"), [
    (["{file}:model"], 2, "pass --input"),
    (["{file}:model", *OPTIONS, "-k", "9"], 1, "k=9 local modules are not possible"),
    (["{file}:gone", *OPTIONS], 1, "gone"),
    (["nowhere.py", *OPTIONS], 2, "nowhere.py"),
    (["{file}:model", *OPTIONS, "--memory-budget", "1KiB"], 1, "no plan fits"),
    (["{file}:model", *OPTIONS, "--input-dtype", "float99"], 1, "float99"),
])
def test_errors(file: Path, arguments: list[str], code: int, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", *(argument.format(file=file) for argument in arguments)]) == code
    assert match in capsys.readouterr().err


def test_nothing_is_touched(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = targets.load(f"{file}:model", {}).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    monkeypatch.setattr(targets, "load", lambda *_: model)
    assert cli.main(["inspect", f"{file}:model", *OPTIONS]) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and not model.training
