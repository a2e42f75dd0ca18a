"""Connect what a training step consists of: what each local loss trains, and the parts of the model that it calls."""

from functools import partial
from typing import TYPE_CHECKING

from torch import fx, nn

from glcan_fx.fx_utils import Parts, function_of
from glcan_fx.step.averages import Averages
from glcan_fx.step.gradients import Agreement, LocalBackward, LossScale
from glcan_fx.step.local_loss import LocalLoss
from glcan_fx.step.parts import Leave, ReadOnly, Recomputed, SizeCheck, Whole, WithAux
from glcan_fx.step.sliced import SlicedHead
from glcan_fx.step.trained import layers_of, targets_of, targets_of_last

if TYPE_CHECKING:
    from glcan_fx.plans.plan import Plan
    from glcan_fx.tasks import Task


def connect(
    model: nn.Module, aux: nn.Module, graph: fx.Graph, plan: "Plan", task: "Task", parts: Parts
) -> None:
    """Connect graph, model and auxiliary networks: fill ``aux`` with what each local loss trains, the last head, and
    the ``parts`` of the model that the graph calls as modules of their own: its tail, blocks that run again in
    backward."""
    head = task.last_head(model, plan.fused_loss)
    reports = task.result() == "output"
    last = LocalLoss(None, head, last=True, reports=reports)
    aux.add_module("last", last)
    if any(node.target == "aux.sizes" for node in graph.nodes):
        aux.add_module("sizes", SizeCheck())
    if any(node.target == "aux.whole" for node in graph.nodes):
        aux.add_module("whole", Whole(model))
    if any(node.target == "aux.leave" for node in graph.nodes):
        aux.add_module("leave", Leave(model))
    for name, part in task.parts(model).items():
        aux.add_module(name, part)
    for module in aux.modules():
        if isinstance(module, ReadOnly | Averages):
            module.bind(model)
    scale = aux._modules.get("scale") or LossScale(kept=plan.k > 1 or plan.slices > 1)
    aux.add_module("scale", scale)
    reaches = plan.reaches
    agreement = Agreement(plan.method.agreement) if plan.method.agreement > 0 else None

    def used(modules: range) -> list[tuple[nn.Module, str]]:
        return [(model, path) for index in modules for path in targets_of(graph, index)]

    for index, info in enumerate(plan.modules[:-1]):
        part, reach = aux.get_submodule(str(index)), reaches[index]
        trains = used(range(reach.first, reach.last + 1)) + [
            (part, name) for name in ("network", "head", "terms") if name in part._modules]
        if "task" in aux._modules:
            trains.append((aux, "task"))
        part.add_module("backward", LocalBackward(
            trains, scale, info.name, model, alone=plan.around is None,
            passes=used(range(reach.last + 1, reach.until + 1)), shared=reaches[index + 1].first <= reach.first,
            agreement=agreement))
        part.__dict__["reports"] = reports
    if plan.k > 1 and reports and plan.around is None:
        trains = used(range(reaches[-1].first, plan.k - 1))
        trains += [(model, path) for path in targets_of_last(model, graph, parts, plan.k)]
        if "task" in aux._modules:
            trains.append((aux, "task"))
        last.add_module("backward", LocalBackward(
            trains, scale, plan.modules[-1].name, model, agreement=agreement))
    bound = {name: (partial(function_of(part, f"<{name} of {type(model).__name__} {id(part):x}>"), WithAux(model, aux)),
                    layers_of(parts, name)) for name, part in parts.items()}
    if plan.slices > 1:
        criterion = [(aux, "task")] if "task" in aux._modules else []
        tail, behind = bound.pop("tail", (None, task.behind(model)))
        last.add_module(
            "head", SlicedHead(tail, head, plan.slices, task.part, model, behind, criterion, scale))
    for name, (run, layers) in bound.items():
        aux.add_module(name, Recomputed(run, model, layers))
