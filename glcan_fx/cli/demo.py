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

from glcan_fx.errors import GlcanFxError

if TYPE_CHECKING:
    import torch

    from glcan_fx.demo.data import CocoFolder
    from glcan_fx.demo.train import Outcome, Recipe
    from glcan_fx.planned import PlannedModel

METHODS = {"bp": "BP", "checkpoint": "BP + checkpointing", "glcan": "GLCAN"}
PACKAGES = "torchvision, scikit-learn, pycocotools, tqdm, rich, matplotlib and graphviz"
# option: (with the digits, with --data). The default run takes about three minutes on two CPU cores.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "image_size": (96, 192),
    "steps": (300, 300),
    "batch_size": (16, 8),
    "memory_batch": (128, 32),
    "lr": (2e-3, 2e-3),
    "train_images": (400, None),
    "val_images": (120, 200),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `glcan-fx demo` to `parser`."""

    def usual(key: str) -> str:
        digits, data = (value or "all" for value in DEFAULTS[key])
        return f"({digits})" if digits == data else f"({digits}; with --data {data})"

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="COCO-format detection folder with instances_train.json and instances_val.json (default:"
        " handwritten digits in photographs, composed from scikit-learn's data)",
    )
    data.add_argument("--classes", type=int, choices=(1, 10), default=1, help="of the digits (%(default)s)")
    data.add_argument("--image-size", type=int, metavar="PX", help=f"longer side {usual('image_size')}")
    data.add_argument("--train-images", type=int, metavar="N", help=f"at most {usual('train_images')}")
    data.add_argument("--val-images", type=int, metavar="N", help=f"held out, at most {usual('val_images')}")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, metavar="N", help=f"training steps {usual('steps')}")
    training.add_argument("--batch-size", type=int, metavar="N", help=f"images a step {usual('batch_size')}")
    training.add_argument(
        "--memory-batch",
        type=int,
        metavar="N",
        help=f"images of one more step whose peak memory is measured {usual('memory_batch')}",
    )
    training.add_argument("--lr", type=float, help=f"peak learning rate of AdamW {usual('lr')}")
    training.add_argument("--seed", type=int, default=0, help="of data, weights and order (%(default)s)")
    training.add_argument("--device", default="auto", help="cpu, cuda, ... (auto: cuda if there is one)")
    training.add_argument("--threads", type=int, metavar="N", help="CPU threads (PyTorch's choice)")
    methods = parser.add_argument_group("methods")
    methods.add_argument(
        "--methods",
        default=",".join(METHODS),
        help="which to run, comma-separated (%(default)s); checkpoint, activation checkpointing on every"
        " residual block, is measured for a few steps and not trained, because its gradients are those of bp",
    )
    methods.add_argument("-k", "--k", default="fewest",
                         help="local modules: a number, fewest, or natural (%(default)s)")
    methods.add_argument("--head", choices=("full", "light", "lean"), help="auxiliary heads (the compiler's choice)")
    methods.add_argument(
        "--aux-width",
        type=float,
        metavar="W",
        help="width of the auxiliary networks, relative to the model's, 0 to 1 (the compiler's choice)",
    )
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="results go here (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the demo with the options of `add_arguments`; returns the exit status."""
    try:
        _run(args)
    except GlcanFxError as error:
        _note(f"glcan-fx demo: {error}")
        return 2
    except ModuleNotFoundError as error:
        _note(f"glcan-fx demo: the Python package {error.name!r} is missing. The demo needs {PACKAGES}.")
        return 2
    except KeyboardInterrupt:
        _note("\nglcan-fx demo: stopped; no results were written.")
        return 130
    return 0


def _run(args: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    from glcan_fx.demo import report
    from glcan_fx.demo.train import build_model

    begin = time.perf_counter()
    options = _options(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = _device(args.device)
    train_set, val_set = _data(options)
    recipe = _recipe(options, device)
    files: list[Path] = []
    plan = hint = None
    if "glcan" in options["methods"]:  # first, so that an option the compiler refuses fails at once
        plan = _plan(build_model(recipe, len(train_set.classes)), options)
        _note(str(plan.simulated()))
        files, hint = report.write_partition(options["out"], plan.to_dot())
    outcomes = [_one(method, plan, train_set, val_set, recipe) for method in options["methods"]]

    Console().print(report.results_table(outcomes, recipe))
    out: Path = options["out"]
    if any(outcome.evaluations for outcome in outcomes):
        files.append(report.write_curves(out / "curves.png", outcomes))
        files.append(report.write_detections(out / "detections.png", outcomes, val_set))
    seconds = time.perf_counter() - begin
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "k": plan.k if plan else None,
        "images": {"train": len(train_set), "val": len(val_set)},
        "classes": train_set.classes,
        "seconds": round(seconds, 1),
    }
    files.append(report.write_results(out / "results.json", outcomes, options, facts))
    _note(report.explanation(outcomes, recipe))
    if hint:
        _note(hint)
    _note(f"Wrote, after {seconds:.0f} s:" + "".join(f"\n  {file}" for file in files))


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
    measure_only = method == "checkpoint"
    try:
        outcome = train(
            method, title, model, train_set, val_set, recipe, measure_only=measure_only, say=_note
        )
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"{title}: {recipe.device} is out of memory. Lower --batch-size (now {recipe.batch_size}),"
            f" --memory-batch ({recipe.memory_batch}) or --image-size ({recipe.image_size})."
        ) from error
    # The next method's peak must not contain this one's weights.
    del model
    gc.collect()
    if recipe.device.type == "cuda":
        torch.cuda.empty_cache()
    return outcome


def _plan(model: torch.nn.Module, options: dict[str, Any]) -> PlannedModel:
    import torch

    import glcan_fx

    size, k = options["image_size"], options["k"]
    method = glcan_fx.methods.GLCAN(head=options["head"], width=options["aux_width"])
    # Sizes only, so that the plan's byte counts are those of this run.
    images = torch.empty(max(options["batch_size"], 2), 3, size, size, device="meta")
    k = int(k) if k.isdecimal() else k
    return glcan_fx.plan(model, k=k, task="detection", example_inputs=images, method=method)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The options with the defaults that depend on the data filled in, checked."""
    from glcan_fx.demo.images import DataError

    options = vars(args) | {"methods": [name.strip() for name in args.methods.split(",") if name.strip()]}
    for key, choices in DEFAULTS.items():
        if options[key] is None:
            options[key] = choices[args.data is not None]
        if options[key] is not None and options[key] <= 0:
            raise DataError(f"--{key.replace('_', '-')} {options[key]}: give a number above 0.")
    unknown = [name for name in options["methods"] if name not in METHODS]
    if unknown or not options["methods"]:
        raise DataError(f"--methods {args.methods}: choose from {', '.join(METHODS)}, separated by commas.")
    options["methods"] = [name for name in METHODS if name in options["methods"]]
    if args.threads is not None and args.threads < 1:
        raise DataError(f"--threads {args.threads}: give a number above 0.")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {args.out}: cannot make this folder: {error.strerror}.") from error
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    # The namespace may hold other things of the command line.
    return {key: options[key] for key in vars(parser.parse_args([]))}


def _device(name: str) -> torch.device:
    import torch

    from glcan_fx.demo.images import DataError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise DataError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _data(options: dict[str, Any]) -> tuple[CocoFolder, CocoFolder]:
    """Training and held-out images."""
    from glcan_fx.demo.data import CocoFolder

    size, folder = options["image_size"], options["data"]
    if folder is None:
        from glcan_fx.demo.digits import DigitSettings, compose_digits

        folder = options["out"] / "data"
        settings = DigitSettings(
            train=options["train_images"],
            val=options["val_images"],
            image_size=size,
            classes=options["classes"],
            seed=options["seed"],
        )
        written = compose_digits(folder, settings)
        _note(f"{'Composed' if written else 'Found'} {folder}: handwritten digits in photographs.")
    flip = options["data"] is not None  # a mirrored digit is no digit
    train_set = CocoFolder(folder, "train", image_size=size, flip=flip, limit=options["train_images"])
    val_set = CocoFolder(folder, "val", image_size=size, limit=options["val_images"])
    for dataset in (train_set, val_set):
        _note(f"{dataset.summary()}.")
    _note(f"Longer side {size} pixels, {len(train_set.classes)} classes.")
    return train_set, val_set


def _recipe(options: dict[str, Any], device: torch.device) -> Recipe:
    from glcan_fx.demo.train import Recipe, anchors_for_any_object, anchors_for_digits

    digits, size = options["data"] is None, options["image_size"]
    return Recipe(
        image_size=size,
        anchor_sizes=anchors_for_digits(size) if digits else anchors_for_any_object(size),
        aspect_ratios=(1.4,) if digits else (0.5, 1.0, 2.0),
        steps=options["steps"],
        batch_size=options["batch_size"],
        memory_batch=options["memory_batch"],
        lr=options["lr"],
        seed=options["seed"],
        device=device,
    )


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
