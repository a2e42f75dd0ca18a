"""Verify, never trust: run the captured graph beside the module that it was captured from, on real values."""

import logging
from typing import Any

import torch
from torch import Tensor, fx, nn

from .analyze import Structure, multiply_adds
from .copies import kept_python_random, replicate
from .errors import TraceError
from .nested import tensors_in
from .tasks import Spec

log = logging.getLogger("glcan_fx")

_AFFORDABLE = {"cpu": 1e10, "cuda": 1e12}  # multiply-adds of one forward pass: about a second


def verify(structure: Structure, model: nn.Module, inputs: Any, path: str) -> bool:
    """Compare graph and module in training mode, at the example's batch size and at another one.

    Both run on copies that share the model's parameters and have buffers of their own, on the model's device. Returns
    False where that would take long, and nothing was compared. Raises TraceError where the outputs or the buffers
    differ. (Evaluation needs no check: it calls the model.)
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if multiply_adds(structure) > _AFFORDABLE.get(device.type, 0):
        log.info("not verified: a forward pass of %s takes long on %s", type(model).__name__, device)
        return False
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), kept_python_random(), torch.no_grad():
        _run_both(structure, model, inputs, path, device)
    return True


def _run_both(structure: Structure, model: nn.Module, inputs: Any, path: str, device: torch.device) -> None:
    batch = next((spec.shape[0] for spec in _specs(inputs) if len(spec.shape) > 1), 0)
    for extra in (0, 1) if batch else (0,):
        values = _random(inputs, batch, extra, device)
        args, kwargs = ((), values) if isinstance(values, dict) else (values, {})
        plain, graph = _copy(model), _copy(model)
        network = plain.get_submodule(path)
        captured = _module(structure, graph)
        try:
            torch.manual_seed(0)
            with kept_python_random():
                expected = network(*args, **kwargs)
        except Exception as error:  # noqa: BLE001
            if extra:
                return  # this model runs at one batch size only, which the trace's report says
            raise TraceError(f"{type(model).__name__} does not run on random values of the example's sizes: "
                             f"{error}. If it runs on yours, pass verify=False.") from error
        torch.manual_seed(0)
        with kept_python_random():
            found = captured(*args, **kwargs)
        _compare(list(tensors_in(expected)), list(tensors_in(found)), "outputs", batch + extra)
        _compare(list(plain.buffers()), list(graph.buffers()), "buffers", batch + extra)


def _specs(inputs: Any) -> list[Spec]:
    values = inputs.values() if isinstance(inputs, dict) else inputs
    return [value for value in values if isinstance(value, Spec)]


def _random(inputs: Any, batch: int, extra: int, device: torch.device) -> Any:
    if isinstance(inputs, Spec):
        shape = inputs.shape
        if extra and shape and shape[0] == batch:
            shape = (batch + extra, *shape[1:])
        dtype = getattr(torch, inputs.dtype)
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape, dtype=dtype, device=device)
        return torch.zeros(shape, dtype=dtype, device=device)
    if isinstance(inputs, dict):
        return {key: _random(value, batch, extra, device) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return [_random(value, batch, extra, device) for value in inputs]
    return inputs


def _copy(model: nn.Module) -> nn.Module:
    """The same module tree with the same parameters and buffers of its own."""
    return replicate(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone()).train()


def _module(structure: Structure, model: nn.Module) -> fx.GraphModule:
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in structure.trace.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        if node.op == "get_attr" and str(node.target).rpartition(".")[2] in structure.trace.constants:
            made[node].target = str(node.target).rpartition(".")[2]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, value in structure.trace.constants.items():
        model.__dict__[name] = value.to(device)
    return fx.GraphModule(model, graph)


def _compare(expected: list[Tensor], found: list[Tensor], what: str, batch: int) -> None:
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        try:
            torch.testing.assert_close(b, a, equal_nan=True)
        except AssertionError as error:
            raise TraceError(
                f"the captured graph does not compute what the model does: {what} {index} differ at batch {batch}: "
                f"{' '.join(str(error).split())}. Something that the model does is not in the graph. Move it into a "
                "sub-module of its own, and please report the model; verify=False compiles it as it is."
            ) from error


