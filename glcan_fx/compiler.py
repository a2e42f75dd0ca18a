"""The compiler: ``plan`` and ``transform``, which call the passes in their order."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from .analyze import Structure, Tap, Unit, analyze, unit_at
from .boundaries import build_segments, plan_segments
from .capture import argument_names
from .copies import cuda_devices
from .emit import assign, emit, register
from .errors import GlcanFxError, PlanError, TraceError
from .layers import weights_in
from .local_model import LocalModel, assemble, is_compiled
from .partition import K, partition
from .plan import LocalModule, Plan
from .replay import Call, Segments, arguments_of, calls_of, surroundings
from .rules import Feature, Place, Rules, State
from .synthesize import Auxiliary, Head, Options, synthesize, tail_of
from .tasks import Spec, Task, make_task, specs
from .tasks.around import Around
from .tasks.base import Criterion
from .trace import trace
from .verify import verify as verify_capture

log = logging.getLogger("glcan_fx")


def plan(
    model: nn.Module,
    *,
    k: K = "natural",
    task: str | Task | None = None,
    example_inputs: Any = None,
    criterion: Criterion | None = None,
    rules: Rules | None = None,
    aux_depth: int = 0,
    aux_width: float = 1.0,
    head: Head = "light",
) -> Plan:
    """Decide how ``model`` is cut into local modules and what their auxiliary networks are; changes nothing.

    Args:
        model: any module that runs, on any device, in either mode; `plan.report` says how it was captured.
        k: number of local modules, "natural" (one per block), or a list of split points (module paths). 1 is plain
            backpropagation.
        task: "detection", "classification", "segmentation", "super_resolution", or a Task object.
        example_inputs: one batch of the sizes that you train with (values do not matter): a tensor, a tuple of
            positional arguments, or a dict of keyword arguments. Detection: images, 2 x 3 x 320 x 320 when left out.
        criterion: ``(outputs, targets) -> Tensor or dict``, instead of a task's own loss.
        rules: the selection rules Γ.
        aux_depth: trunk blocks that each auxiliary network keeps. aux_width: its relative channels, in (0, 1].
        head: "full" copies neck and head as they are, "light" without their shape-keeping towers.

    Raises TraceError, PlanError.
    """
    return _plan(model, k, task, example_inputs, criterion, rules, aux_depth, aux_width, head)[0]


def transform(
    model: nn.Module,
    *,
    plan: Plan | None = None,
    verify: bool = True,
    k: K = "natural",
    task: str | Task | None = None,
    example_inputs: Any = None,
    criterion: Criterion | None = None,
    rules: Rules | None = None,
    aux_depth: int = 0,
    aux_width: float = 1.0,
    head: Head = "light",
) -> LocalModel:
    """Compile ``model`` into gradient-isolated local modules that train in a standard loop.

    Returns a GraphModule that *shares* the model's parameters; the model itself is not changed. Create the optimiser
    afterwards, from ``local.parameters()`` or ``local.parameter_groups()``.

    ``plan``: apply this plan, which decides all but ``task`` and ``criterion``; the other keywords are those of
    ``plan()``. ``verify``: run the captured graph beside the model, on random values at two batch sizes, where that
    takes about a second; a difference is a TraceError. Raises TraceError, PlanError.
    """
    if plan is None:
        chosen, build = _plan(model, k, task, example_inputs, criterion, rules, aux_depth, aux_width, head)
        return build(verify)
    if not isinstance(plan, Plan):
        raise PlanError(f"plan= must be a glcan_fx.Plan, not {type(plan).__name__}: Plan.from_json() reads text")
    decided = {"k": (k, "natural"), "example_inputs": (example_inputs, None), "rules": (rules, None),
               "aux_depth": (aux_depth, 0), "aux_width": (aux_width, 1.0), "head": (head, "light")}
    given = [name for name, (value, default) in decided.items() if value is not default and value != default]
    if given:
        raise PlanError(f"plan= already decides {', '.join(given)}: leave them out")
    return plan.apply(model, task=task, criterion=criterion, verify=verify)


def apply(
    plan: Plan, model: nn.Module, task: str | Task | None, criterion: Criterion | None, verify: bool
) -> LocalModel:
    """What ``Plan.apply`` does."""
    if task is not None or criterion is not None:
        task = make_task(task if task is not None else plan.task if criterion is None else None, criterion, None)
    else:
        task = plan.task_object or make_task(plan.task, None, None)
    task.begin(model)
    if isinstance(plan.around, Segments):
        _check(model, plan.options.depth, plan.options.width, plan.options.head)
        return build_segments(plan, model, task, _calls(model, plan.inputs))
    if plan.around is not None:
        task = Around(task, plan.around)
    return _build(plan, _structure(model, task, plan.inputs), model, task, verify)


# ---------------------------------------------------------------------------------------------- the passes in order


def _plan(
    model: nn.Module, k: K, task: str | Task | None, example_inputs: Any, criterion: Criterion | None,
    rules: Rules | None, depth: int, width: float, head: Head,
) -> tuple[Plan, Callable[[bool], LocalModel]]:
    """The plan, and what builds it from what planning has found out already."""
    _check(model, depth, width, head)
    made = make_task(task, criterion, rules)
    made.begin(model)
    made.network(model)  # first: whether the task fits the model at all
    inputs = specs(made.example_inputs(model, example_inputs))
    if example_inputs is None:
        log.info("no example_inputs: planned for %s", ", ".join(map(str, inputs)))
    options = Options(depth, width, head)

    def in_segments(calls: Sequence[Call], error: TraceError) -> tuple[Plan, Callable[[bool], LocalModel]]:
        planned = plan_segments(model, k, made, inputs, _names(model, inputs), calls, options, error)
        return planned, lambda _: build_segments(planned, model, made, calls)

    try:
        structure = _structure(model, made, inputs)  # 1 trace, 2 analyze
    except TraceError as error:
        if made.network(model) or not error.replayable:
            raise
        calls = _calls(model, inputs, error)
        found = _trunk(model, made, inputs, calls, error)
        if isinstance(found, TraceError):
            return in_segments(calls, found)
        structure, made, inputs = found

    sizes: dict[Any, tuple[int, int]] = {}  # blocks of one stage have auxiliary networks of one size

    def draft(unit: Unit, cuts: Sequence[Unit]) -> LocalModule:
        return _local_module(structure, model, made, options, unit, cuts, sizes=sizes)[0]

    units, refused = structure.units, {}
    if isinstance(k, int | str):  # where the choice is ours, leave out cuts behind which nothing can be built
        refused = _refused(structure, draft)
        units = [unit for unit in structure.units if unit.name not in refused]
        if len(units) == 1 and refused and k != 1:
            first = next(iter(refused.values()))
            if depth or width < 1 or made.network(model):  # what was asked for is the reason
                raise first
            return in_segments(_calls(model, inputs), TraceError(str(first)))

    def aux_bytes(unit: Unit) -> int:
        return draft(unit, structure.units[:-1]).aux_saved

    cuts = partition(structure, k, units, aux_bytes, lambda: _tail_bytes(structure, model, made))  # 3 partition
    modules = [draft(unit, cuts) for unit in cuts]  # 4 select, and 5 synthesize as a draft
    modules.append(_last_module(structure, model, made, cuts))
    chosen = Plan(
        model=type(model).__name__, task=made.name, network=made.network(model), modules=tuple(modules),
        natural=tuple(unit.name for unit in units[:-1]), inputs=inputs, options=options,
        notes=(*_notes(structure, model), *(f"no cut behind '{n}': {str(e)[:200]}" for n, e in refused.items())),
        report=structure.trace.report,
        around=made.around if isinstance(made, Around) else None,
        task_object=made.task if isinstance(made, Around) else made,
    )
    log.info("planned %s: %d local modules of %d possible", chosen.model, chosen.k, len(structure.units))
    return chosen, lambda verified: _build(chosen, structure, model, made, verified)


def _check(model: nn.Module, depth: int, width: float, head: str) -> None:
    if not isinstance(model, nn.Module):
        raise PlanError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if is_compiled(model):
        raise PlanError("this model is compiled already: transform its .original instead")
    if hasattr(model, "_orig_mod"):
        raise PlanError("the model is wrapped by torch.compile: transform the bare model first, then compile the "
                        "result: torch.compile(glcan_fx.transform(model, ...))")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise PlanError(
            f"the model is wrapped in {type(model).__name__}: transform the bare model first, model.module, and wrap "
            "the result: DistributedDataParallel(glcan_fx.transform(model, ...))"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise PlanError(f"{type(model).__name__} has no trainable parameters: nothing to train. Set requires_grad_().")
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise PlanError(f"aux_depth={depth!r}: a number of blocks, 0 or more")
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 1:
        raise PlanError(f"aux_width={width!r}: relative channels, above 0 and at most 1")
    if head not in ("full", "light"):
        raise PlanError(f"head={head!r}: choose 'full' or 'light'")


def _refused(structure: Structure, draft: Callable[[Unit, Sequence[Unit]], LocalModule]) -> dict[str, PlanError]:
    """Units behind which no auxiliary network can be built, and why."""
    refused: dict[str, PlanError] = {}
    for unit in structure.units[:-1]:
        try:
            draft(unit, structure.units[:-1])
        except PlanError as error:
            refused[unit.name] = error
    return refused


def _structure(model: nn.Module, task: Task, inputs: Any) -> Structure:
    with torch.random.fork_rng(devices=cuda_devices(model)):
        example = _example(inputs)
        return analyze(trace(model, example, path=task.network(model)))


def _example(inputs: Any) -> Any:
    example = tree_map_only(Spec, Spec.empty, inputs)
    return example if isinstance(example, dict) else list(example)


_TRIES = 8  # sub-modules, largest first


def _calls(model: nn.Module, inputs: Any, error: TraceError | None = None) -> list[Call]:
    """The calls of sub-modules in one run of the model; ``error`` is raised where it does not run at all."""
    example = _example(inputs)
    try:
        return calls_of(model, *(((), example) if isinstance(example, dict) else (example, {})))
    except Exception as failure:  # noqa: BLE001 - whatever the user's forward raises
        raise error or TraceError(f"{type(model).__name__} does not run on the plan's sizes: {failure}") from failure


def _names(model: nn.Module, inputs: Any) -> tuple[str, ...]:
    return tuple(argument_names(model, *(((), inputs) if isinstance(inputs, dict) else (inputs, {}))))


def _trunk(
    model: nn.Module, task: Task, inputs: Any, calls: Sequence[Call], error: TraceError
) -> tuple[Structure, Task, Any] | TraceError:
    """Rung 4: the largest sub-module that can be captured and cut, and holds half of the weights, where the model
    itself cannot be captured; otherwise the error, with what was tried."""
    once = [call for call in calls if sum(other.path == call.path for other in calls) == 1]
    size = {call.path: weights_in(model.get_submodule(call.path)) for call in once}
    tried = []
    for call in sorted(once, key=lambda call: -size[call.path])[:_TRIES]:
        if 2 * size[call.path] < weights_in(model):
            break
        made = Around(task, surroundings(model, _names(model, inputs), calls, call))
        given = specs(arguments_of(model.get_submodule(call.path), call))
        try:
            structure = _structure(model, made, given)
        except GlcanFxError as failure:
            tried.append(f"'{call.path}': {str(failure).splitlines()[0]}")
            continue
        if len(structure.units) > 1:
            report = replace(structure.trace.report, rung=4, lost=(
                *structure.trace.report.lost, f"'{call.path}' is compiled, the rest runs as Python: {error.reason}"))
            log.info("%s cannot be captured as a whole: '%s' is compiled", type(model).__name__, call.path)
            return replace(structure, trace=replace(structure.trace, report=report)), made, given
        tried.append(f"'{call.path}': it offers nowhere to cut")
    return TraceError(f"{error}\n  sub-modules tried: {'; '.join(tried) or 'none'}", error.reason)


def _notes(structure: Structure, model: nn.Module) -> list[str]:
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    notes = [f"{len(frozen)} parameters are frozen, the first is {frozen[0]}"] if frozen else []
    constants = structure.trace.constants
    if constants:
        notes.append(f"{len(constants)} tensors that are neither parameters nor buffers were recorded as constants")
    return [*notes, *structure.trace.report.lost]


# ---------------------------------------------------------------------------------------------- one local module


def _place(structure: Structure, node: fx.Node, name: str) -> Place:
    return Place(name, structure.stride(node), structure.channels(node))


def _levels(structure: Structure, task: Task) -> dict[Any, fx.Node] | None:
    """The network's output levels by key, where the task's head reads levels."""
    outputs = structure.trace.output.args[0]
    if not task.outputs_are_levels:
        return None
    if isinstance(outputs, fx.Node):
        outputs = {"0": outputs}
    if not isinstance(outputs, dict):
        raise PlanError(f"task '{task.name}' expects a dict of feature maps from the backbone")
    return dict(outputs)


def _local_module(
    structure: Structure, model: nn.Module, task: Task, options: Options, unit: Unit, cuts: Sequence[Unit],
    real: LocalModule | None = None, sizes: dict[Any, tuple[int, int]] | None = None,
) -> tuple[LocalModule, Auxiliary | None, dict[str, Any]]:
    """Select the features of the module that ends with ``unit`` and build its auxiliary network: real, or a draft.

    ``sizes`` remembers drafts: parameters and bytes kept, by what they depend on; a known one is not built again.
    """
    index = [cut.end for cut in cuts].index(unit.end)
    owner = assign(structure, [cut.end for cut in cuts])
    place = _place(structure, unit.end, unit.name)
    levels = _levels(structure, task)
    keys, sigma = list(levels or {}), {}
    if levels is not None:
        places = [_place(structure, node, str(key)) for key, node in levels.items()]
        kept = real.levels if real else tuple(task.rules.levels(place, places))
        if not kept or any(not 0 <= i < len(keys) for i in kept):
            raise PlanError(f"rules.levels must keep some of {len(keys)} levels, not {kept!r} (module '{unit.name}')")
        weights = real.sigma if real else tuple(task.rules.sigma(place, places[i]) for i in kept)
        sigma = {keys[i]: weight for i, weight in zip(kept, weights, strict=True)}
        keys = [keys[i] for i in kept]
    else:
        kept = weights = ()

    def select(outputs: Any) -> Any:
        return outputs if levels is None else {key: levels[key] for key in keys}

    taps = tail_of(structure, select(structure.trace.output.args[0])).taps
    if real and (real.stride, real.channels) != (place.stride, place.channels):
        raise PlanError(f"the plan's module '{real.name}' ends with {real.channels} channels at stride {real.stride}, "
                        f"but in this {type(model).__name__} it has {place.channels} at stride {place.stride}: the "
                        "plan was made for another model. Plan again.")
    if real:
        features: tuple[Feature, ...] = real.features
        if {feature.tap for feature in features} != {tap.name for tap in structure.taps if tap.node in taps}:
            raise PlanError(f"the plan's module '{real.name}' reads {', '.join(f.tap for f in features)}, but this "
                            f"{type(model).__name__} has other features: it was made for another model. Plan again.")
    else:
        features = tuple(_feature(structure, task, tap, place, owner, index) for tap in structure.taps
                         if tap.node in taps)
    key = (structure.shape(unit.end), unit.end in structure.channels_last, features, kept)
    known = sizes.get(key) if sizes is not None and options.depth == 0 else None
    auxiliary = None if known else synthesize(
        structure, model if real else None, unit.end, features, options, select=select, sigma=sigma,
        outputs_are_predictions=not task.outputs_are_levels,
    )
    request: dict[str, Any] = {}
    if auxiliary is not None:
        source = {name: node.meta["value"] for name, node in select(None).items()} if levels is not None else None
        request = {"outputs": auxiliary.outputs, "source": source, "levels": kept, "style": options.head,
                   "width": options.width, "image": _image(structure)}
        if real:
            return real, auxiliary, request
        head_saved, head_parameters = task.head_size(model, **request)
        known = weights_in(auxiliary.network) + head_parameters, auxiliary.saved + head_saved
        if sizes is not None:
            sizes[key] = known
    assert known is not None
    units = _units_of(structure, cuts, index)
    own = [node for node, module in owner.items() if module == index]
    info = LocalModule(
        name=_span(units), cut=unit.name, units=units, stride=place.stride, channels=place.channels,
        parameters=_parameters(structure, own),
        aux_parameters=known[0], saved=sum(node.meta["saved"] for node in own), aux_saved=known[1], features=features,
        levels=tuple(kept), sigma=tuple(weights),
    )
    return info, auxiliary, request


def _feature(
    structure: Structure, task: Task, tap: Tap, place: Place, owner: dict[fx.Node, int], index: int
) -> Feature:
    module = -1 if tap.node.op == "placeholder" else owner[tap.node]
    state: State = "past" if module < index else "own" if module == index else "future"
    if tap.node.op == "placeholder" or not isinstance(tap.node.meta["value"], Tensor):
        return Feature(tap.name, "cache")
    source = task.rules.source(_place(structure, tap.node, tap.name), place, state)
    if state == "future" and source != "synthesised":
        raise PlanError(f"rules.source: '{tap.name}' does not exist yet at '{place.name}', so it can only be "
                        f"'synthesised', not {source!r}")
    return Feature(tap.name, source)


def _image(structure: Structure) -> tuple[int, int]:
    """Height and width of the example images."""
    *_, height, width = (1, 1, *structure.spatial(structure.chain[0]))
    return height, width


def _tail_bytes(structure: Structure, model: nn.Module, task: Task) -> int:
    levels = _levels(structure, task)
    if levels is None:
        return 0
    values = {key: node.meta["value"] for key, node in levels.items()}
    return task.head_size(model, values, values, tuple(range(len(values))), "full", 1.0, _image(structure))[0]


def _last_module(structure: Structure, model: nn.Module, task: Task, cuts: Sequence[Unit]) -> LocalModule:
    owner = assign(structure, [cut.end for cut in cuts])
    own = [node for node, module in owner.items() if module == len(cuts)]
    end = structure.chain[-1]
    units = _units_of(structure, cuts, len(cuts))
    traced = {id(p) for node in structure.trace.graph.nodes for p in structure.trace.parameters(node)}
    rest = sum(p.numel() for p in structure.trace.shadow.parameters() if id(p) not in traced)
    return LocalModule(
        name=_span(units), cut=None, units=units, stride=structure.stride(end), channels=structure.channels(end),
        parameters=_parameters(structure, own) + rest, aux_parameters=0,
        saved=sum(node.meta["saved"] for node in own) + _tail_bytes(structure, model, task), aux_saved=0,
        features=(), levels=(), sigma=(),
    )


def _units_of(structure: Structure, cuts: Sequence[Unit], index: int) -> tuple[str, ...]:
    order = {node: position for position, node in enumerate(structure.chain)}
    ends = [-1, *(order[cut.end] for cut in cuts), len(structure.chain)]
    names = tuple(u.name for u in structure.units if ends[index] < order[u.end] <= ends[index + 1])
    return names or (cuts[index].name if index < len(cuts) else "tail",)


def _span(units: Sequence[str]) -> str:
    return units[0] if len(units) == 1 else f"{units[0]} … {units[-1]}"


def _parameters(structure: Structure, nodes: Sequence[fx.Node]) -> int:
    return sum(p.numel() for p in {id(p): p for n in nodes for p in structure.trace.parameters(n)}.values())


# ---------------------------------------------------------------------------------------------- building


def _build(chosen: Plan, structure: Structure, model: nn.Module, task: Task, verified: bool) -> LocalModel:
    _check(model, chosen.options.depth, chosen.options.width, chosen.options.head)
    if verified:
        verify_capture(structure, model, chosen.inputs, task.network(model))
    cuts = []
    for name in chosen.cuts:
        unit = unit_at(structure, name)
        if unit is None:
            raise PlanError(f"the plan cuts at '{name}', which this {type(model).__name__} does not have: it was made "
                            f"for another model ({chosen.model}). Make a new plan.")
        cuts.append(unit)
    with torch.random.fork_rng(devices=cuda_devices(model)):  # building must not move the user's random state
        auxiliaries, heads = [], []
        for unit, info in zip(cuts, chosen.modules, strict=False):
            _, auxiliary, request = _local_module(structure, model, task, chosen.options, unit, cuts, info)
            assert auxiliary is not None
            auxiliaries.append(auxiliary)
            heads.append(task.head(model, **request))
        aux = nn.Module()
        register(aux, structure, [cut.end for cut in cuts], auxiliaries, heads, task)
    keys = list(_levels(structure, task) or {})

    def outputs(values: Any) -> Any:
        if task.outputs_are_levels and isinstance(values, fx.Node):
            return {keys[0]: values}
        return values

    graph = emit(structure, [cut.end for cut in cuts], auxiliaries, task,
                 [m.headline(i) for i, m in enumerate(chosen.modules)], outputs)
    example = next((p for p in model.parameters()), None)
    if example is not None:
        aux.to(device=example.device)
    log.info("compiled %s; create the optimiser after this call, from its parameters()", chosen.model)
    return assemble(model, aux, graph, chosen, task)
