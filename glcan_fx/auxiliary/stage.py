"""Layers of an auxiliary network that stand for a region of the trunk: one convolution with norm and activation."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import skip_init

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.auxiliary.tails import fixed_sizes, is_map, name_of, takes_any_size
from glcan_fx.capture.trace import is_float
from glcan_fx.initialization import Moments, moments
from glcan_fx.layers import (
    ACTIVATIONS,
    KINDS,
    channel_axis,
    fits,
    inner_activation,
    is_activation,
    is_norm,
    narrowed,
    set_width,
)
from glcan_fx.pytree import tensors_in
from glcan_fx.structure.nodes import is_size, tensor_of
from glcan_fx.structure.structure import Structure, once, region_between

_Kinds = tuple[fx.Node | None, fx.Node | str | None]


def stage(
    build: Builder, start: fx.Node, end: fx.Node, value: fx.Node, present: fx.Node, name: str, width: float, lean: bool
) -> fx.Node:
    """One convolution (+ norm + activation) that takes the shape of ``start`` to that of ``end``.

    The geometry (kernel, stride, padding) is that of the source's own down-sampling layers, so that odd sizes round
    as they do in the source. ``lean``: depthwise and pointwise (Howard et al. 2017, arXiv 1704.04861, section 3.1).
    """
    structure = build.structure
    build.full.add(name)  # made at its final width
    region, path = set(region_between(structure, start, end)), _heaviest_path(structure, start, end)
    rank = len(structure.spatial(end))
    last_in, last_out = present in structure.channels_last, end in structure.channels_last
    channels = structure.channels(present)
    target = narrowed(structure.channels(end), width)
    if last_in:
        value = _move_axis(build, value, rank, to_last=False)
    norm, activation = _kinds(structure, start, end)
    dtype = tensor_of(end).dtype
    if dtype != tensor_of(present).dtype:
        value = build.graph.call_method("to", (value, dtype))
    conv = partial(convolution, build, rank, dtype, norm is None)
    made = False
    for before, node in pairwise([start, *path]):
        if fixes_size_of_all(structure, region, start, node, end) and node not in structure.channels_last:
            value = repeat(build, node, value, f"{name}.{node.name}")
            continue
        if not _shrinks(structure, before, node, start, end):
            continue
        module = build.structure.trace.module(node)
        if made or _is_pool(module) or module is None and _slightly(structure, before, node):
            value = _reduce(build, node, module, value, f"{name}.pool")
            continue
        geometry = _geometry(module, structure, before, node)
        if lean:
            spatial = convolution(build, rank, dtype, False, channels, channels, groups=channels, **geometry)
            value = build.add(f"{name}.depthwise", spatial, value, fresh=True)
            geometry = {"kernel_size": 1}
        value = build.add(f"{name}.conv", conv(channels, target, **geometry), value, fresh=True)
        made = True
    pooled = any(_shrinks(structure, a, b, start, end) for a, b in pairwise([start, *path])) and not made
    if not made and not pooled and (ratio := _ratio(structure, start, end)):  # merged by reshaping
        value = build.add(f"{name}.pool", KINDS[rank].average(ratio[0] if rank == 1 else ratio), value)
    if not made and not (pooled and structure.channels(start) == structure.channels(end)):
        kernel = 3 if pooled and not lean else 1
        value = build.add(f"{name}.conv", conv(channels, target, kernel_size=kernel, padding=kernel // 2), value,
                          fresh=True)
    if last_out:
        value = _move_axis(build, value, rank, to_last=True)
    return _normalised(build, value, name, target, rank, norm, activation)


def _normalised(
    build: Builder, value: fx.Node, name: str, channels: int, rank: int, norm: fx.Node | None,
    activation: fx.Node | str | None,
) -> fx.Node:
    """Copies of a norm layer, at another width or for maps of another rank, and of an activation."""
    if norm is not None:
        new = build.clone(str(norm.target))
        if isinstance(new, nn.modules.batchnorm._NormBase) and len(build.structure.spatial(norm)) != rank:
            with build.making():  # between values of another rank (neighbours of points)
                new = KINDS[rank].norm(channels, dtype=tensor_of(norm).dtype)
        own: Moments = {} if build.draft else moments(new)  # those of the source, whatever its width
        if not fits(new, channels):
            set_width(new, channels)
        value = build.add(f"{name}.norm", new, value)
        build.moments.update({f"{name}.norm.{k}": v for k, v in own.items()})
    if activation is not None:
        value = _activate(build, activation, value, f"{name}.activation")
    return value


GRID = 3
"""Places on a side of the map that a hidden perceptron begins with: batch statistics need some behind it, too."""


def hidden_layers(build: Builder, tap: fx.Node, value: fx.Node, layers: int, half: bool) -> fx.Node:
    """Layers of a convolution and the trunk's kinds of norm and activation on ``value``, which stands for ``tap`` and
    whose mean is taken next: 3x3, on half the size if ``half``, the last two a perceptron on a few positions.

    On so small a map they cost little (as in Belilovsky et al. 2020, arXiv 1901.08164, section 4.1), and the mean alone
    would hide from the module where its features are.
    """
    structure, channels, dtype = build.structure, build.structure.channels(tap), tensor_of(tap).dtype
    sides, last = structure.spatial(tap), tap in build.structure.channels_last
    rank, name = len(sides), f"hidden_{tap.name}"
    norm, activation = _kinds(structure, structure.chain[0], tap)
    if norm is not None and len(structure.spatial(norm)) != rank:
        norm = None
    few = KINDS[rank].adaptive
    half = half and min(sides) >= 2 * GRID
    for index in range(layers):
        if last:
            value = _move_axis(build, value, rank, to_last=False)
        kernel = 3 if index < layers - 2 else 1
        if index == 0 and kernel == 3 and half:
            value = build.add(f"{name}.reduced", KINDS[rank].average(2, ceil_mode=True), value)
        if index == max(layers - 2, 0) and min(sides) >= GRID:
            value, kernel = build.add(f"{name}.few", few(GRID), value), 2
        conv = convolution(build, rank, dtype, norm is None, channels, channels, kernel_size=kernel,
                           padding=int(kernel == 3))
        value = build.add(f"{name}.layer{index}.conv", conv, value, fresh=True)
        if last:
            value = _move_axis(build, value, rank, to_last=True)
        value = _normalised(build, value, f"{name}.layer{index}", channels, rank, norm, activation)
    if not last and not takes_any_size(structure, tap):  # a pooling layer that expects this many positions
        value = build.graph.call_function(F.interpolate, (value,), {"size": sides})
    return value


def repeat(build: Builder, node: fx.Node, value: fx.Node, name: str) -> fx.Node:
    """An operation without weights, applied to ``value``."""
    if node.op == "call_module":
        return build.add(name, build.clone(str(node.target)), value)
    copied = build.graph.node_copy(node, lambda _: value)
    copied.meta = {}
    return copied


def fixes_size_of_all(
    structure: Structure, region: set[fx.Node], start: fx.Node, node: fx.Node, end: fx.Node
) -> bool:
    """Whether a node fixes the spatial size, and all of the region's values pass it: no branch beside it."""
    if node not in fixed_sizes(structure):
        return False
    reached, stack = {node}, [start]
    while stack:
        found = {user for user in stack.pop().users if user in region and not is_size(user)} - reached
        reached |= found
        stack += found
    return node is end or end not in reached


@once
def _heaviest_path(structure: Structure, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The path from start (excluded) to end through the region with the most weights and values; through pieces of
    maps, too, where no other loses as many positions as the region does."""
    path = _heaviest(structure, start, end, is_map)
    if path and _loses_positions(structure, start, end, path):
        return path
    return _heaviest(structure, start, end, lambda node: is_float(node.meta["value"])) or path


def _heaviest(
    structure: Structure, start: fx.Node, end: fx.Node, passes: Callable[[fx.Node], bool]
) -> list[fx.Node]:
    """The maps on the heaviest path through nodes that ``passes`` allows. What has fewer positions than the end is
    beside it (a squeeze-excitation's pooled branch)."""
    positions, region = structure.positions(end), region_between(structure, start, end)
    best: dict[fx.Node, tuple[int, fx.Node | None]] = {start: (0, None)}
    for node in region:
        narrower = is_map(node) and len(structure.shape(node)) == len(structure.shape(end)) and (
            structure.positions(node) < positions)
        if passes(node) and not narrower:
            above = [(best[source][0], source) for source in node.all_input_nodes if source in best]
            if above:
                score, source = max(above, key=lambda pair: pair[0])
                size = sum(p.numel() for p in structure.trace.parameters(node)) + sum(
                    tensor.numel() for tensor in tensors_in(node.meta["value"]))
                best[node] = score + size, source
    path: list[fx.Node] = []
    step = end if end in best else None
    while step is not None and step is not start:
        path.append(step)
        step = best[step][1]
    return [node for node in path[::-1] if is_map(node)]


def reaches(structure: Structure, start: fx.Node, end: fx.Node) -> bool:
    """Whether a ``stage`` would have as many positions as the region: tokens that become a map and tokens again lose
    theirs where it cannot see it."""
    return _loses_positions(structure, start, end, _heaviest_path(structure, start, end))


def _loses_positions(structure: Structure, start: fx.Node, end: fx.Node, path: Sequence[fx.Node]) -> bool:
    few = structure.positions(start) < _FEWER * structure.positions(end)
    return few or _ratio(structure, start, end) is not None or any(
        _shrinks(structure, a, b, start, end) or b in fixed_sizes(structure) for a, b in pairwise([start, *path]))


def _ratio(structure: Structure, start: fx.Node, end: fx.Node) -> tuple[int, ...] | None:
    """By which whole numbers the sides of a map shrink; None where they do not, or not by such."""
    before, after = structure.spatial(start), structure.spatial(end)
    if len(before) != len(after) or before == after or not 0 < len(after) <= len(KINDS) or not all(after):
        return None
    exact = all(a % b == 0 for a, b in zip(before, after, strict=True))
    return tuple(a // b for a, b in zip(before, after, strict=True)) if exact else None


_FEWER = 1.5  # less is an extra token


@once
def _shrinks(structure: Structure, before: fx.Node, node: fx.Node, start: fx.Node, end: fx.Node) -> bool:
    """Whether positions are lost on the way from ``start`` to ``end``; attention's heads and scores have none."""
    a, b, first, last = (structure.spatial(value) for value in (before, node, start, end))
    swapped = node.op != "call_module" and sorted(structure.shape(before)) == sorted(structure.shape(node))
    if swapped or not len(a) == len(b) == len(last):
        return False
    between = all(y >= z for y, z in zip(b, last, strict=True)) and (
        len(first) != len(b) or all(y <= x for x, y in zip(first, b, strict=True)))
    return between and a != b and all(y <= x for x, y in zip(a, b, strict=True))


def _is_pool(module: nn.Module | None) -> bool:
    return module is not None and not any(True for _ in module.parameters())


def _reduce(build: Builder, node: fx.Node, module: nn.Module | None, value: fx.Node, name: str) -> fx.Node:
    """A further reduction of the positions: the source's own pooling, or its ratio."""
    before = next(source for source in node.all_input_nodes if is_map(source))
    if module is not None and _is_pool(module) and not list(module.buffers()):  # those are for so many channels
        rank, last = len(build.structure.spatial(before)), before in build.structure.channels_last
        value = _move_axis(build, value, rank, to_last=True) if last else value
        value = build.add(name, build.clone(str(node.target)), value)
        return _move_axis(build, value, rank, to_last=False) if last else value
    sides = list(zip(build.structure.spatial(before), build.structure.spatial(node), strict=True))
    strides = [max(1, round(a / b)) for a, b in sides]
    kernels = [stride if stride > 1 else a - b + 1 for stride, (a, b) in zip(strides, sides, strict=True)]
    up = any(stride > 1 and a // stride != b for stride, (a, b) in zip(strides, sides, strict=True))
    kernel, stride = (kernels[0], strides[0]) if len(sides) == 1 else (tuple(kernels), tuple(strides))
    return build.add(name, KINDS[len(sides)].average(kernel, stride, ceil_mode=up), value)


def _slightly(structure: Structure, before: fx.Node, node: fx.Node) -> bool:
    """Whether only a margin is lost, as without padding."""
    return all(a < _FEWER * b for a, b in zip(structure.spatial(before), structure.spatial(node), strict=True))


def _geometry(module: nn.Module | None, structure: Structure, before: fx.Node, node: fx.Node) -> dict[str, Any]:
    """Kernel, stride, padding and dilation of a down-sampling layer, or some that give the same size."""
    if module is not None and hasattr(module, "kernel_size") and hasattr(module, "stride"):
        return {key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation")}
    a, b = structure.spatial(before), structure.spatial(node)
    stride = tuple(max(1, round(x / y)) for x, y in zip(a, b, strict=True))
    if all(y == x // s for x, y, s in zip(a, b, stride, strict=True)) and any(
            x % s for x, s in zip(a, stride, strict=True)):
        return {"kernel_size": stride, "stride": stride, "padding": 0, "dilation": 1}
    kernel = tuple(2 * (s // 2) + 1 for s in stride)
    return {"kernel_size": kernel, "stride": stride, "padding": tuple(k // 2 for k in kernel), "dilation": 1}


def convolution(
    build: Builder, rank: int, dtype: torch.dtype, bias: bool, channels: int, target: int, **geometry: Any
) -> nn.Module:
    """A convolution of the trunk's type; without bias in front of a norm, which would take it away."""
    if build.draft:
        with build.making():
            drafted: nn.Module = KINDS[rank].conv(channels, target, bias=bias, dtype=dtype, **geometry)
            return drafted
    conv: nn.Module = skip_init(KINDS[rank].conv, channels, target, bias=bias, dtype=dtype, **geometry)
    return conv


def initialize(conv: Any) -> None:
    nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _move_axis(build: Builder, value: fx.Node, rank: int, *, to_last: bool) -> fx.Node:
    order = (0, *range(2, rank + 2), 1) if to_last else (0, rank + 1, *range(1, rank + 1))
    return build.graph.call_function(torch.permute, (value, order))


@once
def _kinds(structure: Structure, start: fx.Node, end: fx.Node) -> _Kinds:
    """The last norm layer and activation (a module's path, or the node of a function) on the way between two values
    of the trunk, or beside it: the source's own kinds. No activation where the norm layer holds one."""
    norm: fx.Node | None = None
    activation: fx.Node | str | None = None
    path = _heaviest_path(structure, start, end)
    beside = [node for node in region_between(structure, start, end) if node not in path]
    for node in [*beside, *path]:
        module = structure.trace.module(node)
        if module is not None and is_norm(module) and is_map(node):
            last = channel_axis(module, tensor_of(node)) == -1
            norm = node if last == (end in structure.channels_last) else norm
            inner = inner_activation(module)
            activation = f"{node.target}.{inner}" if inner else activation
        elif is_map(node) and _is_activation(structure, node, module):
            activation = str(node.target) if module is not None else node
    if norm is not None and inner_activation(structure.trace.shadow.get_submodule(str(norm.target))):
        activation = None
    return norm, activation


def _is_activation(structure: Structure, node: fx.Node, module: nn.Module | None) -> bool:
    """A torch.nn activation that keeps the shape, called as a module, a function or a method; gates do not count."""
    found = name_of(structure, node) in ACTIVATIONS if module is None else is_activation(module)
    sources = [source for source in node.all_input_nodes if is_map(source)]
    return found and len(sources) == 1 and tensor_of(sources[0]).shape == tensor_of(node).shape


def _activate(build: Builder, node: fx.Node | str, value: fx.Node, name: str) -> fx.Node:
    """The activation of ``node``, with its own arguments, or the module at that path, applied to ``value``."""
    if isinstance(node, str):
        return build.add(name, build.clone(node), value)
    if node.meta["mutates"]:
        value = build.graph.call_function(torch.clone, (value,))
    return build.graph.node_copy(node, lambda _: value)
