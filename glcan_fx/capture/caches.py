"""Caches of the user's functions (``functools.lru_cache``), which must not keep what a recording has made."""

import functools
import gc

_LIBRARIES = ("torch.", "sympy.", "networkx.", "numpy.")  # their caches know of fake tensors, or never see them


def clear_caches() -> None:
    """Clear the caches of functions that are not a library's, after recorded sizes were looked up in some.

    That changes no result of the functions; what they kept would be of a graph that is gone.
    """
    for found in gc.get_objects():
        if type(found) is functools._lru_cache_wrapper:
            module = f"{getattr(found, '__module__', '')}."
            if found.cache_info().currsize and not module.startswith(_LIBRARIES):
                found.cache_clear()
