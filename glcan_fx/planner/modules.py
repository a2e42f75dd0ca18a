"""Local modules, as a plan describes them: one function plans a module, one checks a planned one against a model."""

from collections.abc import Sequence, Set
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import fx

from glcan_fx.auxiliary.builder import Auxiliary
from glcan_fx.auxiliary.features import Feature
from glcan_fx.auxiliary.method import Method, head_request, remainder_behind
from glcan_fx.auxiliary.network import auxiliary_network, readable
from glcan_fx.auxiliary.remainder import Remainder, blocks_ahead, feature_info, image_size, levels_of
from glcan_fx.errors import PlanError
from glcan_fx.layers import Cost, weights_in
from glcan_fx.plans.plan import Block, LocalModule, Plan, Run
from glcan_fx.progress import advance
from glcan_fx.structure.influence import reads_some
from glcan_fx.structure.nodes import is_size
from glcan_fx.structure.parts import parts_of
from glcan_fx.structure.structure import Structure, Unit, once
from glcan_fx.structure.trunk import unit_at
from glcan_fx.tasks.captured import Captured


class Costs:
    """What auxiliary networks cost, by what that depends on: none is built twice."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self._known: dict[Any, Cost] = {}

    def of(self, remainder: Remainder, features: Sequence[Feature], method: Method) -> Cost:
        """Parameters, bytes saved for backward, and operations of an auxiliary network and its head."""
        structure, end = remainder.structure, remainder.end
        shapes = tuple(structure.shape(node) for node in structure.together(end))
        key = (shapes, end in structure.channels_last, tuple(features), remainder.levels, method,
               reads_some(structure, end), _shapes_ahead(structure, end))
        depends_on_rest = method.depends_on_blocks or len(shapes[0]) <= 2
        if depends_on_rest or key not in self._known:
            advance()
            made = auxiliary_network(remainder, features, method, None)
            head = self.captured.task.head_cost(self.captured.model, **head_request(remainder, made, method))
            cost = made.cost + head
            if method.predictors == "model":
                cost = replace(cost, parameters=cost.parameters - _read_parameters(structure, made))
            self._known[key] = cost
        return self._known[key]


@once
def _shapes_ahead(structure: Structure, cut: fx.Node) -> tuple[tuple[int, ...], ...]:
    """The shapes that the trunk takes behind a cut, one after the other."""
    ahead = [unit.end for unit in structure.units]
    shapes = [structure.shape(end) for end in ahead[ahead.index(cut):]] if cut in ahead else []
    return tuple(shape for shape, _ in groupby(shapes))


def _read_parameters(structure: Structure, made: Auxiliary) -> int:
    """Parameters of an auxiliary network's copies that the model's own layers stand for."""
    paths = dict.fromkeys(path for path, _ in readable(structure, made))
    return sum(weights_in(made.network.get_submodule(path)) for path in paths)


def reads_model(costs: Costs, cuts: Sequence[Unit], method: Method) -> bool:
    """Whether an auxiliary network ends with a layer of the shape of the model's last one, which it may read."""
    captured = costs.captured
    for unit in cuts:
        remainder = remainder_behind(captured.structure, captured.task, unit, cuts, method)
        made = auxiliary_network(remainder, method.features(remainder), method, None)
        if readable(captured.structure, made):
            return True
    return False


def plan_module(costs: Costs, unit: Unit, cuts: Sequence[Unit], method: Method) -> LocalModule:
    """The local module that ends with ``unit``, one of ``cuts``. Raises PlanError where it cannot have an auxiliary
    network."""
    remainder = remainder_behind(costs.captured.structure, costs.captured.task, unit, cuts, method)
    return _module(costs, remainder, method.features(remainder), unit, cuts, method)


def auxiliary_cost(costs: Costs, unit: Unit, cuts: Sequence[Unit], method: Method) -> Cost:
    """What the auxiliary network of that module costs. Raises PlanError as ``plan_module``."""
    remainder = remainder_behind(costs.captured.structure, costs.captured.task, unit, cuts, method)
    return costs.of(remainder, method.features(remainder), method)


def check_plan(plan: Plan, captured: Captured) -> Plan:
    """A plan, perhaps edited, checked against a model: with the figures that its local modules have there. Raises
    PlanError where it does not fit."""
    costs = Costs(captured)
    cuts = cuts_of(plan, captured)
    modules = [_check_module(costs, planned, unit, cuts, plan.method)
               for planned, unit in zip(plan.modules, cuts, strict=False)]
    modules.append(replace(last_module(captured, cuts), recompute=plan.modules[-1].recompute))
    for module in modules:
        _check_runs(module, module.recompute, {name for run in module.each for name in run.blocks})
    return replace(plan, modules=tuple(modules))


def _check_runs(module: LocalModule, runs: Sequence[Run], known: Set[str]) -> None:
    """Raise PlanError where an edited plan lets something run again that the module, or the run around, does not have.
    """
    for run in runs:
        unknown = [name for name in run.blocks if name not in known]
        if unknown:
            raise PlanError(f"recompute: '{unknown[0]}' is no block of local module '{module.name}', or not of the run "
                            f"around it, which has {', '.join(known)}.")
        _check_runs(module, run.inside, set(run.blocks))


def cuts_of(plan: Plan, captured: Captured) -> list[Unit]:
    """The units that a plan's local modules end with. Raises PlanError where the model does not have them."""
    cuts = []
    for name in plan.cuts:
        unit = unit_at(captured.structure, name)
        if unit is None:
            raise PlanError(f"the plan cuts at '{name}', which this {type(captured.model).__name__} does not have: it "
                            f"was made for another model ({plan.model}). Make a new plan.")
        cuts.append(unit)
    return cuts


def _check_module(
    costs: Costs, planned: LocalModule, unit: Unit, cuts: Sequence[Unit], method: Method
) -> LocalModule:
    captured = costs.captured
    kind = type(captured.model).__name__
    remainder = remainder_behind(captured.structure, captured.task, unit, cuts, method, (planned.levels, planned.sigma))
    info = feature_info(captured.structure, unit.end, unit.name)
    if (planned.stride, planned.channels) != (info.reduction, info.num_chs):
        raise PlanError(f"the plan's module '{planned.name}' ends with {planned.channels} channels at stride "
                        f"{planned.stride}, but in this {kind} it has {info.num_chs} at stride {info.reduction}: the "
                        "plan was made for another model. Plan again.")
    read = {feature.tap for feature in planned.features}
    if read != {feature.tap for feature in method.features(remainder)}:
        raise PlanError(f"the plan's module '{planned.name}' reads {', '.join(f.tap for f in planned.features)}, but "
                        f"this {kind} has other features: it was made for another model. Plan again.")
    for feature in planned.features:
        _check_source(planned, feature, remainder)
    module = _module(costs, remainder, planned.features, unit, cuts, method)
    return replace(module, recompute=planned.recompute)


def _check_source(planned: LocalModule, feature: Feature, remainder: Remainder) -> None:
    """Raise PlanError where a feature cannot be taken from where an edited plan says."""
    tap = next(tap for tap in remainder.structure.taps if tap.name == feature.tap)
    made_in = remainder.maker(tap)
    later = made_in > remainder.index
    earlier = feature.source == "own" and made_in < remainder.index
    if feature.source != "synthesised" and (later or earlier):
        when, instead = ("later", "synthesised") if later else ("earlier", "cache")
        raise PlanError(f"the plan's module '{planned.name}' cannot take '{feature.tap}' as {feature.source!r}: it is "
                        f"made {when}. Use {instead!r}.")


def _module(
    costs: Costs, remainder: Remainder, features: Sequence[Feature], unit: Unit, cuts: Sequence[Unit], method: Method
) -> LocalModule:
    structure, cost = remainder.structure, costs.of(remainder, features, method)
    uses = structure.uses([cut.end for cut in cuts])[remainder.index]
    return LocalModule(
        **_extent(structure, cuts, remainder.index), cut=unit.name, parameters=uses.parameters,
        aux_parameters=cost.parameters, saved=uses.saved, aux_saved=cost.saved, aux_flops=round(cost.work.flops),
        features=tuple(features), levels=remainder.levels, sigma=remainder.sigma,
        ahead=tuple(block.name for block in blocks_ahead(structure, unit, method.ahead)) if method.ahead else ())


def tail_cost(captured: Captured) -> Cost:
    """What the head costs that the task puts on the last local module."""
    levels = levels_of(captured.structure, captured.task)
    if levels is None:
        return Cost()
    values = {key: node.meta["value"] for key, node in levels.items()}
    image = image_size(captured.structure)
    return captured.task.head_cost(captured.model, values, values, tuple(range(len(values))), "full", 1.0, image)


def last_module(captured: Captured, cuts: Sequence[Unit]) -> LocalModule:
    """The last local module, with the model's own neck and head."""
    structure, ends = captured.structure, [cut.end for cut in cuts]
    last, owner = len(cuts), structure.assign(ends)

    def is_read(node: fx.Node) -> bool:
        return any(owner.get(user, last) == last and not is_size(user) for user in node.users)

    features = tuple(Feature(tap.name, "own" if owner.get(tap.node) == last else "cache")
                     for tap in structure.taps if is_read(tap.node))
    parameters, saved, _ = structure.uses(ends)[-1]
    recorded = {id(p) for node in structure.trace.graph.nodes for p in structure.trace.parameters(node)}
    others = sum(p.numel() for p in structure.trace.shadow.parameters() if id(p) not in recorded)
    return LocalModule(
        **_extent(structure, cuts, last), cut=None, parameters=parameters + others, aux_parameters=0,
        saved=saved + tail_cost(captured).saved, aux_saved=0, aux_flops=0, features=features, levels=(), sigma=(),
        behind=parts_of(structure).behind)


def _extent(structure: Structure, cuts: Sequence[Unit], index: int) -> dict[str, Any]:
    """What a local module is made of, and where it ends."""
    order = {node: position for position, node in enumerate(structure.chain)}
    ends = [-1, *(order[cut.end] for cut in cuts), len(structure.chain)]
    uses = structure.uses([unit.end for unit in structure.units])
    blocks = tuple(
        Block(unit.name, structure.shape(unit.end), structure.stride(unit.end), structure.channels(unit.end),
              used.parameters, used.saved)
        for unit, used in zip(structure.units, uses, strict=False)
        if ends[index] < order[unit.end] <= ends[index + 1])
    end = cuts[index].end if index < len(cuts) else structure.chain[-1]
    owner = structure.assign([cut.end for cut in cuts])
    makes = tuple(tap.name for tap in structure.taps if tap.node.op != "placeholder" and owner.get(tap.node) == index)
    names = [block.name for block in blocks] or [cuts[index].name if index < len(cuts) else "tail"]
    return {"name": names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}", "blocks": blocks,
            "makes": makes, "shape": structure.shape(end), "stride": structure.stride(end),
            "channels": structure.channels(end)}
