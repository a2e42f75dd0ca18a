"""Task adapters: with glcan_fx.models the only rooms that know a library's classes."""

from glcan_fx.errors import PlanError
from glcan_fx.tasks.base import (
    AnyLoss,
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
from glcan_fx.tasks.own_loss import OwnLoss

TASKS: dict[str, type[Task]] = {
    kind.name: kind for kind in (Classification, Detection, OwnLoss, Segmentation, SuperResolution)
}


def make_task(task: "str | Task | None", criterion: Criterion | None) -> Task:
    """The task object for ``task=`` and ``criterion=``; for neither, the model's own loss. Raises PlanError for an
    unknown name."""
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
        return task
    if criterion is not None:
        return CriterionTask(criterion, task or CriterionTask.name)
    if task is None:
        return OwnLoss(unless=f"task= or criterion= is required: task= one of {', '.join(sorted(TASKS))}, or "
                              "criterion=(outputs, targets) -> loss")
    return TASKS[task]()


__all__ = [
    "TASKS", "AnyLoss", "Classification", "CriterionTask", "Detection", "OwnLoss", "Segmentation", "Spec",
    "SuperResolution", "Task", "make_task", "specs",
]
