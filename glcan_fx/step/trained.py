"""What each local module trains, read from the graph of the training step."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn

from glcan_fx.capture.replay import Surroundings
from glcan_fx.capture.trace import only_asked, within
from glcan_fx.fx_utils import Parts
from glcan_fx.plans.plan import Plan
from glcan_fx.step.gradients import LocalBackward, parameters_of


def targets_of(graph: fx.Graph, index: int) -> list[str]:
    """Paths of the modules and parameters that local module ``index`` uses."""
    own = [node for node in graph.nodes if node.meta.get("local_module") == index]
    named = [path for node in own for path in node.meta.get("trains", ())]
    return list(dict.fromkeys([path for path in called_by(own) if not path.startswith("aux.")] + named))


def targets_of_last(model: nn.Module, graph: fx.Graph, parts: Parts, k: int) -> list[str]:
    """What the last local module trains: what it uses, and all that no other does."""
    own = targets_of(graph, k - 1) + (called_by(parts["tail"].nodes) if "tail" in parts else [])
    paths = own + [path for index in range(k - 1) for path in targets_of(graph, index)]
    known = {id(p) for p in parameters_of([(model, path) for path in paths])}
    return own + [name for name, p in model.named_parameters() if id(p) not in known]


def called_by(nodes: Iterable[fx.Node]) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module"
                              or node.op == "get_attr" and not only_asked(node)))


def layers_of(parts: Parts, name: str) -> list[str]:
    """Paths of the model's modules and parameters that a part uses, those in parts inside it included."""
    found = []
    for path in called_by(parts[name].nodes):
        inner = path.removeprefix("aux.")
        found += layers_of(parts, inner) if inner in parts and path != inner else [path]
    return list(dict.fromkeys(found))


def backwards_of(aux: nn.Module, k: int) -> list[LocalBackward]:
    """What differentiates the local losses, but for the last one's."""
    parts: list[Any] = [aux.get_submodule(f"{index}.backward") for index in range(k - 1)]
    return parts


def trained_alone(
    model: nn.Module, aux: nn.Module, graph: fx.Graph, plan: Plan, parts: Parts
) -> dict[str, list[Tensor]]:
    """The parameters that a local module trains and no other part of a step uses, by its name.

    Others may: a criterion's, a layer that is called twice, what every module computes independently of the input,
    and the last module's, which also runs what lies outside the compiled part.
    """
    last = [path for index in range(plan.reaches[-1].first, plan.k) for path in targets_of(graph, index)]
    last += called_by(parts["tail"].nodes) if "tail" in parts else []
    last += plan.around.behind if isinstance(plan.around, Surroundings) else []
    outside = [(model, name) for name, _ in model.named_parameters(remove_duplicate=False)
               if plan.network and not within(name, plan.network)]
    found = [(part.name, part.__dict__["trains"]) for part in backwards_of(aux, plan.k)]
    users: dict[int, set[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, trains in [*found, ("", [*((model, path) for path in last), *outside, (aux, "task")])]:
        for parameter in parameters_of(trains):
            tensors[id(parameter)] = parameter
            users.setdefault(id(parameter), set()).add(name)
    alone: dict[str, list[Tensor]] = {name: [] for name, _ in found}
    for key, names in users.items():
        if len(names) == 1 and "" not in names:
            alone[next(iter(names))].append(tensors[key])
    return alone
