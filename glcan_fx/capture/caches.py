"""Caches of the user's functions (``functools.lru_cache``), which must not keep what a recording has made."""

import functools
import gc
import inspect
import sys
from typing import Any

# they know of fake tensors, or never see them
_LIBRARIES = frozenset(("torch", "sympy", "networkx", "numpy", "glcan_fx")) | sys.stdlib_module_names


class Caches:
    """The caches of functions that are not a library's, as they are now."""

    def __init__(self) -> None:
        self._before = {id(found): found.cache_info() for found in _caches()}

    def clear_used(self) -> bool:
        """Clear those that were used since: results stay the same, and what a recording left in them is of a graph that
        will be gone. Returns whether one has answered with what it kept before, numbers that the recording knows no
        origin of."""
        answered = False
        for found in _caches():
            before, after = self._before.get(id(found)), found.cache_info()
            read = before is not None and before.currsize > 0 and after.hits > before.hits
            if read or after.misses != (before.misses if before else 0):
                found.cache_clear()
            answered |= read
        return answered


def _caches() -> list[Any]:
    found = [each for each in gc.get_objects() if type(each) is functools._lru_cache_wrapper]
    return [each for each in found if (each.__module__ or "").partition(".")[0] not in _LIBRARIES
            and inspect.signature(each).parameters]
