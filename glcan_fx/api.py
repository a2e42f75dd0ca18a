"""What users call: ``plan``, ``transform`` and ``estimate_memory``."""

import gc
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from glcan_fx.auxiliary.method import Method
from glcan_fx.capture.replay import Segments
from glcan_fx.config import K, Options
from glcan_fx.errors import GlcanFxError, PlanError, TraceError
from glcan_fx.methods import method_of
from glcan_fx.planned import PlannedModel
from glcan_fx.planner.choose import NothingToCut, choose
from glcan_fx.planner.modules import check_plan
from glcan_fx.planner.request import Request, request_for
from glcan_fx.planner.segments import plan_segments
from glcan_fx.plans.plan import Plan
from glcan_fx.progress import progress
from glcan_fx.simulate.estimate import Estimate
from glcan_fx.simulate.simulator import Simulator
from glcan_fx.step.local_model import LocalModel, is_compiled
from glcan_fx.step.saving import load_auxiliary, load_weights, read_plan
from glcan_fx.tasks import Task, make_task, specs
from glcan_fx.tasks.base import Criterion
from glcan_fx.tasks.captured import Uncaptured, capture, capture_calls, capture_part

log = logging.getLogger("glcan_fx")

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_ONE = threading.RLock()


@contextmanager
def _no_raw_error(model: nn.Module) -> Iterator[None]:
    """Whatever else goes wrong while a model is compiled is told as such; the error itself stays the cause."""
    try:
        yield
    except (GlcanFxError, MemoryError, torch.OutOfMemoryError, Warning):  # a warning: the user made errors of them
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PlanError(
            f"{type(model).__name__} cannot be compiled: {type(error).__name__}: {error} ({frame.filename}:"
            f"{frame.lineno}, in {frame.name}). Where that is not your own code, please report it, with the traceback: "
            "glcan_fx should have compiled it, or said why not. A sub-module that holds most of the activations may "
            "compile alone.") from error


@contextmanager
def _garbage_waits() -> Iterator[None]:
    """Collect no cycles meanwhile: graphs are full of them, hold no memory, and looking for them would take a tenth of
    the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _one_at_a_time(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """In one thread at a time: random states, which are put back, belong to the process."""
    @wraps(function)
    def locked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        with _ONE:
            return function(*args, **kwargs)
    return locked


@_one_at_a_time
def plan(
    model: nn.Module,
    *,
    k: K = "fewest",
    task: str | Task | None = None,
    criterion: Criterion | None = None,
    example_inputs: Any = None,
    memory_budget: int | str | None = None,
    compute_budget: float | None = None,
    method: str | Method = "glcan",
    plan: Plan | PlannedModel | None = None,
    devices: int = 1,
    options: Options = Options(),
    **method_options: Any,
) -> PlannedModel:
    """Decide how ``model`` is cut into local modules and what their auxiliary networks are; changes nothing.

    Options of the method that are left open are chosen: the richest auxiliary networks with which a training step takes
    no more compute than backpropagation's, and whose weights add at most a tenth to its memory. Without
    ``memory_budget`` 5 % more compute where global average pooling ends the network, 10 % where a decoder does; with or
    without, a third more where that keeps the narrowest decoder.

    Args:
        model: any module that runs, on any device, in either mode; ``report`` says how it was captured.
        k: number of local modules; 1 has backpropagation's own gradients. "fewest" (with which a step takes at most
            2 % more memory than with the natural number, by simulation, with blocks that run again for 5 % more compute
            than backpropagation's at most; the natural number where none can be simulated), "natural" (one per block),
            or a list of split points (module paths). With a ``memory_budget`` and no number, or "auto" (the GPU's
            memory), the fewest that fit.
        task: "detection", "classification", "segmentation", "super_resolution", "own_loss" (the model returns it), or
            a ``Task`` object. Left out, with no ``criterion``: "own_loss".
        criterion: ``(outputs, targets) -> Tensor or dict``, instead of a task's own loss.
        example_inputs: one batch of the sizes that you train with (values do not matter): a tensor, a tuple of
            positional arguments, or a dict of keyword arguments. Detection: images, two of 320 x 320 by default.
        memory_budget: bytes, or text ("6GiB"), that a training step may take at most, by simulation: one local module
            where it fits with blocks that run again, else the fewest. "least": as little as there is for the compute
            that it may take. The plan's notes say what was tried, and what exact gradients would take.
        compute_budget: floating-point operations that a training step may take, or, with ``Options(device=...)``,
            estimated time, relative to backpropagation's, blocks that run again included, by simulation: instead of
            the above, and of 1.05 with a ``memory_budget``. Where
            nothing keeps both budgets, memory is kept, and a note says so. 1.3 lets a few local modules come closest to
            backpropagation's accuracy.
        method: the local-learning method, by name ("glcan", "dgl", "auglocal", "infopro", "predsim", "man", "hpff",
            "mlaan", "sgr", or several, each the base of the one before: "hpff+man+dgl"), or an object of
            ``glcan_fx.methods`` with options of its own, such as ``GLCAN(width=0.5, head="light")``. Options of a
            method that is given by name may be passed as keywords: ``method="glcan", ahead=1, head="light"``.
        plan: a plan that was made before, to look at on this model; only ``task``, ``criterion`` and ``options`` may be
            given beside it (a ``PlannedModel`` brings its own task).
        devices: ranks of a pipeline (``glcan_fx.distributed.pipeline``) that the local modules are divided among, of
            which there are at least as many; ``memory_budget`` is that of one process that runs them all.
        options: how plans are simulated and verified, and savings that change no gradient.

    Raises TraceError where the model cannot be captured, PlanError for a request that is not possible (BudgetError
    where nothing keeps a budget).
    """
    _check_model(model)
    if isinstance(plan, PlannedModel):
        if task is None and criterion is None:
            task = plan.task_object
        plan = plan.plan
    if plan is not None:
        _check_alone(plan, k, example_inputs, memory_budget, compute_budget, method, devices, *method_options)
        return _planned_before(model, plan, task, criterion, options)
    request = request_for(model, k, method_of(method, **method_options), memory_budget, compute_budget, options,
                          devices)
    made = make_task(task, criterion)
    made.begin(model)
    made.network(model)  # first: whether the task fits the model at all
    values = made.example_inputs(model, example_inputs)
    inputs = specs(values)
    if example_inputs is None:
        log.info("no example_inputs: planned for %s", ", ".join(map(str, inputs)))

    with _no_raw_error(model), progress(f"planning {type(model).__name__}"), _garbage_waits():
        return _planned_now(model, made, inputs, values, request)


def _planned_now(model: nn.Module, made: Task, inputs: Any, values: Any, request: Request) -> PlannedModel:
    """Capture the model, and choose a plan."""
    options = request.options
    captured = capture(model, made, inputs, values)
    if isinstance(captured, Uncaptured):
        return PlannedModel(plan_segments(captured, request), captured, options)
    captured.task.fits(captured.structure.trace.output.meta["value"])
    simulator = Simulator(captured, options.example_targets, options.device)
    try:
        chosen = choose(captured, request, simulator)
        if chosen.k < request.devices and not isinstance(request.k, int):
            chosen = choose(captured, replace(request, k=request.devices), simulator)
        if request.devices > 1:
            chosen = simulator.on_devices(chosen, request.devices, options.optimizer)
    except NothingToCut as error:
        if made.network(model):
            raise
        calls = capture_calls(model, made, inputs, TraceError(str(error)), values)
        return PlannedModel(plan_segments(calls, request), calls, options)
    _tell(chosen, captured.structure.units, request)
    return PlannedModel(chosen, captured, options, simulator, request.method)


@_one_at_a_time
def transform(
    model: nn.Module,
    *,
    k: K = "fewest",
    task: str | Task | None = None,
    criterion: Criterion | None = None,
    example_inputs: Any = None,
    memory_budget: int | str | None = None,
    compute_budget: float | None = None,
    method: str | Method = "glcan",
    plan: Plan | PlannedModel | None = None,
    devices: int = 1,
    options: Options = Options(),
    **method_options: Any,
) -> LocalModel:
    """Compile ``model`` into gradient-isolated local modules that train in a standard loop.

    Returns a module that *shares* the model's parameters and parts; the model itself is not changed. Create the
    optimizer afterwards, from ``local.parameters()`` or ``local.parameter_groups()``.

    Args:
        model: any module that runs, on any device, in either mode.
        k: number of local modules; 1 is plain backpropagation. "fewest" that save as much memory as one per block,
            "natural" (one per block), "auto" (that fit the GPU), or a list of split points (module paths).
        task: "detection", "classification", "segmentation", "super_resolution", "own_loss" (the model returns it), or
            a ``Task`` object. Left out, with no ``criterion``: "own_loss".
        criterion: ``(outputs, targets) -> Tensor or dict``, instead of a task's own loss.
        example_inputs: one batch of the sizes that you train with (values do not matter): a tensor, a tuple of
            positional arguments, or a dict of keyword arguments. Detection: images, two of 320 x 320 by default.
        memory_budget: bytes, or text ("6GiB"), that a training step may take at most, or "least".
        compute_budget: compute that a training step may take, relative to backpropagation's.
        method: the local-learning method, by name or as an object of ``glcan_fx.methods``; options of a method that is
            given by name are keywords: ``method="glcan", width=0.5``.
        plan: build this plan, which decides all but ``task``, ``criterion`` and ``options``.
        devices: ranks of a pipeline that the local modules are divided among.
        options: how plans are simulated and verified, and savings that change no gradient.

    ``glcan_fx.plan`` takes the same arguments, documents them in full, and shows the plan before anything is built.

    Raises TraceError (also where the compiled step would compute something else than the model), PlanError,
    NotLearningError where a local module would get no gradient.
    """
    with progress(f"compiling {type(model).__name__}"):
        planned = _plan(model, k=k, task=task, criterion=criterion, example_inputs=example_inputs,
                        memory_budget=memory_budget, compute_budget=compute_budget, method=method, plan=plan,
                        devices=devices, options=options, **method_options)
        with _no_raw_error(model):
            local = planned.build()
    log.info("compiled %s; create the optimizer after this call, from its parameters()", planned.plan.model)
    return local


@_one_at_a_time
def estimate_memory(
    model: nn.Module | PlannedModel,
    example_inputs: Any = None,
    *,
    task: str | Task | None = None,
    criterion: Criterion | None = None,
    recompute: bool = False,
    in_forward: bool = False,
    options: Options = Options(),
) -> Estimate:
    """Simulate a training step on fake tensors: its peak memory, what that is made of, and its compute.

    Needs no GPU and no memory, and takes about a second. Within a few per cent of ``torch.cuda.max_memory_allocated``,
    which also counts library workspaces.

    Args:
        model: a planned or a compiled model (then ``in_forward`` and ``options`` are all that may be given beside it),
            or a model, for backpropagation.
        example_inputs: as for ``plan``, as are ``task`` and ``criterion``.
        task: see there.
        criterion: see there.
        recompute: backpropagation with activation checkpointing on every block.
        in_forward: the optimizer steps each local module in the forward pass (``optimizer_in_forward``).
        options: the optimizer, and example targets.

    Raises TraceError, PlanError.
    """
    if isinstance(model, LocalModel):
        known: Plan | PlannedModel = model.plan
        model = known if isinstance(known, PlannedModel) else _planned_before(
            model.original, known, model.task, None, options)
    if isinstance(model, PlannedModel):
        return model.simulate(options.optimizer, in_forward=in_forward)
    if in_forward:
        raise PlanError("in_forward=True: only local modules can be stepped in the forward pass: estimate a planned "
                        "or a compiled model")
    whole = _plan(model, k=1, task=task, criterion=criterion, example_inputs=example_inputs, options=options)
    return whole.backpropagation(options.optimizer, recompute=recompute)


@_one_at_a_time
def load_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    task: str | Task | None = None,
    criterion: Criterion | None = None,
    options: Options = Options(),
) -> LocalModel:
    """Go on training what ``local.save_pretrained(directory)`` wrote: compile by its plan, with its auxiliary networks.

    Args:
        model: the plain model. Its weights are read from the directory, except where its own library does so
            (``Model.from_pretrained(directory)`` of transformers, huggingface_hub): then it has them already.
        directory: what ``save_pretrained`` was given.
        task: as for ``transform``, as are ``criterion`` and ``options``.
        criterion: see there.
        options: see there.

    Raises LoadError where the directory does not hold what belongs to this model, which stays as it was then.
    """
    chosen = read_plan(directory)
    local = transform(model, plan=chosen, task=task, criterion=criterion, options=options)
    load_auxiliary(local, directory)
    if not hasattr(model, "from_pretrained"):
        load_weights(model, directory)
    return local


_plan = plan  # where a keyword hides the function


def _planned_before(
    model: nn.Module, plan: Plan, task: str | Task | None, criterion: Criterion | None, options: Options
) -> PlannedModel:
    """A plan that was made before, on this model. Raises PlanError where it does not fit."""
    if task is None and criterion is None:
        task = plan.task
    made = make_task(task, criterion)
    made.begin(model)
    if plan.around is not None and plan.slices > 1:
        raise PlanError(f"slices={plan.slices}: a part of this model runs as Python, which takes whole batches")
    if isinstance(plan.around, Segments):
        error = TraceError(f"{type(model).__name__} does not run on the plan's sizes")
        return PlannedModel(plan, capture_calls(model, made, plan.inputs, error), options)
    with _no_raw_error(model):
        captured = capture_part(model, made, plan.inputs, plan.around)
        captured.task.fits(captured.structure.trace.output.meta["value"])
        return PlannedModel(check_plan(plan, captured), captured, options)


def _check_alone(plan: Any, *others: Any) -> None:
    """Raise PlanError where a given plan is not one, or decides what is given beside it."""
    if not isinstance(plan, Plan):
        raise PlanError(f"plan= must be a glcan_fx.Plan, not {type(plan).__name__}: Plan.from_json() reads text")
    names = ("k", "example_inputs", "memory_budget", "compute_budget", "method", "devices", *others[6:])
    usual = ("fewest", None, None, None, "glcan", 1, *[None] * len(others[6:]))
    given = [name for name, value, default in zip(names, others, usual, strict=True)
             if not (value is default or isinstance(value, str) and value == default)]
    if given:
        raise PlanError(f"plan= already decides {', '.join(given)}: remove {'it' if len(given) == 1 else 'them'}")


def _check_model(model: nn.Module) -> None:
    """Raise PlanError for what cannot be compiled, with what to pass instead."""
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
            "the result: DistributedDataParallel(glcan_fx.transform(model, ...))")
    odd = next((name for name, _ in model.named_modules() if any(sign in name for sign in "\"'\\\n")), None)
    if odd is not None:
        raise PlanError(f"the module {odd!r} has a name that no generated code can hold: rename it, without quotes, "
                        "backslashes and line ends.")
    if not any(p.requires_grad for p in model.parameters()):
        raise PlanError(f"{type(model).__name__} has no trainable parameters: nothing to train. Set requires_grad_().")


def _tell(chosen: Plan, units: Any, request: Request) -> None:
    plain = chosen.k == 1 and not chosen.modules[0].recompute
    if plain and len(units) > 1 and request.k == "fewest" and request.memory_budget is None:
        log.warning("%s is not cut: on batches like the example inputs backpropagation takes as little memory as %d "
                    "local modules. Make example_inputs as large as your batches, or pass k.", chosen.model, len(units))
    log.info("planned %s: %d local modules of %d possible", chosen.model, chosen.k, len(units))
