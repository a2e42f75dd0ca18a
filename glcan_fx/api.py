"""The compiler: ``plan`` and ``transform``, which call the passes in their order."""

import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from glcan_fx.auxiliary.builder import Head, Method, Options, Predictors
from glcan_fx.auxiliary.features import Rules
from glcan_fx.auxiliary.tails import ending_of
from glcan_fx.capture.ladder import trace
from glcan_fx.capture.modules import argument_names
from glcan_fx.capture.replay import Call, Segments, arguments_of, calls_of, surroundings
from glcan_fx.capture.shadow import cuda_devices
from glcan_fx.errors import BudgetError, GlcanFxError, PlanError, TraceError
from glcan_fx.layers import weights_in
from glcan_fx.planner.costs import Drafts, levels_of
from glcan_fx.planner.partition import K, partition
from glcan_fx.planner.search import (
    EXTRA_MEMORY,
    Savings,
    allowances,
    candidates,
    fewest,
    in_bytes,
    richest,
    with_richest,
    within_budget,
    within_compute,
)
from glcan_fx.plans.plan import Plan
from glcan_fx.simulate.estimate import Estimate, OptimizerLike, check_optimizer
from glcan_fx.step.build import Draft, connect
from glcan_fx.step.emit import why_not_sliced
from glcan_fx.step.local_model import LocalModel, is_compiled, warn_of_unstepped
from glcan_fx.step.segments import build_segments, plan_segments
from glcan_fx.step.verify import verify as verify_step
from glcan_fx.structure.structure import Structure, Unit
from glcan_fx.structure.trunk import analyze
from glcan_fx.tasks import Spec, Task, make_task, specs
from glcan_fx.tasks.around import Around
from glcan_fx.tasks.base import Criterion

log = logging.getLogger("glcan_fx")


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_ONE = threading.RLock()


def _one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """In one thread at a time: random states, which are put back, belong to the process."""
    @wraps(function)
    def locked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _ONE:
            return function(*args, **kwargs)
    return locked


@dataclass(frozen=True)
class _Request:
    """What the user asks for; None is left to the planner."""

    k: K = "fewest"
    task: str | Task | None = None
    example_inputs: Any = None
    example_targets: Any = None
    criterion: Criterion | None = None
    rules: Rules | None = None
    method: Method = "glcan"
    aux_depth: int = 0
    aux_hidden: int | None = None
    aux_width: float | None = None
    aux_stride: int | None = None
    head: Head | None = None
    fused_loss: bool = False
    slices: int = 1
    predictors: Predictors = "own"
    memory_budget: int | str | None = None
    compute_budget: float | None = None
    optimizer: OptimizerLike = "sgd"

    @property
    def auxiliary(self) -> bool:
        """Whether anything is said of auxiliary networks, so that there shall be some."""
        said = {"method", "predictors", "head", "aux_depth", "aux_hidden", "aux_width", "aux_stride"}
        return not said.isdisjoint(self.given)

    @property
    def given(self) -> list[str]:
        """Names of what differs from the default."""
        found = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        return [name for name, value, default in found if value is not default and value != default]


@_one_at_a_time
def plan(
    model: nn.Module,
    *,
    k: K = "fewest",
    task: str | Task | None = None,
    example_inputs: Any = None,
    example_targets: Any = None,
    criterion: Criterion | None = None,
    rules: Rules | None = None,
    method: Method = "glcan",
    aux_depth: int = 0,
    aux_hidden: int | None = None,
    aux_width: float | None = None,
    aux_stride: int | None = None,
    head: Head | None = None,
    fused_loss: bool = False,
    slices: int = 1,
    predictors: Predictors = "own",
    memory_budget: int | str | None = None,
    compute_budget: float | None = None,
    optimizer: OptimizerLike = "sgd",
) -> Plan:
    """Decide how ``model`` is cut into local modules and what their auxiliary networks are; changes nothing.

    What is left out of ``aux_hidden``, ``aux_width``, ``aux_stride`` and ``head`` is chosen: the richest auxiliary
    networks with which a training step takes no more compute than backpropagation's, and whose weights add at most a
    tenth to its memory. Without ``memory_budget`` 5 % more compute where a mean over all places ends the network, 10 %
    where a decoder does; with or without, a third more where that keeps the narrowest decoder.

    Args:
        model: any module that runs, on any device, in either mode; `plan.report` says how it was captured.
        k: "fewest" (with which a step takes at most 2 % more memory than with the natural number, by simulation; the
            natural number where none can be simulated), "natural" (one per block), a number of local modules, or a list
            of split points (module paths). 1 is plain backpropagation. With a ``memory_budget`` and no number, or
            "auto" (the GPU's memory), the fewest that fit.
        task: "detection", "classification", "segmentation", "super_resolution", or a Task object.
        example_inputs: one batch of the sizes that you train with (values do not matter): a tensor, a tuple of
            positional arguments, or a dict of keyword arguments. Detection: images, two of 320 x 320 when left out.
        example_targets: targets of such a batch, for estimates of memory with a criterion of your own.
        criterion: ``(outputs, targets) -> Tensor or dict``, instead of a task's own loss.
        rules: the selection rules Γ.
        method: "glcan", or "dgl": auxiliary networks on each module's own output alone, decoupled greedy learning's
            (Belilovsky et al. 2020, arXiv 1901.08164), to compare with.
        aux_depth: trunk blocks that each auxiliary network keeps, as copies.
        aux_hidden: layers (convolution, norm, activation) that each auxiliary network has in front of the mean over all
            places, where the tail begins with one (classifiers); on half the size unless ``head`` is "full".
        aux_width: its relative channels, in (0, 1]; 1 is the paper's.
        aux_stride: a detector's levels of smaller strides are left out of it, where there are others; 1 keeps all.
        head: "full" copies neck and head as they are (the paper's), "light" without their shape-keeping towers, "lean"
            with one prediction at each place, from the module's own output.
        fused_loss: compute a dense focal loss from class ids in the last module, too: the same gradients, less memory.
        slices: run the last module's end (a detector's head, an upsampler, and the loss) in so many slices of the
            batch, each with its backward: the same gradients where the loss is a mean over images, which the first
            steps check.
        predictors: "own": each auxiliary network has its own. "shared": they have them in common, where shapes agree:
            copies of the same layers of the model's head are one module, which all local losses train. "model": what is
            in front of the model's own last layer is trained to suit that layer, whose present weights are read (as the
            readout of SOLO, arXiv 2609.35440).
        memory_budget: bytes, or text ("6GiB"), that a training step may take at most, by simulation; the plan's notes
            say what was tried. optimizer: that memory is simulated for: "sgd" (with momentum), "adam", or a function of
            the parameters.
        compute_budget: floating-point operations that a training step may take, relative to backpropagation's, by
            simulation: instead of the above. 1.3 lets a few local modules come closest to backpropagation's accuracy.
            Blocks that run again for a ``memory_budget`` come on top.

    Raises TraceError, PlanError (BudgetError where nothing keeps a budget).
    """
    return _plan(model, _Request(
        k, task, example_inputs, example_targets, criterion, rules, method, aux_depth, aux_hidden, aux_width,
        aux_stride, head, fused_loss, slices, predictors, memory_budget, compute_budget, optimizer))[0]


@_one_at_a_time
def transform(
    model: nn.Module,
    *,
    plan: Plan | None = None,
    verify: bool = True,
    k: K = "fewest",
    task: str | Task | None = None,
    example_inputs: Any = None,
    example_targets: Any = None,
    criterion: Criterion | None = None,
    rules: Rules | None = None,
    method: Method = "glcan",
    aux_depth: int = 0,
    aux_hidden: int | None = None,
    aux_width: float | None = None,
    aux_stride: int | None = None,
    head: Head | None = None,
    fused_loss: bool = False,
    slices: int = 1,
    predictors: Predictors = "own",
    memory_budget: int | str | None = None,
    compute_budget: float | None = None,
    optimizer: OptimizerLike = "sgd",
) -> LocalModel:
    """Compile ``model`` into gradient-isolated local modules that train in a standard loop.

    Returns a module that *shares* the model's parameters and parts; the model itself is not changed. Create the
    optimiser afterwards, from ``local.parameters()`` or ``local.parameter_groups()``.

    ``plan``: apply this plan, which decides all but ``task`` and ``criterion``; the other keywords are those of
    ``plan()``. ``verify``: run the training step beside the model, on random values at two batch sizes, and
    look whether every local module gets gradients, where that takes about a second. Raises TraceError (also for a
    difference), PlanError, NotLearningError.
    """
    request = _Request(k, task, example_inputs, example_targets, criterion, rules, method, aux_depth, aux_hidden,
                       aux_width, aux_stride, head, fused_loss, slices, predictors, memory_budget,
                       compute_budget, optimizer)
    if plan is None:
        chosen, build = _plan(model, request)
        return build(verify)
    if not isinstance(plan, Plan):
        raise PlanError(f"plan= must be a glcan_fx.Plan, not {type(plan).__name__}: Plan.from_json() reads text")
    given = [name for name in request.given if name not in ("task", "criterion")]
    if given:
        raise PlanError(f"plan= already decides {', '.join(given)}: leave them out")
    return plan.apply(model, task=task, criterion=criterion, verify=verify)


@_one_at_a_time
def estimate_memory(
    model: nn.Module | Plan,
    example_inputs: Any = None,
    *,
    optimizer: OptimizerLike = "sgd",
    task: str | Task | None = None,
    criterion: Criterion | None = None,
    example_targets: Any = None,
    recompute: bool = False,
    in_forward: bool = False,
) -> Estimate:
    """Simulate a training step on fake tensors: its peak memory, what that is made of, and its compute.

    Needs no GPU and no memory, and takes about a second. Within a few per cent of ``torch.cuda.max_memory_allocated``,
    which also counts library workspaces.

    Args:
        model: a plan or a compiled model (then ``optimizer`` and ``in_forward`` are all that may be given), or a model,
            for backpropagation.
        example_inputs: as for ``plan()``, as the next three.
        task: see there.
        criterion: see there.
        example_targets: see there.
        optimizer: "sgd" (with momentum), "adam", a function of the parameters, or None.
        recompute: backpropagation with activation checkpointing on every block.
        in_forward: the optimiser steps each local module in the forward pass (``optimizer_in_forward``).

    Raises TraceError, PlanError.
    """
    if isinstance(model, LocalModel):
        model = model.plan
    if isinstance(model, Plan):
        return model.known.simulate(model, optimizer, in_forward)
    if in_forward:
        raise PlanError("in_forward=True: only local modules can be stepped in the forward pass: estimate a plan, or a "
                        "compiled model")
    whole = plan(model, k=1, task=task, criterion=criterion, example_inputs=example_inputs,
                 example_targets=example_targets)
    return whole.known.backpropagation(optimizer, recompute=recompute)


@_one_at_a_time
def apply(
    plan: Plan, model: nn.Module, task: str | Task | None, criterion: Criterion | None, verify: bool
) -> LocalModel:
    """What ``Plan.apply`` does."""
    if task is not None or criterion is not None:
        task = make_task(task if task is not None else plan.task if criterion is None else None, criterion, None)
    else:
        task = plan.task_object or make_task(plan.task, None, None)
    task.begin(model)
    if plan.around is not None and plan.options.slices > 1:
        raise PlanError(f"slices={plan.options.slices}: a part of this model runs as Python, which takes whole batches")
    if isinstance(plan.around, Segments) and any(module.recompute for module in plan.modules):
        raise PlanError("recompute: this model runs as Python, so its blocks cannot run again. Leave it out.")
    if isinstance(plan.around, Segments) and plan.options.predictors != "own":
        raise PlanError(f"predictors={plan.options.predictors!r}: this model runs as Python, and its copies differ. "
                        "Leave it out.")
    if isinstance(plan.around, Segments):
        _check(model, plan.options)
        return build_segments(plan, model, task, _calls(model, plan.inputs))
    if plan.around is not None:
        task = Around(task, plan.around)
    structure = _structure(model, task, plan.inputs)
    task.fits(structure.trace.output.meta["value"])
    if plan.draft is None and plan.around is None:
        plan = replace(plan, draft=Draft(structure, model, task, plan.inputs, None))
    return _build(plan, structure, model, task, verify)


# ---------------------------------------------------------------------------------------------- the passes in order


def _plan(model: nn.Module, request: _Request) -> tuple[Plan, Callable[[bool], LocalModel]]:
    """The plan, and what builds it from what planning has found out already."""
    given: dict[str, Any] = {
        "depth": request.aux_depth, "hidden": request.aux_hidden, "width": request.aux_width,
        "stride": request.aux_stride, "head": request.head, "predictors": request.predictors,
        "method": request.method}
    choices = candidates(**given)
    _check(model, replace(choices[0], slices=request.slices))
    made = make_task(request.task, request.criterion, request.rules)
    made.begin(model)
    made.network(model)  # first: whether the task fits the model at all
    whole = inputs = specs(made.example_inputs(model, request.example_inputs))
    if request.example_inputs is None:
        log.info("no example_inputs: planned for %s", ", ".join(map(str, inputs)))

    check_optimizer(request.optimizer)
    budget = _budget(model, request)

    def in_segments(calls: Sequence[Call], error: TraceError) -> tuple[Plan, Callable[[bool], LocalModel]]:
        if (budget is not None or request.slices > 1 or request.predictors != "own" or request.method != "glcan"
                or request.aux_hidden or request.compute_budget is not None):
            raise PlanError("memory_budget, compute_budget, slices, predictors, aux_hidden and method='dgl' need a "
                            f"model that can be captured: {error.reason}. Leave them out.")
        options = replace(choices[0], hidden=0)
        k = "natural" if request.k == "fewest" else request.k  # no step of it can be simulated
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

    made.fits(structure.trace.output.meta["value"])
    ending = ending_of(structure, not made.outputs_are_levels)
    if request.aux_hidden and request.method == "glcan" and ending != "mean":
        raise PlanError(f"aux_hidden={request.aux_hidden}: {type(model).__name__} takes no mean over all places behind "
                        "its trunk, so there are no hidden layers in front of one. Leave it out.")
    choices = candidates(ending, **given)
    drafts = Drafts(structure, model, made)
    units, refused = structure.units, {}
    if isinstance(request.k, int | str):  # where the choice is ours, leave out cuts behind which nothing can be built
        refused = drafts.refused(choices[0] if request.aux_hidden else replace(choices[0], hidden=0))
        units = [unit for unit in structure.units if unit.name not in refused]
        if len(units) == 1 and refused and request.k != 1:
            first = next(iter(refused.values()))
            asked = request.aux_depth or request.aux_hidden or (request.aux_width or 1) < 1
            if asked or made.network(model):
                raise first
            return in_segments(_calls(model, inputs), TraceError(str(first)))

    draft = Draft(structure, model, made, whole, request.example_targets)
    chosen = _choose(request, budget, drafts, choices, allowances(choices, ending, request.compute_budget, budget),
                     units, refused, inputs, draft)
    if chosen.k == 1 < len(units) and request.k == "fewest" and budget is None:
        log.warning("%s is not cut: on batches like the example inputs backpropagation takes as little memory as %d "
                    "local modules. Make example_inputs as large as your batches, or pass k.", chosen.model, len(units))
    log.info("planned %s: %d local modules of %d possible", chosen.model, chosen.k, len(structure.units))
    return chosen, lambda verified: _build(chosen, structure, model, made, verified)


def _choose(
    request: _Request, budget: int | None, drafts: Drafts, choices: Sequence[Options], allowed: Mapping[Options, float],
    units: Sequence[Unit], refused: dict[str, PlanError], inputs: Any, draft: Draft,
) -> Plan:
    """The plan that keeps the budgets, with the local modules asked for."""
    optimizer = "sgd" if callable(request.optimizer) else request.optimizer  # a plan is data

    def planned(choices: Sequence[Options], k: K, savings: Savings) -> Plan:
        return _decide(k, savings, drafts, choices, allowed, units, refused, inputs, draft, optimizer)

    def simulate(plan: Plan) -> Estimate:
        return draft.simulate(plan, request.optimizer)

    def within_memory(budget: int, choices: Sequence[Options]) -> Plan:
        structure, made, model = drafts.structure, drafts.task, drafts.model
        alone = made.averages_images(model, levels_of(structure, made)) and not why_not_sliced(structure, made)
        slices, fused = _SLICES if alone else 1, made.fuses_losses(model)
        k = None if isinstance(request.k, str) else request.k
        return with_richest(choices, lambda left: within_budget(
            budget, len(units), slices, fused, partial(planned, left), simulate, k=k))

    def chosen(choices: Sequence[Options]) -> Plan:
        if budget is not None:
            return within_memory(budget, choices)
        savings = Savings(request.fused_loss, request.slices)
        if request.k == "fewest":
            return fewest(savings, partial(planned, choices), simulate, least_k=2 if request.auxiliary else 1)
        return planned(choices, request.k, savings)

    def compute(plan: Plan) -> float:  # but for blocks that run again
        modules = tuple(replace(module, recompute=False) for module in plan.modules)
        return simulate(replace(plan, modules=modules)).flops / draft.backpropagation(request.optimizer).flops

    if request.compute_budget is None:
        return chosen(choices)
    try:
        return within_compute(request.compute_budget, choices, chosen, compute)
    except BudgetError:
        if request.k != "fewest" or budget is not None:
            raise
        natural = partial(planned, k="natural", savings=Savings(request.fused_loss, request.slices))
        return within_compute(request.compute_budget, choices, natural, compute)  # more cuts save more gradients


def _budget(model: nn.Module, request: _Request) -> int | None:
    """The memory that a step may take, in bytes: the user's, or the GPU's where k is to be found out."""
    if request.memory_budget is not None or request.k != "auto":
        return None if request.memory_budget is None else in_bytes(request.memory_budget)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        raise PlanError("k='auto' takes the fewest local modules that fit: pass memory_budget=, or move the model to "
                        "the GPU first")
    return int(_OF_GPU * torch.cuda.get_device_properties(device).total_memory)


_OF_GPU = 0.9  # the rest is for library workspaces and fragmentation
_SLICES = 4  # more would save little: other modules are then the peak


def _decide(
    k: K, savings: Savings, drafts: Drafts, choices: Sequence[Options], allowed: Mapping[Options, float],
    units: Sequence[Unit], refused: dict[str, PlanError], inputs: Any, draft: Draft, optimizer: str | None,
) -> Plan:
    """The plan for a number of local modules."""
    structure, model, made = drafts.structure, drafts.model, drafts.task

    def cuts_for(options: Options) -> list[Unit]:
        return partition(structure, k, units, lambda unit: drafts.cost(unit, options).saved,
                         lambda: drafts.tail.saved)

    def excess(options: Options) -> float:
        try:
            cuts = cuts_for(options)
            return max(drafts.extra(cuts, options) - allowed[options], drafts.weight(cuts, options) - EXTRA_MEMORY)
        except PlanError as error:  # a layer that cannot be made narrower
            log.debug("%s: %s", options, error)
            return math.inf

    options = richest(choices, excess) if len(choices) > 1 else choices[0]
    cuts = cuts_for(options)  # 3 partition
    modules = [drafts.module(unit, cuts, options) for unit in cuts]  # 4 select, and 5 synthesize as a draft
    if options.predictors != "own":
        modules = drafts.counted_once(modules, cuts, options)
    modules.append(drafts.last(cuts))
    return Plan(
        model=type(model).__name__, task=made.name, network=made.network(model),
        modules=tuple(replace(m, recompute=i in savings.recompute) for i, m in enumerate(modules)),
        natural=tuple(unit.name for unit in units[:-1]), inputs=inputs,
        options=replace(options, fused=savings.fused, slices=savings.slices),
        notes=(*_notes(structure, model), *(f"no cut behind '{n}': {str(e)[:200]}" for n, e in refused.items())),
        report=structure.trace.report,
        around=made.around if isinstance(made, Around) else None, optimizer=optimizer,
        task_object=made.task if isinstance(made, Around) else made, draft=draft,
    )


def _check(model: nn.Module, options: Options) -> None:
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
    odd = next((name for name, _ in model.named_modules() if any(sign in name for sign in "\"'\\\n")), None)
    if odd is not None:
        raise PlanError(f"the module {odd!r} has a name that no generated code can hold: rename it, without quotes, "
                        "backslashes and line ends.")
    if not any(p.requires_grad for p in model.parameters()):
        raise PlanError(f"{type(model).__name__} has no trainable parameters: nothing to train. Set requires_grad_().")
    _check_options(options)


def _check_options(options: Options) -> None:
    depth, width, stride = options.depth, options.width, options.stride
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise PlanError(f"aux_depth={depth!r}: a number of blocks, 0 or more")
    if isinstance(options.hidden, bool) or not isinstance(options.hidden, int) or options.hidden < 0:
        raise PlanError(f"aux_hidden={options.hidden!r}: a number of layers, 0 or more")
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width <= 1:
        raise PlanError(f"aux_width={width!r}: relative channels, above 0 and at most 1")
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
        raise PlanError(f"aux_stride={stride!r}: input pixels per place, 1 or more")
    if isinstance(options.slices, bool) or not isinstance(options.slices, int) or options.slices < 1:
        raise PlanError(f"slices={options.slices!r}: a number, 1 or more")
    if options.predictors not in ("own", "shared", "model"):
        raise PlanError(f"predictors={options.predictors!r}: choose 'own', 'shared' or 'model'")
    if options.method not in ("glcan", "dgl"):
        raise PlanError(f"method={options.method!r}: choose 'glcan' or 'dgl'")
    if options.head not in ("full", "light", "lean"):
        raise PlanError(f"head={options.head!r}: choose 'full', 'light' or 'lean'")


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


# ---------------------------------------------------------------------------------------------- building


def _build(chosen: Plan, structure: Structure, model: nn.Module, task: Task, verified: bool) -> LocalModel:
    _check(model, chosen.options)
    local, emitted = connect(chosen, structure, model, task)
    if verified:
        verify_step(local, emitted, structure, getattr(chosen.draft, "given_targets", None))
    warn_of_unstepped(local)
    log.info("compiled %s; create the optimiser after this call, from its parameters()", chosen.model)
    return local
