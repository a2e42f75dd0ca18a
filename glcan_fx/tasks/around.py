"""A task around a model that cannot be captured as a whole: only its trunk is compiled, the rest runs as Python."""

import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from ..replay import Entry, Rest, Surroundings, detach_record, weights_in
from .base import Task


class Around(Task):
    """``task`` on the outputs of the whole model, of which only the trunk is compiled."""

    def __init__(self, task: Task, around: Surroundings) -> None:
        self.task, self.around = task, around
        self.name, self.rules = task.name, task.rules

    def begin(self, model: nn.Module) -> None:
        self.task.begin(model)

    def loss(self, outputs: Any, targets: Any) -> Tensor | dict[str, Tensor]:
        return self.task.loss(outputs, targets)

    def network(self, model: nn.Module) -> str:
        return self.around.trunk

    def modules(self) -> dict[str, nn.Module]:
        return self.task.modules()

    def check(self, inputs: Any, targets: Any) -> None:
        self.task.check(inputs, targets)

    def prepare(self, graph: fx.Graph, placeholders: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        inputs = [graph.placeholder(name) for name in self.around.inputs]
        targets = graph.placeholder("targets", default_value=None)
        entry = graph.create_node("call_module", "aux.entry", tuple(inputs), name="entry")
        arguments = graph.create_node("call_function", operator.getitem, (entry, 0), name="arguments")
        record = graph.create_node("call_function", operator.getitem, (entry, 1), name="record")
        parts = [graph.create_node("call_function", operator.getitem, (arguments, index), name=name)
                 for index, name in enumerate(self.around.arguments)]
        return parts, [record, *inputs, targets]

    def finish(self, graph: fx.Graph, result: Any, context: list[fx.Node]) -> tuple[Any, list[fx.Node]]:
        *given, targets = context
        return graph.create_node("call_module", "aux.rest", (result, *given), name="outputs"), [targets]

    def parts(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"entry": Entry(model, self.around), "rest": Rest(model, self.around, fresh=False)}

    def head(self, model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return _AroundHead(self.task, Rest(model, self.around, fresh=True))

    def head_size(self, model: nn.Module, *_: Any, **__: Any) -> tuple[int, int]:
        return 0, sum(weights_in(model.get_submodule(path)) for path in self.around.behind
                      if not any(path.startswith(other + ".") for other in self.around.behind))


class _AroundHead(nn.Module):
    """(the trunk's outputs, record, *inputs, targets) -> loss, by a copy of what follows the trunk."""

    def __init__(self, task: Task, rest: Rest) -> None:
        super().__init__()
        self.rest = rest
        self.__dict__["task"] = task

    def forward(self, outputs: Any, record: Any, *context: Any) -> Any:
        *inputs, targets = context
        return self.__dict__["task"].loss(self.rest(outputs, detach_record(record), *inputs), targets)
