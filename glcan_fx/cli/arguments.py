"""Options of the command line that name a model, its inputs and its task. Only light imports: help shows at once."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any


def add_model(parser: argparse.ArgumentParser, *, target_optional: bool = False) -> Any:
    """Add them to ``parser``; returns the group of training options."""
    parser.add_argument("target", nargs="?" if target_optional else None, metavar="MODEL",
                        help="a preset, file.py, file.py:attribute, or package.module:attribute: a torch.nn.Module, "
                        "or a class or function that makes one")
    model = parser.add_argument_group("model")
    model.add_argument("--kwargs", type=kwargs_of, default={}, metavar="JSON",
                       help="arguments of the class or function")
    model.add_argument("--input", type=sizes_of, action="append", metavar="8x3x800x1066",
                       help="size of an input, batch first; once per positional input")
    model.add_argument("--input-dtype", default=None, metavar="TYPE", help="of the inputs (float32)")
    model.add_argument("--task", metavar="NAME", help="detection, classification, segmentation or super_resolution; "
                       "without it, the loss is the mean square of the outputs")
    training = parser.add_argument_group("training")
    training.add_argument("-k", type=modules_of, metavar="K", help="local modules: a number; natural, one per block; "
                          "fewest, those with which a step takes as little memory as that (default: fewest, or the "
                          "preset's)")
    training.add_argument("--memory-budget", type=bytes_of, metavar="6GiB",
                          help="plan for a training step in so much: without -k, the fewest local modules that fit; "
                          "least: in as little as there is")
    training.add_argument("--compute-budget", type=float, metavar="1.3", help="compute that a step may take, beside "
                          "backpropagation's")
    training.add_argument("--optimizer", choices=("sgd", "adam"), help="sgd has momentum (sgd, or the preset's)")
    return training


def kwargs_of(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("""a JSON object of arguments by name, for example '{"num_classes": 3}'""")
    return value


def sizes_of(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size: numbers above 0 with x between, as in 8x3x224x224")
    return tuple(map(int, text.split("x")))


def without_batch(sizes: Sequence[tuple[int, ...]] | None, task: str | None) -> str | None:
    """What is wrong where the size of an image was given without the batch."""
    images = task in ("detection", "classification", "segmentation", "super_resolution")
    for size in sizes or ():
        if images and len(size) == 3 and size[0] <= 4:
            text = "x".join(map(str, size))
            return f"--input {text} has no batch: the first number is how many images a step takes, as in 8x{text}"
    return None


def bytes_of(text: str) -> str:
    from glcan_fx.errors import PlanError
    from glcan_fx.units import in_bytes

    try:
        if text != "least":
            in_bytes(text)
    except PlanError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not an amount of memory: 6GiB, 800MiB, 6GB, least, or bytes"
                                         ) from error
    return text


def modules_of(text: str) -> int | str:
    if text not in ("fewest", "natural") and not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"'{text}': a number above 0, fewest or natural")
    return int(text) if text.isdecimal() else text
