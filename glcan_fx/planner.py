"""The planner: choose what the user leaves open, with the smallest loss of accuracy that fits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from .synthesize import Options

EXTRA_COMPUTE = 0.05
"""Floating-point operations of all auxiliary networks together, relative to the model's own."""

# From the richest to the leanest. A narrower network costs less accuracy than fewer predictions or fewer levels.
_CANDIDATES = (
    Options(head="light", width=1.0), Options(head="light", width=0.5), Options(head="light", width=0.25),
    Options(head="lean", width=0.25), Options(head="lean", width=0.25, stride=16),
    Options(head="lean", width=0.125, stride=16), Options(head="lean", width=0.125, stride=32),
)


def candidates(**given: Any) -> list[Options]:
    """Options for auxiliary networks from the richest to the leanest; what is given, and not None, is decided."""
    decided = {name: value for name, value in given.items() if value is not None}
    return list(dict.fromkeys(replace(options, **decided) for options in _CANDIDATES))


def richest(choices: Sequence[Options], extra: Callable[[Options], float]) -> Options:
    """The richest options whose extra compute, relative to the model's own, stays within ``EXTRA_COMPUTE``; the
    leanest where none does, and the first where those cannot be built."""
    low, high = 0, len(choices) - 1
    while low < high:
        middle = (low + high) // 2
        if extra(choices[middle]) <= EXTRA_COMPUTE:
            high = middle
        else:
            low = middle + 1
    return choices[low] if math.isfinite(extra(choices[low])) else choices[0]
