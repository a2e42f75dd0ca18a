"""Fresh weights for copies of layers: with the mean and scale of what they are copied from, where gradients flow."""

import copy
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glcan_fx.layers import is_norm, is_vector


@dataclass(frozen=True)
class Moment:
    """Of a parameter, what a copy is drawn from: mean and deviation of its finite values, fan-in and shape."""

    mean: float
    std: float
    fan_in: int
    shape: torch.Size

    @property
    def silent(self) -> bool:
        """Whether a layer with such weights passes on (almost) nothing."""
        return math.hypot(self.mean, self.std) * math.sqrt(self.fan_in) < _SILENT

    @property
    def constant(self) -> bool:
        return self.std <= 1e-6 * abs(self.mean)

    @property
    def zero(self) -> bool:
        return self.mean == self.std == 0
Moments = dict[str, Moment]
_SILENT = 1e-3  # of a signal of size 1
_DEAD = 1e-2  # a norm's scale below this begins at 1
_SMALL = 0.1  # of the weights of a layer that predicts, where the source begins at zero


@torch.no_grad()
def moments(module: nn.Module) -> Moments:
    """Mean, deviation, fan-in and shape of every parameter: what ``freshen`` draws from."""
    return {name: Moment(*_mean_and_deviation(p), _fan_in(p), p.shape)
            for name, p in module.named_parameters() if p.numel()}


def _mean_and_deviation(parameter: Tensor) -> tuple[float, float]:
    values = parameter.detach().float()
    mean, std = values.mean().item(), values.std(correction=0).item()
    if math.isfinite(mean) and math.isfinite(std):
        return mean, std
    finite = values[values.isfinite()]
    return (finite.mean().item(), finite.std(correction=0).item()) if finite.numel() else (0.0, 0.0)


def unhooked_copy(module: nn.Module) -> nn.Module:
    """A copy without the user's hooks (those that make a weight, as pruning's do, stay)."""
    computed = [(part, name, value) for part in module.modules() for name, value in vars(part).items()
                if isinstance(value, Tensor) and not value.is_leaf]
    for part, name, value in computed:  # what such a hook made of the weights: deepcopy refuses tensors with history
        part.__dict__[name] = value.detach()
    try:
        new = copy.deepcopy(module)
    finally:
        for part, name, value in computed:
            part.__dict__[name] = value
    for parameter in new.parameters():
        if not parameter.is_leaf:  # of scripted parts, whose copies are computed from the originals
            parameter.detach_().requires_grad_()
    for part in new.modules():
        for name, hooks in vars(part).items():
            if name.endswith("_hooks") and isinstance(hooks, dict):
                for key in [k for k, hook in hooks.items() if not type(hook).__module__.startswith("torch.nn.utils")]:
                    del hooks[key]
    return new


@torch.no_grad()
def freshen(
    module: nn.Module, source: Moments | None = None, *, scales: Collection[str] = (), predict: Collection[str] = ()
) -> None:
    """Initialise a copy like a freshly built module, in place, so that gradients pass it.

    Weights are drawn with the mean and scale that the source's weights have (whatever scheme made them). Vectors
    keep the source's values (class priors), their mean in norm layers and where the width is another one. Statistics
    are reset. What the user froze keeps its values, and is trained where the width is another one.

    What begins at zero in the source, so that a block begins as its skip or a network with no prediction, must not in
    a copy, which often has no skip and is all that teaches: scales begin at 1, weights at the size of their fan-in.
    ``scales``: parameters that multiply, beside those of norm layers; ``predict``: the layers that make the outputs.
    """
    source = moments(module) if source is None else source
    norms = {id(p) for part in module.modules() if is_norm(part) for p in part.parameters(recurse=False)}
    lengths = {id(p) for part in module.modules() for p in _scales_of(part)}
    matrices = {id(p) for part in module.modules() for p in _matrices_of(part)}
    for name, parameter in module.named_parameters():
        if name not in source:  # made new, not copied
            continue
        own, same = source[name], parameter.shape == source[name].shape
        dead = abs(own.mean) < _DEAD if id(parameter) in lengths else name in scales and own.zero
        weight = id(parameter) in matrices or not is_vector(parameter)
        if not parameter.requires_grad and same and not dead and not (weight and own.silent):
            continue
        parameter.requires_grad_(parameter.requires_grad or not same)
        if dead:
            parameter.fill_(1.0)
        elif weight and (own.silent or own.constant):
            size = _SMALL if name.rpartition(".")[0] in predict else 1.0
            parameter.normal_(own.mean, size / math.sqrt(max(_fan_in(parameter), 1)))
        elif parameter.dim() >= 2:
            parameter.normal_(own.mean, own.std * math.sqrt(own.fan_in / max(_fan_in(parameter), 1)))
        elif not same or id(parameter) in norms:
            parameter.fill_(own.mean)
        else:
            parameter.nan_to_num_(own.mean, own.mean, own.mean)
    for part in module.modules():
        reset: Any = getattr(part, "reset_running_stats", None)
        if callable(reset) and "running_mean" in part._buffers:  # a stand-in (replay.py) has none
            reset()
        elif "running_var" in part._buffers:  # frozen statistics: those of an identity
            for name, buffer in part.named_buffers(recurse=False):
                buffer.fill_(1.0 if "var" in name or "weight" in name else 0.0)


def _matrices_of(module: nn.Module) -> list[nn.Parameter]:
    """A layer's weights, also where it has one input or one output."""
    layer = any(hasattr(module, name) for name in ("in_features", "in_channels", "in1_features", "embedding_dim"))
    return [p for p in module.parameters(recurse=False) if p.dim() >= 2] if layer else []


def _scales_of(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a norm layer that multiply what it has normalised, and the lengths of normalised weights."""
    own = dict(module.named_parameters(recurse=False))
    if is_norm(module):
        return [p for name, p in own.items() if not re.search(r"bias|beta|shift|offset|^b$", name)]
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return [own["original0"]] if "original1" in own and is_vector(own["original0"]) else []
    return [p for name, p in own.items() if name.endswith("_g") and f"{name[:-2]}_v" in own]


def _fan_in(parameter: Tensor) -> int:
    return parameter[0].numel() if parameter.dim() >= 2 and parameter.shape[0] else 1
