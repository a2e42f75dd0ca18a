"""The command line: ``glcan-fx inspect``, ``bench``, ``check``, ``export`` and ``demo``."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from glcan_fx import __version__
from glcan_fx.cli import bench, check, demo, export
from glcan_fx.cli import inspect as inspection
from glcan_fx.errors import GlcanFxError, LoadError

COMMANDS: dict[str, tuple[Any, str]] = {
    "demo": (demo, "train a small detector with backpropagation and with glcan_fx, and compare"),
    "inspect": (inspection, "show how a model would be split into local modules, and what that costs"),
    "bench": (bench, "compare memory and speed of training methods on your own model"),
    "check": (check, "read a detection data set as the training programs do, and summarise it"),
    "export": (export, "extract the plain model's weights from a training checkpoint"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Exit codes: 0 done, 1 it cannot be done as asked (stderr says why), 2 usage or file error."""
    parser = argparse.ArgumentParser(
        prog="glcan-fx",
        description="Train vision models in less memory: gradient-isolated local modules, built by a compiler.",
        epilog="example: glcan-fx demo --data my-coco-folder --steps 500",
    )
    parser.add_argument("--version", action="version", version=f"glcan-fx {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the compiler decides")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, said) in COMMANDS.items():
        part = commands.add_parser(name, help=said, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   epilog=getattr(module, "EPILOG", None))
        module.add_arguments(part)
        part.set_defaults(run=module.run)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot print a character still shows the rest
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO if options.verbose else logging.WARNING,
                        format="%(name)s: %(message)s")
    try:
        status = int(options.run(options))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, LoadError) as error:
        print(f"glcan-fx: {error}", file=sys.stderr)
        return 2
    except GlcanFxError as error:
        print(f"glcan-fx: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("glcan-fx: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
