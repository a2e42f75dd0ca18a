"""Verify, never trust: run the emitted training step beside the module that it was made from, on real values."""

import copy
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from glcan_fx.capture.random_numbers import cuda_devices, kept_python_random, random_state, seed
from glcan_fx.capture.shadow import replicate
from glcan_fx.errors import ModelChangedError, NotLearningError, TraceError
from glcan_fx.pytree import map_tensors, tensors_in
from glcan_fx.step import output as passing
from glcan_fx.step.emit import Emitted
from glcan_fx.step.local_loss import Draws
from glcan_fx.step.local_model import LocalModel
from glcan_fx.structure.structure import Structure, multiply_adds
from glcan_fx.tasks import AnyLoss, Spec
from glcan_fx.tasks.base import LossHead

log = logging.getLogger("glcan_fx")

_AFFORDABLE = {"cpu": 1e10, "cuda": 1e12}  # multiply-adds of one forward pass: about a second


def verify(local: LocalModel, emitted: Emitted, structure: Structure, targets: Any = None) -> bool:
    """Compare step and model in training mode, at the example's batch size and at another one, random numbers included;
    and look, on a small batch, whether every local module gets gradients. ``targets``: those of the example, if known.

    Both run on copies that share the model's parameters and have buffers of their own, on the model's device, without
    hooks. Returns False where that would take long, or the step calls the model as it is, and nothing was compared.
    Raises TraceError where the outputs or the buffers differ, NotLearningError where gradients are exactly zero or not
    finite. (Evaluation needs no check: it calls the model.)
    """
    model = local.original
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if emitted.forward is None:
        return False
    if multiply_adds(structure) > _AFFORDABLE.get(device.type, 0):
        log.info("not verified: a forward pass of %s takes long on %s", type(model).__name__, device)
        return False
    with torch.random.fork_rng(devices=cuda_devices(model)), kept_python_random(), torch.no_grad():
        hooks = structure.trace.hooks
        _run_both(local, emitted.forward, device, hooks)
        if local.task.result() == "output" and local.plan.around is None and not emitted_differs(local):
            _probe(local, structure, targets, device)
    return True


def verify_around(local: LocalModel, inputs: Any) -> None:
    """Compare a step that runs the model's own forward as Python, again for every local module, with one run of the
    model: outputs, parameters, buffers, random numbers. ``inputs``: of the model, as ``Spec``s.

    Both run on copies that share nothing. Raises TraceError where they differ.
    """
    model = local.original
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batch = next((spec.shape[0] for spec in _specs(inputs) if len(spec.shape) > 1), 0)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), kept_python_random(), torch.no_grad():
        values = _random(inputs, batch, min(batch, _PROBED) - batch, device)
        plain = replicate(model, _clone).train()
        trial = _trial(local, replicate(model, _clone), local.task)
        draws = Draws()
        seed(devices)
        try:
            with kept_python_random():
                expected = _call(plain, _fresh(values))
                draws.moved(random_state(values))
        except Exception as error:  # noqa: BLE001 - a model that asks for values of a kind
            log.info("not verified: %s does not run on random values: %s", type(model).__name__, error)
            return
        seed(devices)
        with kept_python_random():
            found = _call(fx.GraphModule(trial, without_losses(trial.graph)), _fresh(values))
            others = draws.moved(random_state(values))
    _compare(list(tensors_in(expected)), list(tensors_in(found)), "outputs", batch)
    for what in ("parameters", "buffers"):
        _compare(list(getattr(plain, what)()), list(getattr(trial.original, what)()), what, batch)
    if others:
        raise TraceError(f"the training step draws other random numbers than {type(model).__name__}, whose own forward "
                         "runs as Python, once for every local module. Draw them in a sub-module.")


def _clone(tensor: Tensor) -> Tensor:
    new = tensor.detach().clone()
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


_PROBED = 4  # images


def _probe(local: LocalModel, structure: Structure, targets: Any, device: torch.device) -> None:
    """One training step on a copy. Its losses are the task's where targets are known, else any of the outputs."""
    specs = _specs(local.plan.inputs)
    batch = next((spec.shape[0] for spec in specs if len(spec.shape) > 1), 0)
    task: Any = _Away()
    if targets is None:
        targets = local.task.example_targets(
            local.original, tuple(specs), structure.trace.output.meta["value"])
    if targets is not None or not local.task.takes_targets:
        task = copy.copy(local.task)
    try:
        trial = _trial(local, _copy(local.original, structure.trace.hooks), task)
        small = min(batch, _PROBED) - batch
        values = _random(local.plan.inputs, batch, small, device)
        given = values if isinstance(values, dict) else dict(zip(local.names(), values, strict=False))
        seed(cuda_devices(local.original))
        with kept_python_random(), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.run_step(
                {**given, **({"targets": _first(targets, batch, batch + small, device)} if task.takes_targets else {})})
    except (NotLearningError, ModelChangedError):
        raise
    except Exception as error:  # noqa: BLE001 - a criterion that wants other targets: the first real step looks again
        log.info("gradients were not probed: %s: %s", type(error).__name__, error)
        return
    idle = [(kind, part.name) for part in trial.trained() for kind in part.watch.idle()]
    if idle:
        kind, name = idle[0]
        raise NotLearningError(
            f"{kind} '{name}' gets no gradient from its local loss: all of them are exactly zero on random inputs. "
            "Choose other split points, k or method, or freeze it with requires_grad_(False) if it is not to be "
            "trained. If it learns from your data, pass "
            "options=glcan_fx.Options(verify=False): the first training steps look again.")


class _Away(AnyLoss):
    """A loss that has a gradient where outputs are zero, too: those of a head whose weights begin at zero."""

    def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        return super().loss(map_tensors(outputs, lambda t: t.float() + 1 if t.is_floating_point() else t), targets)


def _trial(local: LocalModel, model: nn.Module, task: Any) -> LocalModel:
    """The compiled model on a copy of the model, and copies of its auxiliary networks."""
    aux = copy.deepcopy(local.aux)
    for part in aux.modules():
        if isinstance(part, LossHead):
            part.__dict__["task"] = task
    return LocalModel(model, aux, copy.deepcopy(local.graph), local.plan, task, local.__dict__["_parts"],
                    local.__dict__["_opened"]).train()


def _first(targets: Any, batch: int, some: int, device: torch.device) -> Any:
    """The targets of some images of a batch, with values."""
    def values(tensor: Tensor) -> Tensor:
        shape = (some, *tensor.shape[1:]) if tensor.dim() and tensor.shape[0] == batch else tensor.shape
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            return torch.zeros(shape, dtype=tensor.dtype, device=device)
        return tensor.detach()[:some].to(device) if shape != tensor.shape else tensor.detach().to(device)

    return map_tensors(targets, values)


def _run_both(local: LocalModel, forward: fx.Graph, device: torch.device, hooks: bool) -> None:
    model, inputs, path = local.original, local.plan.inputs, local.plan.network
    graph = forward if path or emitted_differs(local) else without_losses(local.graph)
    batch = next((spec.shape[0] for spec in _specs(inputs) if len(spec.shape) > 1), 0)
    for extra in (0, 1) if batch else (0,):
        values = _random(inputs, batch, extra, device)
        plain, other = _copy(model, hooks), _copy(model, hooks)
        network = plain.get_submodule(path)
        step = _module(local, other, graph)
        try:
            seed(cuda_devices(model))
            with kept_python_random():
                expected = _call(network, _fresh(values))
        except Exception as error:  # noqa: BLE001
            if extra:
                return  # this model runs at one batch size only, which the trace's report says
            raise TraceError(f"{type(model).__name__} does not run on random values of the example's sizes: "
                             f"{error}. If it runs on yours, pass options=glcan_fx.Options(verify=False).") from error
        seed(cuda_devices(model))
        try:
            with kept_python_random():
                found = _call(step, _fresh(values))
        except Exception as error:
            raise TraceError(
                f"{type(model).__name__} runs on random values of the example's sizes, but the compiled step fails on "
                f"them: {type(error).__name__}: {error}. A part of the model that returns something else each time "
                "(layers that are left out at random) may be the reason: choose other split points, or k=1.") from error
        _compare(list(tensors_in(expected)), list(tensors_in(found)), "outputs", batch + extra)
        _compare(list(plain.buffers()), list(other.buffers()), "buffers", batch + extra)


def emitted_differs(local: LocalModel) -> bool:
    """Whether a step runs parts of the model that are bound to it, and not to a copy."""
    return bool(local.__dict__["_parts"])


def without_losses(graph: fx.Graph) -> fx.Graph:
    """A step's graph that returns the model's output alone, and computes no losses."""
    new = fx.Graph()
    made: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            [result] = node.all_input_nodes
            new.output(fx.map_arg(result.args[1], made.__getitem__))
        elif node.target is passing.collect or node.target == "aux.leave":
            continue
        elif node.op == "call_module" and (node.target == "aux.last" or str(node.target).rpartition(".")[2].isdecimal()
                                           and str(node.target).startswith("aux.")):
            made[node] = None
        else:
            made[node] = new.node_copy(node, made.__getitem__)
    return new


def _call(module: nn.Module, values: Any) -> Any:
    return module(**values) if isinstance(values, dict) else module(*values)


def _fresh(values: Any) -> Any:
    """Copies: a model may change its inputs in place."""
    return map_tensors(values, Tensor.clone)


def _specs(inputs: Any) -> list[Spec]:
    values = inputs.values() if isinstance(inputs, dict) else inputs
    return [value for value in values if isinstance(value, Spec)]


def _random(inputs: Any, batch: int, extra: int, device: torch.device) -> Any:
    if isinstance(inputs, Spec):
        shape = inputs.shape
        if extra and shape and shape[0] == batch:  # extra images, or fewer
            shape = (batch + extra, *shape[1:])
        dtype = getattr(torch, inputs.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, dtype=dtype, device=device)
        return torch.randint(256 if dtype == torch.uint8 else 2, shape, device=device).to(dtype)
    if isinstance(inputs, dict):
        return {key: _random(value, batch, extra, device) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [_random(value, batch, extra, device) for value in inputs]
    return inputs


def _copy(model: nn.Module, hooks: bool) -> nn.Module:
    """The same module tree with the same parameters and buffers of its own; with hooks, where the model needs them."""
    return replicate(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone(), hooks=hooks).train()


def _module(local: LocalModel, model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph on a copy of the model, with the constants of the compiled one."""
    constants = local.aux._modules.get("constants")
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = new.node_copy(node, made.__getitem__)
        name = str(node.target).rpartition(".")[2]
        if node.op == "get_attr" and constants is not None and name in constants._buffers:
            made[node].target = name
    for name, value in constants._buffers.items() if constants is not None else ():
        model.__dict__[name] = value
    return fx.GraphModule(model, new)


def _compare(expected: list[Tensor], found: list[Tensor], what: str, batch: int) -> None:
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        try:
            torch.testing.assert_close(b, a, equal_nan=True)
        except AssertionError as error:
            raise TraceError(
                f"the training step does not compute what the model does: {what} {index} differ at batch {batch}: "
                f"{' '.join(str(error).split())}. Something that the model does is not in the step. Move it into a "
                "sub-module of its own, and please report the model; "
                "options=glcan_fx.Options(verify=False) compiles it as it is."
            ) from error
