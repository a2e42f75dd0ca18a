"""Local-learning methods: what ``method=`` takes, by name or as an object with options of its own."""

import dataclasses
from typing import Any

from glcan_fx.auxiliary.features import Feature, FeatureInfo, Rules
from glcan_fx.auxiliary.method import METHODS, BaseMethod, Extension, Method
from glcan_fx.errors import PlanError
from glcan_fx.methods.auglocal import AugLocal
from glcan_fx.methods.dgl import DGL
from glcan_fx.methods.glcan import GLCAN
from glcan_fx.methods.hpff import HPFF
from glcan_fx.methods.infopro import InfoPro
from glcan_fx.methods.man import MAN
from glcan_fx.methods.mlaan import MLAAN
from glcan_fx.methods.predsim import PredSim
from glcan_fx.methods.sgr import SGR
from glcan_fx.replacement import replace


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
    kind: Any = METHODS[given]
    known = [field.name for field in dataclasses.fields(kind)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"unexpected keyword {unknown[0]!r}: method {given!r} has the options {', '.join(known)}")
    made: Method = kind(**options)
    return made


__all__ = ["DGL", "GLCAN", "HPFF", "MAN", "METHODS", "MLAAN", "SGR", "AugLocal", "BaseMethod", "Extension", "Feature",
           "FeatureInfo", "InfoPro", "Method", "PredSim", "Rules", "method_of", "replace"]
