"""The package as a whole: its names, and what importing it costs."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import glcan_fx


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_is_there() -> None:
    assert set(glcan_fx.__all__) == {*glcan_fx._HOMES, "distributed", "methods"} <= set(dir(glcan_fx))
    for name in glcan_fx.__all__:
        assert getattr(glcan_fx, name) is getattr(glcan_fx, name)
    with pytest.raises(AttributeError, match="module 'glcan_fx' has no attribute 'transfrom'"):
        glcan_fx.transfrom  # noqa: B018


def test_importing_draws_no_random_numbers() -> None:
    out = run("import random, glcan_fx\nrandom.seed(0)\nglcan_fx.transform\nprint(random.random())")
    random.seed(0)
    assert float(out) == random.random()


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--help"], ["bench", "--help"], ["demo", "--help"],
                                       ["inspect", "resnet34", "-k", "none"], ["--version"]])
def test_help_and_usage_errors_load_no_torch(arguments: list[str]) -> None:
    out = run("import sys\nfrom glcan_fx.cli.main import main\n"
              "try: main(sys.argv[1:])\nexcept SystemExit: print('torch' in sys.modules)", *arguments)
    assert out.splitlines()[-1] == "False"


def test_a_compiled_model_from_a_file_is_whole(tmp_path: Path) -> None:
    """Also in a process that imports nothing of the package by itself, and at sizes that take another way."""
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Sequential):\n    def forward(self, x):\n"
        "        return super().forward(x[..., :-1, :-1] if x.shape[-1] % 2 else x)\n")
    layers = ("torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, 1, 1), torch.nn.ReLU(), "
              "torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5)")
    run(f"import sys, torch\nsys.path.insert(0, {str(tmp_path)!r})\nimport glcan_fx, net\n"
        f"local = glcan_fx.transform(net.Net({layers}), k='natural', task='classification', "
        "example_inputs=torch.randn(2, 3, 16, 16))\nassert local.plan.k > 1\n"
        f"torch.save(local, {str(tmp_path / 'local.pt')!r})")
    run(f"import sys, torch\nsys.path.insert(0, {str(tmp_path)!r})\n"
        f"local = torch.load({str(tmp_path / 'local.pt')!r}, weights_only=False).train()\n"
        "for size in (16, 17): local(torch.randn(2, 3, size, size), torch.tensor([0, 1])).loss.backward()")


@pytest.mark.parametrize("place", ["glcan_fx.api.choose", "glcan_fx.api.capture", "glcan_fx.planned.build"])
def test_no_raw_error_leaves_the_compiler(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(place, fails)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.raises(glcan_fx.PlanError, match=r"Sequential cannot be compiled: KeyError: 'x' \(.*test_package") as e:
        glcan_fx.transform(model, task="classification", example_inputs=torch.empty(2, 3, 8, 8))
    assert isinstance(e.value.__cause__, KeyError) and not model.training
