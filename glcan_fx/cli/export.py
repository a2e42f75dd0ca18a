"""`glcan-fx export`: take the plain model's weights out of a checkpoint of training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glcan_fx.cli.arguments import file_of
from glcan_fx.errors import LoadError

ENDINGS = (".safetensors", ".pt", ".pth")
EPILOG = """examples:
  glcan-fx export output/model_best.pth.tar -o model.safetensors
  glcan-fx export runs/checkpoint.pt --entry ema.module -o model.pt

The output is a state dict for model.load_state_dict(), without auxiliary networks and without the prefixes of
wrappers. exit codes: 0 done, 1 there is no state dict in the file, 2 usage or file error"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `glcan-fx export` to `parser`."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a file written by torch.save, or "
                        ".safetensors: a state dict, or a dict that contains one, from any framework")
    parser.add_argument("-o", "--output", type=file_of(ENDINGS), required=True, metavar="FILE",
                        help="file to write: .safetensors, .pt or .pth")
    parser.add_argument("--entry", metavar="NAME", help="which state dict, if the checkpoint has more than one: "
                        "state_dict_ema, model.ema")
    parser.add_argument("--unsafe", action="store_true", help="also load Python objects, which can run any code: only "
                        "for files that you trust")


def run(args: argparse.Namespace) -> int:
    """Run the command with the options of `add_arguments`; returns the exit status."""
    if args.checkpoint.is_dir():
        raise IsADirectoryError(f"{args.checkpoint} is a folder: what save_pretrained() writes into one is the plain "
                                "model already, as model.safetensors")
    if not args.checkpoint.is_file():
        raise FileNotFoundError(f"{args.checkpoint}: there is no such file")
    from glcan_fx.plans.serialize import prefix_in
    from glcan_fx.step.saving import plain_state_dict

    every = dict(_state_dicts(_loaded(args.checkpoint, args.unsafe)))
    found = {name: state for name, state in every.items() if prefix_in(state) is not None} or every  # or plain ones
    if args.entry is not None and args.entry not in every:
        raise LoadError(f"{args.checkpoint}: no state dict is called '{args.entry}'; there "
                        f"{'is ' if len(every) == 1 else 'are '}{', '.join(map(repr, every)) or 'none'}")
    if not found:
        print(f"glcan-fx export: {args.checkpoint}: there is no state dict in it", file=sys.stderr)
        return 1
    if args.entry is None and len(found) > 1:
        raise LoadError(f"{args.checkpoint} holds {len(found)} state dicts: choose one with --entry "
                        f"{', --entry '.join(found)}")
    state = every[args.entry or next(iter(found))]
    plain = plain_state_dict(state)
    _write(args.output, plain)
    print(f"wrote {args.output}: {len(plain)} tensors{_trained(state)}", file=sys.stderr)
    return 0


def _trained(state: Mapping[str, Any]) -> str:
    """What the state dict says of its plan; nothing of a plain model's, or where the plan was averaged away."""
    from glcan_fx.errors import PlanError
    from glcan_fx.plans.plan import Plan

    try:
        plan = Plan.from_state_dict(state)
    except PlanError:
        return ""
    return f" of {plan.model}, which was trained in {plan.k} local modules"


def _loaded(path: Path, unsafe: bool) -> Any:
    import pickle

    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=not unsafe)
    except pickle.UnpicklingError as error:
        raise LoadError(f"{path} holds Python objects beside tensors, or is no checkpoint: "
                        f"{str(error).splitlines()[0]} If you trust it, pass --unsafe.") from error


def _state_dicts(content: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """State dicts of models, by where they are."""
    from torch import Tensor

    if not isinstance(content, Mapping):
        return
    if content and all(isinstance(key, str) for key in content) and any(
            isinstance(value, Tensor) for value in content.values()):
        yield name, content
        return
    for key, value in content.items():
        yield from _state_dicts(value, f"{name}.{key}" if name else str(key))


def _write(path: Path, state: Mapping[str, Any]) -> None:
    import torch

    from glcan_fx.files import replacing
    from glcan_fx.step.saving import write_weights

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        write_weights(path, state)
        return
    with replacing(path) as file:
        torch.save(dict(state), file)
