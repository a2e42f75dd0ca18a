"""glcan_fx: train vision models in less memory, by gradient-isolated local modules that a compiler builds."""

from glcan_fx import methods
from glcan_fx.api import estimate_memory, plan, transform
from glcan_fx.capture.trace import Report
from glcan_fx.config import Options
from glcan_fx.devices import DEVICES, Device, Work
from glcan_fx.errors import (
    BudgetError,
    CriterionError,
    GlcanFxError,
    ModelChangedError,
    ModelChangedWarning,
    NotLearningError,
    PlanError,
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
from glcan_fx.tasks import Classification, CriterionTask, Detection, OwnLoss, Segmentation, SuperResolution, Task

__version__ = "0.1.0"

__all__ = [
    "DEVICES", "Block", "BudgetError", "Classification", "CriterionError", "CriterionTask", "Detection", "Device",
    "Estimate", "Feature", "FeatureInfo", "GlcanFxError", "LocalModel", "LocalModule", "LocalOutput", "Memory",
    "ModelChangedError", "ModelChangedWarning", "NotLearningError", "Options", "OwnLoss", "Phase", "Plan", "PlanError",
    "PlannedModel", "Point", "Report", "Rules", "Run", "Segmentation", "SmallExampleWarning",
    "StatefulCriterionWarning", "SuperResolution", "TargetError", "Task", "TraceError", "UnsupportedError",
    "UnusedGradientsWarning", "Work", "estimate_memory", "methods", "plan", "transform",
]
