"""Pass 5, synthesize: one auxiliary network per local module, a simplified copy of the remainder of the network.

Taps that are still to come are synthesised from the module's output: along the trunk, a region that keeps the shape is
dropped (or, with ``depth``, sampled evenly, as in AugLocal, arXiv 2402.17318, section 3.2), a region that changes the
shape leaves one convolution with the source's own kind of norm and activation (GLCAN, arXiv 2406.00446, section 4.1).
The tail (neck and head) is copied with fresh parameters; ``head="light"`` leaves out its shape-keeping towers,
``head="lean"`` all but the layers that predict: maps are then predicted from the module's own output, detectors make
one prediction at each place.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init
from torch.utils._pytree import tree_leaves, tree_map_only

from glcan_fx.auxiliary.builder import Auxiliary, Builder, Options
from glcan_fx.auxiliary.features import Feature
from glcan_fx.auxiliary.methods.dgl import decoupled
from glcan_fx.auxiliary.tails import (
    Tail,
    direct_layers,
    fixed_sizes,
    is_averaged,
    is_map,
    name_of,
    tail_of,
    takes_any_size,
    towers_of,
)
from glcan_fx.capture.trace import is_float, quiet, shadow
from glcan_fx.errors import PlanError
from glcan_fx.fx_utils import Network
from glcan_fx.layers import (
    ACTIVATIONS,
    Cost,
    Moments,
    channel_axis,
    cost_of,
    fit,
    fits,
    freshen,
    inner_activation,
    is_activation,
    is_norm,
    moments,
    narrowed,
    not_in_place,
    scale_gradient,
    set_width,
)
from glcan_fx.structure.influence import reach
from glcan_fx.structure.nodes import ancestors, is_size, tensor_of
from glcan_fx.structure.structure import Structure


def synthesize(
    structure: Structure,
    model: nn.Module | None,
    cut: fx.Node,
    features: Sequence[Feature],
    options: Options,
    *,
    select: Callable[[Any], Any] = lambda outputs: outputs,
    sigma: Mapping[Any, float] | None = None,
    outputs_are_predictions: bool = True,
) -> Auxiliary:
    """Build the auxiliary network of the local module that ends at ``cut``.

    ``select`` keeps a part of the network's outputs, ``sigma`` weights the gradients of outputs by key (eq. 8);
    ``outputs_are_predictions``: the outputs are the interface, so their layers keep their number of outputs.
    ``model`` None makes a draft on fake tensors: sizes without memory. Raises PlanError where a tap cannot be
    synthesised or ``options.width`` cannot be applied.
    """
    build = Builder(structure, structure.trace.shadow if model is None else model, draft=model is None)
    own = build.input(cut)
    outputs = select(structure.trace.output.args[0])
    if options.method == "dgl":
        for index, node in enumerate(node for node in tree_leaves(outputs) if isinstance(node, fx.Node)):
            build.values[node] = decoupled(build, cut, own, node, f"local{index}")
    else:
        _collaborative(build, cut, own, features, options, tail_of(structure, outputs), outputs_are_predictions)
    results = fx.map_arg(outputs, lambda node: build.values[node])
    if sigma:
        results = {key: build.graph.call_function(scale_gradient, (value, sigma[key])) if sigma[key] != 1 else value
                   for key, value in results.items()}
    build.graph.output(results)
    network = Network(build.root, build.graph, class_name="AuxiliaryNetwork")
    not_in_place(network)
    network.train()
    examples = [tree_map_only(Tensor, lambda t: _like(build.structure, t), n.meta["value"]) for n in build.inputs]
    _fit(network, build, examples, options, outputs_are_predictions)
    reach(network, structure, cut, build.inputs)
    if outputs_are_predictions:
        _return_own(network)
    cost, shapes = _measured(network, build, examples)
    if not build.draft:
        for name in build.fresh:
            _initialise(network.get_submodule(name))
        predict = {f"tail.{path}" for path in _predictors_of_source(build)} | {
            name for name in build.fresh if name.startswith("predict")}
        freshen(network, build.moments, scales=_scales(network.graph), predict=predict)
    return Auxiliary(network, build.inputs, shapes, cost)


def _measured(network: Network, build: Builder, examples: list[Any]) -> tuple[Cost, Any]:
    """What the network costs and returns at the example's size. Inputs that it would overwrite, which later modules
    read too, are copied first."""
    mode = build.structure.trace.mode
    while True:
        with mode:
            given = tree_map_only(Tensor, torch.clone, examples)  # not leaves: those refuse to be overwritten
            versions = [[t._version for t in tree_leaves(value) if isinstance(t, Tensor)] for value in given]
            sizes = shadow(network, mode)
            cost, shapes = cost_of(sizes, partial(sizes.forward, *given))
        nodes = network.graph.find_nodes(op="placeholder")
        changed = [node for node, value, before in zip(nodes, given, versions, strict=True)
                   if [t._version for t in tree_leaves(value) if isinstance(t, Tensor)] != before]
        if not changed:
            return cost, shapes
        for node in changed:
            with network.graph.inserting_after(node):
                copied = network.graph.call_function(copied_tensors, (node,))
            node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
        network.recompile()


def _return_own(network: Network) -> None:
    """Where a network returns what it is given, as all in between is left out, it returns a copy: what follows, the
    rest of a model or a criterion, may overwrite it."""
    output = network.graph.output_node()
    for node in output.all_input_nodes:
        if node.op == "placeholder":
            with network.graph.inserting_before(output):
                output.replace_input_with(node, network.graph.call_function(copied_tensors, (node,)))
            network.recompile()


def copied_tensors(value: Any) -> Any:
    """A value of its own for an auxiliary network that changes it."""
    return tree_map_only(Tensor, torch.clone, value)


def _scales(graph: fx.Graph) -> set[str]:
    """The parameters that a network multiplies with as they are, or laid out otherwise."""
    def name(node: fx.Node) -> str:
        return str(getattr(node.target, "__name__", node.target)).strip("_")

    found = set()
    for node in graph.find_nodes(op="get_attr"):
        stack = list(node.users)
        while stack:
            user = stack.pop()
            if name(user) in ("mul", "imul", "multiply"):
                found.add(str(node.target))
            elif name(user) in _VIEWS:
                stack.extend(user.users)
    return found


_VIEWS = frozenset(("unsqueeze", "squeeze", "view", "reshape", "expand", "expand_as", "getitem", "to", "type_as",
                    "float", "permute", "transpose", "contiguous", "flatten"))


def _collaborative(
    build: Builder, cut: fx.Node, own: fx.Node, features: Sequence[Feature], options: Options, tail: "Tail",
    outputs_are_predictions: bool,
) -> None:
    """GLCAN's: focal features are read, analog ones made, and the tail's copy computes the outputs of both."""
    sources = {feature.tap: feature.source for feature in features}
    direct = direct_layers(build.structure, cut, tail) if options.head == "lean" and outputs_are_predictions else None
    if direct is not None:
        focal = [build.input(tap.node) for tap in build.structure.taps if tap.name in sources and tap.node is not cut]
        _predict_directly(build, cut, own, focal, *direct)
        return
    missing, learning = [], []
    for tap in build.structure.taps:
        if tap.node not in tail.taps:
            continue
        source = sources.get(tap.name, "cache")
        if source == "synthesised":
            missing.append(tap.node)
        else:
            build.input(tap.node)
        if source != "cache":
            learning.append(tap.node)
    _synthesise_taps(build, cut, own, missing, options, outputs_are_predictions)
    for node in learning:
        if options.hidden and is_averaged(build.structure, node, tail):
            build.values[node] = _hidden(build, node, build.values[node], options.hidden, options.head != "full")
    _copy_tail(build, tail, options.head != "full")


def reads(
    structure: Structure, cut: fx.Node, tail: "Tail", features: Sequence[Feature], options: Options,
    outputs_are_predictions: bool,
) -> tuple[Feature, ...]:
    """Of the features that the rules select, those that the auxiliary network reads or makes. Where it predicts the
    network's maps directly from the module's own output, these are the focal ones of the output's shape (the long skip
    of a residual network)."""
    if options.head != "lean" or not outputs_are_predictions or direct_layers(structure, cut, tail) is None:
        return tuple(features)
    alike = {tap.name for tap in structure.taps if is_map(tap.node) and tap.node.op != "placeholder"
             and structure.shape(tap.node) == structure.shape(cut)}
    return tuple(feature for feature in features if feature.source != "synthesised" and feature.tap in alike)


def predictors_of(auxiliary: Auxiliary, levels: Sequence[int]) -> Iterator[tuple[Any, str]]:
    """The layers with weights that an auxiliary network copies from the tail, or predicts maps with: what makes two of
    them the same (source layer, configuration, shapes, output levels), and their paths."""
    for node in auxiliary.network.graph.nodes:
        path = str(node.target)
        if node.op == "call_module" and (path.startswith("tail.") or re.match(r"predict\d+\.", path)):
            layer = auxiliary.network.get_submodule(path)
            shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
            if shapes:
                yield (path, repr(layer), shapes, tuple(levels)), path


def readable(structure: Structure, auxiliary: Auxiliary) -> list[tuple[str, str]]:
    """The copies of layers that make the model's outputs, where they have the model's shapes: their paths in the
    auxiliary network, and in the model."""
    found = []
    for node in auxiliary.network.graph.nodes:
        path = str(node.target)
        source = path.removeprefix("tail.")
        if node.op == "call_module" and source != path:
            layer, copied = structure.trace.shadow.get_submodule(source), auxiliary.network.get_submodule(path)
            alike = [p.shape for p in layer.parameters()] == [p.shape for p in copied.parameters()]
            if layer in structure.interface and alike and not list(layer.buffers()):  # statistics are not read
                found.append((path, source))
    return found


def share(
    auxiliaries: Sequence[Auxiliary], heads: Sequence[nn.Module], requests: Sequence[Mapping[str, Any]],
    levels: Sequence[Sequence[int]], *, tails: bool,
) -> None:
    """Let the heads of equal requests have the same parts, and with ``tails`` auxiliary networks the same predictors:
    those of the first local module that has them. Heads stay modules of their own, as their calls are told apart."""
    known: dict[Any, nn.Module] = {}
    for auxiliary, head, request, kept in zip(auxiliaries, heads, requests, levels, strict=True):
        for name, part in head.named_children():
            head._modules[name] = known.setdefault((name, str(request)), part)  # fake tensors print as their sizes
        for key, path in list(predictors_of(auxiliary, kept)) if tails else []:
            auxiliary.network.set_submodule(path, known.setdefault(key, auxiliary.network.get_submodule(path)))


# ---------------------------------------------------------------------------------------------- tail


def _copy_tail(build: Builder, tail: Tail, light: bool) -> None:
    skipped = towers_of(build.structure, tail) if light else {}
    inside = {node for nodes, _, _ in skipped.values() for node in nodes}
    for node in tail.nodes:
        if node in skipped:
            _, source, _ = skipped[node]
            build.values[node] = build.values[source]
        elif node not in inside and node not in build.values:
            build.copy(node, "tail")


def _predict_directly(
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
    conv = _conv(build, len(large), tensor_of(node).dtype, True, inputs, channels * (factor**2 if shuffled else 1),
                 kernel_size=kernel, stride=stride, padding=tuple(k // 2 for k in kernel))
    build.full.add(name)
    out = build.add(f"{name}.conv", conv, value, fresh=True)
    if not build.draft:  # as large as the source's, at its mean (class priors)
        own = moments(build.model.get_submodule(str(node.target)))
        build.moments.update({f"{name}.conv.{k}": replace(v, shape=torch.Size())  # of no shape: it is another layer
                              for k, v in own.items() if k in ("weight", "bias")})
    if shuffled:
        return build.add(f"{name}.shuffle", nn.PixelShuffle(factor), out)
    made = tuple((a + 2 * (k // 2) - k) // s + 1 for a, k, s in zip(small, kernel, stride, strict=True))
    if made == large:
        return out
    scale = tuple(b / a for a, b in zip(made, large, strict=True))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(large)]
    return build.graph.call_function(F.interpolate, (out,), {"scale_factor": scale, "mode": mode})


# ---------------------------------------------------------------------------------------------- analog features


def _synthesise_taps(
    build: Builder, cut: fx.Node, own: fx.Node, missing: list[fx.Node], options: Options, predictions: bool
) -> None:
    """Walk the trunk from the cut and make the missing taps on the way."""
    structure = build.structure
    wanted = {*missing, *(unit.end for unit in structure.units)}
    order = {node: index for index, node in enumerate(structure.chain)}
    ahead = [node for node in structure.chain[order[cut] + 1:] if node in wanted]
    ahead = ahead[: max((i + 1 for i, node in enumerate(ahead) if node in missing), default=0)]
    way = _way(structure, cut, ahead, missing)
    keep = _sampled_blocks(structure, way, options.depth)
    interface = structure.interface if predictions else frozenset()
    value, present, narrow = own, cut, False
    for index, (start, end) in enumerate(pairwise(way)):
        same = structure.shape(start) == structure.shape(end)
        if (same and end in keep) or not _can_shorten(structure, start, end):
            value = _copy_region(build, cut, start, end, value, f"block{index}")
            present = end
            if not narrow:
                build.full.add(f"block{index}")
        elif not same:
            final = predictions and _is_output(structure, end, way[index + 1:]) or any(
                structure.trace.module(node) in interface for node in _region(structure, start, end))
            width = 1.0 if final else options.width
            value = _stage(build, start, end, value, present, f"stage{index}", width, options.head == "lean")
            present = end
            narrow = narrowed(structure.channels(end), width) < structure.channels(end)
        else:
            value = _resized(build, start, end, value, f"sized{index}")
        if end in missing:
            made, needed = tensor_of(present).dtype, tensor_of(end).dtype
            build.values[end] = value if made == needed else build.graph.call_method("to", (value, needed))
    for tap in missing:  # taps beside the chain: from the nearest value of the chain before them
        if tap not in build.values:
            above = ancestors([tap])
            start = next((n for n in reversed(structure.chain) if n in above and n is not tap), structure.chain[0])
            base = own if order.get(start, -1) <= order[cut] else build.values.get(start, own)
            origin = start if order.get(start, -1) > order[cut] and start in build.values else cut
            same = structure.shape(origin) == structure.shape(tap)
            build.values[tap] = base if same else _stage(
                build, origin, tap, base, origin, f"tap_{tap.name}", options.width, options.head == "lean")


def _is_output(structure: Structure, made: fx.Node, ahead: Sequence[fx.Node]) -> bool:
    """Whether a value of the trunk, or one of its shape behind it, is what the network returns: what follows the
    network takes all of its channels."""
    outputs = structure.trace.output.all_input_nodes
    same = takewhile(lambda node: structure.shape(node) == structure.shape(made), ahead)
    return any(node in outputs for node in same)


def _way(structure: Structure, cut: fx.Node, ahead: list[fx.Node], missing: list[fx.Node]) -> list[fx.Node]:
    """The values of the trunk that are made one after the other. Where tokens become a map by the sizes of another
    that is not made, the new map is made from what was before the tokens."""
    known, dependent = structure.known_by(cut), structure.dependent
    way = [cut]

    def asks_for_what_is_not_made(start: fx.Node, end: fx.Node) -> bool:
        region = _region(structure, start, end)
        made = known | {start, *region}
        return any(source in dependent and source not in made and (is_size(node) or is_size(source))
                   for node in region for source in node.all_input_nodes)

    for end in ahead:
        while len(way) > 1 and way[-1] not in missing and not _can_shorten(structure, way[-1], end) and (
                asks_for_what_is_not_made(way[-1], end)):
            way.pop()
        way.append(end)
    return way


def _sampled_blocks(structure: Structure, way: list[fx.Node], depth: int) -> set[fx.Node]:
    """``depth`` of the shape-keeping blocks ahead, sampled evenly (AugLocal's rule)."""
    blocks = [end for start, end in pairwise(way) if structure.shape(start) == structure.shape(end)]
    if depth >= len(blocks):
        return set(blocks) if depth else set()
    return {blocks[round((j + 1) * (len(blocks) - 1) / depth)] for j in range(depth)}


def _can_shorten(structure: Structure, start: fx.Node, end: fx.Node) -> bool:
    return len(structure.spatial(start)) == len(structure.spatial(end)) and len(structure.shape(start)) > 2


def _region(structure: Structure, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Nodes between two values of the trunk (start excluded, end included), in graph order."""
    behind, before = ancestors([end]), ancestors([start])
    return [node for node in structure.trace.graph.nodes if node in behind and node not in before]


def _copy_region(
    build: Builder, cut: fx.Node, start: fx.Node, end: fx.Node, value: fx.Node, prefix: str
) -> fx.Node:
    """A fresh copy of a trunk region, applied to ``value``."""
    known, dependent = build.structure.known_by(cut), build.structure.dependent
    region = [node for node in _region(build.structure, start, end) if node not in known]
    saved = dict(build.values)
    build.values[start] = value
    for node in region:
        for source in node.all_input_nodes:
            if source not in build.values and source not in region:
                if source in dependent and not is_float(source.meta["value"]) and source in known:
                    build.input(source)  # a size that is known by then
                    continue
                if source in dependent:
                    raise PlanError(
                        f"the region up to '{end.name}' also reads '{source.name}', which the auxiliary network does "
                        "not have: use aux_depth=0, or other split points."
                    )
                for extra in [n for n in build.structure.trace.graph.nodes if n in ancestors([source])]:
                    if extra not in build.values:
                        build.copy(extra, prefix)
        build.copy(node, prefix)
    result = build.values[end]
    build.values = {**saved, **{node: build.values[node] for node in build.inputs if node in build.values}}
    return result


def _stage(
    build: Builder, start: fx.Node, end: fx.Node, value: fx.Node, present: fx.Node, name: str, width: float, lean: bool
) -> fx.Node:
    """One convolution (+ norm + activation) that takes the shape of ``start`` to that of ``end``.

    The geometry (kernel, stride, padding) is that of the source's own down-sampling layers, so that odd sizes round
    as they do in the source. ``lean``: depthwise and pointwise (Howard et al. 2017, arXiv 1704.04861, section 3.1).
    """
    structure = build.structure
    build.full.add(name)  # made at its final width
    region = set(_region(structure, start, end))
    path = _heaviest_path(structure, region, start, end)
    rank = len(structure.spatial(end))
    last_in, last_out = present in structure.channels_last, end in structure.channels_last
    channels = structure.channels(present)
    target = narrowed(structure.channels(end), width)
    if last_in:
        value = _move_axis(build, value, rank, to_last=False)
    norm, activation = _kinds(structure, region, path, end)
    dtype = tensor_of(end).dtype
    if dtype != tensor_of(present).dtype:
        value = build.graph.call_method("to", (value, dtype))
    conv = partial(_conv, build, rank, dtype, norm is None)
    made = False
    for before, node in pairwise([start, *path]):
        if _fixes_size_of_all(structure, region, start, node, end) and node not in structure.channels_last:
            value = _again(build, node, value, f"{name}.{node.name}")
            continue
        if not _shrinks(structure, before, node, start, end):
            continue
        module = build.structure.trace.module(node)
        if made or _is_pool(module):
            value = _reduce(build, node, module, value, f"{name}.pool")
            continue
        geometry = _geometry(module, structure, before, node)
        if lean:
            spatial = _conv(build, rank, dtype, False, channels, channels, groups=channels, **geometry)
            value = build.add(f"{name}.depthwise", spatial, value, fresh=True)
            geometry = {"kernel_size": 1}
        value = build.add(f"{name}.conv", conv(channels, target, **geometry), value, fresh=True)
        made = True
    pooled = any(_shrinks(structure, a, b, start, end) for a, b in pairwise([start, *path])) and not made
    if not made and not (pooled and structure.channels(start) == structure.channels(end)):
        kernel = 3 if pooled and not lean else 1
        value = build.add(f"{name}.conv", conv(channels, target, kernel_size=kernel, padding=kernel // 2), value,
                          fresh=True)
    if last_out:
        value = _move_axis(build, value, rank, to_last=True)
    return _normalised(build, value, name, target, norm, activation)


def _normalised(
    build: Builder, value: fx.Node, name: str, channels: int, norm: fx.Node | None, activation: fx.Node | str | None
) -> fx.Node:
    """Copies of a norm layer, at another width, and of an activation."""
    if norm is not None:
        new = build.clone(str(norm.target))
        own: Moments = {} if build.draft else moments(new)  # those of the source, whatever its width
        if not fits(new, channels):
            set_width(new, channels)
        value = build.add(f"{name}.norm", new, value)
        build.moments.update({f"{name}.norm.{k}": v for k, v in own.items()})
    if activation is not None:
        value = _activate(build, activation, value, f"{name}.activation")
    return value


_AVERAGE: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}

GRID = 3
"""Places on a side of the map that a hidden perceptron begins with: batch statistics need some behind it, too."""


def _hidden(build: Builder, tap: fx.Node, value: fx.Node, layers: int, half: bool) -> fx.Node:
    """Layers of a convolution and the trunk's kinds of norm and activation on ``value``, which stands for ``tap`` and
    whose mean is taken next: 3x3, on half the size if ``half``, the last two a perceptron on a few places.

    On so small a map they cost little (as in Belilovsky et al. 2020, arXiv 1901.08164, section 4.1), and the mean alone
    would hide from the module where its features are.
    """
    structure, channels, dtype = build.structure, build.structure.channels(tap), tensor_of(tap).dtype
    sides, last = structure.spatial(tap), tap in build.structure.channels_last
    rank, start, name = len(sides), structure.chain[0], f"hidden_{tap.name}"
    region = set(_region(structure, start, tap))
    norm, activation = _kinds(structure, region, _heaviest_path(structure, region, start, tap), tap)
    if norm is not None and len(structure.spatial(norm)) != rank:
        norm = None
    few = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[rank]
    half = half and min(sides) >= 2 * GRID
    for index in range(layers):
        if last:
            value = _move_axis(build, value, rank, to_last=False)
        kernel = 3 if index < layers - 2 else 1
        if index == 0 and kernel == 3 and half:
            value = build.add(f"{name}.reduced", _AVERAGE[rank](2, ceil_mode=True), value)
        if index == max(layers - 2, 0) and min(sides) >= GRID:
            value, kernel = build.add(f"{name}.few", few(GRID), value), 2
        conv = _conv(build, rank, dtype, norm is None, channels, channels, kernel_size=kernel, padding=int(kernel == 3))
        value = build.add(f"{name}.layer{index}.conv", conv, value, fresh=True)
        if last:
            value = _move_axis(build, value, rank, to_last=True)
        value = _normalised(build, value, f"{name}.layer{index}", channels, norm, activation)
    if not last and not takes_any_size(structure, tap):  # a pooling layer that expects this many places
        value = build.graph.call_function(F.interpolate, (value,), {"size": sides})
    return value


def _resized(build: Builder, start: fx.Node, end: fx.Node, value: fx.Node, name: str) -> fx.Node:
    """``value`` in place of ``end``, where what lies between is dropped, as it keeps the example's shape: with as many
    places as ``end`` has at every size."""
    structure = build.structure
    alike = [node for node in fixed_sizes(structure) if structure.spatial(node) == structure.spatial(end)
             and len(structure.shape(node)) == len(structure.shape(end))
             and (node in structure.channels_last) == (start in structure.channels_last)]
    region = _region(structure, start, end) if alike else []
    fixed = [node for node in region if node in alike and _fixes_size_of_all(structure, set(region), start, node, end)]
    return _again(build, fixed[-1], value, name) if fixed else value


def _again(build: Builder, node: fx.Node, value: fx.Node, name: str) -> fx.Node:
    """An operation without weights, applied to ``value``."""
    if node.op == "call_module":
        return build.add(name, build.clone(str(node.target)), value)
    copied = build.graph.node_copy(node, lambda _: value)
    copied.meta = {}
    return copied


def _fixes_size_of_all(
    structure: Structure, region: set[fx.Node], start: fx.Node, node: fx.Node, end: fx.Node
) -> bool:
    """Whether a node fixes the number of places, and all of the region's values pass it: no branch beside it."""
    if node not in fixed_sizes(structure):
        return False
    reached, stack = {node}, [start]
    while stack:
        found = {user for user in stack.pop().users if user in region and not is_size(user)} - reached
        reached |= found
        stack += found
    return node is end or end not in reached


def _heaviest_path(structure: Structure, region: set[fx.Node], start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The path from start (excluded) to end through the region with the most weights and values.

    What has fewer places than the end is beside it (a squeeze-excitation's pooled branch).
    """
    places = structure.positions(end)
    best: dict[fx.Node, tuple[int, fx.Node | None]] = {start: (0, None)}
    for node in structure.trace.graph.nodes:
        same_rank = is_map(node) and len(structure.shape(node)) == len(structure.shape(end))
        if node in region and is_map(node) and not (same_rank and structure.positions(node) < places):
            above = [(best[source][0], source) for source in node.all_input_nodes if source in best]
            if above:
                score, source = max(above, key=lambda pair: pair[0])
                size = sum(p.numel() for p in structure.trace.parameters(node)) + tensor_of(node).numel()
                best[node] = score + size, source
    path: list[fx.Node] = []
    step = end if end in best else None
    while step is not None and step is not start:
        path.append(step)
        step = best[step][1]
    return path[::-1]


def _shrinks(structure: Structure, before: fx.Node, node: fx.Node, start: fx.Node, end: fx.Node) -> bool:
    """Whether places are lost on the way from ``start`` to ``end``; attention's heads and scores have none to lose."""
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
    """A further reduction of the places: the source's own pooling, or its ratio."""
    if module is not None and _is_pool(module):
        return build.add(name, build.clone(str(node.target)), value)
    before = next(source for source in node.all_input_nodes if is_map(source))
    scale = [a // b for a, b in zip(build.structure.spatial(before), build.structure.spatial(node), strict=True)]
    return build.add(name, _AVERAGE[len(scale)](scale[0] if len(scale) == 1 else tuple(scale), ceil_mode=True), value)


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


def _conv(
    build: Builder, rank: int, dtype: torch.dtype, bias: bool, channels: int, target: int, **geometry: Any
) -> nn.Module:
    """A convolution of the trunk's type; without bias in front of a norm, which would take it away."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[rank]
    if build.draft:
        with build.structure.trace.mode:
            return kind(channels, target, bias=bias, dtype=dtype, **geometry)
    conv: nn.Module = skip_init(kind, channels, target, bias=bias, dtype=dtype, **geometry)
    return conv


def _initialise(conv: Any) -> None:
    nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _move_axis(build: Builder, value: fx.Node, rank: int, *, to_last: bool) -> fx.Node:
    order = (0, *range(2, rank + 2), 1) if to_last else (0, rank + 1, *range(1, rank + 1))
    return build.graph.call_function(torch.permute, (value, order))


def _kinds(
    structure: Structure, region: set[fx.Node], path: list[fx.Node], end: fx.Node
) -> tuple[fx.Node | None, fx.Node | str | None]:
    """The last norm layer and activation (a module's path, or the node of a function) on the way, or beside it: the
    source's own kinds. No activation where the norm layer holds one."""
    norm: fx.Node | None = None
    activation: fx.Node | str | None = None
    beside = [node for node in structure.trace.graph.nodes if node in region and node not in path]
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


# ---------------------------------------------------------------------------------------------- widths


def _fit(
    network: Network, build: Builder, examples: list[Any], options: Options, outputs_are_predictions: bool
) -> None:
    """Give the copied layers the channels that they meet: found on a shadow, then applied."""
    trial = shadow(network, build.structure.trace.mode).eval()
    keep: set[nn.Module] = set()
    if options.width < 1:
        paths = _predictors_of_source(build) if outputs_are_predictions else set()
        keep = {part for path, part in trial.named_modules()
                if path.partition(".")[2] in paths or path.partition(".")[0] in build.full}
    try:
        with quiet(), build.structure.trace.mode, torch.no_grad():
            changed = fit(trial, lambda: trial.forward(*examples), options.width, keep)
    except PlanError:
        raise
    except Exception as error:  # noqa: BLE001 - a copied layer or function that does not accept the new widths
        raise PlanError(
            f"the auxiliary network behind '{build.inputs[0].name}' cannot be built with aux_width="
            f"{options.width}, aux_depth={options.depth}, aux_hidden={options.hidden}, head={options.head!r}: {error}. "
            "Try aux_width=1, aux_depth=0, aux_hidden=0, head='full', other split points, or example_inputs of the "
            "type that the model computes in."
        ) from error
    for path, (inputs, outputs) in changed.items():
        set_width(network.get_submodule(path), inputs, outputs)


def _like(structure: Structure, tensor: Tensor) -> Tensor:
    with structure.trace.mode:
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return out.requires_grad_() if out.is_floating_point() else out


def _predictors_of_source(build: Builder) -> set[str]:
    """Paths of the layers that make the source network's outputs."""
    named = build.structure.trace.shadow.named_modules(remove_duplicate=False)
    return {path for path, module in named if module in build.structure.interface}
