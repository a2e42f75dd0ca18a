"""What `glcan-fx bench` shows: the table, the JSON file, the page."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
import torchvision
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from glcan_fx import __version__
from glcan_fx.bench.job import Job
from glcan_fx.bench.measured import COMPILE_BUDGET, PRECISION
from glcan_fx.bench.rows import METHODS, Row
from glcan_fx.presets import PRESETS
from glcan_fx.report.comparison import Figure, cells, comparison_table
from glcan_fx.report.page import page
from glcan_fx.units import size

WIDTH = 100  # columns: of the table at most, and where the width is not known


def _console() -> Console:
    console = Console()
    return Console(width=min(console.width, WIDTH) if console.is_terminal else WIDTH)


def show(rows: Sequence[Row], job: Job) -> None:
    """The table and its footnotes on stdout, and how to read it on stderr."""
    console = _console()
    padding = (0, 1) if job.device == "estimate" else (0, 1, 0, 0)
    console.print(comparison_table(*compared(rows, job), padding=padding, pad_edge=False))
    for number, line in enumerate(footnotes(rows), 1):
        console.print(f"[{number}] {line}", markup=False, highlight=False)
    print("\n".join(explanation(rows, job)), file=sys.stderr)


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What the table's numbers in brackets refer to."""
    return list(dict.fromkeys(line for row in rows for line in row.reasons + row.notes))


def compared(rows: Sequence[Row], job: Job) -> tuple[list[str], list[list[str]]]:
    """The table's columns and cells: each method's figures, and their ratios to backpropagation's."""
    name, unit, digits = _unit(rows)
    reference = next((row for row in rows if row.method == "bp"), None)
    figures: list[Figure[Row]] = [
        Figure(f"estimated\npeak {name}", digits, lambda row: _in(row.estimated, unit)),
        Figure("\ncompute", "", lambda row: row.flops),
    ]
    if job.device != "estimate":
        figures += [
            Figure(f"measured\npeak {name}", digits, lambda row: _in(row.measured, unit)),
            Figure("step\nms", ".0f" if (reference and reference.step_seconds or 1) > 0.1 else ".1f",
                   lambda row: _in(row.step_seconds, 1e-3)),
            Figure("images\n/s", ".1f", lambda row: row.images_per_second, ratio=False),
        ]
    if job.largest_batch:
        figures.append(Figure("largest\nbatch", ".0f", lambda row: row.largest_batch))
    notes = footnotes(rows)
    named = [(row.title + "".join(f" [{notes.index(line) + 1}]" for line in dict.fromkeys(row.reasons + row.notes)),
              row) for row in rows]
    return cells(named, figures, reference)


def _unit(rows: Sequence[Row]) -> tuple[str, int, str]:
    """Of memory, so that the largest is easily read: name, bytes, format."""
    largest = max((row.peak or 0 for row in rows), default=0)
    return ("GiB", 2**30, ".2f") if largest >= 2**30 else ("MiB", 2**20, ".0f" if largest >= 100 * 2**20 else ".1f")


def _in(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def explanation(rows: Sequence[Row], job: Job) -> list[str]:
    """What the figures are, in a few lines."""
    amp = ", autocast to bfloat16" if job.amp else ""
    lines = [
        f"{job.target}, {job.sizes} {job.dtype}, {job.optimizer}{amp}.",
        "Estimated: live tensor bytes of a step simulated on fake tensors, without library workspaces.",
        "Compute: floating-point operations of convolutions, matrix products and attention.",
    ]
    if job.device != "estimate":
        how = ("torch.cuda.max_memory_allocated" if job.device.startswith("cuda") else
               "live tensor bytes (glcan_fx.peak_memory.PeakMemory)")
        lines += [f"Measured: {how}.",
                  f"Step: median of {job.steps} after a warm-up; every method runs in its own process."]
    if job.largest_batch:
        lines.append(f"Largest batch: to within 1/{PRECISION}.")
    if job.task is None:
        lines.append("No --task: the loss is the mean square of the outputs, a stand-in for yours.")
    if any(row.method in ("glcan", "budget") and row.peak for row in rows):
        lines.append("glcan trains with local gradients; the others compute those of backpropagation.")
    return lines


def lists() -> None:
    """The presets and the methods."""
    console = _console()
    presets = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("preset", "model", "input", "k", "optimizer"):
        presets.add_column(title, overflow="fold")
    for name, preset in PRESETS.items():
        sizes = ", ".join("x".join(map(str, size)) for size in preset.inputs)
        arguments = ", ".join(f"{key}={value}" for key, value in preset.kwargs.items())
        presets.add_row(name, f"{preset.target}({arguments})", sizes, str(preset.k), preset.optimizer)
    methods = Table("method", "", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name, method in METHODS.items():
        methods.add_row(name, method.explained)
    console.print(presets)
    console.print(methods)


def as_json(rows: Sequence[Row], job: Job, device: str) -> str:
    """All figures of the run as JSON; memory in bytes, time in seconds."""
    return json.dumps({
        "format": "glcan_fx.bench", "version": 1, "device": device, "seed": job.seed, "job": asdict(job),
        "compile_memory_budget": COMPILE_BUDGET,
        "versions": {"glcan_fx": __version__, "python": platform.python_version(), "torch": str(torch.__version__),
                     "torchvision": str(torchvision.__version__)},
        "methods": [asdict(row) for row in rows],
    }, indent=1)


def as_page(rows: Sequence[Row], name: str, job: Job) -> str:
    """One HTML page that needs nothing else: what every method's memory is made of, over a step, and the table."""
    reference = next((row.estimated for row in rows if row.method == "bp"), None)
    flops = next((row.flops for row in rows if row.method == "bp"), None)
    steps = [{"name": row.title, "peak": row.estimated, "when": row.when or "",
              "peak_text": size(row.estimated) + (f" ({row.estimated / reference:.2f})" if reference else ""),
              "compute": f"compute {row.flops / flops:.2f}" if row.flops and flops else "compute –",
              "parts": [[part, count, size(count)] for part, count in sorted(row.parts.items(), key=lambda x: -x[1])],
              "live": row.curve, "phases": []}
             for row in rows if row.curve and row.parts and row.estimated]
    columns, lines = compared(rows, job)
    return page({
        "title": name, "subtitle": f"training methods compared, {job.sizes}", "graphs": [], "modules": [], "report": [],
        "memory": {"text": "Peak memory of a training step, simulated", "steps": steps} if steps else None,
        "table": {"columns": [{"name": title.strip(), "align": "left" if title == "method" else "right"}
                              for title in columns], "rows": lines, "totals": []},
        "notes": [*(f"[{number}] {line}" for number, line in enumerate(footnotes(rows), 1)), *explanation(rows, job)],
    })
