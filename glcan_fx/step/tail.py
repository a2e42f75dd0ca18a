"""The network's end, where it runs slice by slice."""

from collections.abc import Sequence

from torch import Tensor, fx

from glcan_fx.structure.nodes import ancestors
from glcan_fx.structure.structure import Structure
from glcan_fx.tasks import Task


def sliced_tail(structure: Structure, task: Task) -> list[fx.Node]:
    """The recorded nodes behind the trunk, which run slice by slice; none where the task has a head of its own for
    that."""
    if task.outputs_are_levels:
        return []
    behind = {node for node in structure.dependent - structure.trunk if node.op not in ("placeholder", "output")}
    tail = behind | (ancestors(behind) - structure.dependent)
    # (what does not depend on the input is not cut into slices)
    return [node for node in structure.trace.graph.nodes if node in tail]


def why_not_sliced(structure: Structure, task: Task) -> str | None:
    """What keeps the tail from running slice by slice."""
    tail = sliced_tail(structure, task)
    inside = set(tail)
    calls = [call for node in tail if node.meta.get("call") for call in node.meta["call"].around()]
    left = {node: name for call in calls for node, name in call.left.items()}
    for node in tail:
        if node in left:
            return f"it leaves a value on '{left[node]}', which would be that of a slice"
        module = structure.trace.module(node)
        if module is not None and any("running_mean" in part._buffers for part in module.modules()):
            return f"'{node.target}' keeps statistics of the whole batch"
        if not node.meta["mutates"] <= inside:
            return f"'{node.name}' changes the trunk's output, in place"
    numbers = [node for node in tail_inputs(tail) if not isinstance(node.meta["value"], Tensor)]
    return f"it reads the number '{numbers[0].name}', which may be the batch's size" if numbers else None


def tail_inputs(tail: Sequence[fx.Node]) -> list[fx.Node]:
    """What the tail reads and does not make."""
    inside = set(tail)
    return list(dict.fromkeys(source for node in tail for source in node.all_input_nodes if source not in inside))
