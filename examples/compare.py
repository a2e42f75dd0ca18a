"""Compare local-learning methods on a task: train with each, and print a table.

    python examples/compare.py classification --data DIR --methods glcan "glcan --ahead 1" man+dgl --k natural 4 \\
        --seeds 0 1 -- --limit 10000 --epochs 12
    python examples/compare.py --page docs/methods.md          # the page about the methods

A method is a value of the training program's --method, followed by its options; options after -- are for all runs.
Backpropagation and activation checkpointing run, too. A run that is in --out already is not run again.
docs/make_results.py adds runs to docs/results.md.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from records import EXACT, devices, table
from train_classification import CifarResNet

import glcan_fx
from glcan_fx import methods
from glcan_fx.methods import DGL, GLCAN, HPFF, MAN, Method

ROOT = Path(__file__).parents[1]
TASKS = ("classification", "detection", "segmentation", "super_resolution")
DRAWN: dict[str, Method] = {
    "glcan": GLCAN(), "ahead": GLCAN(ahead=1), "dgl": DGL(), "auglocal": methods.AugLocal(),
    "infopro": methods.InfoPro(), "predsim": methods.PredSim(base="dgl"), "man": MAN(base="dgl"),
    "hpff": HPFF(base="dgl"), "mlaan": methods.MLAAN(), "sgr": methods.SGR()}
"""What the page shows pictures of, by the file's name."""


def runs_of(args: argparse.Namespace, rest: Sequence[str]) -> list[Path]:
    """Train with every method, number of local modules and seed; the runs' folders."""
    folders = []
    for seed in args.seeds:
        for text in (*EXACT, *args.methods):
            name, *options = shlex.split(text)
            for k in [None] if name in EXACT else args.k:
                chosen = [*options, *(["--k", k] if k else []), "--seed", str(seed), *rest]
                words = re.sub("[^a-z0-9.]+", "-", " ".join([name, *chosen]).lower()).strip("-")
                folder = args.out / f"{args.task}-{words}"
                folders.append(folder)
                if (folder / "record.json").exists():
                    continue
                program = ROOT / "examples" / f"train_{args.task}.py"
                state = ["--resume"] if (folder / "checkpoint.pt").exists() else ["--overwrite"]
                command = [sys.executable, program, "--data", *args.data, "--method", name, *chosen, "--out", folder]
                print(f"{name} {' '.join(chosen)}", file=sys.stderr)
                subprocess.run([str(part) for part in [*command, *state]], check=True, stdout=sys.stderr)
    return folders


def paragraphs(kind: type[Method]) -> list[str]:
    """What a method is, by its own docstring; options and what they are published with stand there, too."""
    text = inspect.getdoc(kind) or ""
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    return [block for block in blocks if not block.startswith("Args:") and not block.startswith("Raises ")]


def page(path: Path) -> None:
    """Write the page, and the pictures beside it."""
    lines = [TEXT]
    example = torch.empty(128, 3, 32, 32, device="meta")
    for name, method in DRAWN.items():
        plan = glcan_fx.plan(CifarResNet(20), k=4, task="classification", example_inputs=example, method=method)
        picture = path.parent / "pictures" / f"method-{name}.svg"
        plan.save(picture)
        title = "GLCAN(ahead=1)" if name == "ahead" else type(method).__name__
        lines += [f"### {title}", ""]
        if name == "ahead":
            lines += [AHEAD, ""]
        else:
            lines += [line for block in paragraphs(type(method)) for line in (block, "")]
        lines += [f"![{title} on a ResNet-20 at k=4](pictures/{picture.name})", ""]
    path.write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {path}")


TEXT = """# Methods

Written by `python examples/compare.py --page docs/methods.md`.

`method=` takes a name or an object: `method="man", base="dgl"`, or
`method=glcan_fx.methods.HPFF(base=MAN(base="dgl"))`. Each method is a file in `glcan_fx/methods/`; what one adds,
another may have as its base. All of them work on any network that can be cut: auxiliary networks are made from it.

## Which one

| what you train | what to write | why |
|---|---|---|
| what fits with exact gradients | `memory_budget=...` alone | no local loss is as good as backpropagation's |
| a classifier, few local modules | `k=4, compute_budget=1.3` | richer auxiliary networks |
| a classifier, a module per block | `k="natural", ahead=1` | the loss sees the next block, whose forward is free |
| a detector | `k=2`, or `"fewest"` | the plain method keeps almost all of AP |
| super-resolution, a U-Net | `compute_budget=1.3` | decoders in auxiliary networks |

At equal memory, fewer local modules with the plain method are better than more modules that are coupled. The other
methods are here for comparison, and for what has not been tried yet.

Results of training with them: [results](results.md).

## The methods
"""

AHEAD = (
    "`ahead=r`, an option of every method with its own auxiliary networks: the loss of a local module is computed "
    "after the next r blocks. It does not train these blocks, and their forward pass is the one that the next local "
    "module runs anyway. The cost: gradients of their inputs, and two local modules that are alive at the same time."
    " `window=w` trains the last w local modules with each loss instead, the windows of HPFF without its "
    "patches.")


def main() -> None:
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[:own.index("--")], own[own.index("--") + 1:]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0],
                                     epilog="Options after -- are passed to every run of the training program.")
    parser.add_argument("task", nargs="?", choices=TASKS, help="the program to run; none: only write the page")
    parser.add_argument("--data", type=Path, nargs="+", metavar="DIR", help="as the training program's")
    parser.add_argument("--methods", nargs="+", default=["glcan", "dgl"], metavar="NAME",
                        help='each with options, such as "glcan --ahead 1" (%(default)s)')
    parser.add_argument("--k", nargs="+", default=["natural"], metavar="K", help="(%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], metavar="N", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="their folder (%(default)s)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page: docs/methods.md")
    args = parser.parse_args(own)
    if args.task is None and args.page is None:
        parser.error("nothing to do: give a task, or --page docs/methods.md")
    if args.task is not None:
        if not args.data:
            parser.error("--data is needed")
        folders = runs_of(args, rest)
        found = [json.loads((folder / "record.json").read_text()) for folder in folders]
        print("\n".join([*table(found), devices(found)]))
        print(f"to keep them: python docs/make_results.py {' '.join(map(str, folders))}")
    if args.page is not None:
        page(args.page)


if __name__ == "__main__":
    main()
