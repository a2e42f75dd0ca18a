"""Options that several commands have, and how their values are read. Only light imports: help shows at once."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from glcan_fx.errors import LoadError, PlanError
from glcan_fx.presets import PRESETS, Preset
from glcan_fx.units import in_bytes


def add_model(parser: argparse.ArgumentParser, *, optional: bool = False) -> Any:
    """Add what names a model, its inputs and its task; returns the group of training options."""
    parser.add_argument("target", nargs="?" if optional else None, metavar="MODEL",
                        help="a preset, file.py, file.py:attribute, or package.module:attribute: a torch.nn.Module, "
                        "or a class or function that makes one")
    model = parser.add_argument_group("model")
    model.add_argument("--kwargs", type=kwargs_of, default={}, metavar="JSON",
                       help="arguments of the class or function")
    model.add_argument("--input", type=sizes_of, action="append", metavar="8x3x800x1066",
                       help="shape of an input, batch first; once for each positional input")
    model.add_argument("--input-dtype", type=dtype_of, default="float32", metavar="TYPE",
                       help="dtype of the inputs (%(default)s)")
    model.add_argument("--task", metavar="NAME", help="detection, classification, segmentation or super_resolution; "
                       "default: the loss is the mean square of the outputs")
    training = parser.add_argument_group("training")
    training.add_argument("-k", type=modules_of, metavar="K", help="number of local modules: a number; natural, one "
                          "per block; fewest, as few as possible in about the memory of natural (default: fewest, or "
                          "the preset's)")
    training.add_argument("--memory-budget", type=budget_of, metavar="6GiB",
                          help="plan for a training step that fits in this much memory: without -k, with the fewest "
                          "local modules; least: as little memory as possible")
    training.add_argument("--compute-budget", type=float, metavar="1.3", help="compute that a step may take, relative "
                          "to backpropagation")
    training.add_argument("--optimizer", choices=("sgd", "adam"), help="sgd (with momentum) or adam (default: sgd, or "
                          "the preset's)")
    return training


def preset_of(args: argparse.Namespace, *, inputs_known: bool = False) -> Preset:
    """The model that ``add_model``'s options name, and what they say of it, in place of the preset's choices.

    inputs_known: the sizes of the inputs are known from elsewhere. Raises LoadError where they are not known, or the
    batch is missing.
    """
    preset = PRESETS.get(args.target) or Preset(args.target, (), None)
    inputs = tuple(args.input or preset.inputs)
    if not inputs and not inputs_known:
        if ":" not in args.target and not args.target.endswith(".py"):
            from glcan_fx.models.load import not_a_model

            raise LoadError(not_a_model(args.target))
        raise LoadError(f"the input sizes of '{args.target}' are not known: pass --input, for example "
                        "--input 8x3x224x224")
    task = args.task or preset.task
    for size in args.input or ():
        if task in _OF_IMAGES and len(size) == 3 and size[0] <= 4:
            text = "x".join(map(str, size))
            raise LoadError(f"--input {text} has no batch dimension: the first number is the batch size, as in "
                            f"8x{text}")
    return replace(preset, kwargs={**preset.kwargs, **args.kwargs}, inputs=inputs, task=task,
                   optimizer=args.optimizer or preset.optimizer)


_OF_IMAGES = ("detection", "classification", "segmentation", "super_resolution")


def add_output(parser: Any, endings: Collection[str], text: str) -> None:
    """Add -o, which may be given several times; the ending of a file decides what is written."""
    parser.add_argument("-o", "--output", type=file_of(endings), action="append", default=[], metavar="FILE",
                        help=f"{text}; may be given several times")


# ---------------------------------------------------------------------------------------------- values


def kwargs_of(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("""a JSON object of arguments by name, for example '{"num_classes": 3}'""")
    return value


def sizes_of(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a shape: positive integers with x between: 8x3x224x224")
    return tuple(map(int, text.split("x")))


def dtype_of(text: str) -> str:
    import torch

    if not isinstance(getattr(torch, text, None), torch.dtype):
        raise argparse.ArgumentTypeError(f"'{text}' is not a dtype of PyTorch; float32 and int64 are")
    return text


def budget_of(text: str) -> str:
    try:
        in_bytes(text)
    except PlanError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount of memory: 6GiB, 800MiB, 6GB, least, or bytes"
                                         ) from error
    return text


def count_of(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def modules_of(text: str) -> int | str:
    if text not in ("fewest", "natural") and not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"'{text}': give a positive integer, fewest or natural")
    return int(text) if text.isdecimal() else text


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Reads names with commas between them; they come in the order of ``known``."""
    def read(text: str) -> list[str]:
        given = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in given if name not in known]
        if unknown or not given:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'none'}: choose from {', '.join(known)}")
        return [name for name in known if name in given]
    return read


def file_of(endings: Collection[str]) -> Callable[[str], Path]:
    """Reads a file's name, which has one of these endings."""
    def read(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in endings:
            raise argparse.ArgumentTypeError(f"'{text}': the file must end in {', '.join(endings)}")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"'{text}' is a folder: name a file")
        return path
    return read
