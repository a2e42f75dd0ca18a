"""Write docs/performance.md: memory, compute and time beside what one would use otherwise.

    python docs/make_performance.py             # everything: about half an hour on one core
    python docs/make_performance.py edsr depth  # these parts again, the others as they are in docs/performance.json

Every number comes from here: from `glcan-fx bench`, or from the functions below.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet18

import glcan_fx
from glcan_fx import Options
from glcan_fx.measure import medians
from glcan_fx.models import edsr, retinanet, yolo
from glcan_fx.models.load import load
from glcan_fx.presets import PRESETS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from unet import UNet

HERE = Path(__file__).parent
RECORDS, PAGE = HERE / "performance.json", HERE / "performance.md"
GIB = 2**30
# per preset: local modules, and the memory that it is planned for, in GiB or relative to backpropagation's
BUDGETS: dict[str, tuple[int | str, float | str]] = {
    "retinanet-r34": (17, 2.9), "retinanet-r50": (17, 3.3), "retinanet-r101": (34, 3.6), "retinanet-r152": (51, 3.8),
    "yolo-r34": ("natural", "0.35"), "yolo-r50": ("natural", "0.35"), "yolo-r101": ("natural", "0.35"),
    "yolo-r152": ("natural", "0.35"), "edsr": ("natural", 0.28), "edsr-full": ("natural", 1.7),
    "resnet34": ("natural", 3.45),
}
# small enough for a CPU: size of the input, the budget relative to backpropagation's, arguments of the model
MEASURED: dict[str, tuple[str, float, dict[str, Any]]] = {
    "retinanet-r34": ("2x3x320x416", 0.75, {"min_size": 320, "max_size": 416}),
    "retinanet-r50": ("2x3x320x416", 0.6, {"min_size": 320, "max_size": 416}),
    "edsr": ("4x3x48x48", 0.4, {}), "resnet34": ("32x3x128x128", 0.7, {}),
    "yolo-r34": ("4x3x320x320", 0.8, {"image_size": 320}),
}
FRONTIERS = ("resnet34", "edsr", "yolo-r34", "retinanet-r50", "retinanet-r152")
METHODS = {"bp": "backpropagation", "checkpoint": "checkpoint per block", "nested": "nested checkpoint",
           "selective": "selective checkpoint", "offload": "save_on_cpu", "accumulate": "accumulation",
           "glcan": "glcan_fx", "fewest": "glcan_fx, fewest", "budget": "glcan_fx, budget"}


def bench(preset: str, *options: str) -> dict[str, Any]:
    """What `glcan-fx bench` finds out, by method."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "bench.json")
        subprocess.run([sys.executable, "-m", "glcan_fx", "bench", preset, "-o", str(out), *options], check=True)
        data: dict[str, Any] = json.loads(out.read_text())
    return {row["method"]: {key: row[key] for key in ("estimated", "measured", "flops", "step_seconds", "k", "reasons")}
            for row in data["methods"]}


def estimated(preset: str) -> dict[str, Any]:
    """A preset at its own size, simulated."""
    k, budget = BUDGETS[preset]
    if isinstance(budget, str):
        whole = bench(preset, "--device", "estimate", "--methods", "bp")["bp"]["estimated"]
        size = str(int(float(budget) * whole))
    else:
        size = f"{budget}GiB"
    chosen = [name for name in METHODS if name != "fewest"]
    found = bench(preset, "--device", "estimate", "--methods", ",".join(chosen), "--memory-budget", size, "-k", str(k))
    fewest = bench(preset, "--device", "estimate", "--methods", "glcan", "-k", "fewest")
    found["fewest"] = fewest["glcan"]
    if k == "natural":  # all of them, within the budget, instead of the fewest
        natural = found["glcan"]["k"]
        found |= bench(preset, "--device", "estimate", "--methods", "budget", "--memory-budget", size, "-k",
                       str(natural))
    return found


def measured(preset: str) -> dict[str, Any]:
    """A preset at a size for a CPU: real steps."""
    size, share, kwargs = MEASURED[preset]
    given = ("--input", size, "--kwargs", json.dumps(kwargs))
    whole = bench(preset, *given, "--device", "estimate", "--methods", "bp")["bp"]["estimated"]
    steps = (*given, "--device", "cpu", "--steps", "7", "--methods")
    found = bench(preset, *steps, "bp,checkpoint,glcan", "-k", str(BUDGETS[preset][0]))
    fewest = bench(preset, *steps, "glcan,budget", "-k", "fewest", "--memory-budget", str(int(share * whole)))
    return {**found, "fewest": fewest["glcan"], "budget": fewest["budget"]}


class Block(nn.Module):
    """A residual block of a chain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


def chain(depth: int) -> nn.Module:
    """A residual network of one resolution."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *(Block(16) for _ in range(depth)), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(16, 10))


def depths() -> list[dict[str, Any]]:
    """Peaks of a chain that grows, simulated, and step times."""
    rows = []
    x, y = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
    for depth in (20, 50, 100, 200, 500, 1000):
        model = chain(depth)
        start = time.perf_counter()
        plan = glcan_fx.plan(model, k="natural", task="classification", example_inputs=x)
        planned = time.perf_counter() - start
        memory = plan.memory
        plain, local = side_by_side(model, plan, x, y, 3)
        row: dict[str, Any] = {"depth": depth, "k": plan.k, "bp": memory.backpropagation.peak,
                               "plan": memory.plan.peak, "plain": plain, "seconds": local, "planned": planned}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def side_by_side(model: nn.Module, plan: glcan_fx.Plan, x: Tensor, y: Tensor, turns: int) -> list[float]:
    """Median seconds of a step of backpropagation and of the plan, in turns."""
    local = glcan_fx.transform(model, plan=plan).train()
    return medians((lambda: F.cross_entropy(model(x), y).backward(), lambda: local(x, y).loss.backward()), turns)


def overhead() -> dict[str, float]:
    """A step of ResNet-18 at 64 x 64, batch 8, plain and compiled with k=1, which computes the same."""
    x, y = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    model = resnet18(num_classes=10)
    plan = glcan_fx.plan(model, k=1, task="classification", example_inputs=x)
    plain, compiled = side_by_side(model, plan, x, y, 25)
    return {"plain": plain, "compiled": compiled}


def stepping() -> list[dict[str, Any]]:
    """Peaks of plans at their budgets, with an ordinary optimizer and with one that steps in the forward pass."""
    rows = []
    for name in ("retinanet-r50", "retinanet-r152", "edsr-full", "resnet34"):
        preset, (k, budget) = PRESETS[name], BUDGETS[name]
        plan = glcan_fx.plan(load(preset.target, preset.kwargs), k=k, task=preset.task, memory_budget=f"{budget}GiB",
                             example_inputs=torch.empty(preset.inputs[0], device="meta"),
                             options=Options(optimizer=preset.optimizer))
        for optimizer in ("sgd", "adam"):
            ordinary, inside = (plan.estimate(optimizer, in_forward=inside).plan for inside in (False, True))
            rows.append({"preset": name, "k": plan.k, "optimizer": optimizer, "ordinary": ordinary.peak,
                         "inside": inside.peak})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def frontiers() -> dict[str, list[dict[str, Any]]]:
    """What can be had of some presets: the frontier, the default plan, and how long that took to plan."""
    found = {}
    for name in FRONTIERS:
        preset = PRESETS[name]
        model, start = load(preset.target, preset.kwargs), time.perf_counter()
        plan = glcan_fx.plan(model, task=preset.task, example_inputs=torch.empty(preset.inputs[0], device="meta"),
                             options=Options(optimizer=preset.optimizer))
        seconds = time.perf_counter() - start
        found[name] = [{"name": point.name, "k": point.k, "exact": point.exact, "peak": point.peak,
                        "compute": point.compute, "chosen": point.chosen, "peer": point.plan is None,
                        "seconds": seconds if point.chosen else None} for point in plan.frontier]
        print(name, found[name], file=sys.stderr, flush=True)
    return found


# beside the presets of MEASURED: size of the input, and the model
TIMED: dict[str, tuple[str, tuple[int, ...], Callable[[], nn.Module]]] = {
    "resnet18": ("classification", (8, 3, 64, 64), lambda: resnet18(num_classes=10)),
    "mobilenet_v3_small": (
        "classification", (8, 3, 96, 96), lambda: torchvision.models.mobilenet_v3_small(num_classes=10)),
    "vgg11_bn": ("classification", (4, 3, 64, 64), lambda: torchvision.models.vgg11_bn(num_classes=10)),
    "vit": ("classification", (8, 3, 64, 64), lambda: torchvision.models.VisionTransformer(
        image_size=64, patch_size=8, num_layers=6, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=10)),
    "unet": ("segmentation", (4, 3, 96, 96), lambda: UNet(11, 16)),
    "efficientnet_b0": ("classification", (8, 3, 64, 64), lambda: torchvision.models.efficientnet_b0(num_classes=10)),
    "densenet121": ("classification", (4, 3, 64, 64), lambda: torchvision.models.densenet121(num_classes=10)),
    "shufflenet_v2": ("classification", (8, 3, 96, 96), lambda: torchvision.models.shufflenet_v2_x1_0(num_classes=10)),
    "convnext_tiny": ("classification", (2, 3, 64, 64), lambda: torchvision.models.convnext_tiny(num_classes=10)),
    "edsr": ("super_resolution", (4, 3, 32, 32), lambda: edsr(blocks=8, channels=32)),
    "retinanet_r18": ("detection", (2, 3, 160, 160), lambda: retinanet(18, num_classes=3, min_size=160, max_size=160)),
    "yolo_r18": ("detection", (2, 3, 160, 160), lambda: yolo(18, num_classes=3, image_size=160)),
}


def times() -> list[dict[str, Any]]:
    """Steps in turns, measured and estimated for the device at hand: backpropagation, with every block again, and plans
    with few and with many local modules. Without an optimizer's step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name, (task, size, make) in TIMED.items():
        torch.manual_seed(0)
        model = make().to(device)
        x = torch.rand(size, device=device)
        given: dict[str, Any] = {"task": task, "example_inputs": x, "options": Options(optimizer=None, device=device)}
        one = glcan_fx.plan(model, k=1, **given)
        plans = {"k=1": one, "every block again": one.replace(modules=tuple(
            dataclasses.replace(module, recompute=module.each) for module in one.modules))}
        for k in (2, "natural"):
            plan = glcan_fx.plan(model, k=k, **given)
            plans.setdefault(f"k={plan.k}", plan)
        y = targets_of(task, size, device)
        inputs = list(x) if task == "detection" else x
        trained = [plan.build(verify=False).train() for plan in plans.values()]
        steps = [partial(step, local, inputs, y) for local in trained]
        plain = one.simulate(None)
        for (what, plan), seconds in zip(plans.items(), medians(steps, 8, warm_up=3, device=device), strict=True):
            estimate = plan.simulate(None)
            rows.append({"model": name, "what": what, "seconds": seconds, "estimated": estimate.seconds(device),
                         "time": estimate.relative_to(plain, device), "compute": estimate.relative_to(plain),
                         "device": device})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def step(local: nn.Module, inputs: Any, targets: Any) -> None:
    """Forward and backward."""
    local.zero_grad()
    out = local(inputs, targets)
    (sum(out.values()) if isinstance(out, dict) else out.loss).backward()


def targets_of(task: str, size: tuple[int, ...], device: str) -> Any:
    """Random targets of a batch."""
    count, _, height, width = size
    if task == "detection":
        boxes = torch.tensor([[10.0, 10.0, 90.0, 80.0], [60.0, 40.0, 130.0, 140.0]], device=device)
        return [{"boxes": boxes, "labels": torch.tensor([1, 2], device=device)} for _ in range(count)]
    if task == "segmentation":
        return torch.randint(11, (count, height, width), device=device)
    if task == "super_resolution":
        return torch.rand(count, 3, 2 * height, 2 * width, device=device)
    return torch.randint(10, (count,), device=device)


def planning() -> dict[str, float]:
    """Seconds to plan and transform RetinaNet-R152 at k=51."""
    model = retinanet(152, num_classes=91)
    start = time.perf_counter()
    glcan_fx.transform(model, k=51, task="detection", example_inputs=torch.empty(8, 3, 800, 1066, device="meta"))
    return {"seconds": time.perf_counter() - start}


PARTS: dict[str, Callable[[], Any]] = {
    **{preset: lambda preset=preset: estimated(preset) for preset in BUDGETS},
    **{f"cpu-{preset}": lambda preset=preset: measured(preset) for preset in MEASURED},
    "depth": depths, "overhead": overhead, "planning": planning,
    "stepping": stepping, "frontiers": frontiers, "times": times,
}


def cell(row: dict[str, Any] | None, whole: dict[str, Any]) -> str:
    """Memory in GiB, relative to backpropagation's, and compute relative to its."""
    if row is None or row["estimated"] is None:
        return "–"
    k = f"k={row['k']}: " if row["k"] else ""
    return (f"{k}{row['estimated'] / GIB:.2f} ({row['estimated'] / whole['estimated']:.2f}), "
            f"{row['flops'] / whole['flops']:.2f}x")


def estimates_table(records: dict[str, Any]) -> list[str]:
    columns = list(METHODS)
    lines = ["| preset | " + " | ".join(METHODS[name] for name in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for preset in BUDGETS:
        if preset in records:
            found = records[preset]["value"]
            lines.append(f"| {preset} | " + " | ".join(cell(found.get(name), found["bp"]) for name in columns) + " |")
    return lines


def measured_table(records: dict[str, Any]) -> list[str]:
    lines = ["| preset, input | method | peak, simulated | peak, measured | compute | step time |", "|---" * 6 + "|"]
    for preset, (size, _, _) in MEASURED.items():
        found = records.get(f"cpu-{preset}", {}).get("value", {})
        for method, row in found.items():
            if row["measured"] is None or row["step_seconds"] is None:
                lines.append(f"| {preset}, {size} | {METHODS[method]} | {'; '.join(row['reasons'])} | | | |")
                continue
            whole, k = found["bp"], f", k={row['k']}" if row["k"] else ""
            lines.append(
                f"| {preset}, {size} | {METHODS[method]}{k} | {row['estimated'] / 2**20:.0f} MiB | "
                f"{row['measured'] / 2**20:.0f} MiB ({row['measured'] / whole['measured']:.2f}) | "
                f"{row['flops'] / whole['flops']:.2f}x | {row['step_seconds'] * 1e3:.0f} ms "
                f"({row['step_seconds'] / whole['step_seconds']:.2f}) |")
    return lines


def depth_table(records: dict[str, Any]) -> list[str]:
    lines = ["| blocks | k | backpropagation | glcan_fx | step of backpropagation | of glcan_fx | planning |",
             "|---" * 7 + "|"]
    for row in records["depth"]["value"]:
        lines.append(f"| {row['depth']} | {row['k']} | {row['bp'] / 2**20:.0f} MiB | {row['plan'] / 2**20:.0f} MiB | "
                     f"{row['plain']:.2f} s | {row['seconds']:.2f} s | {row['planned']:.1f} s |")
    return lines


def stepping_table(records: dict[str, Any]) -> list[str]:
    lines = ["| plan within its budget | optimizer | behind backward | in the forward pass |", "|---" * 4 + "|"]
    for row in records["stepping"]["value"]:
        lines.append(f"| {row['preset']}, k={row['k']} | {row['optimizer']} | {row['ordinary'] / GIB:.2f} GiB | "
                     f"{row['inside'] / GIB:.2f} GiB ({row['inside'] / row['ordinary']:.2f}) |")
    return lines


COMPUTES = (1.05, 1.1, 1.2, 1.35, 1.5)  # of the columns


def frontier_table(records: dict[str, Any]) -> list[str]:
    columns = ["preset", "backpropagation", "checkpoint per block", *(f"exact, {c:g}x" for c in COMPUTES),
               "default plan", "planned in"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for preset, points in records["frontiers"]["value"].items():
        plain, again = [point for point in points if point["peer"]]
        exact = [point for point in points if point["k"] == 1 and (not point["peer"] or point is plain)]
        best = [min(point["peak"] for point in exact if point["compute"] <= compute + 0.005) for compute in COMPUTES]
        chosen = next(point for point in points if point["chosen"])
        cells = [f"{plain['peak'] / GIB:.2f}", f"{again['peak'] / GIB:.2f}, {again['compute']:.2f}x",
                 *(f"{peak / GIB:.2f}" for peak in best),
                 f"{chosen['name']}: {chosen['peak'] / GIB:.2f}, {chosen['compute']:.2f}x",
                 f"{chosen['seconds']:.0f} s"]
        lines.append(f"| {preset} | " + " | ".join(cells) + " |")
    return lines


def ratios(records: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of steps that are not backpropagation's, with their measured times relative to its."""
    rows = records["times"]["value"]
    plain = {row["model"]: row["seconds"] for row in rows if row["what"] == "k=1"}
    return [{**row, "measured": row["seconds"] / plain[row["model"]]} for row in rows if row["what"] != "k=1"]


def agreement(records: dict[str, Any]) -> dict[str, str]:
    """How well estimated times agree with measured ones."""
    rows, every = ratios(records), records["times"]["value"]
    measured = [row["measured"] for row in rows]
    off = sorted(abs(row["time"] / row["measured"] - 1) for row in rows)
    seconds = rank_correlation([row["seconds"] for row in every], [row["estimated"] for row in every])
    return {
        "by_time": f"{rank_correlation(measured, [row['time'] for row in rows]):.2f}",
        "by_compute": f"{rank_correlation(measured, [row['compute'] for row in rows]):.2f}",
        "by_seconds": f"{seconds:.2f}", "off": f"{100 * statistics.median(off):.0f}",
        "most_off": f"{100 * off[-1]:.0f}", "timed_on": every[0]["device"],
    }


def times_table(records: dict[str, Any]) -> list[str]:
    lines = ["| model | step | measured | time, estimated | compute |", "|---" * 5 + "|"]
    for row in ratios(records):
        lines.append(f"| {row['model']} | {row['what']} | {row['measured']:.2f} | {row['time']:.2f} | "
                     f"{row['compute']:.2f} |")
    return lines


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's."""
    ranks = [[sorted(values).index(value) for value in values] for values in (one, other)]
    return statistics.correlation(*ranks)


def page(records: dict[str, Any]) -> str:
    overhead, planning = records["overhead"]["value"], records["planning"]["value"]
    budgets = ", ".join(f"{name} {budget} GiB" if isinstance(budget, float) else f"{name} {budget} of backpropagation's"
                        for name, (_, budget) in BUDGETS.items())
    return TEXT.format(
        torch=torch.__version__.split("+")[0], torchvision=torchvision.__version__.split("+")[0], budgets=budgets,
        commits=", ".join(sorted({record["commit"] for record in records.values()})),
        estimates="\n".join(estimates_table(records)), measured="\n".join(measured_table(records)),
        frontiers="\n".join(frontier_table(records)), depth="\n".join(depth_table(records)),
        times="\n".join(times_table(records)), **agreement(records),
        stepping="\n".join(stepping_table(records)),
        share=f"{100 * (overhead['compiled'] / overhead['plain'] - 1):+.1f}",
        step=f"{1e3 * overhead['plain']:.0f}", planning=f"{planning['seconds']:.1f}",
    )


TEXT = """# Memory, compute and time

What training steps take with backpropagation, with the usual alternatives, and with glcan_fx: simulated, and measured
on a CPU. Nothing here has been measured on a GPU yet. How to read it: [choose](choose.md).

## The models of the paper, at its sizes

Peak memory of a training step in GiB, relative to backpropagation's, and compute relative to its; simulated
(`glcan-fx bench PRESET --device estimate`). Batch 8 at 800 x 1066 for RetinaNet, 16 at 640 x 640 for YOLO, 16 of
96 x 96 for EDSR x2 (Adam), 256 at 224 x 224 for ResNet-34; float32, trainable batch norm, SGD with momentum elsewhere.
*glcan_fx* is at the paper's k (RetinaNet) or the natural one, *fewest* is the default: the fewest local modules with as
little memory as the natural k. *Budget* is the first again, with `memory_budget=` ({budgets}): the last module in
slices, recomputed blocks, where needed.

{estimates}

*checkpoint per block* recomputes every block that is one call of a sub-module. *save_on_cpu* and *accumulation* need
less memory than glcan_fx: the first moves what backward needs to main memory and back (24 GiB a step for
RetinaNet-R50), the other changes what batch norm sees, and is exact and free for EDSR, which has none. All but glcan_fx
compute backpropagation's gradients; glcan_fx trains with local ones.

## Exact gradients first

What a step takes at least with backpropagation's own gradients, where it may take so much of its compute (`k=1`, losses
from class ids, and recomputed blocks, nested, as a dynamic program chooses them), and the default plan: as little
memory as one local module per block, with the fewest of them, at 5 % more compute at most. Peaks in GiB, simulated
(`glcan-fx inspect PRESET --frontier`); planning on one core that other work shared.

{frontiers}

## Real steps

The same models, small enough for a CPU (`glcan-fx bench PRESET --device cpu`): medians of 7 steps, each method in a
process of its own; times vary by some per cent. *Budget* is here the fewest local modules that fit one. Small
operations cost more than their arithmetic, and every local module computes a loss of its own, so time is above compute.

{measured}

## Estimated time

A step's time relative to backpropagation's: measured (medians of 8 steps, in turns in one process, on {timed_on},
without an optimizer), as estimated for the same device (`Estimate.seconds`: floating-point operations at the rate of a
convolution, bytes that operators read and write at that of adding large tensors, and for each operator what one takes
in training steps of a tiny network), and compute. Over all steps, estimated seconds agree with measured ones at a rank
correlation of {by_seconds}; the ratios below at {by_time} (compute alone: {by_compute}), off by {off} % in the median,
{most_off} % at most. Not in the estimate: Python of activation checkpointing, and convolutions of few channels, which
run far below a device's rate.

{times}

## Depth

A chain of residual blocks, 16 channels, 64 x 64 pixels, batch 16, one local module per block:

{depth}

## Stepping in the forward pass

`local.optimizer_in_forward(...)` steps every local module as soon as its gradients exist, and frees them; the numbers
are those of the ordinary loop. Simulated peaks:

{stepping}

It helps when the peak comes late, while the gradients of many modules wait, and weights are a large part of it; not
when the first modules are the peak.

## Overheads

- A model compiled with k=1, which computes what the plain model does, takes {share} % of a step more: ResNet-18 at
  64 x 64, batch 8, {step} ms.
- Planning and transforming RetinaNet-R152 at k=51: {planning} s on one core.

## How it is measured, and its limits

- Peaks are live tensor bytes in blocks of 512, parameters, gradients, optimizer state and inputs included: what
  `torch.cuda.max_memory_allocated` shows, less library workspaces. Simulated and real steps on a CPU agree within 2 %
  (tests/simulate/test_memory.py).
- Region-based detectors are simulated with as many regions as can survive.
- Floating-point operations are those of convolutions, matrix products and attention. They are not time.
- The largest local module is the floor: often the first, or the last with neck, head and loss.
- Written by `python docs/make_performance.py` from docs/performance.json, on a CPU, one thread, seed 0, torch {torch},
  torchvision {torchvision}, commits {commits}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page alone")
    args = parser.parse_args()
    chosen = [] if args.page else args.parts or list(PARTS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    records: dict[str, Any] = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True,
                            check=True).stdout.strip()
    for part in chosen:
        start = time.perf_counter()
        value = PARTS[part]()
        records[part] = {"value": value, "commit": commit, "device": platform.machine(), "seed": 0,
                         "seconds": round(time.perf_counter() - start)}
        RECORDS.write_text(json.dumps(records, indent=1) + "\n")
        print(part, records[part]["seconds"], "s", file=sys.stderr, flush=True)
    PAGE.write_text(page(records))


if __name__ == "__main__":
    main()
