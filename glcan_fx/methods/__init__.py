"""Local-learning methods: what ``method=`` takes, by name or as an object with options of its own."""

import dataclasses
from typing import Any

from glcan_fx.auxiliary.features import Feature, FeatureInfo, Rules
from glcan_fx.auxiliary.method import Method
from glcan_fx.errors import PlanError
from glcan_fx.methods.dgl import DGL
from glcan_fx.methods.glcan import GLCAN

METHODS: dict[str, type[Method]] = {method.name: method for method in (GLCAN, DGL)}


def method_of(given: str | Method, **options: Any) -> Method:
    """The method for ``method=``: an object, or a name and its options. Raises PlanError for anything else."""
    if isinstance(given, Method):
        if options:
            raise PlanError(f"{', '.join(options)}: {type(given).__name__} is an object: pass its options to it")
        return given
    if isinstance(given, type) and issubclass(given, Method):
        raise PlanError(f"method= must be an instance, not the class: {given.__name__}()")
    if not isinstance(given, str) or given not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise PlanError(f"method={given!r}: choose one of {names}, or pass an object such as "
                        "glcan_fx.methods.GLCAN(width=0.5)")
    kind = METHODS[given]
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"unexpected keyword {unknown[0]!r}: method {given!r} has the options {', '.join(known)}")
    return kind(**options)


__all__ = ["DGL", "GLCAN", "METHODS", "Feature", "FeatureInfo", "Method", "Rules", "method_of"]
