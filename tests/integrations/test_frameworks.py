"""The examples of examples/frameworks: with one local module a run is the framework's own, with three it takes less
memory, goes on where it was stopped, and leaves files that the framework reads without glcan_fx."""

import csv
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import glcan_fx
from glcan_fx.peak_memory import PeakMemory

EXAMPLES = Path(__file__).parents[2] / "examples" / "frameworks"
GLUE = {"transformers_trainer": "transformers", "ultralytics_trainer": "ultralytics", "timm_task": "timm",
        "lightning_module": "lightning", "accelerate_loop": "accelerate"}
LOOPS = [("torchvision_loops", task) for task in ("classification", "detection", "segmentation")]
ALL = [*((name, None) for name in GLUE), *LOOPS]
LONG = {"ultralytics_trainer", "lightning_module", "detection", "segmentation"}
BIG = {"transformers_trainer": ("--batch", 128), "ultralytics_trainer": ("--size", 256, "--batch", 8, "--epochs", 2)}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, no settings of the user's, and nothing left in the process."""
    monkeypatch.setenv("YOLO_OFFLINE", "True")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    deterministic, level = torch.are_deterministic_algorithms_enabled(), logging.root.level
    yield
    torch.use_deterministic_algorithms(deterministic)
    logging.root.setLevel(level)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def call(name: str, task: str | None, out: str, *options: Any) -> Any:
        if name in GLUE:
            pytest.importorskip(GLUE[name], reason=f"{GLUE[name]} is not installed: pip install 'glcan-fx[frameworks]'")
        given = [task] if task else ["--out", tmp_path / out]
        monkeypatch.setattr(sys, "argv", [name, *map(str, [*given, *options])])
        return import_module(name).main()
    return call


@contextmanager
def after_the_first_step() -> Iterator[list[PeakMemory]]:
    """Counts what is live from a run's second step on, planning aside: weights, gradients, optimizer, activations."""
    found: list[PeakMemory] = []
    entered = ExitStack()

    def begin(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not found and sum(len(group["params"]) for group in optimizer.param_groups) > 1:  # planning tries one on one
            found.append(entered.enter_context(PeakMemory(optimizer)))

    handle = register_optimizer_step_post_hook(begin)
    try:
        with entered:
            yield found
    finally:
        handle.remove()


def numbers(name: str, result: Any, out: Path) -> list[Any]:
    """What a run logs: losses, and what it evaluates."""
    if name == "transformers_trainer":
        return [[row.get(key) for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy")]
                for row in result.state.log_history]
    if name == "ultralytics_trainer":
        with (out / "run" / "results.csv").open() as file:
            return [[value for key, value in row.items() if key != "time"] for row in csv.DictReader(file)]
    return result.losses if name == "lightning_module" else result[1]


@pytest.mark.parametrize(("name", "task"), [
    pytest.param(*one, marks=[pytest.mark.slow] if LONG & {*one} else []) for one in ALL])
def test_one_local_module_is_the_frameworks_own_run(name: str, task: str | None, run: Any, tmp_path: Path) -> None:
    plain = numbers(name, run(name, task, "plain"), tmp_path / "plain")
    assert len(plain) >= 3
    one = numbers(name, run(name, task, "one", "--k", 1), tmp_path / "one")
    if task == "detection":  # whose losses from class ids round otherwise, which batch norm of few values magnifies
        assert one[0] == pytest.approx(plain[0], rel=1e-6) and one == pytest.approx(plain, rel=0.02)
    else:
        assert one == plain


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), ALL)
def test_three_local_modules_take_less_memory(name: str, task: str | None, run: Any, tmp_path: Path) -> None:
    big = BIG.get(name, ("--batch", 16, "--size", 96))
    peaks = []
    for k in ((), ("--k", 3)):
        with after_the_first_step() as found:
            run(name, task, f"k{len(k)}", *big, *k)
        peaks.append(found[0].bytes)
    assert peaks[1] < 0.85 * peaks[0], [f"{peak / 2**20:.0f} MiB" for peak in peaks]


def transformers_loads(trainer: Any, out: Path) -> None:
    """The checkpoint is the plain model's, with auxiliary networks beside it."""
    from transformers import ViTForImageClassification

    assert trainer.model.plan.k == 3
    plain = ViTForImageClassification.from_pretrained(out / "checkpoint-10").eval()
    again = glcan_fx.load_pretrained(plain, out / "checkpoint-10")
    assert again.plan == trainer.model.plan
    saved = load_file(out / "checkpoint-10" / "auxiliary.safetensors")
    assert saved and all(torch.equal(value, again.aux.state_dict()[name]) for name, value in saved.items())


@pytest.mark.parametrize(("name", "where", "resume"), [
    ("transformers_trainer", "checkpoint-5", ("--resume", "{}/checkpoint-5")),
    pytest.param("timm_task", "checkpoint-4.pth.tar", ("--resume", "{}/checkpoint-4.pth.tar"), marks=pytest.mark.slow),
    pytest.param("lightning_module", "epoch=0-step=5.ckpt", ("--resume", "{}/epoch=0-step=5.ckpt"),
                 marks=pytest.mark.slow),
    pytest.param("accelerate_loop", "model.safetensors", ("--resume",), marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_same_numbers(
    name: str, where: str, resume: tuple[str, ...], run: Any, tmp_path: Path
) -> None:
    trained = run(name, None, "run", "--k", 3)
    whole = numbers(name, trained, tmp_path / "run")
    assert (tmp_path / "run" / where).exists()
    if name == "transformers_trainer":
        transformers_loads(trained, tmp_path / "run")
    options = [option.format(tmp_path / "run") for option in resume]
    again = numbers(name, run(name, None, "run", "--k", 3, *options), tmp_path / "run")
    assert again[-3:] == whole[-3:]


@pytest.mark.slow
def test_a_detector_of_transformers_trains_in_its_trainer(tmp_path: Path) -> None:
    """YOLOS, whose labels are dicts, and whose loss matches boxes: one local module has the Trainer's numbers."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'glcan-fx[frameworks]'")
    from transformers import Trainer, TrainingArguments, YolosConfig, YolosForObjectDetection

    from glcan_fx.integrations.transformers import trainer

    config = YolosConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
                         image_size=[64, 64], patch_size=16, num_detection_tokens=5, num_labels=3)
    box = torch.tensor([[0.5, 0.5, 0.3, 0.3]])
    data = [{"pixel_values": torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index)),
             "labels": {"class_labels": torch.tensor([index % 3]), "boxes": box}} for index in range(32)]

    def losses(kind: Any, out: str) -> tuple[Any, list[Any]]:
        torch.manual_seed(0)
        made = kind(
            model=YolosForObjectDetection(config), train_dataset=data, eval_dataset=data[:8],
            args=TrainingArguments(str(tmp_path / out), max_steps=10, per_device_train_batch_size=4, logging_steps=1,
                                   eval_strategy="steps", eval_steps=5, eval_do_concat_batches=False, report_to=[],
                                   remove_unused_columns=False, disable_tqdm=True),
            data_collator=lambda items: {"pixel_values": torch.stack([item["pixel_values"] for item in items]),
                                         "labels": [item["labels"] for item in items]})
        made.train()
        return made, [[row.get("loss"), row.get("eval_loss")] for row in made.state.log_history]

    assert losses(Trainer, "plain")[1] == losses(trainer(k=1), "one")[1]
    made, found = losses(trainer(k=3), "three")
    assert made.model.plan.k == 3 and len(found) >= 12
    YolosForObjectDetection.from_pretrained(tmp_path / "three" / "checkpoint-10")


def test_timm_loads_the_plain_model(run: Any, tmp_path: Path) -> None:
    task, _ = run("timm_task", None, "run", "--k", 3)
    import timm

    plain = timm.create_model("mobilenetv2_100", num_classes=4, checkpoint_path=str(tmp_path / "run" / "last.pth.tar"))
    averaged = task.get_eval_model(ema=True).module
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain.eval()(x), averaged.eval()(x))


@pytest.mark.slow
def test_ultralytics_validates_exports_and_goes_on_with_the_plain_model(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("ultralytics", reason="ultralytics is not installed: pip install 'glcan-fx[frameworks]'")
    from ultralytics import YOLO

    class Interruption(Exception):
        pass

    def stop(trainer: Any) -> None:
        if trainer.epoch == 1 and len(stopped) == 0:
            stopped.append(load_file(trainer.wdir / "auxiliary.safetensors"))
            raise Interruption

    stopped: list[Any] = []
    train = YOLO.train

    def interrupted(yolo: Any, **options: Any) -> Any:
        yolo.add_callback("on_fit_epoch_end", stop)
        return train(yolo, **options)

    last = tmp_path / "run" / "run" / "weights" / "last.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(YOLO, "train", interrupted)
        with pytest.raises(Interruption):
            run("ultralytics_trainer", None, "run", "--k", 3)
    assert type(torch.load(last, weights_only=False)["ema"]).__module__ == "ultralytics.nn.tasks"
    before = load_file(last.with_name("auxiliary.safetensors"))
    yolo = run("ultralytics_trainer", None, "run", "--k", 3, "--model", last)
    assert yolo.trainer.local.plan.k == 3 and len(numbers("ultralytics_trainer", yolo, tmp_path / "run")) == 3
    after = load_file(last.with_name("auxiliary.safetensors"))
    moved = [name for name in before if not torch.equal(before[name], after[name]) and before[name].is_floating_point()]
    assert moved

    best = YOLO(last.with_name("best.pt"))
    data = str(tmp_path / "run" / "data" / "data.yaml")
    assert best.val(data=data, imgsz=96, workers=0, plots=False).box.map >= 0
    assert Path(best.export(format="torchscript", imgsz=96)).exists()


def test_ultralytics_refuses_what_would_not_train_by_local_modules(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("ultralytics", reason="ultralytics is not installed: pip install 'glcan-fx[frameworks]'")
    from ultralytics import YOLO

    from glcan_fx.integrations.ultralytics import trainer

    data = str(import_module("ultralytics_trainer").draw(tmp_path / "data"))
    with pytest.raises(glcan_fx.UnsupportedError, match="compile="):
        YOLO("yolo11n.yaml").train(trainer=trainer(k=2), data=data, epochs=1, imgsz=96, workers=0, compile=True)
