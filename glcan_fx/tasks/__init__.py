"""Task adapters: with glcan_fx.models the only places that know a library's classes."""

import copy

from glcan_fx.auxiliary.features import Rules
from glcan_fx.errors import PlanError
from glcan_fx.tasks.base import (
    Classification,
    Criterion,
    CriterionTask,
    Segmentation,
    Spec,
    SuperResolution,
    Task,
    specs,
)
from glcan_fx.tasks.detection import Detection

TASKS: dict[str, type[Task]] = {
    kind.name: kind for kind in (Classification, Detection, Segmentation, SuperResolution)
}


def make_task(task: "str | Task | None", criterion: Criterion | None, rules: Rules | None) -> Task:
    """The task object for ``task=`` and ``criterion=``. Raises PlanError for an unknown name or neither."""
    if rules is not None and not isinstance(rules, Rules):
        raise PlanError(f"rules= must be an instance of glcan_fx.Rules, not {type(rules).__name__}")
    unknown = not isinstance(task, str | Task | None) or (isinstance(task, str) and task not in TASKS)
    if isinstance(task, type) and issubclass(task, Task):
        raise PlanError(f"task= must be an instance, not the class: {task.__name__}()")
    if task == CriterionTask.name and criterion is None:
        raise PlanError("this plan was made with criterion=: pass criterion=(outputs, targets) -> loss again")
    if unknown and (criterion is None or not isinstance(task, str)):
        raise PlanError(f"unknown task {task!r}: choose one of {', '.join(sorted(TASKS))}, pass criterion=, or an "
                        "instance of a subclass of glcan_fx.Task")
    if isinstance(task, Task):
        if criterion is not None:
            raise PlanError("pass either a Task object or criterion=, not both: the Task's loss() is its criterion")
        made = task
    elif criterion is not None:
        made = CriterionTask(criterion, task or CriterionTask.name)
    elif task is None:
        raise PlanError(f"what to train for? Pass task= ({', '.join(sorted(TASKS))}) or criterion=(outputs, targets)")
    else:
        made = TASKS[task]()
    if rules is not None:
        made = copy.copy(made)  # the caller's object keeps its own
        made.rules = rules
    return made


__all__ = [
    "TASKS", "Classification", "CriterionTask", "Detection", "Segmentation", "Spec", "SuperResolution", "Task",
    "make_task", "specs",
]
