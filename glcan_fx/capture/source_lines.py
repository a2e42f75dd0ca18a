"""Where in the user's code something happened, and why a graph cannot hold it."""

import linecache
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from glcan_fx import fakes

_OWN_FILES = (torch.__path__[0] + os.sep, os.path.dirname(__file__) + os.sep, fakes.__file__)


@dataclass(frozen=True)
class Specialisation:
    """A question about sizes that was answered for the example's, in the forward of ``module``: where that is written
    out, the step holds while the answer does."""

    where: str  # file:line
    code: str
    answer: str
    module: str = ""


@dataclass(frozen=True)
class Opaque:
    """A module that is called as a whole, because of what its forward does at ``where`` (file:line)."""

    path: str
    kind: str
    reason: str
    where: str


class Uncapturable(Exception):
    """Something in a forward pass that a graph cannot hold. replayable: Python may run it more than once a step."""

    def __init__(self, message: str, *, replayable: bool = True) -> None:
        super().__init__(message)
        self.replayable = replayable


class NotMadeYet(BaseException):
    """Parameters appear in the first call: nothing can be compiled before it. No opaque module helps."""


def users_frame() -> Any:
    """The innermost frame that is the model's."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN_FILES) and not name.startswith("<"):
            return frame
        frame = frame.f_back
    return None


def users_place() -> tuple[str, str]:
    """File:line, and the source line, of the innermost frame that is the model's."""
    frame = users_frame()
    if frame is None:
        return "", ""
    name = frame.f_code.co_filename
    return f"{name}:{frame.f_lineno}", linecache.getline(name, frame.f_lineno).strip()


def in_words(error: BaseException) -> str:
    """What went wrong, without torch's advice on its own logs."""
    if isinstance(error, DataDependentOutputException):
        return "data-dependent: its forward asks for the value of a tensor"
    if isinstance(error, DynamicOutputShapeException):
        return "data-dependent: the shape of a result depends on values"
    text = str(error).partition("\n\n")[0].strip()
    return text if isinstance(error, Uncapturable) else f"{type(error).__name__}: {text}"


def place_of(error: BaseException) -> tuple[str, str]:
    """File:line, and the source line, of the innermost frame of an error that is the model's."""
    found, step = ("", ""), error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith(_OWN_FILES) and not name.startswith("<"):
            found = f"{name}:{step.tb_lineno}", linecache.getline(name, step.tb_lineno).strip()
        step = step.tb_next
    return found
