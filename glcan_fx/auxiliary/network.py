"""Build one auxiliary network per local module: a simplified copy of the remainder of the network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from glcan_fx.auxiliary.builder import Auxiliary, Builder
from glcan_fx.auxiliary.features import Feature
from glcan_fx.auxiliary.patches import in_patches
from glcan_fx.auxiliary.reach import reach
from glcan_fx.auxiliary.stage import initialize
from glcan_fx.capture.trace import quiet, shadow
from glcan_fx.errors import PlanError
from glcan_fx.fx_utils import Network
from glcan_fx.initialization import freshen
from glcan_fx.layers import Cost, cost_of, fit, not_in_place, scale_gradient, set_width
from glcan_fx.structure.structure import Structure

if TYPE_CHECKING:
    from glcan_fx.auxiliary.method import Method
    from glcan_fx.auxiliary.remainder import Remainder


def auxiliary_network(
    remainder: "Remainder", features: Sequence[Feature], method: "Method", model: nn.Module | None
) -> Auxiliary:
    """Build the auxiliary network of the local module that ends with ``remainder.end``.

    features: the taps that it reads or makes. model: whose layers are copied; None makes a draft on fake tensors: sizes
    without memory. Raises PlanError where a tap cannot be synthesised or ``method.width`` cannot be applied.
    """
    structure = remainder.structure
    build = Builder(structure, structure.trace.shadow if model is None else model, draft=model is None)
    build.input(remainder.end)
    with _explained(build, method):
        method.predict(build, remainder, features)
    results = fx.map_arg(remainder.outputs, lambda node: build.values[node])
    weights = {key: weight for key, weight in remainder.weights.items() if weight != 1}
    if weights:
        results = dict(results)
    for key, weight in weights.items():
        results[key] = build.graph.call_function(scale_gradient, (results[key], weight))
    build.graph.output(results)
    _average_without_gradients(build)

    network = Network(build.root, build.graph, class_name="AuxiliaryNetwork")
    not_in_place(network)
    network.train()
    examples = [tree_map_only(Tensor, lambda t: _like(structure, t), n.meta["value"]) for n in build.inputs]
    _fit(network, build, examples, method, remainder.predicts)
    reach(network, structure, remainder.end, build.inputs)
    if remainder.predicts:
        _return_own(network)
    terms = {name: term for name, (term, _) in build.terms.items()}
    if terms:
        output = network.graph.output_node()
        output.args = ((output.args[0], {name: node for name, (_, node) in build.terms.items()}),)
        network.recompile()
    with _explained(build, method):
        cost, shapes = _measured(network, build, examples)
    patches, cost = in_patches(network, build, examples, method.patches, cost)
    if not build.draft:
        _initialize(network, build)
    averages = {path: source for path, source in build.twins.items() if path.startswith(f"{build.average}.")}
    return Auxiliary(network, build.inputs, shapes[0] if terms else shapes, cost, terms, method.share(remainder),
                     averages if build.average else {}, build.momentum, patches)


def _average_without_gradients(build: Builder) -> None:
    """What follows the model's weights are buffers (those of scripted blocks, which cannot be, parameters without
    gradients): no optimizer, and no gradient, moves them."""
    owner = build.root._modules.get(build.average) if build.average else None
    for module in owner.modules() if owner is not None else ():
        if isinstance(module, torch.jit.ScriptModule):
            for scripted in module.parameters():
                scripted.requires_grad_(False)
            continue
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())


@contextmanager
def _explained(build: Builder, method: "Method") -> Iterator[None]:
    """Say which auxiliary network cannot be built, and what to do."""
    try:
        yield
    except PlanError:
        raise
    except Exception as error:  # noqa: BLE001 - a layer or function that does not accept what it meets in a copy
        raise PlanError(
            f"the auxiliary network behind '{build.inputs[0].name}' cannot be built with "
            f"{method}: {error}. Try GLCAN(width=1, hidden=0, head='full'), other split points, or example_inputs of "
            "the type that the model computes in."
        ) from error


def _initialize(network: Network, build: Builder) -> None:
    """Give copies the scale of what they are copied from, and begin at scales where gradients flow."""
    for name in build.fresh:
        initialize(network.get_submodule(name))
    predict = {f"tail.{path}" for path in predictors_of_source(build)}
    predict |= {name for name in build.fresh if name.startswith("predict")}
    freshen(network, build.moments, scales=_scales(network.graph), predict=predict)
    own = dict(network.named_parameters()) | dict(network.named_buffers())
    with torch.no_grad():
        for path, source in build.twins.items():
            own[path].copy_(build.model.get_parameter(source))


def _measured(network: Network, build: Builder, examples: list[Any]) -> tuple[Cost, Any]:
    """What the network costs and returns at the example's size. Inputs that it would overwrite, which later modules
    read too, are copied first."""
    mode = build.structure.trace.mode
    while True:
        with mode:
            given = tree_map_only(Tensor, torch.clone, examples)  # not leaves: those refuse to be overwritten
            versions = [[t._version for t in tree_leaves(value) if isinstance(t, Tensor)] for value in given]
            sizes = network if build.draft else shadow(network, mode)
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


def _fit(
    network: Network, build: Builder, examples: list[Any], method: "Method", outputs_are_predictions: bool
) -> None:
    """Give the copied layers the channels that they meet: found on a shadow, then applied; a draft is its
    own shadow."""
    trial = (network if build.draft else shadow(network, build.structure.trace.mode)).eval()
    keep: set[nn.Module] = set()
    if method.width < 1:
        paths = predictors_of_source(build) if outputs_are_predictions else set()
        keep = {part for path, part in trial.named_modules()
                if path.partition(".")[2] in paths or path.partition(".")[0] in build.full}
    with _explained(build, method), quiet(), build.structure.trace.mode, torch.no_grad():
        changed = fit(trial, lambda: trial.forward(*examples), method.width, keep)
    network.train()
    if not build.draft:
        for path, (inputs, outputs) in changed.items():
            set_width(network.get_submodule(path), inputs, outputs)


def _like(structure: Structure, tensor: Tensor) -> Tensor:
    with structure.trace.mode:
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return out.requires_grad_() if out.is_floating_point() else out


def predictors_of_source(build: Builder) -> set[str]:
    """Paths of the layers that make the source network's outputs."""
    named = build.structure.trace.shadow.named_modules(remove_duplicate=False)
    return {path for path, module in named if module in build.structure.interface}
