"""Progress on a terminal, where something takes more than two seconds."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm import tqdm

_SECONDS = 2.0  # before anything is shown
_shown: ContextVar["tqdm[None] | None"] = ContextVar("shown", default=None)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say on stderr what runs, and for how long, where that is a terminal; within another one, nothing is added."""
    if _shown.get() is not None:
        yield
        return
    with tqdm(desc=what, bar_format="{desc}: {elapsed}", miniters=1, mininterval=0.2, delay=_SECONDS, leave=False,
              disable=sys.stderr is None or None) as bar:
        token = _shown.set(bar)
        try:
            yield
        finally:
            _shown.reset(token)


def advance() -> None:
    """Some of it is done: what is shown is brought up to date."""
    bar = _shown.get()
    if bar is not None:
        bar.update()
