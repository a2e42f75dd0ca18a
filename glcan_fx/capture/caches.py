"""Caches of the user's functions (``functools.lru_cache``), which must not keep what a recording has made."""

import functools
import gc
from typing import Any

_LIBRARIES = ("torch.", "sympy.", "networkx.", "numpy.", "glcan_fx.")  # they know of fake tensors, or never see them


class Caches:
    """The caches of functions that are not a library's, and how many values each has kept so far."""

    def __init__(self) -> None:
        self._before: dict[int, int] = {id(found): found.cache_info().misses for found in _caches()}

    def clear_new(self) -> None:
        """Clear those that have kept something since, of a graph that will be gone; results stay the same."""
        for found in _caches():
            if found.cache_info().misses != self._before.get(id(found), 0):
                found.cache_clear()


def _caches() -> list[Any]:
    return [found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper
            and not f"{getattr(found, '__module__', '')}.".startswith(_LIBRARIES)]
