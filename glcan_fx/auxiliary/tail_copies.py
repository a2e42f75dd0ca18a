"""Copies of the tail (neck and head) for an auxiliary network, or predictions in its place."""

import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx, nn

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.auxiliary.stage import convolution
from glcan_fx.auxiliary.tails import Tail, is_map, towers_of
from glcan_fx.initialization import moments
from glcan_fx.layers import KINDS
from glcan_fx.structure.nodes import tensor_of
from glcan_fx.structure.structure import Structure


def copy_tail(build: Builder, tail: Tail, light: bool) -> None:
    skipped = towers_of(build.structure, tail) if light else {}
    inside = {node for nodes, _, _ in skipped.values() for node in nodes}
    for node in tail.nodes:
        if node in skipped:
            _, source, _ = skipped[node]
            build.values[node] = build.values[source]
        elif node not in inside and node not in build.values:
            build.copy(node, "tail")


def predict_directly(
    build: Builder, cut: fx.Node, own: fx.Node, focal: Sequence[fx.Node], made: list[fx.Node], behind: list[fx.Node]
) -> None:
    """One convolution on the module's own output, and the focal features added to it, for each of the network's maps,
    at the output's resolution."""
    value = own
    for feature in focal:
        value = build.graph.call_function(operator.add, (value, feature))
    for index, node in enumerate(made):
        build.values[node] = _prediction(build, cut, node, value, f"predict{index}")
    for node in behind:
        if node not in build.values:
            build.copy(node, "tail")


def _prediction(build: Builder, cut: fx.Node, node: fx.Node, value: fx.Node, name: str) -> fx.Node:
    """A map of the shape of ``node`` from ``value``, which has the shape of ``cut``."""
    structure, target = build.structure, build.structure.trace.module(node)
    assert target is not None
    small, large = structure.spatial(cut), structure.spatial(node)
    channels, inputs = structure.channels(node), structure.channels(cut)
    factor = large[0] // small[0]
    shuffled = len(large) == 2 and factor > 1 and channels * factor**2 <= inputs and all(
        a * factor == b for a, b in zip(small, large, strict=True))
    stride = tuple(max(1, round(a / b)) for a, b in zip(small, large, strict=True))
    kernel = getattr(target, "kernel_size", 3) if max(stride) == 1 else tuple(2 * (s // 2) + 1 for s in stride)
    kernel = (kernel,) * len(large) if isinstance(kernel, int) else kernel
    made_channels = channels * (factor**2 if shuffled else 1)
    conv = convolution(build, len(large), tensor_of(node).dtype, True, inputs, made_channels,
                       kernel_size=kernel, stride=stride, padding=tuple(k // 2 for k in kernel))
    build.full.add(name)
    out = build.add(f"{name}.conv", conv, value, fresh=True)
    if not build.draft:  # as large as the source's, at its mean (class priors)
        own = moments(build.model.get_submodule(str(node.target)))
        build.moments.update({f"{name}.conv.{k}": replace(v, shape=torch.Size())  # of no shape: it is another layer
                              for k, v in own.items() if k in ("weight", "bias")})
    if shuffled:
        out = build.add(f"{name}.shuffle", nn.PixelShuffle(factor), out)
        return out if not _is_dense(structure, node) else _as_large_as_the_input(build, out, len(large))
    made = tuple((a + 2 * (k // 2) - k) // s + 1 for a, k, s in zip(small, kernel, stride, strict=True))
    if made == large:
        return out
    if _is_dense(structure, node):
        return _as_large_as_the_input(build, out, len(large))
    scale = tuple(b / a for a, b in zip(made, large, strict=True))
    return build.graph.call_function(F.interpolate, (out,), {"scale_factor": scale, "mode": KINDS[len(large)].mode})


def _is_dense(structure: Structure, node: fx.Node) -> bool:
    """Whether a map has the spatial size of the network's input, which no factor gives where the input's is odd."""
    data = structure.chain[0]
    return data.op == "placeholder" and is_map(data) and structure.spatial(node) == structure.spatial(data)


def _as_large_as_the_input(build: Builder, value: fx.Node, rank: int) -> fx.Node:
    shape = build.graph.call_function(getattr, (build.input(build.structure.chain[0]), "shape"))
    size = build.graph.call_function(operator.getitem, (shape, slice(2, None)))
    return build.graph.call_function(F.interpolate, (value,), {"size": size, "mode": KINDS[rank].mode})
