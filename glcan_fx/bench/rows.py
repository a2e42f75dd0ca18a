"""Rows of a comparison, and the processes that fill them. Light imports only: the command line's help needs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from glcan_fx.errors import GlcanFxError, LoadError

if TYPE_CHECKING:
    from glcan_fx.bench.job import Job

EXACT_COMPUTE = 1.34
"""What an exact plan may take, relative to backpropagation's compute: about one forward pass more, as checkpointing of
every block takes."""


class Method(NamedTuple):
    """How a method is called in the table, and what `--list` says of it."""

    title: str
    explained: str


METHODS = {
    "bp": Method("backpropagation", "a plain training step: what the others are compared with"),
    "checkpoint": Method("checkpoint", "torch.utils.checkpoint on every block"),
    "nested": Method("nested checkpoint", "groups of sqrt(n) blocks are recomputed, and every block inside again"),
    "selective": Method("selective checkpoint", "convolutions and matrix products are kept, the rest of every block is "
                        "recomputed"),
    "offload": Method("save_on_cpu",
                      "torch.autograd.graph.save_on_cpu: what is saved for backward moves to main memory"),
    "accumulate": Method("accumulation", "gradient accumulation over micro-batches of one image"),
    "compile": Method("torch.compile", "torch.compile with activation_memory_budget = 0.5"),
    "exact": Method("glcan_fx, exact", "backpropagation's gradients: glcan_fx chooses which blocks are recomputed, for "
                    f"the least memory at {EXACT_COMPUTE} of the compute (or --compute-budget)"),
    "glcan": Method("glcan", "gradient-isolated local modules, as glcan_fx plans them"),
    "budget": Method("glcan, budget", "the same, planned for --memory-budget"),
}
OURS = ("exact", "glcan", "budget")
"""Methods that are plans."""
# glibc gives large freed blocks back to the system, and each page that returns is a fault: a method that frees more
# would look slower than it is. CUDA's allocator keeps what is freed.
_KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(2**36), "MALLOC_MMAP_THRESHOLD_": str(2**36)}


@dataclass
class Row:
    """One method. Memory in bytes: estimated, measured, reserved (by CUDA's allocator). flops: of a step. parts: what
    the estimated peak is made of, when: what runs then. curve: bytes over a step. None: not known; reasons say why."""

    method: str
    title: str
    estimated: int | None = None
    flops: int | None = None
    measured: int | None = None
    reserved: int | None = None
    step_seconds: float | None = None
    images_per_second: float | None = None
    largest_batch: int | None = None
    k: int | None = None
    when: str | None = None
    parts: dict[str, int] | None = None
    curve: list[int] | None = None
    notes: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def update(self, message: dict[str, Any]) -> None:
        """Take over what a process found out."""
        self.notes += [note for note in message.pop("notes", ()) if note not in self.notes]
        self.reasons += [reason for reason in message.pop("reasons", ()) if reason not in self.reasons]
        vars(self).update({key: value for key, value in message.items() if key in vars(self)})
        if self.k is not None and self.method != "exact":
            self.title = f"{METHODS[self.method].title}, k={self.k}"

    @property
    def peak(self) -> int | None:
        """Bytes, measured where they are."""
        return self.estimated if self.measured is None else self.measured


def fill(rows: Sequence[Row], job: Job) -> str:
    """Simulate and measure every method; returns the name of the device. Raises GlcanFxError where the model cannot be
    used at all."""
    from tqdm import tqdm

    by_name, device, blocks = {row.method: row for row in rows}, job.device, []
    real = job.device != "estimate"
    # disable=None: no bar unless stderr is a terminal
    with tqdm(total=len(rows) * (1 + real), desc="simulating", unit="method", file=sys.stderr, disable=None) as bar:
        for message in _process(job, list(by_name), measure=False):
            if "blocks" in message:
                blocks = message["blocks"]
                continue
            by_name[message["method"]].update(message)
            bar.update()
        for row in rows if real else ():
            bar.set_description(row.title)
            for message in _process(job, [row.method], measure=True, blocks=blocks):
                device = message.get("device", device)
                row.update(message)
            bar.update()
    return device


def _process(
    job: Job, methods: Sequence[str], *, measure: bool, blocks: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The messages of a fresh process that simulates or measures methods."""
    command = [sys.executable, "-m", "glcan_fx.bench.methods"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                          env={**_KEEP_FREED, **os.environ}) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            json.dump({"job": asdict(job), "methods": methods, "measure": measure, "blocks": blocks}, process.stdin)
            process.stdin.close()
            left = list(methods)
            for line in process.stdout:
                message = json.loads(line)
                if "fatal" in message:
                    raise (LoadError if message["usage"] else GlcanFxError)(message["fatal"])
                if "method" in message:
                    left.remove(message["method"])
                yield message
            for name in left:
                yield {"method": name, "reasons": [_died(process.wait())]}
        finally:
            process.kill()


def _died(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}; see its output above"
    name = signal.Signals(-code).name
    hint = ": probably main memory ran out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}"
