"""Load the model that a command line names: ``file.py``, ``file.py:attribute`` or ``package.module:attribute``."""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from glcan_fx.errors import LoadError
from glcan_fx.presets import PRESETS


def load(target: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model that ``target`` names: a module, or what a class or a function makes of ``kwargs``.

    A bare file may be named where exactly one thing in it can be meant: its one model, or see ``candidates``. Importing
    runs the code of the file or package. Raises LoadError, and FileNotFoundError for a file that is not there.
    """
    if target.endswith(".py"):
        module = _from_file(Path(target))
        names = candidates(module, kwargs)
        ready = [name for name in names if isinstance(getattr(module, name), nn.Module)]
        if len(ready) == 1 and not kwargs:
            names = ready
        if len(names) != 1:
            found = (f"{len(names)} things in it can be meant: name one, " + ", ".join(f"{target}:{n}" for n in names)
                     if names else "there is neither a model in it nor a class or function that makes one of "
                     f"{_arguments(kwargs)}: name what you mean, {target}:NAME, or pass its arguments as kwargs")
            raise LoadError(f"'{target}': {found}")
        return _made(module, names[0], kwargs, f"{target}:{names[0]}")
    place, colon, attribute = target.rpartition(":")
    if not colon or not place or not attribute:
        raise LoadError(not_a_model(target))
    module = _from_file(Path(place)) if place.endswith(".py") else _from_package(place)
    return _made(module, attribute, kwargs, target)


def not_a_model(target: str) -> str:
    """What to say of a name that is neither a preset nor a place: those that it may be meant for."""
    from torchvision.models import get_model_builder, list_models

    said = f"'{target}' is not a model: give a preset, file.py, file.py:attribute or package.module:attribute."
    presets = get_close_matches(target.lower(), PRESETS, cutoff=0.75)
    if presets and target not in list_models():
        said += f" Did you mean the preset {' or '.join(presets)}?"
    for name in get_close_matches(target.lower(), list_models(), n=1, cutoff=0.8):
        package = get_model_builder(name).__module__.rpartition(".")[0]
        kind = package.rpartition(".")[2]
        task = kind if kind in ("detection", "segmentation") else "classification"
        said += f" torchvision's: {package}:{name} --input 8x3x224x224 --task {task}"
    return said


def candidates(module: ModuleType, kwargs: Mapping[str, Any]) -> list[str]:
    """Names of the models of a module, and of its own classes and functions that ``kwargs`` suffice to call.

    Nothing is called: a function counts unless it says that it returns something else, or is called ``main``.
    """
    return [name for name, value in vars(module).items() if not name.startswith("_") and (
        isinstance(value, nn.Module) or (getattr(value, "__module__", None) == module.__name__ and name != "main"
                                         and callable(value) and _makes_model(value, kwargs)))]


def _makes_model(value: Any, kwargs: Mapping[str, Any]) -> bool:
    if isinstance(value, type) and not issubclass(value, nn.Module):
        return False
    try:
        signature = inspect.signature(value)
        signature.bind(**kwargs)
    except (TypeError, ValueError):  # does not fit; has no signature
        return False
    result = signature.return_annotation
    if isinstance(value, type) or result is inspect.Signature.empty:
        return True
    if isinstance(result, str):  # the text alone does not say which class it is
        return result != "None"
    return isinstance(result, type) and issubclass(result, nn.Module)


def _made(module: ModuleType, attribute: str, kwargs: Mapping[str, Any], target: str) -> nn.Module:
    value: Any = module
    for name in attribute.split("."):
        if not hasattr(value, name):
            names = ", ".join(candidates(module, kwargs))
            raise LoadError(f"'{target}': there is no '{name}' in it" + (f"; it has {names}" if names else ""))
        value = getattr(value, name)
    if isinstance(value, nn.Module):
        if kwargs:
            raise LoadError(f"'{target}' is a model already, to which no arguments can be given ({_arguments(kwargs)}):"
                            " name the class or function that makes it, or remove them")
        return value
    if not callable(value):
        raise LoadError(f"'{target}' is a {type(value).__name__}, not a model, nor a class or function that makes one")
    try:
        made = value(**kwargs)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise LoadError(f"'{target}' called with {_arguments(kwargs)} raised {_said(error)}") from error
    if not isinstance(made, nn.Module):
        raise LoadError(f"'{target}' called with {_arguments(kwargs)} returned a {type(made).__name__}, not a "
                        "torch.nn.Module")
    return made


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    name = f"glcan_fx_target_{path.stem}"  # not the file's own name, which an installed package may have
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    _importable(path.resolve().parent)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        hint = ('. Put what the file does when it is run under `if __name__ == "__main__":`'
                if isinstance(error, SystemExit) else "")
        raise LoadError(f"'{path}' cannot be imported: {_said(error)}{hint}") from error
    return module


def _from_package(name: str) -> ModuleType:
    _importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        hint = ("" if not isinstance(error, ModuleNotFoundError) else
                f": it is looked for in {Path.cwd()} and among the installed packages")
        raise LoadError(f"'{name}' cannot be imported: {_said(error)}{hint}") from error


def _importable(folder: Path) -> None:
    """As Python does for a script: modules beside it can be imported."""
    if os.fspath(folder) not in sys.path:
        sys.path.insert(0, os.fspath(folder))


def _arguments(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "no arguments"


def _said(error: BaseException) -> str:
    """An error in the user's code, with the last line of it that was running, outside of installed packages."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):  # says where itself
        return said
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if "site-packages" not in frame.filename and not frame.filename.startswith(("<frozen", _OWN))]
    return f"{said} ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else said


_OWN = str(Path(__file__).parent)
