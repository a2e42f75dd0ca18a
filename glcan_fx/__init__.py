"""glcan_fx: train vision models in less memory, by gradient-isolated local modules that a compiler builds."""

from .compiler import estimate_memory, plan, transform
from .errors import (
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
from .estimate import Estimate, Memory, Phase
from .local_model import LocalModel
from .plan import Block, LocalModule, Plan
from .rules import Feature, Place, Rules
from .runtime import LocalOutput
from .tasks import Classification, CriterionTask, Detection, Segmentation, SuperResolution, Task
from .trace import Report

__version__ = "0.1.0"

__all__ = [
    "Block", "BudgetError", "Classification", "CriterionError", "CriterionTask", "Detection", "Estimate", "Feature",
    "GlcanFxError", "LocalModel", "LocalModule", "LocalOutput", "Memory", "ModelChangedError",
    "ModelChangedWarning", "NotLearningError", "Phase", "Place", "Plan", "PlanError", "Report", "Rules",
    "Segmentation", "SmallExampleWarning", "StatefulCriterionWarning", "SuperResolution", "TargetError", "Task",
    "TraceError", "UnsupportedError", "UnusedGradientsWarning", "estimate_memory", "plan", "transform",
]
