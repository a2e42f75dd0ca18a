"""`glcan-fx bench`: compare training methods on one model, in one run: memory, compute, time.

Only light imports at module level, so that the command line can show its help at once.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from glcan_fx.bench.rows import METHODS, Row, fill
from glcan_fx.cli.arguments import add_model, add_output, count_of, names_of, preset_of
from glcan_fx.errors import LoadError
from glcan_fx.files import write

if TYPE_CHECKING:
    from glcan_fx.bench.job import Job

EPILOG = """examples:
  glcan-fx bench tiny
  glcan-fx bench retinanet-r50 --device estimate -o memory.html
  glcan-fx bench train.py:build --kwargs '{"classes": 3}' --input 8x3x512x512 --task segmentation
  glcan-fx bench torchvision.models:resnet50 --input 64x3x224x224 --task classification

exit codes: 0 done, 1 the model cannot be used as asked, 2 usage or file error"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `glcan-fx bench` to `parser`."""
    training = add_model(parser, optional=True)
    parser.add_argument("--list", action="store_true", help="list presets and methods, and exit")
    training.add_argument("--amp", choices=("bf16",), help="autocast to bfloat16")
    training.add_argument("--seed", type=int, default=0, help="seed of weights and inputs (%(default)s)")
    run = parser.add_argument_group("run")
    run.add_argument("--methods", type=names_of(METHODS), metavar="a,b", help=f"which of {', '.join(METHODS)} (all)")
    run.add_argument("--device", type=_device, metavar="DEVICE",
                     help="cuda, cpu, or estimate: a simulation only (cuda if there is a GPU, else estimate)")
    run.add_argument("--steps", type=count_of, default=10, metavar="N", help="timed steps, after a warm-up "
                     "(%(default)s)")
    run.add_argument("--largest-batch", action="store_true", help="on cuda: find the largest batch that fits")
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print all figures as JSON instead of the table")
    add_output(out, (".json", ".html"), "write the comparison to a file: .json has all figures, .html is a page with "
               "memory over a step")


def run(args: argparse.Namespace) -> int:
    """Run the bench with the options of `add_arguments`; returns the exit status."""
    from glcan_fx.bench import report

    if args.list:
        report.lists()
        return 0
    if args.target is None:
        raise LoadError("name a model: a preset (see --list), file.py, file.py:attribute or package.module:attribute")
    job = _job(args)
    for path in args.output:  # before minutes of work
        path.parent.mkdir(parents=True, exist_ok=True)
    chosen = args.methods or [name for name in METHODS if name != "budget"]
    wanted = {*chosen, "bp"} | ({"budget"} if args.memory_budget is not None else set())  # bp: every ratio's reference
    rows = [Row(name, METHODS[name].title) for name in METHODS if name in wanted]
    device = fill(rows, job)
    if args.json:
        print(report.as_json(rows, job, device))
    else:
        report.show(rows, job)
    for path in args.output:
        json = path.suffix.lower() == ".json"
        write(path, f"{report.as_json(rows, job, device)}\n" if json else report.as_page(rows, args.target, job))
    return 0 if any(row.peak is not None for row in rows) else 1


def _job(args: argparse.Namespace) -> Job:
    """What to do: the options, the preset's choices, the defaults. Raises LoadError for options that clash."""
    import torch

    from glcan_fx.bench.job import Job

    preset = preset_of(args)
    if args.memory_budget is None and "budget" in (args.methods or ()):
        raise LoadError("the method 'budget' needs --memory-budget, for example --memory-budget 6GiB")
    gpu = torch.cuda.is_available()
    device = args.device or ("cuda" if gpu else "estimate")
    if device.startswith("cuda") and not gpu:
        raise LoadError(f"--device {device}: PyTorch finds no CUDA device here; cpu and estimate work anywhere")
    if args.largest_batch and not device.startswith("cuda"):
        raise LoadError(f"--largest-batch needs --device cuda; here it is {device}")
    return Job(
        target=preset.target, kwargs=dict(preset.kwargs), inputs=list(map(list, preset.inputs)), dtype=args.input_dtype,
        task=preset.task, k=preset.k if args.k is None else args.k, memory_budget=args.memory_budget,
        budget_k=args.k or "fewest", compute_budget=args.compute_budget, device=device, optimizer=preset.optimizer,
        amp=args.amp is not None, steps=args.steps, seed=args.seed, largest_batch=args.largest_batch)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|estimate|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"'{text}': choose cuda, cpu or estimate")
    return text
