"""`glcan-fx inspect`: show how a model would be cut, and what that costs, without training anything."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from glcan_fx.cli.arguments import add_model, without_batch
from glcan_fx.errors import LoadError, PlanError, TraceError
from glcan_fx.presets import PRESETS, Preset

if TYPE_CHECKING:
    from torch import nn

    from glcan_fx.planned import PlannedModel

PICTURES = (".svg", ".png", ".pdf")
ENDINGS = (".html", *PICTURES, ".dot", ".json", ".txt")
DEPTHS = ("stages", "modules", "blocks", "operators")
_SHOWN = 12  # calls before an error
EPILOG = """examples:
  glcan-fx inspect retinanet-r50
  glcan-fx inspect torchvision.models:resnet50 --input 8x3x224x224 --task classification -o report.html
  glcan-fx inspect model.py:build --kwargs '{"depth": 50}' -k 17 --input 8x3x512x512 --task detection -o plan.svg

exit codes: 0 done, 1 the model cannot be planned as asked, 2 usage or file error"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `glcan-fx inspect` to `parser`."""
    training = add_model(parser)
    training.add_argument("--method", metavar="NAME", help="glcan (the default), dgl, auglocal, infopro, predsim, man, "
                          "hpff, mlaan, sgr, or several, each the base of the one before: hpff+man+dgl")
    training.add_argument("--ahead", type=int, metavar="N", help="blocks behind its module through which a local loss "
                          "passes")
    training.add_argument("--window", type=int, metavar="N", help="local modules that a local loss trains")
    training.add_argument("--device", metavar="rtx4090", help="plan for the estimated time of a step on this GPU, and "
                          "show it; cpu or cuda: the one at hand, measured (default: floating-point operations alone)")
    training.add_argument("--devices", type=int, metavar="N", help="divide the local modules among so many ranks of a "
                          "pipeline, and show what each needs")
    training.add_argument("--micro-batches", type=int, default=8, metavar="N", help="parts of a batch, of a pipeline "
                          "(%(default)s)")
    out = parser.add_argument_group("output")
    out.add_argument("--plan", type=Path, metavar="FILE", help="show this plan (JSON) on the model, not a new one")
    out.add_argument("--frontier", action="store_true", help="also show what can be had: memory against compute, with "
                     "backpropagation's gradients and with local modules; takes seconds, or minutes for a large model")
    out.add_argument("--json", action="store_true", help="print the plan as JSON instead of the table")
    out.add_argument("-o", "--output", type=_output, action="append", default=[], metavar="FILE",
                     help="write it, as the file's ending says: .html is a report that works offline; .svg, .png or "
                     ".pdf need Graphviz; .dot, .json or .txt; several times for several files")
    out.add_argument("--depth", choices=DEPTHS, help="what the picture shows: local modules that are alike as one "
                     "(stages), every local module, its blocks, or its operators (stages for more than 20 modules, "
                     "else modules)")


def run(args: argparse.Namespace) -> int:
    """Run the command with the options of `add_arguments`; returns the exit status."""
    decided = {"-k": args.k, "--memory-budget": args.memory_budget, "--compute-budget": args.compute_budget,
               "--input": args.input, "--optimizer": args.optimizer, "--method": args.method, "--ahead": args.ahead,
               "--window": args.window, "--devices": args.devices}
    clashing = [name for name, value in decided.items() if value is not None]
    if clashing and args.plan is not None:
        raise LoadError(f"{', '.join(clashing)}: the plan of --plan decides that; remove it")
    if args.frontier and args.json:
        raise LoadError("--frontier prints a table, --json the plan alone: remove one of them")
    for path in args.output:
        if path.is_dir():
            raise OSError(f"{path} is a folder: name a file")
        if path.suffix.lower() in PICTURES and shutil.which("dot") is None:
            from glcan_fx.report.dot import NO_DOT

            raise OSError(f"{path}: {NO_DOT}")
    from glcan_fx.models.load import load

    if said := without_batch(args.input, args.task):
        raise LoadError(said)
    preset = PRESETS.get(args.target) or Preset(args.target, tuple(args.input or ()), args.task)
    model = load(preset.target, {**preset.kwargs, **args.kwargs})
    if not (preset.inputs or args.plan or args.task == "detection"):
        print(f"glcan-fx inspect: the inputs of '{args.target}' are not known: pass --input, for example --input "
              "8x3x224x224", file=sys.stderr)
        return 2
    try:
        plan = _plan(args, preset, model)
    except TraceError as error:
        _print_reached(error)
        raise
    notes = (note for note in plan.notes if note not in plan.report.lost)
    for line in dict.fromkeys((*plan.report.lines(plan.plan.model), *notes)):
        print(f"note: {line}", file=sys.stderr)
    if args.json:
        print(plan.to_json())
    else:
        _print(plan)
        if plan.ranks:
            _print_ranks(plan, args.micro_batches, args.optimizer or preset.optimizer)
    if args.frontier:
        _print_frontier(plan)
    for path in args.output:
        plan.save(path, depth=args.depth)
        print(f"wrote {path}", file=sys.stderr)
    return 0


def _print(plan: PlannedModel) -> None:
    """The table, in colour on a terminal that wants it (NO_COLOR is obeyed)."""
    from rich.console import Console

    from glcan_fx.errors import PlanError
    from glcan_fx.report.table import plan_text, print_plan

    console = Console(highlight=False)
    try:
        memory = plan.memory
    except PlanError as error:
        memory = None
        print(f"note: {error}", file=sys.stderr)
    if not console.is_terminal:
        print(plan_text(plan.plan, memory, notes=False))
    else:
        print_plan(plan.plan, memory, console)


def _print_ranks(plan: PlannedModel, micro_batches: int, optimizer: str) -> None:
    from glcan_fx.report.table import ranks_text

    print("\n".join(ranks_text(plan.on_ranks(micro_batches, optimizer), micro_batches)))


def _print_frontier(plan: PlannedModel) -> None:
    from rich.console import Console

    from glcan_fx.report.frontier import frontier_table, frontier_text

    points = plan.frontier
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(frontier_table(points), markup=False, emoji=False)
    else:
        print(frontier_text(points))


def _print_reached(error: TraceError) -> None:
    """What the model called before it failed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    calls = error.reached()
    if calls:
        title = f"the last of {len(calls)} calls before the error" if len(calls) > _SHOWN else "calls before the error"
        table = Table("module", "class", "returned", box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for call in calls[-_SHOWN:]:
            table.add_row(*call)
        Console(stderr=True).print(table, markup=False, emoji=False)


def _plan(args: argparse.Namespace, preset: Preset, model: nn.Module) -> PlannedModel:
    import torch

    from glcan_fx import api
    from glcan_fx.config import Options
    from glcan_fx.plans.plan import Plan
    from glcan_fx.tasks import TASKS, AnyLoss

    task = args.task or preset.task
    if args.plan is not None:
        try:
            given = Plan.from_json(args.plan.read_text(encoding="utf-8"))
        except (PlanError, UnicodeDecodeError) as error:
            raise LoadError(f"{args.plan}: {error}") from error
        if task is not None and task != given.task:
            raise LoadError(f"--task {task}: the plan in {args.plan} is for task {given.task}")
        return api.plan(model, plan=given, task=None if given.task in TASKS else AnyLoss(),
                        options=Options(device=args.device))
    sizes = args.input or preset.inputs
    dtype = getattr(torch, args.input_dtype or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise LoadError(f"--input-dtype {args.input_dtype}: no type of PyTorch's; float32 and int64 are")
    examples = tuple(torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    reach = {name: value for name in ("ahead", "window") if (value := getattr(args, name)) is not None}
    return api.plan(
        model, k=args.k or ("fewest" if args.memory_budget else preset.k), task=task or AnyLoss(),
        example_inputs=(examples[0] if len(examples) == 1 else examples) if examples else None,
        memory_budget=args.memory_budget, compute_budget=args.compute_budget, method=args.method or "glcan", **reach,
        devices=1 if args.devices is None else args.devices,
        options=Options(optimizer=args.optimizer or preset.optimizer, device=args.device))


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in ENDINGS:
        raise argparse.ArgumentTypeError(f"'{text}': a file that ends in {', '.join(ENDINGS)}")
    return path
