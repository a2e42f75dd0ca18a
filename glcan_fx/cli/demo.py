"""`glcan-fx demo`: train one small detector by backpropagation and by local modules, and compare.

Only light imports at module level, so that the command line can show its help without the demo's packages.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glcan_fx.cli.arguments import count_of, modules_of, names_of
from glcan_fx.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from glcan_fx.demo.data import CocoFolder
    from glcan_fx.demo.train import Outcome, Recipe
    from glcan_fx.planned import PlannedModel

METHODS = {"bp": "BP", "checkpoint": "BP + checkpointing", "glcan": "GLCAN"}
# option: (with the digits, with --data). The default run takes about three minutes on two CPU cores.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "image_size": (96, 192), "steps": (300, 300), "batch_size": (16, 8), "memory_batch": (128, 32), "lr": (2e-3, 2e-3),
    "train_images": (400, None), "val_images": (120, 200),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `glcan-fx demo` to `parser`."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="COCO-format detection folder with "
                        "instances_train.json and instances_val.json, or a Pascal VOC folder (default: handwritten "
                        "digits in photographs, composed from scikit-learn's data)")
    for name, said in (("image_size", "longer side of images in pixels"), ("train_images", "training images"),
                       ("val_images", "held-out images"), ("steps", "training steps"), ("batch_size", "batch size"),
                       ("memory_batch", "batch size of one more step, to measure its peak memory")):
        digits, data = (value or "all" for value in DEFAULTS[name])
        usual = f"({digits})" if digits == data else f"({digits}; with --data {data})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=count_of, metavar="N", help=f"{said} {usual}")
    parser.add_argument("--lr", type=float, help=f"peak learning rate of AdamW ({DEFAULTS['lr'][0]})")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and order (%(default)s)")
    parser.add_argument("--device", type=_device, help="cpu, cuda, ... (cuda if there is a GPU)")
    parser.add_argument("--methods", type=names_of(METHODS), default=list(METHODS), metavar="a,b",
                        help=f"which of {', '.join(METHODS)} (all). checkpoint is activation checkpointing of every "
                        "residual block; it is measured for a few steps and not trained: its gradients are those of bp")
    parser.add_argument("-k", "--k", type=modules_of, default="fewest",
                        help="number of local modules: a number, fewest, or natural (%(default)s)")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/demo"), metavar="DIR",
                        help="folder for the results (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the demo with the options of `add_arguments`; returns the exit status."""
    import torch
    from rich.console import Console

    from glcan_fx.demo import report
    from glcan_fx.demo.train import build_model

    begin = time.perf_counter()
    for name, usual in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, usual[args.data is not None])
    args.out.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(args)
    train_set, val_set = _data(args)
    files: list[Path] = []
    plan = None
    if "glcan" in args.methods:
        images = torch.empty(max(args.batch_size, 2), 3, args.image_size, args.image_size, device="meta")
        plan = _planned(build_model(recipe, len(train_set.classes)), args.k, images)
        files += _pictures(plan, args.out)
    outcomes = [_one(method, plan, train_set, val_set, recipe) for method in args.methods]

    Console().print(report.results_table(outcomes, recipe))
    if any(outcome.evaluations for outcome in outcomes):
        files.append(report.write_curves(args.out / "curves.png", outcomes))
        files.append(report.write_detections(args.out / "detections.png", outcomes, val_set))
    seconds = time.perf_counter() - begin
    options = {name: value for name, value in vars(args).items() if name not in ("run", "command", "verbose")}
    files.append(report.write_results(
        args.out / "results.json", outcomes, options=options, device=recipe.device, threads=torch.get_num_threads(),
        k=plan.k if plan else None, images={"train": len(train_set), "val": len(val_set)}, classes=train_set.classes,
        seconds=round(seconds, 1)))
    _note(report.explanation(outcomes, recipe))
    _note(f"Wrote, after {seconds:.0f} s:" + "".join(f"\n  {file}" for file in files))
    return 0


def _one(
    method: str, plan: PlannedModel | None, train_set: CocoFolder, val_set: CocoFolder, recipe: Recipe
) -> Outcome:
    """Train, or only measure, one method from the initial weights."""
    import torch

    from glcan_fx.demo.images import DataError
    from glcan_fx.demo.train import build_model, checkpoint_blocks, train

    model, title = build_model(recipe, len(train_set.classes)), METHODS[method]
    if method == "checkpoint":
        checkpoint_blocks(model)
    elif plan and method == "glcan":
        model, title = plan.build(), f"{title}, k={plan.k}"
    try:
        outcome = train(method, title, model, train_set, val_set, recipe, measure_only=method == "checkpoint",
                        say=_note)
    except torch.OutOfMemoryError as error:
        raise DataError(f"{title}: {recipe.device} is out of memory. Lower --batch-size (now {recipe.batch_size}), "
                        f"--memory-batch ({recipe.memory_batch}) or --image-size ({recipe.image_size}).") from error
    # The next method's peak must not contain this one's weights.
    del model
    gc.collect()
    if recipe.device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome


def _planned(model: torch.nn.Module, k: int | str, images: torch.Tensor) -> PlannedModel:
    import glcan_fx

    plan = glcan_fx.plan(model, k=k, task="detection", example_inputs=images).simulated()
    _note(str(plan))
    return plan


def _pictures(plan: PlannedModel, folder: Path) -> list[Path]:
    """Write partition.dot, and its pictures where Graphviz is installed."""
    files: list[Path] = []
    try:
        for ending in ("dot", "svg", "png"):
            plan.save(folder / f"partition.{ending}")
            files.append(folder / f"partition.{ending}")
    except UnsupportedError as error:
        _note(f"No partition.svg and .png: {error}")
    return files


def _device(name: str) -> str:
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise argparse.ArgumentTypeError(f"'{name}': {str(error).splitlines()[0]}") from error
    return name


def _data(args: argparse.Namespace) -> tuple[CocoFolder, CocoFolder]:
    """Training and held-out images."""
    from glcan_fx.demo.data import CocoFolder

    size, folder = args.image_size, args.data
    if folder is None:
        from glcan_fx.demo.digits import DigitSettings, compose_digits

        folder = args.out / "data"
        written = compose_digits(folder, DigitSettings(args.train_images, args.val_images, size, args.seed))
        _note(f"{'Composed' if written else 'Found'} {folder}: handwritten digits in photographs.")
    flip = args.data is not None  # a mirrored digit is no digit
    train_set = CocoFolder(folder, "train", image_size=size, flip=flip, limit=args.train_images)
    val_set = CocoFolder(folder, "val", image_size=size, limit=args.val_images)
    for dataset in (train_set, val_set):
        _note(f"{dataset.summary()}.")
    _note(f"Longer side {size} pixels, {len(train_set.classes)} classes.")
    return train_set, val_set


def _recipe(args: argparse.Namespace) -> Recipe:
    import torch

    from glcan_fx.demo.train import Recipe, anchors_for_any_object, anchors_for_digits

    digits, size = args.data is None, args.image_size
    return Recipe(
        image_size=size, anchor_sizes=anchors_for_digits(size) if digits else anchors_for_any_object(size),
        aspect_ratios=(1.4,) if digits else (0.5, 1.0, 2.0), steps=args.steps, batch_size=args.batch_size,
        memory_batch=args.memory_batch, lr=args.lr, seed=args.seed,
        device=torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
