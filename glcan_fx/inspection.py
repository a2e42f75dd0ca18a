"""`glcan-fx inspect`: show how a model would be cut, and what that costs, without training anything."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_model
from .errors import GlcanFxError, LoadError
from .presets import PRESETS, Preset

if TYPE_CHECKING:
    from .plan import Plan

PICTURES = (".svg", ".png", ".pdf")
EPILOG = """examples:
  glcan-fx inspect retinanet-r50
  glcan-fx inspect model.py --input 8x3x224x224 --task classification
  glcan-fx inspect model.py:build --kwargs '{"depth": 50}' -k 17 --input 8x3x512x512 --task detection -o plan.svg

exit codes: 0 done, 1 the model cannot be planned as asked, 2 usage or file error"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `glcan-fx inspect` to `parser`."""
    add_model(parser)
    out = parser.add_argument_group("output")
    out.add_argument("--plan", type=Path, metavar="FILE", help="show this plan (JSON) on the model, not a new one")
    out.add_argument("--json", action="store_true", help="print the plan as JSON instead of the table")
    out.add_argument("-o", "--output", type=_output, metavar="FILE",
                     help="draw it: .svg, .png or .pdf with Graphviz, or .dot; or keep it: .json")


def run(args: argparse.Namespace) -> int:
    """Run the command with the options of `add_arguments`; returns the exit status."""
    if args.output is not None and args.output.suffix in PICTURES and shutil.which("dot") is None:
        raise OSError(f"{args.output}: drawing needs Graphviz's program `dot`, which was not found: apt-get install "
                      "graphviz, or brew install graphviz. A .dot or .json file needs nothing.")
    if not (args.input or args.plan or args.target in PRESETS or args.task == "detection"):
        print(f"glcan-fx inspect: the inputs of '{args.target}' are not known: pass --input, for example --input "
              "8x3x224x224", file=sys.stderr)
        return 2
    plan = _plan(args)
    for line in _notes(plan):
        print(line, file=sys.stderr)
    print(plan.to_json() if args.json else str(plan))
    if args.output is not None:
        _write(plan, args.output)
        print(f"wrote {args.output}", file=sys.stderr)
    return 0


def _plan(args: argparse.Namespace) -> Plan:
    import torch

    from . import compiler
    from .estimate import AnyLoss
    from .plan import Plan
    from .targets import load

    preset = PRESETS.get(args.target) or Preset(args.target, tuple(args.input or ()), args.task)
    model = load(preset.target, {**preset.kwargs, **args.kwargs})
    task = args.task or preset.task
    if args.plan is not None:
        return compiler.transform(model, plan=Plan.from_json(args.plan.read_text()),
                                  task=None if task else AnyLoss()).plan
    sizes = args.input or preset.inputs
    dtype = getattr(torch, args.input_dtype or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise LoadError(f"--input-dtype {args.input_dtype}: no type of PyTorch's; float32 and int64 are")
    examples = tuple(torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    return compiler.plan(
        model, k=args.k or ("natural" if args.memory_budget else preset.k), task=task or AnyLoss(),
        example_inputs=(examples[0] if len(examples) == 1 else examples) if examples else None,
        memory_budget=args.memory_budget, optimizer=args.optimizer or preset.optimizer)


def _notes(plan: Plan) -> list[str]:
    """How the model was captured."""
    report = plan.report
    lines = [f"{plan.model} was captured on rung {report.rung} of 5 (1: as it is; 2: sizes answered; 3: some modules "
             "are opaque; 4: around its trunk; 5: at calls of sub-modules)"]
    lines += [f"  holds while {s.code} is {s.answer} ({s.where})" for s in report.specialisations]
    lines += [f"  opaque: {o.path} ({o.kind}): {o.reason} {o.where}".rstrip() for o in report.opaque]
    return lines + [f"  not kept in training: {line}" for line in report.lost]


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (*PICTURES, ".dot", ".json"):
        raise argparse.ArgumentTypeError(f"'{text}': a file that ends in .svg, .png, .pdf, .dot or .json")
    return path


def _write(plan: Plan, path: Path) -> None:
    import graphviz

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in PICTURES:
        try:
            path.write_bytes(graphviz.Source(plan.to_dot()).pipe(format=path.suffix[1:]))
        except graphviz.CalledProcessError as error:
            raise GlcanFxError(f"`dot` could not draw the plan: {str(error).splitlines()[0]}") from error
    else:
        path.write_text(plan.to_json() if path.suffix == ".json" else plan.to_dot(), encoding="utf-8")
