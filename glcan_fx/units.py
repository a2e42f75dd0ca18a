"""Amounts of memory, for people and from them."""

import math
import re
from typing import Literal

from glcan_fx.errors import PlanError

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}

_LEAST = 2**16  # bytes


def size(count: int, *, up: bool = False) -> str:
    """Bytes for people; up: no fewer than there are, so that they may be given as a budget."""
    unit, value, digits = "KiB", count / 2**10, 1
    if count >= 2**20:
        unit, value, digits = ("MiB", count / 2**20, 1) if count < 2**30 else ("GiB", count / 2**30, 2)
    return f"{math.ceil(value * 10**digits) / 10**digits if up else value:.{digits}f} {unit}"


def in_bytes(budget: int | float | str) -> int | Literal["least"]:
    """A memory budget in bytes, given as a number or as text ("6GiB", "500 MB"); "least" stays what it is. Raises
    PlanError for anything else, and for a number that can only be meant in another unit."""
    if budget == "least":
        return "least"
    number, unit = budget, ""
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", budget.lower())
        number, unit = (float(match[1]), match[2]) if match else (0, "")
    if isinstance(number, bool) or not isinstance(number, int | float) or number <= 0 or unit not in _UNITS:
        raise PlanError(f"memory_budget={budget!r}: give bytes, or text such as '6GiB', or 'least'")
    if not unit and number < _LEAST:
        raise PlanError(f"memory_budget={budget!r} is a number of bytes, too few for any training step: say the unit, "
                        f"memory_budget='{number:g}GiB' or '{number:g}MiB'")
    return int(number * _UNITS[unit])
