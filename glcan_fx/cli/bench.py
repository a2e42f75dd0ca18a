"""`glcan-fx bench`: compare training methods on one model, in one run: memory, compute, time.

Only light imports at module level, so that the command line can show its help at once.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from glcan_fx.bench.rows import METHODS, Fatal, Row, fill
from glcan_fx.cli.arguments import add_model, without_batch
from glcan_fx.files import write
from glcan_fx.presets import PRESETS, Preset

if TYPE_CHECKING:
    from glcan_fx.bench.job import Job

EPILOG = """examples:
  glcan-fx bench tiny
  glcan-fx bench retinanet-r50 --device estimate -o memory.png
  glcan-fx bench train.py:build --kwargs '{"classes": 3}' --input 8x3x512x512 --task segmentation
  glcan-fx bench torchvision.models:resnet50 --input 64x3x224x224 --task classification

exit codes: 0 done, 1 the model cannot be used as asked, 2 usage or file error"""


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
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="print all figures as JSON instead of the table")
    out.add_argument("-o", "--output", type=_output, action="append", default=[], metavar="FILE",
                     help="write it, as the file's ending says: .json has all figures, .png, .svg and .pdf a plot, "
                     ".html a page; several times for several files")


def run(args: argparse.Namespace) -> int:
    """Run the bench with the options of `add_arguments`; returns the exit status."""
    if args.list:
        _list()
        return 0
    problem = _problem(args)
    if problem:
        _note(f"glcan-fx bench: {problem}")
        return 2
    for path in args.output:  # before minutes of work
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: name a file")
    from glcan_fx.bench import report

    job, methods = _job(args)
    rows = [Row(name, METHODS[name]) for name in methods]
    try:
        device = fill(rows, job)
    except Fatal as error:
        _note(f"glcan-fx bench: {error}")
        return error.code
    if args.json:
        print(report.as_json(rows, job, device))
    else:
        report.show(rows, job)
    for path in args.output:
        if path.suffix == ".json":
            write(path, f"{report.as_json(rows, job, device)}\n")
        else:
            draw = report.write_report if path.suffix == ".html" else report.write_plot
            draw(path, rows, args.target, job)
    return 0 if any(row.peak is not None for row in rows) else 1


def _problem(args: argparse.Namespace) -> str | None:
    """What is wrong with options that are right one by one."""
    if args.target is None:
        return "name a model: a preset (see --list), file.py, file.py:attribute or package.module:attribute"
    if args.target not in PRESETS and ":" not in args.target and not args.target.endswith(".py"):
        from glcan_fx.models.load import not_a_model

        return not_a_model(args.target)
    if args.target not in PRESETS and not args.input:
        return (f"'{args.target}' is not a preset (see --list), so its inputs are not known: pass --input, "
                "for example --input 8x3x224x224")
    if said := without_batch(args.input, args.task):
        return said
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

    from glcan_fx.bench.job import Job

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


def _output(text: str) -> Path:
    if Path(text).suffix not in (".json", ".png", ".svg", ".pdf", ".html"):
        raise argparse.ArgumentTypeError(f"'{text}': a file that ends in .json, .png, .svg, .pdf or .html")
    return Path(text)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
