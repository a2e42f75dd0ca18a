"""Local-learning methods: what ``method=`` takes, by name or as an object with options of its own."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from glcan_fx.auxiliary.features import Feature, FeatureInfo, Rules
from glcan_fx.auxiliary.method import METHODS, BaseMethod, Extension, Method
from glcan_fx.config import Options
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
    """The method for ``method=``: an object, or a name and its options; or several names, each the base of the one
    before it, "hpff+man+dgl". An option is that of the first of them that has it; what an extension without a base
    does not know is that of its base, GLCAN. Raises PlanError for what is no method, TypeError for other options.
    """
    if isinstance(given, Method):
        if options:
            raise PlanError(f"{', '.join(options)}: {type(given).__name__} is an object: pass its options to it")
        return given
    if isinstance(given, type) and issubclass(given, Method):
        raise PlanError(f"method= must be an instance, not the class: {given.__name__}()")
    names = given.split("+") if isinstance(given, str) else []
    if not names or any(name not in METHODS for name in names):
        known = ", ".join(map(repr, METHODS))
        raise PlanError(f"method={given!r}: choose one of {known}, or several with + between them, or pass an object "
                        "such as glcan_fx.methods.GLCAN(width=0.5)")
    inner = next((name for name in names[:-1] if not issubclass(METHODS[name], Extension)), None)
    if inner is not None:
        raise PlanError(f"method={given!r}: '{inner}' has auxiliary networks of its own and no base: name it last")
    kinds: list[Any] = [METHODS[name] for name in names]
    if issubclass(kinds[-1], Extension) and any(name not in _options(kinds) and name in _options([GLCAN])
                                                for name in options):
        kinds.append(GLCAN)
    unknown = [name for name in options if name not in _options(kinds)]
    if unknown:
        where = (f"pass options=glcan_fx.Options({unknown[0]}=...)" if unknown[0] in Options.__dataclass_fields__ else
                 f"method {given!r} has the options {', '.join(_options(kinds))}")
        raise TypeError(f"unexpected keyword {unknown[0]!r}: {where}")
    made: Method | None = None
    left = dict(options)
    each = [{name: left.pop(name) for name in _options([kind]) if name in left} for kind in kinds]
    for kind, own in zip(reversed(kinds), reversed(each), strict=True):
        made = kind(**own) if made is None else kind(**{"base": made, **own})
    assert made is not None
    return made


def _options(kinds: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(field.name for kind in kinds for field in dataclasses.fields(kind)))


__all__ = ["DGL", "GLCAN", "HPFF", "MAN", "METHODS", "MLAAN", "SGR", "AugLocal", "BaseMethod", "Extension", "Feature",
           "FeatureInfo", "InfoPro", "Method", "PredSim", "Rules", "method_of", "replace"]
