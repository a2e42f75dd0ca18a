"""A table of methods: each figure, and its ratio to that of a reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table

T = TypeVar("T")


@dataclass(frozen=True)
class Figure(Generic[T]):
    """A column of a table with a ``T`` per row. of: the value, None where it is not known; form: its format, "" to
    show only the ratio; ratio: whether its ratio to the reference is shown; unknown: what stands for None."""

    title: str
    form: str
    of: Callable[[T], float | None]
    ratio: bool = True
    unknown: str = "–"


def cells(
    rows: Sequence[tuple[str, T]], figures: Sequence[Figure[T]], reference: T | None
) -> tuple[list[str], list[list[str]]]:
    """Columns and cells as text. rows: a method's name and what it cost; reference: the row that ratios are to."""
    columns = ["method"]
    for figure in figures:
        ratio = figure.ratio and reference is not None
        columns += [figure.title] * bool(figure.form) + [
            "vs\nBP" if figure.form else f"{figure.title}\nvs BP".strip()] * ratio
    lines = []
    for name, row in rows:
        line = [name]
        for figure in figures:
            value, base = figure.of(row), None if reference is None else figure.of(reference)
            if figure.form:
                line.append(figure.unknown if value is None else format(value, figure.form))
            if figure.ratio and reference is not None:
                line.append("" if value is None or not base else f"{value / base:.2f}")
        lines.append(line)
    return columns, lines


def comparison_table(columns: Sequence[str], lines: Sequence[Sequence[str]], **options: Any) -> Table:
    """The cells for a terminal; options: rich's."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, **options)
    for title in columns:
        table.add_column(title, justify="right" if title != "method" else "left", no_wrap=True,
                         style="cyan" if "BP" in title else "")
    for first, *others in lines:
        table.add_row(first.replace("[", r"\["), *others)
    return table
