"""The training programs in examples/: they learn, stop and go on, and every method goes through the same loop."""

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glcan_fx import LocalModel

EXAMPLES = Path(__file__).parents[2] / "examples"
SHARED = Path(__file__).parents[3] / "shared" / "data"
METHODS = ("bp", "checkpoint", "dgl", "glcan")
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not here")


def program(name: str) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def call(name: str, *options: object) -> dict[str, Any]:
    """The record that a program writes, run with these options."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        program(name).main()
    path = said.getvalue().splitlines()[-1].removeprefix("wrote ").partition(": ")[0]
    record: dict[str, Any] = json.loads(Path(path).read_text())
    return record


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of images, 32 x 32: bright above, bright below."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 16)):
        for label in range(2):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(count // 2):
                pixels = random.integers(0, 128, (32, 32, 3), dtype=np.uint8)
                pixels[16 * label:16 * (label + 1)] += 100
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{index}.png")
    return folder


SMALL = ("--epochs", 4, "--batch-size", 8, "--depth", 8, "--threads", 1, "--lr", 0.05)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of a method; a method runs once."""
    @cache
    def train(method: str) -> Path:
        out = tmp_path_factory.mktemp("run")
        call("train_classification", "--data", pictures, *SMALL, "--method", method, "--out", out)
        return out
    return train


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", [
    pytest.param(method, marks=[pytest.mark.slow] * (method in ("checkpoint", "dgl"))) for method in METHODS])
def test_every_method_trains(trained: Callable[[str], Path], method: str) -> None:
    out = trained(method)
    record, lines = json.loads((out / "record.json").read_text()), metrics(out)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4] and lines[-1]["loss"] < lines[0]["loss"]
    assert record["accuracy"] == lines[-1]["accuracy"] > 10 and record["peak_bytes"] > 1e6
    assert record["seconds_a_step"] > 0
    assert (out / "curves.png").stat().st_size > 1000
    assert (out / "plan.html").exists() == (out / "plan.json").exists() == (method in ("dgl", "glcan"))
    kept = torch.load(out / "checkpoint.pt", weights_only=False)
    assert any(key.startswith("aux.") for key in kept["model"]) == (method in ("dgl", "glcan"))


def goes_on(whole: Path, parts: Path, name: str, *options: object) -> None:
    """A run that was stopped behind a checkpoint and is resumed has the numbers and weights of a whole one."""
    def numbers(run: Path) -> list[dict[str, float]]:
        return [{key: value for key, value in line.items() if key != "seconds_a_step"} for line in metrics(run)]

    assert 1 <= len(numbers(parts)) < len(numbers(whole))
    call(name, *options, "--out", parts, "--resume")
    assert numbers(parts) == numbers(whole)
    states = [torch.load(run / "checkpoint.pt", weights_only=False)["model"] for run in (whole, parts)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_stopped_run_goes_on_with_the_same_numbers(
    pictures: Path, trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    state = program("training")._State
    save = state.save

    def save_and_stop(self: Any) -> None:
        save(self)
        raise Stopped

    options = ("train_classification", "--data", pictures, *SMALL, "--method", "glcan")
    monkeypatch.setattr(state, "save", save_and_stop)
    with pytest.raises(Stopped):
        call(*options, "--out", tmp_path)
    monkeypatch.undo()
    goes_on(trained("glcan"), tmp_path, *options)


def goes_on_after_a_kill(folder: Path, name: str, *options: object) -> None:
    """Killed after its first checkpoint, by the system."""
    call(name, *options, "--out", folder / "whole")
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, options), "--out", str(folder / "parts")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        kept = folder / "parts" / "checkpoint.pt"
        deadline = time.monotonic() + 120
        while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    goes_on(folder / "whole", folder / "parts", name, *options)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_numbers(pictures: Path, tmp_path: Path) -> None:
    goes_on_after_a_kill(tmp_path, "train_classification", "--data", pictures, *SMALL, "--method", "bp")


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_detection", "train_super_resolution", "train_segmentation"])
def test_a_killed_run_goes_on_with_every_kind_of_augmentation(tmp_path: Path, name: str) -> None:
    own: dict[str, list[object]] = {
        "train_detection": ["--data", SHARED / "detection" / "bccd", "--size", 96, "--channels", 32, "--limit", 32],
        "train_super_resolution": ["--data", SHARED / "super_resolution" / "T91", "--test",
                                   SHARED / "super_resolution" / "Set5", "--blocks", 2, "--channels", 16, "--limit", 32,
                                   "--each", 1],
        "train_segmentation": ["--data", SHARED / "segmentation" / "camvid", "--limit", 32, "--size", 64, 96,
                               "--width", 8]}
    goes_on_after_a_kill(tmp_path, name, *own[name], "--epochs", 3, "--batch-size", 8, "--threads", 1)


LEARNS: dict[str, tuple[list[object], str, float]] = {  # options, score, floor; chance or bicubic in the comment
    "train_classification": (["--data", SHARED / "classification" / "cifar10", "--limit", 5120, "--epochs", 6,
                              "--batch-size", 64, "--lr", 0.1, "--evaluate-every", 3], "accuracy", 36),  # 10
    "train_super_resolution": (["--data", SHARED / "super_resolution" / "T91", "--test",
                                SHARED / "super_resolution" / "Set5", "--blocks", 4, "--channels", 16, "--epochs", 20,
                                "--lr", 2e-3], "PSNR Set5", 34.0),  # 33.67
    "train_segmentation": (["--data", SHARED / "segmentation" / "camvid", "--size", 80, 112, "--epochs", 6],
                           "pixel accuracy", 45),  # the largest class: 32
    "train_detection": (["--data", SHARED / "detection" / "bccd", "--size", 128, "--channels", 64, "--epochs", 12,
                         "--lr", 2e-3, "--evaluate-every", 6], "AP50", 0.2),  # 0
}


@real
@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNS)
def test_glcan_learns_real_data_in_two_minutes(tmp_path: Path, name: str) -> None:
    options, score, floor = LEARNS[name]
    record = call(name, *options, "--method", "glcan", "--k", "natural", "--threads", 1, "--out", tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]
    assert record[score] > floor


def refused(*options: object) -> str:
    """What a program says that does not begin."""
    with pytest.raises(SystemExit) as end:
        call("train_classification", *options)
    return str(end.value)


@pytest.mark.slow
def test_a_stopped_run_says_how_to_go_on_and_is_prolonged(pictures: Path, tmp_path: Path) -> None:
    """Ctrl-C in the second epoch; other options are refused, and leave what is there; more epochs are not."""
    out = tmp_path / "run"
    options = ["--data", pictures, *SMALL, "--method", "glcan", "-k", "2", "-o", out]
    command = [sys.executable, str(EXAMPLES / "train_classification.py"), *map(str, options), "--epochs", "40"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if line.startswith("epoch 1:"):
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130 and "2 local modules" in said and "with SGD, simulated" in said
    assert "checkpoint.pt (weights, auxiliary networks, optimizer)" in said
    assert "Resume with:" in said and said.rstrip().endswith("--epochs 40 --resume")
    step = torch.load(out / "checkpoint.pt", weights_only=False)["step"]
    assert f"stopped at step {step} of 240" in said and step >= 6

    plan = (out / "plan.json").read_bytes()
    assert "--overwrite" in refused(*options, "--epochs", 40)
    assert "seed: 0 then, 1 now" in refused(*options, "--epochs", 40, "--seed", 1, "--resume")
    assert "epochs: 40.0 then, 2.0 now" in refused(*options, "--epochs", 2, "--resume")
    assert (out / "plan.json").read_bytes() == plan and (out / "metrics.jsonl").exists()
    record = call("train_classification", *options, "--epochs", 41, "--resume", "--evaluate-every", 40)
    assert record["epoch"] == 41 and record["epochs"] == 41


def on_two_processes(script: Path, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", script, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=script.parent)


@pytest.mark.slow
def test_two_processes_train_and_go_on(pictures: Path, tmp_path: Path) -> None:
    options = ["--data", pictures, *SMALL, "--method", "glcan", "-k", "2", "-o", tmp_path / "run"]
    for more in ([], ["--resume", "--epochs", 5]):
        done = on_two_processes(EXAMPLES / "train_classification.py", *options, *more)
        assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["processes"] == 2 and record["epoch"] == 5 and record["accuracy"] > 10


@pytest.mark.slow
def test_a_pipeline_of_two_processes_trains_and_goes_on(pictures: Path, tmp_path: Path) -> None:
    """With the numbers of a run that was not stopped; what is saved is a whole model."""
    whole, stops = EXAMPLES / "train_classification.py", tmp_path / "stops.py"  # behind its first checkpoint
    stops.write_text(f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\nimport train_classification, training\n"
                     "save = training._State.save\ntraining._State.save = lambda self: (save(self), exit(3))\n"
                     "train_classification.main()\n")
    options = ["--data", pictures, *SMALL, "--method", "glcan", "-k", "2", "--pipeline", 2, "--micro-batches", 2]
    for out, script, more in (("straight", whole, ()), ("stopped", stops, ()), ("stopped", whole, ("--resume",))):
        done = on_two_processes(script, *options, "-o", tmp_path / out, *more)
        assert (done.returncode == 0) == (script == whole), done.stderr
    found = {}
    for out in ("straight", "stopped"):
        content = torch.load(tmp_path / out / "checkpoint.pt", weights_only=False)
        found[out] = content["model"]
        record = json.loads((tmp_path / out / "record.json").read_text())
        assert record["processes"] == 2 and record["epoch"] == 4 and record["accuracy"] > 60
        assert [path.name for path in (tmp_path / out).glob("optimizer-*")] == [f"optimizer-{content['step']}"]
    assert found["straight"].keys() == found["stopped"].keys()
    assert all(torch.equal(found["straight"][key], found["stopped"][key]) for key in found["straight"])


def test_evaluation_runs_no_auxiliary_network_and_all_of_them_learn(pictures: Path, tmp_path: Path) -> None:
    training, classification = program("training"), program("train_classification")
    pixels, labels = classification.read(pictures, train=True)
    data = classification.Images(pixels, labels, classification.v2.ToDtype(torch.float32, scale=True))
    called: list[str] = []
    before: dict[int, torch.Tensor] = {}
    models: list[LocalModel] = []

    def evaluate(model: LocalModel, device: torch.device) -> dict[str, float]:
        handles = [part.register_forward_pre_hook(lambda part, _, name=name: called.append(name))
                   for name, part in model.aux.named_modules()]
        model(torch.zeros(2, 3, 32, 32))
        for handle in handles:
            handle.remove()
        models.append(model)
        return {"quality": 1.0}

    def optimizer(groups: Any, lr: float) -> torch.optim.Optimizer:
        trained = [p for group in groups for p in group["params"]]
        before.update({id(p): p.detach().clone() for p in trained})
        return torch.optim.SGD(groups, lr)

    parser = training.argparse.ArgumentParser()
    training.add_arguments(parser, epochs=1, batch_size=8, lr=0.05)
    args = parser.parse_args(["--data", str(pictures), "--out", str(tmp_path / "run")])
    training.run(training.Experiment(
        "classification", lambda: classification.CifarResNet(8, 2), (8, 3, 32, 32), data, evaluate, optimizer), args)
    assert models and not called
    trained = [p for p in models[0].parameters() if p.requires_grad]
    assert before.keys() >= {id(p) for p in trained} and not any(  # a plan's simulated steps made optimizers, too
        torch.equal(p, before[id(p)]) for p in trained)


@pytest.mark.slow
def test_cosines_between_local_and_backpropagated_gradients(pictures: Path, tmp_path: Path) -> None:
    """The last module's gradient is backpropagation's; looking changes nothing of the run."""
    out = tmp_path / "run"
    options = ["--data", pictures, *SMALL, "--method", "glcan", "--aux-lr", 2]
    plain = call("train_classification", *options, "--out", tmp_path / "plain")
    record = call("train_classification", *options, "--cosines", "--out", out)
    names = [module["name"] for module in json.loads((out / "plan.json").read_text())["modules"]]
    assert list(record["cosines"]) == names and record["cosines"][names[-1]] == pytest.approx(1, abs=1e-4)
    assert all(-1 <= value < 0.999 for name, value in record["cosines"].items() if name != names[-1])
    assert record["loss"] == plain["loss"] and record["accuracy"] == plain["accuracy"]


def test_psnr_and_ssim_are_the_field_s(tmp_path: Path) -> None:
    """On an image and a copy that is brighter by 10 of 255: known in closed form."""
    sr = program("train_super_resolution")
    base = torch.full((3, 24, 24), 100 / 255)
    image = Image.fromarray(np.full((24, 24, 3), 110, np.uint8))
    difference = 10 / 255 * (65.481 + 128.553 + 24.966)
    psnr, ssim = sr.compare(base, image, 2)
    assert psnr == pytest.approx(10 * np.log10(255**2 / difference**2), abs=1e-3)
    a, b = sr.luma(base)[0, 0].item(), sr.luma(base)[0, 0].item() + difference
    assert ssim == pytest.approx((2 * a * b + (0.01 * 255) ** 2) / (a**2 + b**2 + (0.01 * 255) ** 2), abs=1e-4)


@real
@pytest.mark.parametrize(("scale", "published"), [(2, 33.64), (3, 30.39), (4, 28.42)])
def test_bicubic_on_set5_is_the_published_number(scale: int, published: float) -> None:
    sr = program("train_super_resolution")
    pairs = sr.test_pairs(SHARED / "super_resolution" / "Set5", scale)
    values = [sr.compare(sr.bicubic(low, scale), high, scale)[0] for high, low in pairs]
    assert sum(values) / len(values) == pytest.approx(published, abs=0.05)
