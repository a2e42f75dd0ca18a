"""`glcan-fx bench`: methods that do what they say, figures that agree, and rows instead of aborts."""
import argparse
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torchvision.models.resnet import BasicBlock, ResNet

from glcan_fx.bench.job import Job, Skipped, at_batch
from glcan_fx.bench.measured import largest, measured
from glcan_fx.bench.peers import PREPARE, Elsewhere
from glcan_fx.bench.report import footnotes
from glcan_fx.bench.rows import EXACT_COMPUTE, METHODS, Row
from glcan_fx.bench.simulated import estimates
from glcan_fx.cli import arguments
from glcan_fx.cli import main as cli
from glcan_fx.measure import medians
from glcan_fx.peak_memory import PeakMemory
from glcan_fx.simulate.estimate import curve

FILE = '''
import os
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width, inplace=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(width, width, 3,
                                  padding=1))

    def forward(self, x):
        return x + self.body(x)


class Net(nn.Module):
    def __init__(self, inplace=False, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width, inplace) for _ in range(4)))
        self.out = nn.Linear(width, 5)

    def forward(self, x):
        print("a model may print")
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


class Killed(Net):
    def forward(self, x):
        if type(x) is torch.Tensor and x.device.type == "cpu" and not x.is_meta and torch.is_grad_enabled():
            os.kill(os.getpid(), 9)
        return super().forward(x)


class Broken(Net):
    def forward(self, x):
        return x.nonsense
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    return path


def command(tmp_path: Path, *arguments: str) -> tuple[int, dict]:
    """Exit code and the rows by method."""
    path = tmp_path / "bench.json"
    code = cli.main(["bench", *map(str, arguments), "-o", str(path)])
    return code, {row["method"]: row for row in json.loads(path.read_text())["methods"]}


# --------------------------------------------------------------------------------------- the methods


def small() -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, [2, 2, 1, 1], num_classes=4).train()


BLOCKS = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("method", PREPARE)
def test_recomputing_changes_no_gradient_and_keeps_less(method):
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(4, 3, 32, 32))
        return sum(sizes.values())

    plain, other = small(), small()
    PREPARE[method](other, BLOCKS)
    assert kept(other) < kept(plain)
    for expected, found in zip(gradients(small()), gradients(_prepared(method)), strict=True):
        assert torch.equal(expected, found)


def _prepared(method: str) -> nn.Module:
    model = small()
    PREPARE[method](model, BLOCKS)
    return model


class Counted(nn.Module):
    def __init__(self, calls: list[int]) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 3), calls

    def forward(self, x):
        self.calls.append(id(self))
        return self.layer(x).relu()


def test_nested_recomputes_groups_of_sqrt_n_blocks_and_the_blocks_inside():
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(3, 3), *(Counted(calls) for _ in range(9)), nn.Linear(3, 3))
    blocks = [str(index) for index in range(1, 10)]
    order = [id(model.get_submodule(path)) for path in blocks]
    PREPARE["nested"](model, blocks)
    model(torch.randn(2, 3)).sum().backward()
    # a group again, then every block of it but the last, which has just been run, again
    assert [order.index(call) + 1 for call in calls] == [*range(1, 10), 7, 8, 9, 8, 7, 4, 5, 6, 5, 4, 1, 2, 3, 2, 1]


def test_nested_needs_blocks_in_a_row():
    model = nn.Module()
    model.a, model.b = nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))
    with pytest.raises(Skipped, match=r"nn\.Sequential"):
        PREPARE["nested"](model, ["a", "b"])


def test_elsewhere_moves_what_save_on_cpu_moves_and_leaves_no_memory():
    moved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal moved
        moved += tensor.nbytes
        return tensor

    model, x = small(), torch.randn(4, 3, 32, 32)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, fake_x = small(), mode.from_tensor(x)
    with PeakMemory(fake, fake_x) as memory:
        before = memory.live
        elsewhere = Elsewhere()
        with elsewhere:
            loss = fake(fake_x).sum()
        assert memory.live - before < 4096
        loss.backward()
        assert all(p.grad.shape == p.shape for p in fake.parameters())
    assert elsewhere.bytes == moved


def test_at_batch():
    images, labels = torch.arange(12.0).view(3, 4), torch.tensor([5, 6, 7])
    [grown], other = at_batch([images], 3, 5), at_batch(labels, 3, 1)
    assert grown[:, 0].tolist() == [0, 4, 8, 0, 4] and other.tolist() == [5]
    assert other.untyped_storage().nbytes() == labels.element_size()
    boxes = [{"boxes": torch.full((count, 4), float(count))} for count in range(3)]
    assert [len(target["boxes"]) for target in at_batch(boxes, 3, 4)] == [0, 1, 2, 0]
    assert [len(image) for image in at_batch([torch.zeros(1, 8), torch.zeros(1, 8)], 2, 3)] == [1, 1, 1]
    assert [len(part) for part in at_batch([torch.zeros(2, 8), torch.zeros(2, 8)], 2, 3)] == [3, 3]  # two inputs
    assert at_batch({"image": images, "scale": torch.tensor(2.0), "name": "x"}, 3, 1)["image"].shape == (1, 4)
    with FakeTensorMode() as mode:
        views = list(mode.from_tensor(torch.zeros(2, 3, 8, 8)))
    [one] = at_batch(views, 2, 1)
    assert one.untyped_storage().nbytes() == 3 * 8 * 8 * 4  # not the whole batch's


@pytest.mark.parametrize("limit", [0, 1, 5, 8, 9, 100, 1000])
@pytest.mark.parametrize("batch", [1, 8])
def test_largest_batch(limit, batch):
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest(fits, batch, known=batch <= limit)
    assert limit - max(1, limit // 32) < found <= limit or found == limit == 0
    assert len(tried) < 20


def test_steps_are_timed_in_turns_after_a_warm_up():
    called = []

    def step(name: str, seconds: float) -> None:
        called.append(name)
        time.sleep(seconds * (len(called) > 4))

    slow, fast = medians([lambda: step("slow", 0.02), lambda: step("fast", 0)], 3, warm_up=2)
    assert called == ["slow", "fast"] * 5 and fast < 0.02 <= slow


def test_a_curve_has_the_peak_and_is_even_in_bytes():
    live = [10] + [10 + 100 * index for index in range(1, 101)] + [10]
    points = curve(live)
    assert points[0] == 10 and max(points) == points[-2] == max(live) and points[-1] == 10
    assert abs(points.index(max(points)) - len(points) / 2) < 5  # one release of all takes half of the bytes
    assert set(curve([5, 5])) == {5} and set(curve([])) == {0}


def test_seeds_and_learning_rate_leave_a_step_as_it_was(file):
    job = Job(f"{file}:Net", {}, [[2, 3, 16, 16]], task="classification", device="cpu", steps=1)
    first, again = (measured(job, "bp", []) for _ in range(2))
    assert first["measured"] == again["measured"] and first["step_seconds"] > 0


# --------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_estimates_of_all_methods(tmp_path, capfd):
    page = tmp_path / "made" / "bench.html"
    code, rows = command(tmp_path, "tiny", "--device", "estimate", "-o", page)
    out, err = capfd.readouterr()
    assert code == 0
    assert list(rows) == [name for name in METHODS if name != "budget"]
    base = rows["bp"]
    assert rows["exact"]["estimated"] <= min(rows[name]["estimated"] for name in ("checkpoint", "selective"))
    assert rows["exact"]["flops"] <= 1.005 * EXACT_COMPUTE * base["flops"] and "exact" in rows["exact"]["title"]
    for name in ("checkpoint", "nested", "selective", "offload", "accumulate", "exact", "glcan"):
        assert rows[name]["estimated"] < base["estimated"], name
    assert rows["nested"]["flops"] > rows["checkpoint"]["flops"] > 1.1 * base["flops"]
    assert rows["selective"]["flops"] == rows["offload"]["flops"] == rows["accumulate"]["flops"] == base["flops"]
    assert "changes batch statistics" in rows["accumulate"]["notes"][0]
    assert rows["compile"]["estimated"] is None and "only where it runs" in rows["compile"]["reasons"][0]
    assert all(row["measured"] is None for row in rows.values())
    assert sum(base["parts"].values()) == base["estimated"] == max(base["curve"])
    assert max(map(len, out.splitlines())) <= 100 and "\x1b" not in out
    assert "selective checkpoint" in out and "fake tensors" in err
    assert "selective checkpoint" in page.read_text()
    content = json.loads((tmp_path / "bench.json").read_text())
    assert (content["format"], content["version"], content["device"]) == ("glcan_fx.bench", 1, "estimate")
    assert content["versions"]["torch"] == torch.__version__ and content["seed"] == 0


@pytest.mark.slow
def test_measured_is_what_was_estimated(file, tmp_path, capfd):
    code, rows = command(tmp_path, f"{file}:Net", "--input", "8x3x32x32", "--task", "classification", "--device", "cpu",
                         "--steps", "2", "--methods", "selective,accumulate,offload,glcan")
    assert code == 0
    assert list(rows) == ["bp", "selective", "offload", "accumulate", "glcan"]  # bp: what the others are compared with
    for name in ("bp", "selective", "accumulate", "glcan"):
        row = rows[name]
        assert row["measured"] == pytest.approx(row["estimated"], rel=0.02), name
        assert row["images_per_second"] == pytest.approx(8 / row["step_seconds"])
    assert not rows["accumulate"]["notes"]  # no batch statistics
    assert rows["offload"]["measured"] is None and rows["offload"]["estimated"] < rows["bp"]["estimated"]
    out, _ = capfd.readouterr()
    assert max(map(len, out.splitlines())) <= 100


def test_a_method_that_fails_is_a_row(file):
    job = Job(f"{file}:Net", {"inplace": True}, [[8, 3, 32, 32]], task="classification", k=99, memory_budget="1GiB",
              budget_k=99)
    rows = {message["method"]: message for message in estimates(job, ["bp", "selective", "glcan", "budget"])
            if "method" in message}
    assert rows["bp"]["estimated"] and "mutated" in rows["selective"]["reasons"][0]
    assert "99" in rows["glcan"]["reasons"][0] and "99" in rows["budget"]["reasons"][0]
    row = Row("selective", "x", notes=["a note"])
    row.update(rows["selective"])
    assert [line for line in footnotes([row]) if "mutated" in line] and row.peak is None and row.notes == ["a note"]


@pytest.mark.slow
def test_a_memory_budget(file, tmp_path):
    arguments = (f"{file}:Net", "--input", "8x3x64x64", "--device", "estimate", "--methods", "glcan")
    _, rows = command(tmp_path, *arguments, "--memory-budget", "15MiB")
    assert rows["bp"]["estimated"] > 15 * 2**20 >= rows["budget"]["estimated"] > rows["glcan"]["estimated"]
    assert rows["budget"]["k"] < rows["glcan"]["k"]
    code, rows = command(tmp_path, *arguments, "--memory-budget", "1KB")
    assert code == 0 and rows["budget"]["reasons"] and rows["budget"]["estimated"] is None


def test_one_local_module_is_backpropagation_and_json_is_printed_instead_of_the_table(file, tmp_path, capfd):
    _, rows = command(tmp_path, f"{file}:Net", "--input", "8x3x32x32", "--device", "estimate", "--methods", "glcan",
                      "-k", "1", "--json")
    assert rows["glcan"]["estimated"] == pytest.approx(rows["bp"]["estimated"], rel=1e-3)
    assert rows["glcan"]["flops"] == rows["bp"]["flops"]
    assert {row["method"]: row for row in json.loads(capfd.readouterr().out)["methods"]} == rows


@pytest.mark.slow
def test_a_process_that_dies_is_a_row(file, tmp_path):
    code, rows = command(tmp_path, f"{file}:Killed", "--input", "2x3x16x16", "--device", "cpu", "--steps", "1",
                         "--methods", "bp")
    assert code == 0  # there is an estimate
    assert "SIGKILL" in rows["bp"]["reasons"][0] and rows["bp"]["measured"] is None


@pytest.mark.slow
def test_bfloat16(file, tmp_path):
    arguments = (f"{file}:Net", "--input", "8x3x32x32", "--device", "estimate", "--methods", "checkpoint,glcan")
    (_, full), (_, half) = command(tmp_path, *arguments), command(tmp_path, *arguments, "--amp", "bf16")
    assert all(half[name]["estimated"] < 0.8 * full[name]["estimated"] for name in full)


@pytest.mark.slow
def test_a_model_that_cannot_be_used(file, tmp_path, capfd):
    assert command(tmp_path, f"{file}:Broken", "--input", "2x3x16x16", "--device", "estimate")[0] == 1
    assert "nonsense" in capfd.readouterr().out
    assert cli.main(["bench", "nowhere.py", "--input", "2x3", "--device", "estimate"]) == 2
    assert "there is no such file" in capfd.readouterr().err
    assert cli.main(["bench", f"{file}:nothing", "--input", "2x3x16x16", "--device", "estimate"]) == 2
    assert "there is no 'nothing'" in capfd.readouterr().err
    assert cli.main(["bench", "tiny", "--task", "poetry", "--device", "estimate"]) == 1
    assert "unknown task 'poetry'" in capfd.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "name a model"),
    (["nets.py"], "pass --input"),
    (["tiny", "--methods", "budget"], "needs --memory-budget"),
    (["tiny", "--input-dtype", "float33"], "float33"),
    (["tiny", "--methods", "bp,magic"], "choose from bp"),
    (["tiny", "--kwargs", "[1]"], "a JSON object"),
    (["tiny", "--kwargs", "{{"], "not valid JSON"),
    (["tiny", "--input", "8x0"], "is not a shape"),
    (["tiny", "--memory-budget", "6 bananas"], "is not an amount of memory"),
    (["tiny", "-k", "0"], "fewest or natural"),
    (["tiny", "--steps", "0"], "not a positive integer"),
    (["tiny", "--device", "tpu"], "choose cuda"),
    (["tiny", "-o", "plot.txt"], "must end in .json"),
    (["tiny", "-o", "{folder}"], "is a folder"),
    (["tiny", "--device", "cpu", "--largest-batch"], "needs --device cuda"),
    (["resnet18"], "torchvision.models:resnet18 --input 8x3x224x224 --task classification"),
    (["torchvision.models:resnet18", "--input", "3x64x64", "--task", "classification"], "has no batch dimension"),
    pytest.param(["tiny", "--device", "cuda"], "finds no CUDA", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is one")),
])
def test_usage_errors(arguments, message, tmp_path, capfd):
    (tmp_path / "folder.json").mkdir()
    try:
        code = cli.main(["bench", *(text.format(folder=tmp_path / "folder.json") for text in arguments)])
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
    assert message in capfd.readouterr().err


def test_memory_sizes():
    read = arguments.budget_of
    assert [read(text) for text in ("6GiB", "1.5 mib", "least")] == ["6GiB", "1.5 mib", "least"]
    for text in ("6 apples", "512"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not an amount of memory"):
            read(text)


def test_list(capfd):
    assert cli.main(["bench", "--list"]) == 0
    out = capfd.readouterr().out
    assert "retinanet-r152" in out and "51" in out and all(name in out for name in METHODS)
    assert max(map(len, out.splitlines())) <= 100
