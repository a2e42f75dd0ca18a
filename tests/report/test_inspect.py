"""`glcan-fx inspect` and what a plan shows of itself: what is printed and written, and that nothing is changed.

`GOLDEN=write pytest tests/report/test_inspect.py -k golden` writes the texts in golden/ anew; read the difference.
"""

import html
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from rich.console import Console
from test_invariants import UNet
from torch import Tensor, nn

import glcan_fx
from glcan_fx import PlanError, PlannedModel, UnsupportedError
from glcan_fx.cli import main as cli
from glcan_fx.models import edsr, retinanet, yolo
from glcan_fx.models import load as targets
from glcan_fx.peak_memory import PeakMemory
from glcan_fx.plans.plan import Plan
from glcan_fx.report.table import print_plan

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


@pytest.mark.parametrize("task", [OPTIONS[2:], []])
def test_text(file: Path, task: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", f"{file}:model", "-k", "natural", *OPTIONS[:2], *task]) == 0
    out, notes = capsys.readouterr()
    assert "3 local modules of 3 possible" in out and "backpropagation: " in out and "this plan: " in out
    assert "rung 2 of 5" in notes and "x.shape[-1] > 8" in notes and "model.py" in notes
    assert [row[1] for row in rows_of(out)[:-1]] == ["a", "b", "c"] and not out.count("\x1b")


def test_json_and_the_plan_file(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "out" / "plan.json"
    assert cli.main(["inspect", f"{file}:Net", "--kwargs", '{"channels": 12}', "-k", "2", *OPTIONS, "--json", "-o",
                     str(kept)]) == 0
    text = capsys.readouterr().out
    plan = glcan_fx.Plan.from_json(text)
    assert plan.k == 2 and plan.modules[0].channels == 12 and json.loads(kept.read_text()) == json.loads(text)
    assert cli.main(["inspect", f"{file}:Net", "--kwargs", '{"channels": 12}', "--plan", str(kept), "--json"]) == 0
    assert glcan_fx.Plan.from_json(capsys.readouterr().out) == plan


def test_written_files(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begins = {".dot": b"digraph", ".html": b"<!doctype html>", ".json": b"{", ".txt": b"Net, task classification"}
    if shutil.which("dot"):
        begins |= {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF"}
    paths = {ending: tmp_path / "new" / f"plan{ending}" for ending in begins}
    assert cli.main(["inspect", f"{file}:model", *OPTIONS, *(f"-o{path}" for path in paths.values())]) == 0
    said = capsys.readouterr().err
    for ending, begin in begins.items():
        assert paths[ending].read_bytes().lower().startswith(begin.lower()) and str(paths[ending]) in said


def test_without_graphviz(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert cli.main(["inspect", f"{file}:model", *OPTIONS, "-o", str(tmp_path / "plan.png")]) == 2
    assert "apt-get install" in capsys.readouterr().err
    plan = small_plan()
    plan.save(tmp_path / "plan.html")
    with pytest.raises(UnsupportedError, match="apt-get install"):
        plan.save(tmp_path / "plan.svg")
    with pytest.raises(PlanError, match=r"plan\.gif.*\.html"):
        plan.save(tmp_path / "plan.gif")
    assert [path.name for path in tmp_path.glob("plan.*")] == ["plan.html"]
    assert "plan.save('plan.html')" in plan._repr_html_()


def test_other_methods_are_said_and_drawn(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "plan.dot"
    command = ["inspect", f"{file}:model", *OPTIONS, "-k", "natural", "-o", str(made)]
    assert cli.main([*command, "--method", "man+dgl", "--window", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "MAN: next block, learned + averaged" in said and "windows of 2 local modules" in said
    assert "MAN: next block" in made.read_text() and "loss 1 back" in made.read_text()
    assert cli.main([*command, "--ahead", "1"]) == 0
    assert "after" in capsys.readouterr().out and "behind the next block" not in made.read_text()
    assert cli.main([*command, "--method", "mna"]) == 1
    assert "choose one of" in capsys.readouterr().err


def test_colours_are_for_terminals(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
                                   ) -> None:
    coloured = r"\x1b\[(?:\d+;)*3\d(?:;\d+)*m"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    assert cli.main(["inspect", f"{file}:model", *OPTIONS]) == 0
    assert re.search(coloured, capsys.readouterr().out)
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["inspect", f"{file}:model", *OPTIONS]) == 0
    assert not re.search(coloured, capsys.readouterr().out)


def test_terminals_that_know_ascii_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert cli.main(["inspect", f"{file}:model", "-k", "natural", *OPTIONS]) == 0
    sys.stdout.flush()
    assert b"3 local modules of 3 possible" in shown.getvalue() and b"?4" in shown.getvalue()  # instead of an arrow


def test_a_reader_who_has_seen_enough(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["inspect", f"{file}:model", *OPTIONS]) == 0


def test_a_failing_model_shows_what_was_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.py"
    path.write_text(MODEL.replace("nn.Conv2d(channels, 16, 3, 2, 1)", "nn.Conv2d(7, 16, 3, 2, 1)"))
    assert cli.main(["inspect", f"{path}:model", *OPTIONS]) == 1
    out, err = capsys.readouterr()
    reached = [line.split() for line in err.splitlines() if " Conv2d " in line and "module '" not in line]
    assert not out
    assert reached == [["a", "Conv2d", "4x8x16x16"], ["b", "Conv2d", "4x8x16x16"]]
    assert "module 'c'" in err and "7 channels" in err


@pytest.mark.parametrize(("arguments", "code", "match"), [
    (["{file}:model"], 2, "pass --input"),
    (["{file}:model", *OPTIONS, "-k", "9"], 1, "k=9 local modules are not possible"),
    (["{file}:gone", *OPTIONS], 2, "gone"),
    (["nowhere.py", *OPTIONS], 2, "nowhere.py"),
    (["{file}:model", *OPTIONS, "--memory-budget", "1KiB"], 1, "no plan fits"),
    (["{file}:model", *OPTIONS, "--input-dtype", "float99"], 2, "float99"),
    (["{file}:model", *OPTIONS, "-o", "plan.gif"], 2, ".html"),
])
def test_errors(file: Path, arguments: list[str], code: int, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        found = cli.main(["inspect", *(argument.format(file=file) for argument in arguments)])
    except SystemExit as error:  # argparse's
        found = error.code
    assert found == code
    assert match in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".html", ".json"])
def test_nothing_is_touched(file: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(targets.load(f"{file}:model", {}), nn.BatchNorm1d(10)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    versions = [value._version for value in model.state_dict().values()]
    own = torch.get_rng_state(), random.getstate()
    monkeypatch.setattr(targets, "load", lambda *_: model)
    assert cli.main(["inspect", f"{file}:model", *OPTIONS, "-o", str(tmp_path / f"plan{ending}")]) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert versions == [value._version for value in model.state_dict().values()]
    assert torch.equal(torch.get_rng_state(), own[0]) and random.getstate() == own[1]
    assert not any(part.training for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------- what a plan shows


@cache
def small_plan(k: int | str = "natural") -> PlannedModel:
    return glcan_fx.plan(torchvision.models.resnet18(num_classes=10), k=k, task="classification",
                         example_inputs=torch.empty(2, 3, 64, 64)).simulated()


def shown(
    model: Callable[[], nn.Module], size: tuple[int, ...], task: str, **options: object
) -> Callable[[], PlannedModel]:
    options = {"k": "natural", **options}
    example = torch.empty(size, device="meta")
    return cache(lambda: glcan_fx.plan(model(), task=task, example_inputs=example, **options).simulated())


PLANS = {
    "resnet18": shown(torchvision.models.resnet18, (8, 3, 224, 224), "classification"),
    "mobilenet_v3_small": shown(torchvision.models.mobilenet_v3_small, (8, 3, 224, 224), "classification", k=5),
    "swin_t": shown(torchvision.models.swin_t, (4, 3, 224, 224), "classification", k=4),
    "lraspp": shown(lambda: torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None),
                    (4, 3, 128, 128), "segmentation", k=4),
    "unet": shown(UNet, (4, 3, 64, 64), "segmentation"),
    "edsr": shown(edsr, (16, 3, 48, 48), "super_resolution"),
    "retinanet-r18": shown(lambda: retinanet(18, num_classes=21), (4, 3, 320, 320), "detection"),
    "yolo-r34": shown(lambda: yolo(34, num_classes=20), (4, 3, 320, 320), "detection", k=6),
}


SLOW = ("swin_t", "lraspp", "mobilenet_v3_small", "yolo-r34")


def rows_of(text: str) -> list[list[str]]:
    """The cells of the printed table, the total last; lines of wrapped cells are left out."""
    table = [re.split(r"  +", line.strip()) for line in text.split("─\n", 1)[1].partition("\n\nSaved")[0].splitlines()]
    return [cells for cells in table if cells[0].isdecimal() or cells[0] == "total"]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PLANS])
def test_golden_text_and_its_totals(name: str) -> None:
    plan = PLANS[name]()
    text = f"{plan}\n"
    golden = Path(__file__).parent / "golden" / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")

    *rows, total = rows_of(text)
    assert len(rows) == plan.k and [int(row[0]) for row in rows] == list(range(plan.k))
    numbers = [row[4:7] if row[2].lstrip("▼").isdecimal() and row[3].isdecimal() else row[3:6] for row in rows]
    for column, printed in enumerate(total[1:4]):  # blocks, parameters, auxiliary
        assert sum(int(row[column].replace(",", "")) for row in numbers) == int(printed.replace(",", ""))
    kept = [re.search(r"([\d.]+) \+ ([\d.]+)  .*?([\d.]+) %", "  ".join(row)) for row in (*rows, total)]
    for group in (1, 2, 3):
        *parts, whole = [float(found[group]) for found in kept if found]
        assert len(parts) == plan.k and sum(parts) == pytest.approx(whole, abs=0.05 * (plan.k + 1))


def test_totals_are_the_model_s() -> None:
    class Shared(nn.Module):
        """One convolution used by both blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 2, 1)
            self.first, self.second = (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(2))
            self.second[0].weight = self.first[0].weight
            self.head = nn.Linear(8, 4)
            self.unused = nn.Parameter(torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(self.stem(x))).mean((2, 3)))

    shared = glcan_fx.plan(Shared(), k="natural", task="classification", example_inputs=torch.empty(2, 3, 64, 64))
    for plan in (shared, small_plan()):
        model = plan.captured.model
        assert sum(module.parameters for module in plan.modules) == sum(p.numel() for p in model.parameters())
        assert sum(map(plan.memory.plan.share, range(plan.k))) == pytest.approx(1)
        assert all(sum(block.saved for block in module.blocks) <= module.saved for module in plan.modules)


@pytest.mark.skipif(shutil.which("dot") is None, reason="the program dot of Graphviz is not installed")
@pytest.mark.parametrize("depth", [None, "stages", "modules", "blocks", "operators"])
@pytest.mark.parametrize("name", ["retinanet-r18", "unet", "edsr"])
def test_the_picture_has_every_module(name: str, depth: str | None) -> None:
    plan = PLANS[name]()
    drawn = subprocess.run(["dot", "-Tsvg"], input=plan.to_dot(depth), capture_output=True, text=True, check=True)
    assert not drawn.stderr
    ids = [html.unescape(i) for i in re.findall(r'<g id="([^"]+)" class="(?:node|cluster)"', drawn.stdout)]
    spans = [list(map(int, found[1].split("-"))) for i in ids if (found := re.fullmatch(r"module-(\d+(?:-\d+)?)", i))]
    modules = [index for start, *stop in spans for index in range(start, (stop or [start])[0] + 1)]
    assert sorted(modules) == list(range(plan.k)) and (depth != "modules" or len(spans) == plan.k)
    assert len([i for i in ids if i.startswith("aux-")]) == len(spans) - 1
    if depth == "stages" and name == "edsr":
        assert len(spans) == 3
    texts = re.sub(r"<[^>]+>", " ", drawn.stdout)
    if depth == "blocks":
        assert all(block.name.rpartition(".")[2] in texts for module in plan.modules for block in module.blocks)
    if depth == "operators":
        assert len([i for i in ids if "-op-" in i]) > 2 * plan.k


def test_the_cache_in_the_picture() -> None:
    """The U-Net's skips: written by the module that makes them, held until the last reader, read by both."""
    dot = PLANS["unet"]().to_dot()
    assert "a0 -> c1" in dot and "a1 -> c2" in dot and "c1 -> c2" in dot
    held = {node: re.findall(r'POINT-SIZE="10">(\w+)<', line) for line in dot.splitlines()
            if (node := line.split()[0]) in ("c0", "c1", "c2") and "TABLE" in line}
    assert held == {"c1": ["enc1"], "c2": ["enc1", "enc2"]}


def data_of(page: str) -> dict[str, object]:
    return json.loads(page.split('id="data">', 1)[1].split("</script", 1)[0])


def test_the_report_s_contents() -> None:
    plan = small_plan(4)
    data = data_of(plan.to_html())
    assert [graph["label"] for graph in data["graphs"]] == ["local modules", "blocks"]  # no two are alike
    assert data["table"]["rows"][1][1] in str(plan) and len(data["table"]["totals"]) == len(data["table"]["columns"])
    for index, module in enumerate(data["modules"]):
        assert module["code"].startswith(f"# local module {index}: ") and "= None" not in module["code"]
        assert (module["aux_code"] is None) == (index == 3) and (index == 3 or "def forward" in module["aux_code"])
    steps = {step["name"]: step for step in data["memory"]["steps"]}
    assert list(steps) == ["backpropagation", "activation checkpointing, every block", "this plan"]
    for step in steps.values():
        assert max(step["live"]) == step["peak"] == sum(part[1] for part in step["parts"])
        assert [start for _, start in step["phases"]] == sorted(start for _, start in step["phases"])
    assert any("rung 1" in line for line in data["report"])
    assert [g["label"] for g in data_of(plan.to_html("operators"))["graphs"]][0] == "operators"
    with pytest.raises(PlanError, match="'stages', 'modules', 'blocks', 'operators'"):
        plan.to_dot("everything")


def test_a_notebook_shows_it() -> None:
    plan = small_plan(4)
    text = plan._repr_html_()
    assert text.count("<tr>") == 6 and f"{sum(m.parameters for m in plan.modules):,}" in text
    assert "<script" not in text and "backpropagation: " in text


# ---------------------------------------------------------------------------------------------- found by review


def test_numbers_are_never_cut_off(file: Path) -> None:
    """Long module paths, and a terminal of 80 columns."""

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_model_of_the_first_kind = nn.ModuleDict({
                f"feature_extractor_stage_number_{i}": nn.Sequential(
                    nn.Conv2d(3 if i == 0 else 64, 64, 3, 1 + i % 2, 1), nn.ReLU()) for i in range(5)})

        def forward(self, x: Tensor) -> Tensor:
            for part in self.vision_model_of_the_first_kind.values():
                x = part(x)
            return x.mean((2, 3))

    plan = glcan_fx.plan(Long(), k=3, task="classification", example_inputs=torch.empty(2, 3, 32, 32))
    text = str(plan)
    for module in plan.modules:
        assert f" {module.parameters:,} " in text and f" {module.aux_parameters:,} " in text


@pytest.mark.parametrize(("width", "count"), [(60, 4), (80, 3), (140, 0)])
def test_a_narrow_terminal_shows_fewer_columns(width: int, count: int) -> None:
    """And says which are left out."""
    console, plan = Console(file=io.StringIO(), width=width), small_plan()
    print_plan(plan.plan, plan.memory, console)
    text = console.file.getvalue()
    title = next(line for line in text.splitlines() if "local module " in line)
    assert "saved" in title and "features" in title and "100.0 %" in text
    left_out = [name for name in ("channels", "blocks", "parameters", "auxiliary") if name not in title]
    assert len(left_out) == count
    assert (f"A wider terminal also shows {', '.join(left_out)}." in " ".join(text.split())) == bool(left_out)
    assert width == 60 or max(map(len, text.splitlines())) <= width


def test_an_edited_plan_shows_the_model_s_figures() -> None:
    plan = small_plan(4)
    model = plan.captured.model
    data = json.loads(plan.to_json())
    del data["modules"][1]
    applied = glcan_fx.plan(model, plan=Plan.from_json(json.dumps(data)))
    assert sum(module.parameters for module in applied.modules) == sum(p.numel() for p in model.parameters())
    assert [b.name for m in applied.modules for b in m.blocks] == [b.name for m in plan.modules for b in m.blocks]
    assert applied.modules[1].parameters == plan.modules[1].parameters + plan.modules[2].parameters
    assert glcan_fx.plan(model, plan=Plan.from_json(plan.to_json())).memory == plan.memory


@pytest.mark.parametrize(("edit", "match"), [
    (lambda data: data["modules"][0]["features"][0].update(source="cache"), "made later"),
    (lambda data: data["modules"][0].pop("cut"), "cut"),
    (lambda data: data["modules"][0].update(cutt="x"), "cutt"),
    (lambda data: data.pop("method"), "method"),
])
def test_plans_that_were_edited_wrongly(edit: Callable[[dict], object], match: str) -> None:
    plan = small_plan(4)
    data = json.loads(plan.to_json())
    edit(data)
    with pytest.raises(PlanError, match=match):
        glcan_fx.plan(plan.captured.model, plan=Plan.from_json(json.dumps(data)))


def test_sizes_are_no_features() -> None:
    """The decoder asks for the size of the image, which every segmentation network does."""

    class Net(UNet):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.interpolate(super().forward(x), size=x.shape[-2:])

    plan = glcan_fx.plan(Net(), k="natural", task="segmentation", example_inputs=torch.empty(4, 3, 64, 64))
    assert not [feature for module in plan.modules for feature in module.features if feature.tap in ("x", "input")]
    glcan_fx.transform(Net(), plan=plan)


def test_what_is_kept_is_what_a_real_step_keeps() -> None:
    """Live memory when a module's backward begins, on real tensors, counted by hooks."""
    plan = small_plan(4)
    x, y = torch.randn(2, 3, 64, 64), torch.randint(10, (2,))
    local = plan.build(verify=False).train()
    live: list[int] = []
    with PeakMemory(local, x) as memory:
        local.aux.get_submodule("0.backward").register_forward_pre_hook(lambda *_: live.append(memory.live))
        start = memory.live
        local(x, y)
    assert live[0] - start == pytest.approx(sum(plan.memory.plan.kept[0]), rel=0.02)


def test_modules_drawn_as_one_are_alike() -> None:
    plan = PLANS["edsr"]()
    rows = re.findall(r'id="module-(\d+)-(\d+)"', plan.to_dot("stages"))
    for start, stop in rows:
        alike = plan.modules[int(start):int(stop) + 1]
        kept = plan.memory.plan.kept[int(start):int(stop) + 1]
        assert len({(m.parameters, m.aux_parameters, m.shape, m.features) for m in alike}) == len(set(kept)) == 1


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a'b"])
def test_names_that_code_cannot_hold(name: str) -> None:
    model = nn.Sequential()
    for part in (name, "c", "d"):
        model.add_module(part, nn.Conv2d(3, 3, 3, padding=1))
    with pytest.raises(PlanError, match="rename it"):
        glcan_fx.plan(model, k="natural", task="super_resolution", example_inputs=torch.empty(2, 3, 16, 16))


def test_names_that_graphs_and_pages_must_escape(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = ("<b>&{x|y}", ":smile:", "中 x")
            self.parts = nn.ModuleDict({name: nn.Conv2d(3, 3, 3, padding=1) for name in names})

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts.values():
                x = part(x)
            return x

    plan = glcan_fx.plan(Odd(), k="natural", task="super_resolution", example_inputs=torch.empty(2, 3, 16, 16))
    assert "<b>&{x|y}" in str(plan) and ":smile:" in str(plan)
    plan.save(tmp_path / "plan.HTML")
    if shutil.which("dot"):
        plan.save(tmp_path / "plan.svg", depth="blocks")


@pytest.mark.parametrize(("content", "options", "match"), [
    ("[]", [], "not a plan"), ("\udcff", [], "plan.json"), (None, ["-k", "2", "--window", "1"], "-k, --window"),
    (None, ["--task", "detection"], "--task"),
])
def test_plans_from_files(file: Path, tmp_path: Path, content: str | None, options: list[str], match: str,
                          capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "plan.json"
    kept.write_bytes(small_plan().to_json().encode() if content is None else content.encode("utf-8", "surrogateescape"))
    assert cli.main(["inspect", f"{file}:model", "--plan", str(kept), *options]) == 2
    assert match in capsys.readouterr().err


def test_memory_is_for_the_optimizer(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = []
    for optimizer, said in (("sgd", "with SGD and momentum"), ("adam", "with Adam")):
        assert cli.main(["inspect", f"{file}:model", *OPTIONS, "--optimizer", optimizer]) == 0
        shown = capsys.readouterr().out
        assert said in shown
        peaks.append(float(re.search(r"this plan: ([\d.]+)", shown)[1]))
    assert peaks[0] < peaks[1]
