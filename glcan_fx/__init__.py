"""glcan_fx: train vision models in less memory, by gradient-isolated local modules that a compiler builds.

Names are imported when they are first used, so that the command line shows its help without loading torch.
"""

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glcan_fx import distributed, methods
    from glcan_fx.api import estimate_memory, load_pretrained, plan, transform
    from glcan_fx.capture.trace import Report
    from glcan_fx.config import Options
    from glcan_fx.devices import DEVICES, Device, Work
    from glcan_fx.errors import (
        BudgetError,
        CriterionError,
        GlcanFxError,
        InputGradientWarning,
        LoadError,
        ModelChangedError,
        ModelChangedWarning,
        NotLearningError,
        PlanError,
        RankError,
        SmallExampleWarning,
        StatefulCriterionWarning,
        TargetError,
        TraceError,
        UnsupportedError,
        UnusedGradientsWarning,
    )
    from glcan_fx.methods import Feature, FeatureInfo, Rules
    from glcan_fx.planned import PlannedModel
    from glcan_fx.planner.frontier import Point
    from glcan_fx.plans.plan import Block, LocalModule, Plan, Run
    from glcan_fx.simulate.estimate import Estimate, Memory, Phase
    from glcan_fx.step.local_model import LocalModel
    from glcan_fx.step.output import LocalOutput
    from glcan_fx.step.saving import plain_state_dict
    from glcan_fx.tasks import Classification, CriterionTask, Detection, OwnLoss, Segmentation, SuperResolution, Task

__version__ = "0.1.0"

_NAMES = {
    "glcan_fx.api": "estimate_memory load_pretrained plan transform",
    "glcan_fx.capture.trace": "Report",
    "glcan_fx.config": "Options",
    "glcan_fx.devices": "DEVICES Device Work",
    "glcan_fx.errors": (
        "BudgetError CriterionError GlcanFxError InputGradientWarning LoadError ModelChangedError ModelChangedWarning "
        "NotLearningError PlanError RankError SmallExampleWarning StatefulCriterionWarning TargetError TraceError "
        "UnsupportedError UnusedGradientsWarning"),
    "glcan_fx.methods": "Feature FeatureInfo Rules",
    "glcan_fx.planned": "PlannedModel",
    "glcan_fx.planner.frontier": "Point",
    "glcan_fx.plans.plan": "Block LocalModule Plan Run",
    "glcan_fx.simulate.estimate": "Estimate Memory Phase",
    "glcan_fx.step.local_model": "LocalModel",
    "glcan_fx.step.output": "LocalOutput",
    "glcan_fx.step.saving": "plain_state_dict",
    "glcan_fx.tasks": "Classification CriterionTask Detection OwnLoss Segmentation SuperResolution Task",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = [
    "DEVICES", "Block", "BudgetError", "Classification", "CriterionError", "CriterionTask", "Detection", "Device",
    "Estimate", "Feature", "FeatureInfo", "GlcanFxError", "InputGradientWarning", "LoadError", "LocalModel",
    "LocalModule", "LocalOutput", "Memory", "ModelChangedError", "ModelChangedWarning", "NotLearningError",
    "Options", "OwnLoss", "Phase", "Plan", "PlanError", "PlannedModel", "Point", "RankError", "Report", "Rules",
    "Run", "Segmentation", "SmallExampleWarning", "StatefulCriterionWarning", "SuperResolution", "TargetError",
    "Task", "TraceError", "UnsupportedError", "UnusedGradientsWarning", "Work", "distributed", "estimate_memory",
    "load_pretrained", "methods", "plain_state_dict", "plan", "transform",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'glcan_fx' has no attribute {name!r}")
    state = random.getstate()
    try:
        home = import_module(_HOMES.get(name, f"glcan_fx.{name}"))
    finally:
        random.setstate(state)  # some libraries draw numbers when they are imported, now that a loop may have seeded
    return globals().setdefault(name, getattr(home, name) if name in _HOMES else home)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
