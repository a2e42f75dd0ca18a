"""Kinds and widths of layers, and what they cost."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from glcan_fx.devices import Work
from glcan_fx.errors import PlanError
from glcan_fx.peak_memory import Counting


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself; its gradient is multiplied by ``factor``.

    On a level of V_m this is the weight sigma_j of GLCAN's eq. 8 as the local module sees it, whatever the loss is.
    """
    out: Tensor = _ScaleGradient.apply(x, factor)
    return out


def leaves(module: nn.Module) -> Iterable[nn.Module]:
    """The sub-modules that have parameters, buffers or no children, each once; torch.nn's composites, and norm layers
    with an activation in them, stay whole."""
    for path, part in module.named_modules():
        whole = isinstance(part, nn.MultiheadAttention) or "parametrizations" in part._modules or is_norm(part)
        inside = ".parametrizations." in f".{path}."
        if whole or not inside and not any(True for _ in part.children()):
            yield part


def narrowed(channels: int, width: float) -> int:
    """Channels at a relative width: a multiple of 8, at least 8, at most as many as before."""
    return channels if width >= 1 or channels <= 8 else max(8, 8 * round(channels * width / 8))


def is_norm(module: nn.Module) -> bool:
    """A layer that normalises: it keeps statistics, or has an epsilon to divide by; one value per channel in each
    tensor. It may hold what has no tensors: an activation, a dropout."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    sizes = {t.numel() for t in tensors if t.dim() == 1}
    normalises = "running_var" in module._buffers or any("eps" in name for name in vars(module))
    alone = not any(True for child in module.children() for _ in [*child.parameters(), *child.buffers()])
    return normalises and alone and len(sizes) == 1 and all(t.dim() <= 1 for t in tensors)
_GATES = nn.Sigmoid | nn.Hardsigmoid | nn.Softmax | nn.Softmin | nn.LogSoftmax
ACTIVATIONS = {name.lower() for name, kind in vars(nn.modules.activation).items()
               if isinstance(kind, type) and issubclass(kind, nn.Module)
               and not issubclass(kind, _GATES | nn.MultiheadAttention)}


def is_activation(module: nn.Module) -> bool:
    """One of torch.nn's; gates do not count."""
    kind = type(module)
    return kind.__module__ == nn.modules.activation.__name__ and kind.__name__.lower() in ACTIVATIONS


def inner_activation(norm: nn.Module) -> str | None:
    """The name of the activation that a norm layer holds."""
    return next((name for name, child in norm.named_children() if is_activation(child)), None)


def fits(module: nn.Module, channels: int) -> bool:
    """Whether a leaf accepts that many input channels as it is."""
    for name in ("in_channels", "in_features", "embed_dim"):
        if hasattr(module, name):
            return bool(getattr(module, name) == channels)
    return not is_norm(module) or _norm_size(module) == channels


def _norm_size(module: nn.Module) -> int:
    return next(t.numel() for t in [*module.parameters(), *module.buffers()] if t.dim() == 1)


def channel_axis(module: nn.Module, value: Tensor) -> int:
    """The axis of an input that a leaf treats as channels."""
    if hasattr(module, "in_features") or isinstance(module, nn.MultiheadAttention):
        return -1
    if isinstance(module, nn.LayerNorm):
        if type(module).forward is nn.LayerNorm.forward or value.dim() == 3:
            return -1
        size = module.normalized_shape[-1]  # a subclass may permute inside: the sizes tell, or it is one for images
        return -1 if value.shape[-1] == size and value.shape[1] != size else 1
    return 1 if value.dim() > 1 else 0


def set_width(module: Any, inputs: int, outputs: int | None = None) -> None:
    """Give a convolution, linear or norm layer other channel counts, in place; values are undefined afterwards.

    Raises PlanError for any other layer that has parameters.
    """
    if hasattr(module, "in_channels") and hasattr(module, "out_channels") and hasattr(module, "groups"):
        before = module.in_channels
        outputs = int(module.out_channels) if outputs is None else outputs
        if module.groups == before:  # depthwise
            multiplier = module.out_channels // before
            module.groups, outputs = inputs, inputs * multiplier
        else:
            module.groups = math.gcd(module.groups, math.gcd(inputs, outputs))
        kernel = tuple(module.weight.shape[2:])
        module.in_channels, module.out_channels = inputs, outputs
        a, b = (inputs, outputs) if getattr(module, "transposed", False) else (outputs, inputs)
        _replace(module, "weight", (a, b // module.groups, *kernel))
        _replace(module, "bias", (outputs,))
    elif hasattr(module, "in_features") and hasattr(module, "out_features"):
        outputs = int(module.out_features) if outputs is None else outputs
        module.in_features, module.out_features = inputs, outputs
        _replace(module, "weight", (outputs, inputs))
        _replace(module, "bias", (outputs,))
    elif is_norm(module):
        before = _norm_size(module)
        for name in ("num_features", "num_channels"):
            if hasattr(module, name):
                setattr(module, name, inputs)
        if hasattr(module, "normalized_shape"):
            module.normalized_shape = (inputs,)
        if hasattr(module, "num_groups"):
            alone = module.num_groups == before  # one channel a group, which at a single position is always zero
            module.num_groups = math.gcd(module.num_groups, inputs)
            if module.num_groups == inputs > 1 and not alone:
                module.num_groups = inputs // next(n for n in range(2, inputs + 1) if inputs % n == 0)
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim() == 1 and tensor.numel() == before:
                _replace(module, name, (inputs,))
    elif any(True for _ in module.parameters()):
        raise PlanError(f"a layer of class {type(module).__name__} cannot be made narrower: use aux_width=1")


def keep_outputs(conv: nn.Conv2d, rows: slice) -> None:
    """Leave only some of a convolution's outputs, in place."""
    conv.out_channels = len(range(conv.out_channels)[rows])
    conv.weight = nn.Parameter(conv.weight.detach()[rows].clone(), requires_grad=conv.weight.requires_grad)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[rows].clone(), requires_grad=conv.bias.requires_grad)


def _replace(module: nn.Module, name: str, shape: Sequence[int]) -> None:
    old = getattr(module, name, None)
    if old is None or old.shape == tuple(shape):
        return
    new = old.detach().new_ones(tuple(shape))
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        module._buffers[name] = new
Widths = dict[str, tuple[int, int | None]]


def fit(module: nn.Module, run: Callable[[], Any], width: float, keep: set[nn.Module]) -> Widths:
    """Run ``module`` once and give each layer the input channels that it meets, and ``width`` of its outputs.

    ``keep`` are layers whose number of outputs stays (predictors: the interface). Returns what was changed, by path.
    """
    changed: Widths = {}
    done: set[nn.Module] = set()
    paths = {part: path for path, part in module.named_modules()}

    def adapt(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if value is None or layer in done or not any(True for _ in layer.parameters()) and not is_norm(layer):
            return
        done.add(layer)
        channels = value.shape[channel_axis(layer, value)]
        outputs = getattr(layer, "out_channels", getattr(layer, "out_features", None))
        wanted = outputs if outputs is None or layer in keep else narrowed(outputs, width)
        if not fits(layer, channels) or wanted != outputs:
            set_width(layer, channels, wanted)
            changed[paths[layer]] = channels, wanted

    handles = [layer.register_forward_pre_hook(adapt, with_kwargs=True) for layer in leaves(module)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return changed


def predictors(module: nn.Module, outputs: Any) -> set[nn.Module]:
    """The layers nearest to the outputs: those from whose weights an output is reached without another weight."""
    owners = {id(p): layer for layer in leaves(module) for p in layer.parameters() if p.dim() >= 2}
    found: set[nn.Module] = set()
    seen: set[Any] = set()
    stack = [leaf.grad_fn for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    while stack:
        function = stack.pop()
        if function in seen:
            continue
        seen.add(function)
        below = [after for after, _ in function.next_functions if after is not None]
        own = [owners[key] for f in below if (key := id(getattr(f, "variable", None))) in owners]
        casts = [owners[key] for f in below if len(f.next_functions) == 1  # autocast, a transposed weight
                 if (key := id(getattr(f.next_functions[0][0], "variable", None))) in owners]
        found.update(own, casts)
        if not own and not casts:
            stack.extend(below)
    return found


def towers(module: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Paths of the largest sub-modules with weights that always keep their input's shape: what "light" leaves out."""
    keeps: dict[str, bool] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            same = len(args) == 1 and isinstance(args[0], Tensor) and isinstance(out, Tensor)
            keeps[path] = keeps.get(path, True) and same and args[0].shape == out.shape
        return hook

    handles = [part.register_forward_hook(watch(path)) for path, part in module.named_modules()
               if path and any(p.dim() >= 2 for p in part.parameters())]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    kept = sorted((path for path, same in keeps.items() if same), key=lambda path: path.count("."))
    largest: list[str] = []
    for path in kept:
        if not any(path.startswith(outer + ".") for outer in largest):
            largest.append(path)
    return largest


@dataclass(frozen=True)
class Cost:
    """What a part costs a training step: parameters, bytes kept for backward, and what its operators do forward."""

    parameters: int = 0
    saved: int = 0
    work: Work = Work()

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.parameters + other.parameters, self.saved + other.saved, self.work.plus(other.work))


class Kinds(NamedTuple):
    """Layers and interpolation of maps of one rank."""

    conv: Any
    norm: Any
    average: Any
    adaptive: Any
    mode: str


KINDS = {
    1: Kinds(nn.Conv1d, nn.BatchNorm1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, "linear"),
    2: Kinds(nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, "bilinear"),
    3: Kinds(nn.Conv3d, nn.BatchNorm3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, "trilinear"),
}
"""By the number of spatial axes."""


def cost_of(module: nn.Module, run: Callable[[], Any]) -> tuple[Cost, Any]:
    """What ``module`` costs while ``run`` runs, and what ``run`` returns. Parameters and buffers are not counted among
    what is kept."""
    own = {tensor.untyped_storage()._cdata for tensor in [*module.parameters(), *module.buffers()]}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:  # a linear layer keeps a view of its weight
            seen.setdefault(tensor.untyped_storage()._cdata, tensor.detach())
        return tensor.detach()  # the tensor itself would hold the graph that holds it

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor), Counting() as counting:
        result = run()
    saved = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    return Cost(weights_in(module), saved, counting.work), result


def weights_in(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def replace(module: nn.Module, path: str, new: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, new)


def not_in_place(module: nn.Module) -> None:
    """Make activations write new tensors: what they would overwrite may be handed on, or kept by a neighbour."""
    for part in module.modules():
        if getattr(part, "inplace", False) and not isinstance(part, torch.jit.ScriptModule):  # its code is fixed
            part.inplace = False  # type: ignore[assignment]


def is_vector(tensor: Tensor) -> bool:
    """Whether a tensor is a number, or one value for each channel or position, however it is laid out."""
    return tensor.dim() < 2 or tensor.numel() == max(tensor.shape)
