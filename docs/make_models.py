"""Write docs/models.md: how each network of torchvision's registry is captured, and where it can be cut.

    python docs/make_models.py --all            # writes docs/models.md (about an hour on one core)
    python docs/make_models.py resnet18 swin_t  # prints the table of these

Weights and inputs are random; every network trains one step at k="natural".
"""

import argparse
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models import get_model, get_model_builder, list_models
from torchvision.ops import StochasticDepth

import glcan_fx
from glcan_fx.capture.ladder import trace
from glcan_fx.capture.trace import Report
from glcan_fx.tasks import Spec

KINDS = ("detection", "segmentation", "video", "optical_flow", "quantization")
PAGE = Path(__file__).with_name("models.md")
HEAD = """# What the compiler does with torchvision's networks

All {count} networks of `torchvision.models.list_models()` but the quantized ones; torchvision {torchvision}, torch
{torch}.
Written by `python docs/make_models.py --all` on a CPU, one thread, commit {commit}. Training at k=4, and evaluation
bit for bit, is what tests/models/test_registry.py checks.

- **rung**: 1 the call was recorded as it is; 2 questions about sizes were answered for the example's sizes; 3 some
  modules are opaque: called as a whole. Of a detector: its backbone's.
- **natural k**: local modules at `k="natural"`; 1 means that no place to cut was found.
- **opaque modules**: how many, their paths (numbers as `*`), class and the reason.
- **spec.**: specialisations, the questions about sizes. **nodes**: of the recorded graph.
- **learns**: whether in one step on two random images, at the natural k, every local module and every auxiliary
  network has gradients that are not all zero, where backpropagation has; else which has not.
- **s**: seconds of process time of `transform(k="natural")`: planning, building, and comparing the step with the model.

Inputs: 2 x 3 x 224 x 224 (Inception 299, detectors 320, optical flow two of 128); videos of 16 frames of 112 x 112, or
224 x 224 where the network has a fixed size.

"""
COLUMNS = ("model", "rung", "natural k", "opaque modules", "spec.", "nodes", "learns", "s")
LIMIT = 300e6  # parameters: of larger networks the slow tests see that they learn


def kind_of(name: str) -> str:
    """"classification", or the sub-package of torchvision.models that a network comes from."""
    package = get_model_builder(name).__module__.split(".")[2]
    return package if package in KINDS else "classification"


def names() -> list[str]:
    return [name for name in list_models() if kind_of(name) != "quantization"]


def build(name: str) -> nn.Module:
    """The network with random weights, in training mode."""
    backbone = {"weights_backbone": None} if kind_of(name) in ("detection", "segmentation") else {}
    return get_model(name, weights=None, **backbone).train()


def flow_criterion(outputs: list[Tensor], targets: Tensor) -> Tensor:
    """L1 distance of every refinement of the flow, later ones with more weight, as RAFT is trained."""
    return sum(0.8 ** (len(outputs) - 1 - i) * (flow - targets).abs().mean() for i, flow in enumerate(outputs))


def options(name: str) -> dict[str, Any]:
    """Keywords of ``plan()`` for a network: what it is trained for, and the sizes of one batch."""
    kind = kind_of(name)
    if kind == "detection":
        return {"task": "detection"}
    if kind == "optical_flow":
        return {"criterion": flow_criterion, "example_inputs": (torch.empty(2, 3, 128, 128, device="meta"),) * 2}
    if kind == "video":
        side = 112 if "resnet" in get_model_builder(name).__module__ else 224
        return {"task": "classification", "example_inputs": torch.empty(2, 3, 16, side, side, device="meta")}
    side = 299 if name == "inception_v3" else 224
    return {"task": kind, "example_inputs": torch.empty(2, 3, side, side, device="meta")}


def row(name: str) -> tuple[str, ...]:
    """A line of the table; for a network that is refused, the error's first line."""
    model, given = build(name), options(name)
    start = time.process_time()
    try:
        local = glcan_fx.transform(model, k="natural", **given)
        seconds = time.process_time() - start
        plan = local.plan
        traced = trace(model, tree_map_only(Spec, Spec.empty, list(plan.inputs)), path=plan.network)
        learning = learns(name, local)
    except Exception as error:  # noqa: BLE001 - the table shows it
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return name, "–", "–", f"**{type(error).__name__}**: {_cell(text)}", *["–"] * 4
    report = traced.report
    return (name, str(report.rung), str(plan.k), opaque_modules(report), str(len(report.specialisations)),
            str(len(traced.graph.nodes)), learning, f"{seconds:.1f}")


def learns(name: str, local: glcan_fx.LocalModel) -> str:
    """What one step on random values tells: "yes", or which local modules and auxiliary networks got only zeros."""
    if sum(p.numel() for p in local.parameters()) > LIMIT:
        return "–"
    for part in local.modules():
        if isinstance(part, StochasticDepth):
            part.p = 0.0  # both images of a batch may skip a local module
    given = batch(name, local)
    out = local.train()(*given)
    (sum(out.values()) if isinstance(out, dict) else out.loss).backward()
    groups = local.parameters_by_module()
    groups |= {f"auxiliary {i}": list(local.aux.get_submodule(str(i)).parameters()) for i in range(local.plan.k - 1)}
    silent = [group for group, own in groups.items() if any(p.requires_grad for p in own) and not reached(own)]
    if silent:  # a level of a detector without an object: by backpropagation, too?
        plain = local.original
        losses = plain(*given) if isinstance(out, dict) else local.task.loss(plain(*given[:-1]), given[-1])
        (sum(losses.values()) if isinstance(losses, dict) else losses).backward()
        silent = [group for group in silent if group.startswith("auxiliary") or reached(groups[group])]
    return f"not {', '.join(silent)}" if silent else "yes"


def reached(parameters: list[nn.Parameter]) -> bool:
    return any(p.grad is not None and p.grad.any() for p in parameters)


def batch(name: str, local: glcan_fx.LocalModel) -> tuple[Any, ...]:
    """Random images of the size that was planned for, and targets."""
    kind = kind_of(name)
    if kind == "detection":
        mask = torch.zeros(1, 320, 320, dtype=torch.uint8)
        mask[:, 40:250, 40:200] = 1
        target = {"boxes": torch.tensor([[40.0, 40.0, 200.0, 250.0]]), "labels": torch.tensor([1]), "masks": mask,
                  "keypoints": torch.tensor([100.0, 150.0, 1.0]).expand(1, 17, 3)}
        return [torch.rand(3, 320, 320) for _ in range(2)], [target, target]
    inputs = [torch.rand(spec.shape) for spec in local.plan.inputs]
    labels, sides = torch.tensor([1, 2]), inputs[0].shape[2:]
    if kind == "segmentation":
        return *inputs, labels[:, None, None].expand(2, *sides)
    return *inputs, torch.rand(2, 2, *sides) if kind == "optical_flow" else labels


def opaque_modules(report: Report) -> str:
    found = Counter((re.sub(r"\d+", "*", o.path), o.kind, o.reason, _short(o.where)) for o in report.opaque)
    return "<br>".join(
        f"{count} × `{path}` ({kind}): {_cell(reason)}{f' ({_cell(where)})' if where else ''}"
        for (path, kind, reason, where), count in found.items())


def _short(where: str) -> str:
    return re.sub(r"^\S*?((torch|torchvision)/\S+:\d+)", r"\1", where)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PAGE.parent, capture_output=True, text=True)
    return asked.stdout.strip()


def table(rows: list[tuple[str, ...]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks of torchvision.models.list_models()")
    parser.add_argument("--all", action="store_true", help=f"all of them, into {PAGE.name}")
    arguments = parser.parse_args()
    if not arguments.all and not arguments.names:
        parser.error("name some networks, or pass --all")
    torch.set_num_threads(1)
    rows = []
    for name in names() if arguments.all else arguments.names:
        rows.append(row(name))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    if arguments.all:
        head = HEAD.format(count=len(rows), torchvision=torchvision.__version__.split("+")[0],
                           torch=torch.__version__.split("+")[0], commit=commit())
        PAGE.write_text(head + table(rows))
    else:
        print(table(rows), end="")


if __name__ == "__main__":
    main()
