"""The result: a module that trains by local losses and evaluates as the original model."""

import copy
import inspect
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from glcan_fx.capture.random_numbers import random_state
from glcan_fx.errors import (
    ModelChangedError,
    PlanError,
    TargetError,
    UnsupportedError,
)
from glcan_fx.fx_utils import Packed, Parts, pack, unpack
from glcan_fx.pytree import tensors_in
from glcan_fx.step import saving
from glcan_fx.step.arguments import signature_of, unlike
from glcan_fx.step.connect import connect
from glcan_fx.step.gradients import LocalBackward, parameters_of, private_graph
from glcan_fx.step.guards import Guards, Opened
from glcan_fx.step.hooks import within_hooks
from glcan_fx.step.local_loss import Draws, LocalLoss
from glcan_fx.step.members import SharedMembers
from glcan_fx.step.notices import compare_shapes, compare_sizes, warn_of_input_gradients, warn_of_unused
from glcan_fx.step.optimizer_in_forward import OptimizerInForward, refuse_distributed
from glcan_fx.step.output import LocalOutput, collect, parts_of_loss, reported, total
from glcan_fx.step.sharing import links_of, refuse_sharded
from glcan_fx.step.stages import Share, Stage, Step, called, uncompiled
from glcan_fx.step.trained import backwards_of, called_by, targets_of, targets_of_last, trained_alone
from glcan_fx.tasks.base import LossHead, Spec

if TYPE_CHECKING:
    from glcan_fx.plans.plan import Plan
    from glcan_fx.tasks import Task


class LocalModel(SharedMembers):
    """The user's model as gradient-isolated local modules; shares the model's parameters, buffers and sub-modules.

    In training mode a call runs ``local.graph``, whose code ``local.code`` shows; in evaluation mode it calls the
    original model, so predictions are the same bit for bit; with targets it returns their loss, too. What
    is new (auxiliary networks) is registered under ``aux.``; every other key of ``state_dict`` is the original's.
    """

    plan: "Plan"
    task: "Task"
    graph: fx.Graph
    _written_for: ClassVar[Callable[..., Any]]  # for other sizes, and whether they need one: set by variants.py, which
    _check_new_sizes: ClassVar[Callable[..., None]]  # records again

    def __new__(cls, *_: Any, **__: Any) -> "LocalModel":
        """Of a class of its own, whose ``forward`` has the signature of the model's."""
        return super().__new__(type(cls.__name__, (cls,), {"__module__": cls.__module__}))

    def __init__(
        self, model: nn.Module, aux: nn.Module, graph: fx.Graph, plan: "Plan", task: "Task",
        parts: Parts | None = None, opened: Opened | None = None,
    ) -> None:
        """``parts`` of the model are what the graph calls as modules of their own; ``opened`` is what its written-out
        modules read of themselves."""
        parts, opened = parts or {}, opened or {}
        taken = [name for name in model._modules | model._parameters | model._buffers if name in _RESERVED]
        if taken:
            raise PlanError(
                f"{type(model).__name__} has members called {', '.join(map(repr, taken))}, names that the compiled "
                "module needs itself. Wrap the model in a module that holds it under another name."
            )
        super().__init__()
        connect(model, aux, graph, plan, task, parts)
        self._share(model, aux)
        called = frozenset(str(node.target) for node in graph.nodes if node.op == "call_module")
        asks = not task.network_is_part and plan.report.asks_about_sizes(opened)
        if "sizes" in aux._modules:
            aux.get_submodule("sizes").bind(partial(_check_sizes, weakref.ref(self)))  # type: ignore[operator]
        called |= {path for part in parts.values() for path in called_by(part.nodes)}
        self.__dict__.update(plan=plan, task=task, graph=graph, _last_reached=[], _parts=parts,
                             _opened=opened, _guards=Guards(model, opened, called), _optimizer=_no_optimizer,
                             _compared=False, _told=False, _steps={}, _asks=asks)
        losses: list[Any] = [part for part in aux.children() if isinstance(part, LocalLoss)]
        trained = [part.backward for part in losses if "backward" in part._modules]
        self.__dict__.update(_draws=Draws(), _parts_that_train=trained)
        for part in losses:
            part.__dict__["draws"] = self.__dict__["_draws"]
        self.__dict__["training"] = model.training
        for name, part in aux.named_children():
            if name != "task":
                part.train(model.training)
        aux.__dict__["training"] = model.training
        self.register_load_state_dict_pre_hook(saving.before_loading)
        self.recompile()

    @property
    def code(self) -> str:
        """The training step, as Python."""
        return self.graph.python_code("self").src

    def recompile(self) -> None:
        """Run ``graph`` as it is now, after it was edited."""
        cls: Any = type(self)
        self.__dict__["_step"] = step = self._written(self.graph)
        self.__dict__["_stages"] = [Stage(piece) for piece in step.pieces]
        self.__dict__["_steps"].clear()

        def forward(self: "LocalModel", *args: Any, **kwargs: Any) -> Any:
            return self._train_step(args, kwargs) if self.training else self._evaluate(args, kwargs)

        forward.__signature__ = signature_of(self.original, self.task.takes_targets)  # type: ignore[attr-defined]
        cls.forward = forward

    def _written(self, graph: fx.Graph) -> Step:
        """The training step that a graph describes."""
        return Step(graph, type(self.original).__name__)

    def own_stages(self) -> list[Stage]:
        """The local modules as modules of their own, with what each trains now: ``stages``, where the model itself has
        nothing of that name."""
        stages: list[Stage] = self.__dict__["_stages"]
        step: Step = self.__dict__["_step"]
        for stage, run, paths in zip(stages, step.runs, self.paths_by_stage(), strict=True):
            stage.hold(self, paths)
            stage.__dict__["forward"] = partial(called, run, self)
        for first, last, why in links_of(self):
            for index in (first, last):
                stages[index].__dict__["needs"] = (*(self.plan.modules[i].name for i in (first, last)), why)
        return stages

    def paths_by_stage(self) -> list[list[str]]:
        """Of every local module the modules, parameters and buffers that belong to it; the last one has what no other
        has."""
        last = self.plan.k - 1
        paths = [[*targets_of(self.graph, index), f"aux.{index}"] for index in range(last)]
        taken = {id(buffer) for buffer in Share.of(self, sum(paths, [])).buffers()}
        left = [name for name, buffer in self.named_buffers() if id(buffer) not in taken]
        tail = targets_of_last(self.original, self.graph, self.__dict__["_parts"], last + 1)
        constants = [[path for path in called_by(piece.graph.nodes) if path.startswith("aux.constants.")]
                     for piece in self.__dict__["_step"].pieces]
        return [[*own, *more] for own, more in zip(
            [*paths, [*tail, *left, "aux.last", "aux.task"]], constants, strict=True)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def step_for(self, given: dict[str, Any]) -> Step:
        """The step for arguments of these sizes, where the answers to the model's questions about sizes decide."""
        if any(part.watch.on for part in self.trained()):
            self.__dict__["_draws"].moved(random_state(list(given.values())))
        written: Step = self.__dict__["_step"]
        if not self.__dict__["_asks"]:
            return written
        key = tuple((tuple(t.shape[1:]), t.dtype) for name in self.inputs()
                    for t in tensors_in(given.get(name)))
        steps = self.__dict__["_steps"]
        if key not in steps:
            made = None if key == self._example_key() else type(self)._written_for(self, given)
            steps[key] = written if made is None else self._written(made.graph)
            if made is not None:
                self._train_also(made.graph)
        found: Step = steps[key]
        return found

    def _example_key(self) -> tuple[Any, ...]:
        """The sizes that the step was written for."""
        inputs = self.plan.inputs
        specs = tree_leaves([inputs[name] for name in self.inputs() if name in inputs]
                            if isinstance(inputs, dict) else inputs)
        return tuple((spec.shape[1:], getattr(torch, spec.dtype)) for spec in specs if isinstance(spec, Spec))

    def _train_also(self, graph: fx.Graph) -> None:
        """Let the local losses train what another step uses beside the parameters of the first one."""
        for part in backwards_of(self.aux, self.plan.k):
            index = next(i for i, module in enumerate(self.plan.modules) if module.name == part.name)
            more = [(self.original, path) for path in targets_of(graph, index)]
            part.__dict__["trains"] = (*part.__dict__["trains"], *more)

    def _evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original model's output; with targets, its loss beside it."""
        if self.task.result() == "dict" or not self.task.takes_targets:
            return self.original(*args, **kwargs)
        targets, inputs = kwargs.get("targets"), self.inputs()
        if len(args) > len(inputs):
            args, targets = args[:len(inputs)], args[len(inputs)]
        output = self.original(*args, **{key: value for key, value in kwargs.items() if key != "targets"})
        if targets is None:
            return output
        loss = LossHead(self.task)(output, targets)
        return collect([reported(total(loss), parts_of_loss(loss))], output)

    def names(self) -> list[str]:
        """Of the arguments of a training step: the model's, and its targets."""
        return [str(node.target) for node in self.graph.nodes if node.op == "placeholder"]

    def inputs(self) -> list[str]:
        """Of the arguments of a training step, the model's."""
        return [name for name in self.names() if name != "targets" or not self.task.takes_targets]

    @uncompiled
    def _train_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._before_step(args, kwargs)
        if given is None:
            return self.original(*args, **kwargs)  # statistics are being collected (update_bn): nothing to train
        if "whole" in self.aux._modules:  # the model's own call runs its hooks
            return self.run_step(given)
        detector = self.task.result() == "dict"
        seen = [name for name in self.names() if name in given and (detector or name != "targets")]
        return within_hooks(self.original, self.run_step, given, seen,
                            lambda result: result if detector else result.output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a training step by name; None where nothing is to be trained. Raises where the step cannot
        be trusted."""
        given = self.arguments(args, kwargs)
        if given.get("targets") is None and not torch.is_grad_enabled():
            return None
        self.task.check(next(iter(given.values()), None), given.get("targets"))
        self.check_guards()
        reached = {part.name: part.delivered for part in self.trained()}
        reached.setdefault(self.plan.modules[-1].name, self.__dict__["_last_reached"])
        warn_of_unused(reached)
        if not self.__dict__["_told"]:
            self.__dict__["_told"] = warn_of_input_gradients(self.plan, given, self.inputs())
        if not self.__dict__["_compared"]:
            self.__dict__["_compared"] = True
            compare_sizes(self.plan, next(iter(given.values()), None))
        return given

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a training step by name. Raises ModelChangedError for those that the step was not written
        for."""
        names = self.names()
        if len(args) > len(names):
            raise TargetError(f"a training step of {self.plan.model} takes {', '.join(names)}, not {len(args)} "
                              "arguments: example_inputs= say which arguments it has, and the targets are the last.")
        given = dict(zip(names, args, strict=False)) | kwargs
        if self.plan.network or self.plan.around is not None:
            return given
        known = inspect.signature(self.original.forward).parameters
        for name in [name for name in given if name not in names]:
            default = known[name].default if name in known else inspect.Parameter.empty
            if given[name] is not default:
                raise ModelChangedError(
                    f"argument '{name}' of {self.plan.model} was not among example_inputs=, which the training step "
                    "was written for. Compile again with an example that has it, as keyword arguments: "
                    f"example_inputs={{..., '{name}': ...}}.")
            del given[name]
        examples = self.plan.inputs.items() if isinstance(self.plan.inputs, dict) else zip(
            names, self.plan.inputs, strict=False)
        for name, example in examples if self.plan.k > 1 else ():
            if name in given and (what := unlike(example, given[name])):
                raise ModelChangedError(
                    f"argument '{name}' of {self.plan.model} was {what[0]} in example_inputs=, which the training step "
                    f"was written for, and is {what[1]} now. Compile again with such an example.")
        return given

    def check_guards(self) -> None:
        """Raise ModelChangedError where the model is no longer what the training step was written for, UnsupportedError
        where it is sharded in a way that the step cannot do."""
        refuse_sharded(self)
        self._sync()
        self.__dict__["_guards"].check()

    def trained(self) -> list[LocalBackward]:
        """What differentiates the local losses."""
        parts: list[LocalBackward] = self.__dict__["_parts_that_train"]
        return parts

    @uncompiled
    def run_step(self, given: dict[str, Any]) -> Any:
        """Run the step's graph on arguments by name, unchecked and without the hooks on the model itself."""
        step = self.step_for(given)
        optimizer = self.__dict__["_optimizer"]()
        stepping = optimizer is not None and torch.is_grad_enabled()
        try:
            values = step.values(given)
            with optimizer.forward(backwards_of(self.aux, self.plan.k)) if stepping else nullcontext():
                self.run_stages(step, values, range(len(step.pieces)))
                result = step.result(self, values)
                if stepping:
                    optimizer.refuse_used_again(list(tensors_in(result)))
        except BaseException as error:
            self._forget_step()
            if isinstance(error, RuntimeError) and step is not self.__dict__["_step"]:
                raise ModelChangedError(
                    f"{self.plan.model} takes another branch at these sizes than at those of its example, and "
                    f"its auxiliary networks do not run there: {error}. Compile it with an example of such sizes, or "
                    "pad inputs in the loop.") from error
            raise
        self._after_step(result)
        return result

    @uncompiled
    def run_stages(self, step: Step, values: dict[str, Any], which: range) -> None:
        """Run some local modules on the values of the step so far, in place."""
        several = self.plan.k > 1
        twice = several and self.plan.method.agreement  # fast attention has no second derivative
        with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext(), private_graph() if several else nullcontext():
            for index in which:
                step.run(self, self.__dict__["_stages"][index], values, index)

    def differentiate_stage(
        self, step: Step, values: dict[str, Any], index: int, weight: float, losses: dict[str, Tensor]
    ) -> None:
        """Run a local module on values, in place; differentiate its loss, times ``weight``, and add it to ``losses``,
        by the name of its value."""
        self.run_stages(step, values, range(index, index + 1))
        for name in [name for name in step.pieces[index].makes if name in step.losses]:
            loss = values.pop(name)
            scalar = total(loss[0] if isinstance(loss, tuple) else loss) * weight
            if scalar.requires_grad:
                scalar.backward()
            losses[name] = losses.get(name, 0) + scalar.detach()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_step(self, result: Any) -> None:
        self.aux.get_submodule("scale").update()  # type: ignore[operator]
        self._watch_last(result)
        compare_shapes(self.plan, self.aux, result)

    def _forget_step(self) -> None:
        """After an exception there is no step whose losses could be minimised in part."""
        self.__dict__["_last_reached"] = []
        for part in self.trained():
            part.delivered = []

    def _watch_last(self, result: Any) -> None:
        """Note whether the last module's loss reaches backward, where it is an ordinary autograd graph."""
        last = result.losses[-1] if isinstance(result, LocalOutput) else list(result.values())[-1]
        ordinary = "backward" not in self.aux.get_submodule("last")._modules
        reached = self.__dict__["_last_reached"] = [False] if ordinary and last.requires_grad else []
        optimizer = self.__dict__["_optimizer"]()

        def arrived(_: Any) -> None:
            reached[:] = [True]
            if optimizer is not None:
                optimizer.in_backward()

        if reached or optimizer is not None and last.requires_grad:
            last.register_hook(arrived)

    def train(self, mode: bool = True) -> "LocalModel":
        self._sync_if_made()
        kept = [(part, part.training) for module in self.task.modules().values() for part in module.modules()]
        super().train(mode)
        self.original.train(mode)  # also applies the model's own train(), which may keep parts in evaluation mode
        for part, training in kept:  # a criterion's mode is the user's business
            part.training = training
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "stages" and "_original" in self.__dict__ and not hasattr(self.original, name):
            return self.own_stages()
        return super().__getattr__(name)

    def __copy__(self) -> "LocalModel":
        parts = self.__dict__["_parts"]
        new = LocalModel(self.original, self.aux, copy.deepcopy(self.graph), self.plan, self.task, parts,
                       self.__dict__["_opened"])
        new.__dict__["training"] = self.training
        return new

    def parameter_groups(self, lr: float, aux_lr: float | None = None) -> list[dict[str, Any]]:
        """Optimizer groups with the two learning rates of GLCAN's eq. 5 and 6: the model's, and the auxiliary's."""
        own = {id(p) for p in self.original.parameters()}
        return [
            {"params": [p for p in self.parameters() if id(p) in own], "lr": lr},
            {"params": [p for p in self.parameters() if id(p) not in own], "lr": lr if aux_lr is None else aux_lr},
        ]

    def parameters_by_module(self) -> dict[str, list[nn.Parameter]]:
        """The original model's parameters by the local module that trains them first; names are the plan's. The last
        module has the neck and head, and what no other trains."""
        left = {id(p): p for p in self.original.parameters()}
        found = {
            info.name: [left.pop(id(p)) for p in parameters_of([(self.original, path) for path in targets_of(
                self.graph, index)]) if id(p) in left]
            for index, info in enumerate(self.plan.modules[:-1])}
        return {**found, self.plan.modules[-1].name: list(left.values())}

    def optimizer_in_forward(
        self, make: Callable[..., Optimizer], *, max_norm: float | None = None, **options: Any
    ) -> OptimizerInForward:
        """An optimizer that steps each local module inside the forward pass, and frees its gradients at once.

            optimizer = local.optimizer_in_forward(torch.optim.Adam, lr=1e-3)

        The loop stays as it is, and so do the numbers; learning-rate schedulers and state dicts are those of the
        optimizer itself. Of the gradients, only those of the last local module, and of parameters that more than one
        trains, wait for ``loss.backward()`` and ``optimizer.step()``. It steps as long as the optimizer exists; a later
        call replaces it. After an exception in the forward pass, the modules before it have been stepped.

        Args:
            make: an optimizer's class, or a function of the parameters, which may return parameter groups of its own; a
                rule per parameter, as all of torch.optim but LBFGS.
            max_norm: clip the gradients of each local module to this norm, its own.
            options: the class's own, ``lr`` and others.

        Refused with UnsupportedError, here or while it trains: a loss that is scaled or weighted before backward
        (GradScaler, accumulation), gradients that are changed before the step (clip_grad_norm_), gradient hooks,
        several processes. Scaled losses are looked for in the first steps only.
        """
        refuse_distributed()
        if isinstance(make, Optimizer):
            raise UnsupportedError("optimizer_in_forward() makes the optimizer itself: pass its class and options, for "
                                   "example optimizer_in_forward(torch.optim.SGD, lr=0.1)")
        inner = make(list(self.parameters()), **options)
        if isinstance(inner, torch.optim.LBFGS):
            raise UnsupportedError("LBFGS evaluates the loss of all parameters together, several times a step: local "
                                   "modules cannot be stepped one by one. Use another optimizer.")
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        optimizer = OptimizerInForward(inner, self.trained_alone, names, max_norm)
        self.__dict__["_optimizer"] = weakref.ref(optimizer)
        return optimizer

    def trained_alone(self) -> dict[str, list[Tensor]]:
        """Of every local module but the last, the parameters that no other part of a step uses."""
        return trained_alone(self.original, self.aux, self.graph, self.plan, self.__dict__["_parts"])

    def original_state_dict(self) -> dict[str, Any]:
        """The original model's state dict: what to ship."""
        return self.original.state_dict()

    def save_pretrained(self, directory: str | Path, **options: Any) -> None:
        """Write the plain model, and beside it what is needed to go on training.

        The model's own ``save_pretrained(directory, **options)`` is called where it has one (transformers,
        huggingface_hub); else its weights go to model.safetensors. Auxiliary networks go to auxiliary.safetensors, the
        plan to plan.json. ``glcan_fx.load_pretrained`` goes on from there; the plain model's library needs neither.
        """
        saving.save(self, directory, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LocalModel":
        model = copy.deepcopy(self.original, memo)
        task = copy.deepcopy(self.task, memo)  # may hold a criterion with parameters
        aux = copy.deepcopy(self.aux, memo)
        new = LocalModel(model, aux, copy.deepcopy(self.graph), self.plan, task, self.__dict__["_parts"],
                       self.__dict__["_opened"])
        memo[id(self)] = new
        return _with_modes(new, _modes(self))

    def __reduce__(self) -> Any:
        saving.refuse_closure(self)
        parts = {name: pack(part) for name, part in self.__dict__["_parts"].items()}
        return _rebuild, (self.original, self.aux, pack(self.graph), self.plan, self.task, _modes(self), parts,
                          dict(self.__dict__["_opened"]))


def _check_sizes(local: "weakref.ref[LocalModel]", values: tuple[Any, ...]) -> None:
    made = local()
    assert made is not None
    type(made)._check_new_sizes(made, values)


_RESERVED = ("aux", "plan", "task", "original", "graph", "code", "meta")


def _no_optimizer() -> None:
    """Stands for the weak reference to an optimizer that steps in the forward pass, where there is none."""


def _rebuild(
    model: nn.Module, aux: nn.Module, graph: Packed, plan: "Plan", task: "Task", modes: dict[str, bool],
    parts: dict[str, Packed], opened: Opened,
) -> LocalModel:
    unpacked = {name: unpack(part) for name, part in parts.items()}
    made = LocalModel(model, aux, unpack(graph), plan, task, unpacked, opened)
    return _with_modes(made, modes)


def _modes(local: LocalModel) -> dict[str, bool]:
    """Which modules are in training mode: parts may be kept in evaluation mode."""
    return {name: part.training for name, part in local.named_modules(remove_duplicate=False)}


def _with_modes(local: LocalModel, modes: dict[str, bool]) -> LocalModel:
    for name, part in local.named_modules(remove_duplicate=False):
        part.__dict__["training"] = modes.get(name, local.training)
    local.original.__dict__["training"] = local.training
    return local


def is_compiled(model: nn.Module) -> bool:
    """Whether a model is, or holds, a compiled one."""
    return any(isinstance(part, LocalModel) for part in model.modules())
