"""Show a frontier as a table, as text, and for the report's plot."""

from collections.abc import Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from glcan_fx.planner.frontier import Point
from glcan_fx.units import size

TITLE = "Trade-offs: memory of a training step against compute"
HINT = ("Exact: backpropagation's gradients. Fewer local modules train more like backpropagation. To use a row, pass "
        "its peak and compute, rounded up, as memory_budget= and compute_budget=, or call "
        "transform(model, plan=point.plan).")


def columns(points: Sequence[Point]) -> list[str]:
    """The heads of the table's columns."""
    time = ["time"] * any(point.time is not None for point in points)
    return ["plan", "gradients", "peak", "of BP", "compute", *time, "auxiliary networks"]


def rows(points: Sequence[Point]) -> list[list[str]]:
    """The cells of the table, a row for each point."""
    plain = next(point.peak for point in points if point.plan is None)  # backpropagation's
    return [[f"{'▶ ' if point.chosen else ''}{point.name}", "exact" if point.exact else "local", size(point.peak),
             f"{point.peak / plain:.2f}", f"{point.compute:.2f}",
             *([] if point.time is None else [f"{point.time:.2f}"]), _networks(point)] for point in points]


def frontier_table(points: Sequence[Point]) -> Table:
    """A table with a row for each point; the chosen one is marked."""
    table = Table(title=f"{TITLE}, simulated", title_justify="left", box=box.SIMPLE_HEAD, caption=HINT,
                  caption_justify="left")
    for name in columns(points):
        numbers = name in ("peak", "of BP", "compute", "time")
        table.add_column(name, justify="right" if numbers else "left", no_wrap=numbers, overflow="fold",
                         min_width=len("backpropagation") if name == "plan" else None)
    for point, cells in zip(points, rows(points), strict=True):
        table.add_row(*cells, style="bold" if point.chosen else None)
    return table


def frontier_text(points: Sequence[Point], width: int = 120) -> str:
    """The same as plain text."""
    text = StringIO()
    Console(file=text, width=width, color_system=None).print(frontier_table(points), markup=False, emoji=False)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def frontier_data(points: Sequence[Point]) -> dict[str, Any]:
    """For the report's page, as static/report.js describes it."""
    names = columns(points)
    axis = "time" if "time" in names else "compute"
    return {"title": TITLE, "text": HINT, "columns": names, "axis": axis, "rows": rows(points), "points": [
        {"name": point.name, "k": point.k, "exact": point.exact, "peak": point.peak, "compute": point.cost,
         "chosen": point.chosen, "peer": point.plan is None} for point in points]}


def _networks(point: Point) -> str:
    if point.plan is None or point.k == 1:
        return ""
    text = point.plan.method.description(point.plan.modules[0].levels)
    return text.removeprefix("Auxiliary networks: ").removesuffix(".")
