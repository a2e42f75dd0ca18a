"""Local-learning methods: what ``method=`` takes, by name or as an object with options of its own."""

from glcan_fx.auxiliary.features import Feature, FeatureInfo, Rules
from glcan_fx.auxiliary.method import Method
from glcan_fx.errors import PlanError
from glcan_fx.methods.dgl import DGL
from glcan_fx.methods.glcan import GLCAN

METHODS: dict[str, type[Method]] = {method.name: method for method in (GLCAN, DGL)}


def method_of(given: str | Method) -> Method:
    """The method for ``method=``: a name, or an object. Raises PlanError for anything else."""
    if isinstance(given, Method):
        return given
    if isinstance(given, type) and issubclass(given, Method):
        raise PlanError(f"method= must be an instance, not the class: {given.__name__}()")
    if not isinstance(given, str) or given not in METHODS:
        names = ", ".join(map(repr, METHODS))
        raise PlanError(f"method={given!r}: choose one of {names}, or pass an object such as "
                        "glcan_fx.methods.GLCAN(width=0.5)")
    return METHODS[given]()


__all__ = ["DGL", "GLCAN", "METHODS", "Feature", "FeatureInfo", "Method", "Rules", "method_of"]
