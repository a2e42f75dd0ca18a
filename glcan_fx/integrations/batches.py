"""One batch of a loader, as an example to plan by, at no cost to the run."""

import random
from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import torch

_T = TypeVar("_T")


def first_batch(loader: Iterable[_T]) -> _T:
    """The first batch of a loader; the order and the augmentation of the run that follows stay what they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            return next(iter(loader))
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
