"""`glcan-fx inspect`: show how a model would be cut, and what that costs, without training anything."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from glcan_fx.cli.arguments import add_model, add_output, count_of, preset_of
from glcan_fx.errors import LoadError, PlanError, TraceError

if TYPE_CHECKING:
    from torch import nn

    from glcan_fx.planned import PlannedModel
    from glcan_fx.presets import Preset

PICTURES = (".svg", ".png", ".pdf")
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
    training.add_argument("--ahead", type=int, metavar="N", help="number of next blocks that a local loss passes "
                          "through, without training them")
    training.add_argument("--window", type=int, metavar="N", help="number of local modules that a local loss trains")
    training.add_argument("--device", metavar="rtx4090", help="plan for the estimated time of a step on this GPU, and "
                          "show it; cpu or cuda: the device of this machine, measured (default: plan for "
                          "floating-point operations)")
    training.add_argument("--devices", type=count_of, metavar="N", help="divide the local modules among the N ranks of "
                          "a pipeline, and show what each rank needs")
    training.add_argument("--micro-batches", type=count_of, default=8, metavar="N", help="micro-batches per step of a "
                          "pipeline (%(default)s)")
    out = parser.add_argument_group("output")
    out.add_argument("--plan", type=Path, metavar="FILE", help="show this plan (JSON) for the model, not a new one")
    out.add_argument("--frontier", action="store_true", help="also list the trade-offs: memory against compute, with "
                     "backpropagation's gradients and with local modules; takes seconds, or minutes for a large model")
    out.add_argument("--json", action="store_true", help="print the plan as JSON instead of the table")
    add_output(out, (".html", *PICTURES, ".dot", ".json", ".txt"), "write the plan to a file, in the format of its "
               "ending: .html is a report that works offline; .svg, .png and .pdf need Graphviz; .dot, .json, .txt")
    out.add_argument("--depth", choices=DEPTHS, help="what the picture shows: local modules, identical ones drawn once "
                     "(stages), every local module, its blocks, or its operators (default: stages for more than 20 "
                     "modules, else modules)")


def run(args: argparse.Namespace) -> int:
    """Run the command with the options of `add_arguments`; returns the exit status."""
    decided = ("k", "memory_budget", "compute_budget", "input", "optimizer", "method", "ahead", "window", "devices")
    clashing = [name for name in decided if getattr(args, name) is not None]
    if clashing and args.plan is not None:
        options = ", ".join(f"--{name.replace('_', '-')}".replace("--k", "-k") for name in clashing)
        raise LoadError(f"{options}: the plan of --plan decides that; remove it")
    if args.frontier and args.json:
        raise LoadError("--frontier prints a table, --json only the plan: remove one of them")
    for path in args.output:
        if path.suffix.lower() in PICTURES and shutil.which("dot") is None:
            from glcan_fx.report.dot import NO_DOT

            raise OSError(f"{path}: {NO_DOT}")
    # a plan knows its inputs, and a detector resizes images itself
    preset = preset_of(args, inputs_known=args.plan is not None or args.task == "detection")
    from glcan_fx.models.load import load

    model = load(preset.target, preset.kwargs)
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
            _print_ranks(plan, args.micro_batches, preset.optimizer)
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

    if args.plan is not None:
        try:
            given = Plan.from_json(args.plan.read_text(encoding="utf-8"))
        except (PlanError, UnicodeDecodeError) as error:
            raise LoadError(f"{args.plan}: {error}") from error
        if preset.task is not None and preset.task != given.task:
            raise LoadError(f"--task {preset.task}: the plan in {args.plan} is for task {given.task}")
        return api.plan(model, plan=given, task=None if given.task in TASKS else AnyLoss(),
                        options=Options(device=args.device))
    dtype = getattr(torch, args.input_dtype)
    examples = tuple(torch.empty(size, dtype=dtype, device="meta") for size in preset.inputs)
    reach = {name: value for name in ("ahead", "window") if (value := getattr(args, name)) is not None}
    return api.plan(
        model, k=args.k or ("fewest" if args.memory_budget else preset.k), task=preset.task or AnyLoss(),
        example_inputs=(examples[0] if len(examples) == 1 else examples) if examples else None,
        memory_budget=args.memory_budget, compute_budget=args.compute_budget, method=args.method or "glcan", **reach,
        devices=args.devices or 1, options=Options(optimizer=preset.optimizer, device=args.device))
