"""Tasks around a model that cannot be captured as a whole: some of it, or all, runs as Python."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from glcan_fx.capture.replay import Entry, Rest, Segment, Segments, Surroundings, detach_record
from glcan_fx.layers import Cost, weights_in
from glcan_fx.tasks.base import LossHead, Task


class _Wrapped(Task):
    """What another task says, but for how the model is run."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.name, self.takes_targets = task.name, task.takes_targets
        self._counted = vars(task).setdefault("_counted", {})  # one memory of which of its losses are minimised

    def begin(self, model: nn.Module) -> None:
        self.task.begin(model)

    def loss(self, outputs: Any, targets: Any) -> Tensor | dict[str, Tensor]:
        return self.task.loss(outputs, targets)

    def modules(self) -> dict[str, nn.Module]:
        return self.task.modules()

    def example_targets(self, model: nn.Module, inputs: Any, outputs: Any) -> Any:
        return None  # the outputs are the trunk's

    def check(self, inputs: Any, targets: Any) -> None:
        self.task.check(inputs, targets)


class InSegments(_Wrapped):
    """``task`` on a model that runs as Python in segments of sub-module calls."""

    def __init__(self, task: Task, segments: Segments) -> None:
        super().__init__(task)
        self.around = segments

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        last = len(self.around.paths) - 1
        return {f"segment_{index}" if index < last else "rest": Segment(model, self.around, index)
                for index in range(last + 1)}


class Around(_Wrapped):
    """``task`` on the outputs of the whole model, of which only the trunk is compiled."""

    network_is_part = True

    def __init__(self, task: Task, around: Surroundings) -> None:
        super().__init__(task)
        self.around = around

    def network(self, model: nn.Module) -> str:
        return self.around.trunk

    def prepare(self, graph: fx.Graph, placeholders: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        inputs = [graph.placeholder(name) for name in self.around.inputs]
        targets = [graph.placeholder("targets", default_value=None)] if self.takes_targets else []
        entry = graph.create_node("call_module", "aux.entry", tuple(inputs), name="entry")
        arguments = graph.create_node("call_function", operator.getitem, (entry, 0), name="arguments")
        record = graph.create_node("call_function", operator.getitem, (entry, 1), name="record")
        parts = [graph.create_node("call_function", operator.getitem, (arguments, index), name=name)
                 for index, name in enumerate(self.around.arguments)]
        return parts, [record, *inputs, *targets]

    def finish(self, graph: fx.Graph, result: Any, context: list[fx.Node]) -> tuple[Any, list[fx.Node]]:
        given, targets = self.divided(context)
        return graph.create_node("call_module", "aux.rest", (result, *given), name="outputs"), list(targets)

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"entry": Entry(model, self.around), "rest": Rest(model, self.around, fresh=False)}

    def head(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return _AroundHead(self.task, Rest(model, self.around, fresh=True))

    def head_cost(self, model: nn.Module, *_: Any, **__: Any) -> Cost:
        return Cost(sum(weights_in(model.get_submodule(path)) for path in self.around.behind
                      if not any(path.startswith(other + ".") for other in self.around.behind)))


class _AroundHead(nn.Module):
    """(the trunk's outputs, record, *inputs, targets) -> loss, by a copy of what follows the trunk."""

    def __init__(self, task: Task, rest: Rest) -> None:
        super().__init__()
        self.rest = rest
        self.loss = LossHead(task, repeated=True)
        self.__dict__["divided"] = task.divided

    def forward(self, outputs: Any, record: Any, *context: Any) -> Any:
        inputs, targets = self.__dict__["divided"](context)
        return self.loss(self.rest(outputs, detach_record(record), *inputs), *targets)
