"""Max pooling goes before the ReLU that only it reads."""

from collections.abc import Sequence

from torch import fx, nn

from glcan_fx.capture.trace import Trace
from glcan_fx.step.calls import WholeCalls


def pool_first(trace: Trace, calls: WholeCalls, cuts: Sequence[fx.Node]) -> None:
    """Put max-pooling layers before the ReLU that only they read, where both are written out: autograd keeps and makes
    no map of the ReLU's size. Values and gradients are the same, bit for bit: a window's largest value stays its
    largest, and where all are negative the gradient is 0 either way."""
    for pool in list(calls.graph.nodes):
        layer = trace.module(pool)
        if not isinstance(layer, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) or layer.return_indices:
            continue
        [relu] = pool.all_input_nodes
        together = calls.label[pool] == calls.label.get(relu) and relu not in cuts
        if not together or not isinstance(trace.module(relu), nn.ReLU) or len(relu.users) > 1:
            continue
        [source] = relu.all_input_nodes
        if len(source.users) > 1:
            continue
        pool.replace_all_uses_with(relu)
        pool.replace_input_with(relu, source)
        relu.replace_input_with(source, pool)
        pool.append(relu)
        for name in ("value", "returned_by"):
            relu.meta[name] = pool.meta[name]
        in_place = bool(relu.meta["mutates"])
        relu.meta["overwritten"], pool.meta["overwritten"], source.meta["overwritten"] = (
            pool.meta["overwritten"], in_place, False)
        relu.meta["mutates"] = {pool} if in_place else set()
        calls.at.update({node: relu for node, made in calls.at.items() if made is pool})
