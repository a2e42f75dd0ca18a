"""What the demo shows at the end: the table and the files."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib import figure as plots
from matplotlib.axes import Axes
from rich.table import Table
from torchvision.utils import draw_bounding_boxes

from glcan_fx.demo.data import CocoFolder
from glcan_fx.demo.train import MIB, Outcome, Recipe
from glcan_fx.files import write, write_figure
from glcan_fx.report.comparison import Figure, cells, comparison_table

COLOURS = {"bp": "tab:blue", "checkpoint": "tab:green", "glcan": "tab:orange"}
TRUTH_COLOUR, PREDICTION_COLOUR = (0, 230, 0), (255, 60, 200)
SHOWN_SCORE = 0.4  # predictions below this are not drawn


def results_table(outcomes: Sequence[Outcome], recipe: Recipe) -> Table:
    """One row per method, each figure followed by its ratio to BP's where BP ran."""
    bp = next((outcome for outcome in outcomes if outcome.method == "bp"), None)
    as_bp = "as BP" if bp else "–"  # a method without AP was only measured: its gradients are BP's
    # Units stand in the header so that the table fits 80 columns, what rich assumes when the output is piped.
    figures: list[Figure[Outcome]] = [
        Figure(f"peak MiB\nbatch {recipe.batch_size}", ".0f", lambda outcome: outcome.peak_bytes / MIB),
        Figure(f"peak MiB\nbatch {recipe.memory_batch}", ".0f", lambda outcome: outcome.large_peak_bytes / MIB),
        Figure("step\nms", ".0f", lambda outcome: outcome.step_seconds and outcome.step_seconds * 1000),
        Figure("\nAP", ".3f", lambda outcome: score(outcome, "AP"), unknown=as_bp),
        Figure("\nAP50", ".3f", lambda outcome: score(outcome, "AP50"), unknown=as_bp),
    ]
    return comparison_table(*cells([(outcome.title, outcome) for outcome in outcomes], figures, bp), padding=0)


def score(outcome: Outcome, name: str) -> float | None:
    """AP or AP50 after the last step, None for a method that was not trained."""
    return outcome.evaluations[-1][name] if outcome.evaluations else None


def explanation(outcomes: Sequence[Outcome], recipe: Recipe) -> str:
    """What the table's numbers are, in a few lines."""
    cuda = recipe.device.type == "cuda"
    how = "torch.cuda.max_memory_allocated" if cuda else "live tensor bytes (glcan_fx.peak_memory.PeakMemory)"
    resident = ", ".join(f"{outcome.title} {outcome.resident_bytes / MIB:.0f} MiB" for outcome in outcomes)
    lines = [
        f"Peak memory: {how} of a training step. Of it, weights and optimizer state: {resident}.",
        "Step time: median of forward, backward and optimizer. AP: COCO's, by pycocotools, held-out images.",
    ]
    if any(outcome.method == "checkpoint" for outcome in outcomes):
        lines.append("BP + checkpointing was measured for a few steps, not trained: its gradients are BP's.")
    return "\n".join(lines)


def write_curves(path: Path, outcomes: Sequence[Outcome]) -> Path:
    """Loss over steps, and AP and AP50 at the evaluation points, of the methods that were trained.

    The loss is that of the detector's own head, which all methods have; local losses come on top of it.
    """
    trained = [outcome for outcome in outcomes if outcome.evaluations]
    figure = plots.Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for outcome in trained:
        colour = COLOURS[outcome.method]
        steps = range(1, len(outcome.head_losses) + 1)
        left.plot(steps, outcome.head_losses, color=colour, alpha=0.25, linewidth=1)
        left.plot(steps, _smooth(outcome.head_losses), color=colour, linewidth=2, label=outcome.title)
        for name, style in (("AP50", "--"), ("AP", "-")):
            right.plot([each["step"] for each in outcome.evaluations], [each[name] for each in outcome.evaluations],
                       style, color=colour, marker="o", label=f"{outcome.title}: {name}")
    left.set(title="Training loss of the detector's own head", xlabel="step", ylabel="loss (log scale)")
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    right.set(title="Held-out images", xlabel="step", ylabel="average precision", ylim=(0, 1))
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    write_figure(path, figure)
    return path


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without a start-up bias."""
    total, norm, smooth = 0.0, 0.0, []
    for value in values:
        total, norm = total * weight + value, norm * weight + 1
        smooth.append(total / norm)
    return smooth


def write_detections(path: Path, outcomes: Sequence[Outcome], dataset: CocoFolder, count: int = 6) -> Path:
    """The same held-out images once per trained method: predicted boxes with scores, and the truth."""
    trained = [outcome for outcome in outcomes if outcome.detections]
    chosen = [round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(min(count, len(dataset)))]
    figure = plots.Figure(figsize=(2.6 * len(chosen), 2.75 * len(trained) + 0.4), layout="constrained")
    axes = figure.subplots(len(trained), len(chosen), squeeze=False)
    for outcome, row in zip(trained, axes, strict=True):
        for index, cell in zip(chosen, row, strict=True):
            image, target = dataset[index]
            found = outcome.detections[target["image_id"]]
            kept = found["scores"] >= SHOWN_SCORE
            zoom = max(1, round(384 / max(image.shape[-2:])))  # thin lines need more pixels than the detector
            large = torch.nn.functional.interpolate(image[None], scale_factor=zoom, mode="bilinear")[0]
            for boxes, colour in ((target["boxes"], TRUTH_COLOUR), (found["boxes"][kept], PREDICTION_COLOUR)):
                if len(boxes):
                    large = draw_bounding_boxes(large.clamp(0, 1), boxes * zoom, colors=colour, width=3)
            cell.imshow(large.permute(1, 2, 0).numpy())
            cell.axis("off")
            _write_scores(cell, dataset, found, kept, zoom)
        row[0].set_title(f"{outcome.title} (AP50 {score(outcome, 'AP50'):.3f})", loc="left", fontsize=11)
    figure.suptitle(f"green: truth, pink: detections with score >= {SHOWN_SCORE}", fontsize=11)
    write_figure(path, figure)
    return path


def _write_scores(
    cell: Axes, dataset: CocoFolder, found: dict[str, torch.Tensor], kept: torch.Tensor, zoom: int
) -> None:
    """Score (and class, where there are several) inside each drawn box."""
    style = {"facecolor": [c / 255 for c in PREDICTION_COLOUR], "edgecolor": "none", "pad": 1}
    columns = (found[key][kept].tolist() for key in ("boxes", "scores", "labels"))
    for (x, y, *_), confidence, label in zip(*columns, strict=True):
        name = f"{dataset.classes[label]} " if len(dataset.classes) > 1 else ""
        text = f"{name}{confidence:.2f}"
        cell.text(x * zoom, y * zoom, text, fontsize=7, va="top", bbox=style, clip_on=True)


def write_results(path: Path, outcomes: Sequence[Outcome], **facts: Any) -> Path:
    """All numbers of the run as JSON, with ``facts`` of it; memory in bytes, time in seconds."""
    methods = {outcome.method: {**asdict(replace(outcome, detections={})), "AP": score(outcome, "AP"),
                                "AP50": score(outcome, "AP50")} for outcome in outcomes}
    versions = {name: version(name) for name in ("torch", "torchvision", "pycocotools")}
    content = {"methods": methods, **facts, "versions": {"python": platform.python_version(), **versions}}
    write(path, json.dumps(content, indent=1, default=str))
    return path
