"""`glcan-fx export`: take the plain model's weights out of a checkpoint of training."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from glcan_fx.errors import LoadError

ENDINGS = (".safetensors", ".pt", ".pth")
EPILOG = """examples:
  glcan-fx export output/model_best.pth.tar -o model.safetensors
  glcan-fx export runs/checkpoint.pt --entry ema.module -o model.pt

What is written is a state dict that model.load_state_dict() takes, without auxiliary networks and without the prefixes
of wrappers. exit codes: 0 done, 1 there is no state dict of a compiled model in the file, 2 usage or file error"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `glcan-fx export` to `parser`."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what torch.save wrote, or .safetensors: a "
                        "state dict, or a dict that holds one, of any framework")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE",
                        help="write it there: .safetensors, .pt or .pth")
    parser.add_argument("--entry", metavar="NAME", help="which state dict, where the checkpoint has more than one: "
                        "state_dict_ema, model.ema")
    parser.add_argument("--unsafe", action="store_true", help="load Python objects, too, which can run any code: only "
                        "for a file that you trust")


def run(args: argparse.Namespace) -> int:
    """Run the command with the options of `add_arguments`; returns the exit status."""
    if args.output.suffix not in ENDINGS:
        raise LoadError(f"{args.output}: a file that ends in {', '.join(ENDINGS)}")
    if not args.checkpoint.is_file():
        raise FileNotFoundError(f"{args.checkpoint}: there is no such file")
    from glcan_fx.plans.plan import Plan
    from glcan_fx.step.saving import plain_state_dict

    found = dict(_state_dicts(_loaded(args.checkpoint, args.unsafe)))
    if args.entry is not None and args.entry not in found:
        raise LoadError(f"{args.checkpoint}: no state dict of a compiled model is called '{args.entry}'; there "
                        f"{'is ' if len(found) == 1 else 'are '}{', '.join(map(repr, found)) or 'none'}")
    if not found:
        print(f"glcan-fx export: {args.checkpoint}: there is no state dict of a compiled model in it: none has the key "
              "'aux.plan'. One of a plain model, or of one local module, needs no export.", file=sys.stderr)
        return 1
    if args.entry is None and len(found) > 1:
        raise LoadError(f"{args.checkpoint} holds {len(found)} state dicts: choose one with --entry "
                        f"{', --entry '.join(found)}")
    state = found[args.entry or next(iter(found))]
    plain = plain_state_dict(state)
    _write(args.output, plain)
    plan = Plan.from_state_dict(state)
    print(f"wrote {args.output}: {len(plain)} tensors of {plan.model}, which was trained in {plan.k} local modules",
          file=sys.stderr)
    return 0


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
    """State dicts of compiled models, by where they are."""
    if not isinstance(content, Mapping):
        return
    from glcan_fx.plans.serialize import prefix_in

    keys = [key for key in content if isinstance(key, str)]
    if len(keys) == len(content) and prefix_in(content) is not None:
        yield name, content
        return
    for key, value in content.items():
        yield from _state_dicts(value, f"{name}.{key}" if name else str(key))


def _write(path: Path, state: Mapping[str, Any]) -> None:
    import torch
    from safetensors.torch import save

    from glcan_fx.files import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        if path.suffix == ".safetensors":  # which holds no tensor under two names
            file.write(save({key: value.detach().clone().contiguous() for key, value in state.items()}))
        else:
            torch.save(dict(state), file)
