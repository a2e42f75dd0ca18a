"""`glcan-fx bench`: compare training methods on one model, in one run: memory, compute, time.

Only light imports at module level, so that the command line can show its help at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glcan_fx.cli.arguments import add_model
from glcan_fx.models.presets import PRESETS, Preset

if TYPE_CHECKING:
    from glcan_fx.bench.methods import Job

METHODS = {
    "bp": "backpropagation",
    "checkpoint": "checkpoint",
    "nested": "nested checkpoint",
    "selective": "selective checkpoint",
    "offload": "save_on_cpu",
    "accumulate": "accumulation",
    "compile": "torch.compile",
    "glcan": "glcan",
    "budget": "glcan, budget",
}
EXPLAINED = {
    "bp": "a plain training step: what the others are compared with",
    "checkpoint": "torch.utils.checkpoint on every block",
    "nested": "groups of sqrt(n) blocks are recomputed, and every block inside again",
    "selective": "convolutions and matrix products are kept, the rest of every block is recomputed",
    "offload": "torch.autograd.graph.save_on_cpu: what is saved for backward moves to main memory",
    "accumulate": "gradient accumulation over micro-batches of one image",
    "compile": "torch.compile with activation_memory_budget = 0.5",
    "glcan": "gradient-isolated local modules, as glcan_fx plans them",
    "budget": "the same, planned for --memory-budget",
}
EPILOG = """examples:
  glcan-fx bench tiny
  glcan-fx bench retinanet-r50 --device estimate -o memory.png
  glcan-fx bench train.py:build --kwargs '{"classes": 3}' --input 8x3x512x512 --task segmentation
  glcan-fx bench torchvision.models:resnet50 --input 64x3x224x224 --task classification

exit codes: 0 done, 1 the model cannot be used as asked, 2 usage or file error"""
# glibc gives large freed blocks back to the system, and each page that returns is a fault: a method that frees more
# would look slower than it is. CUDA's allocator keeps what is freed.
_KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_MMAP_THRESHOLD_": str(2**36)}


@dataclass
class Row:
    """One method. Memory in bytes: estimated, measured, reserved (by CUDA's allocator). flops: of a step. parts: what
    the estimated peak is made of, when: what runs then. curve: bytes over a step. None: not known; reasons say why."""

    method: str
    title: str
    estimated: int | None = None
    flops: int | None = None
    measured: int | None = None
    reserved: int | None = None
    step_seconds: float | None = None
    images_per_second: float | None = None
    largest_batch: int | None = None
    k: int | None = None
    when: str | None = None
    parts: dict[str, int] | None = None
    curve: list[int] | None = None
    notes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def update(self, message: dict[str, Any]) -> None:
        """Take over what a process found out."""
        for key, value in message.items():
            if key in ("notes", "reason"):
                lines = self.notes if key == "notes" else self.reasons
                lines += [line for line in (value if key == "notes" else [value]) if line not in lines]
            elif key in vars(self) and key != "method" and (key != "flops" or self.flops is None):
                setattr(self, key, value)
        if "k" in message:
            self.title = f"{METHODS[self.method]}, k={self.k}"

    @property
    def peak(self) -> int | None:
        """Bytes, measured where they are."""
        return self.estimated if self.measured is None else self.measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `glcan-fx bench` to `parser`."""
    training = add_model(parser, target_optional=True)
    parser.add_argument("--list", action="store_true", help="list presets and methods, and do nothing else")
    training.add_argument("--amp", choices=("bf16",), help="autocast")
    training.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    run = parser.add_argument_group("run")
    run.add_argument("--methods", type=_methods, metavar="a,b", help=f"of {', '.join(METHODS)} (all)")
    run.add_argument("--device", type=_device, metavar="DEVICE",
                     help="cuda, cpu, or estimate: nothing runs but a simulation (cuda if there is one, else estimate)")
    run.add_argument("--steps", type=_count, default=10, metavar="N", help="timed, after a warm-up (%(default)s)")
    run.add_argument("--largest-batch", action="store_true", help="on cuda: search the largest batch that fits")
    out = parser.add_argument_group("output, beside the table")
    out.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    out.add_argument("-o", "--output", type=_picture, metavar="FILE",
                     help="a plot, .png, .svg or .pdf; or a page, .html")


def run(args: argparse.Namespace) -> int:
    """Run the bench with the options of `add_arguments`; returns the exit status."""
    if args.list:
        _list()
        return 0
    problem = _problem(args)
    if problem:
        _note(f"glcan-fx bench: {problem}")
        return 2
    for path in (args.json, args.output):  # before minutes of work
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder: name a file")
    from glcan_fx.bench import report

    job, methods = _job(args)
    rows = [Row(name, METHODS[name]) for name in methods]
    try:
        device = _fill(rows, job)
    except _Fatal as error:
        _note(f"glcan-fx bench: {error}")
        return error.code
    report.show(rows, job)
    if args.json:
        report.write_json(args.json, rows, job, device)
    if args.output:
        write = report.write_report if args.output.suffix == ".html" else report.write_plot
        write(args.output, rows, args.target, job)
    return 0 if any(row.peak is not None for row in rows) else 1


def _problem(args: argparse.Namespace) -> str | None:
    """What is wrong with options that are right one by one."""
    if args.target is None:
        return "name a model: a preset (see --list), file.py, file.py:attribute or package.module:attribute"
    if args.target not in PRESETS and not args.input:
        return (f"'{args.target}' is no preset (see --list), so its inputs are not known: pass --input, "
                "for example --input 8x3x224x224")
    if args.memory_budget is None and "budget" in (args.methods or ()):
        return "the method 'budget' needs --memory-budget, for example --memory-budget 6GiB"
    if args.device is not None and args.device != "estimate":
        import torch

        if args.device.startswith("cuda") and not torch.cuda.is_available():
            return f"--device {args.device}: PyTorch finds no CUDA device here; cpu and estimate work anywhere"
    if args.input_dtype is not None:
        import torch

        if not isinstance(getattr(torch, args.input_dtype, None), torch.dtype):
            return f"--input-dtype {args.input_dtype}: no type of PyTorch's; float32 and int64 are"
    return None


def _job(args: argparse.Namespace) -> tuple[Job, list[str]]:
    """What to do: the options, the preset's choices, the defaults."""
    import torch

    from glcan_fx.bench.methods import Job

    preset = PRESETS.get(args.target) or Preset(args.target, tuple(args.input or ()), args.task)
    job = Job(
        target=preset.target, kwargs={**preset.kwargs, **args.kwargs},
        inputs=[list(size) for size in args.input or preset.inputs], dtype=args.input_dtype or "float32",
        task=args.task or preset.task, k=preset.k if args.k is None else args.k, memory_budget=args.memory_budget,
        budget_k=args.k or "fewest",  # within a budget, the fewest that fit
        compute_budget=args.compute_budget,
        device=args.device or ("cuda" if torch.cuda.is_available() else "estimate"),
        optimizer=args.optimizer or preset.optimizer, amp=args.amp is not None, steps=args.steps, seed=args.seed,
        largest_batch=args.largest_batch,
    )
    if job.largest_batch and not job.device.startswith("cuda"):
        _note(f"note: --largest-batch is for cuda; here it is {job.device}")
        job = Job(**{**asdict(job), "largest_batch": False})
    chosen = args.methods or [name for name in METHODS if name != "budget"]
    wanted = {*chosen, "bp"} | ({"budget"} if args.memory_budget is not None else set())  # bp: every ratio's reference
    return job, [name for name in METHODS if name in wanted]


def _fill(rows: Sequence[Row], job: Job) -> str:
    """Simulate and measure every method; returns the name of the device."""
    from tqdm import tqdm

    by_name, device, blocks = {row.method: row for row in rows}, job.device, []
    real = job.device != "estimate"
    # disable=None: no bar unless stderr is a terminal
    with tqdm(total=len(rows) * (1 + real), desc="simulating", unit="method", file=sys.stderr, disable=None) as bar:
        for message in _process(job, list(by_name), measure=False):
            if "blocks" in message:
                blocks = message["blocks"]
                continue
            by_name[message["method"]].update(message)
            bar.update()
        for row in rows if real else ():
            bar.set_description(row.title)
            for message in _process(job, [row.method], measure=True, blocks=blocks):
                device = message.get("device", device)
                row.update(message)
            bar.update()
    return device


class _Fatal(Exception):
    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def _process(
    job: Job, methods: Sequence[str], *, measure: bool, blocks: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The messages of a fresh process that simulates or measures methods."""
    command = [sys.executable, "-m", "glcan_fx.bench.methods"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                          env={**_KEEP_FREED, **os.environ}) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            json.dump({"job": asdict(job), "methods": methods, "measure": measure, "blocks": blocks}, process.stdin)
            process.stdin.close()
            left = list(methods)
            for line in process.stdout:
                message = json.loads(line)
                if "fatal" in message:
                    raise _Fatal(message["fatal"], message["code"])
                if "method" in message:
                    left.remove(message["method"])
                yield message
            for name in left:
                yield {"method": name, "reason": _died(process.wait())}
        finally:
            process.kill()


def _died(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}; what it said is above"
    name = signal.Signals(-code).name
    hint = ": probably main memory ran out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"


def _list() -> None:
    from glcan_fx.bench.report import lists

    lists()


# ---------------------------------------------------------------------------------------------- options


def _methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'none'}: choose from {', '.join(METHODS)}")
    return names


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|estimate|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"'{text}': choose cuda, cpu or estimate")
    return text


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"'{text}': a number above 0")
    return int(text)


def _picture(text: str) -> Path:
    if Path(text).suffix not in (".png", ".svg", ".pdf", ".html"):
        raise argparse.ArgumentTypeError(f"'{text}': a file that ends in .png, .svg, .pdf or .html")
    return Path(text)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
