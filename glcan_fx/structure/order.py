"""Whether a step keeps a model's order: random numbers drawn, and statistics moved, one after the other as it does."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from glcan_fx.capture.random_numbers import Seeded
from glcan_fx.capture.trace import Trace, is_float, quiet
from glcan_fx.pytree import map_tensors
from glcan_fx.structure.nodes import computed, is_size
from glcan_fx.structure.structure import Structure, once


@once
def out_of_order(structure: Structure, end: fx.Node) -> str | None:
    """What would happen in another order if a local module ended with a value, in words; None where nothing would.

    What the model computes in front of that value, and not for it (the other pass of an encoder that runs twice),
    comes behind it in the step.
    """
    owner = structure.assign([end])
    nodes = [node for node in structure.trace.graph.nodes if node in owner and node in structure.dependent]
    last = max((index for index, node in enumerate(nodes) if owner[node] == 0), default=-1)
    first = next((index for index, node in enumerate(nodes[:last]) if owner[node] == 1), last)
    moved = [node for node in nodes[first:last] if owner[node] == 1 and not is_size(node)]
    passed = [node for node in nodes[first:last + 1] if owner[node] == 0 and not is_size(node)]
    if not moved:
        return None
    shared = _states(structure.trace, moved) & _states(structure.trace, passed)
    if shared:
        return f"the statistics of '{min(shared)}', which is called several times"
    if any(draws(structure, node) for node in moved) and any(draws(structure, node) for node in passed):
        return "random numbers"
    return None


def _states(trace: Trace, nodes: Sequence[fx.Node]) -> set[str]:
    """The modules and buffers that nodes may change, by path."""
    opaque = {module.path for module in trace.report.opaque}
    found: set[str] = set()
    for node in nodes:
        module = trace.module(node)
        moves = module is not None and module.training and any(True for _ in module.buffers())
        if moves or str(node.target) in opaque:
            found.add(str(node.target))
        found |= {str(source.target) for source in node.meta.get("mutates", ()) if source.op == "get_attr"}
    return found


@once
def draws(structure: Structure, node: fx.Node) -> bool:
    """Whether a node draws random numbers, as opaque modules may."""
    return draws_random(structure.trace, node)


def draws_random(trace: Trace, node: fx.Node) -> bool:
    """The same, of a recording."""
    if node.op in ("placeholder", "get_attr", "output") or is_size(node) or not is_float(node.meta["value"]):
        return False
    if any(opaque.path == node.target for opaque in trace.report.opaque):
        return True
    seeded = Seeded()
    with quiet(), trace.mode, torch.no_grad(), seeded:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda source: map_tensors(source.meta["value"], Tensor.clone))
        computed(trace, node, args, kwargs)
    return seeded.found
