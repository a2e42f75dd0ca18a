"""Replacement Learning: blocks whose weights are made of their neighbours' (arXiv 2410.01239)."""

import copy
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from glcan_fx.errors import PlanError
from glcan_fx.layers import is_norm, is_vector


class Replacement(nn.Module):
    """(a, b) -> a times the weight of the layer before plus b times that of the layer behind. Both weights are the
    other layers' own parameters, registered here, too, as tied ones are."""

    def __init__(self, before: nn.Parameter, behind: nn.Parameter) -> None:
        super().__init__()
        self.before, self.behind = before, behind

    def forward(self, scales: Tensor) -> Tensor:
        return scales[0] * self.before + scales[1] * self.behind

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The scales to begin with: a weight as large as its neighbours', where these are independent."""
        return weight.new_full((2,), 2**-0.5)


def replace(model: nn.Module, every: int = 2, *, blocks: Sequence[str] | None = None) -> nn.Module:
    """A copy of a model in which some blocks compute with weights made of their neighbours', for Replacement Learning
    (arXiv 2410.01239): theta_i = a theta_{i-1} + b theta_{i+1}, with two learnable scalars for each layer.

    It trains as any model does, end to end or compiled with any method; a replaced block and its neighbours then stay
    in one local module, so that with ``every=2`` a whole row does. What is saved are the weights, their
    gradients and the optimizer's state.

    Args:
        model: it is not changed.
        every: of neighbours in a row with weights of the same shapes, every so many-th block is replaced; 2 or more, so
            that its neighbours are not. The first and the last of a row stay.
        blocks: module paths of the blocks to replace, instead.

    Only matrices and kernels are made of the neighbours'; norm layers, biases and other vectors stay the block's own.
    Both scalars begin at 1 / sqrt(2), which keeps the size of independent weights. (Which blocks, and how the scalars
    begin, is not published.)

    Raises PlanError where there is nothing to replace, or a named block has no such neighbours.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 2:
        raise PlanError(f"every={every!r}: 2 or more, so that the neighbours of a replaced block are not replaced")
    made = copy.deepcopy(model)
    rows = list(_rows(made))
    chosen = [row[place - 1: place + 2] for row in rows for place in range(1, len(row) - 1)
              if (row[place] in blocks if blocks is not None else place % every == every - 1)]
    found = [name for _, name, _ in chosen]
    missing = [name for name in blocks or () if name not in found]
    offers = [name for row in rows for name in row[1:-1]]
    if missing or not chosen:
        what = f"'{missing[0]}'" if missing else f"no block of {type(model).__name__}"
        raise PlanError(f"{what} has neighbours on both sides with weights of the same shapes"
                        + (f"; these have: {', '.join(offers)}" if offers else ""))
    both = next((name for name in found for others in chosen if name in (others[0], others[2])), None)
    if both:
        raise PlanError(f"'{both}' is replaced, and so is its neighbour: leave one of them as it is")
    for before, name, behind in chosen:
        _replace(*(made.get_submodule(path) for path in (before, name, behind)))
    return made


def _rows(model: nn.Module) -> Iterator[list[str]]:
    """Neighbours in containers with weights of the same shapes, by path."""
    for path, parent in model.named_modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            children = [(f"{path}.{name}" if path else name, child) for name, child in parent.named_children()]
            for shapes, row in groupby(children, lambda pair: tuple(
                    (name, weight.shape) for name, weight in _weights(pair[1]))):
                if shapes:
                    yield [name for name, _ in row]


def _weights(block: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The matrices and kernels of a block; none where one of its layers has computed weights already."""
    if any(parametrize.is_parametrized(part) for part in block.modules()):
        return []
    norms = {id(p) for part in block.modules() if is_norm(part) for p in part.parameters(recurse=False)}
    return [(name, p) for name, p in block.named_parameters() if id(p) not in norms and not is_vector(p)]


def _replace(before: nn.Module, block: nn.Module, behind: nn.Module) -> None:
    others = dict(_weights(before)), dict(_weights(behind))
    for name, _ in _weights(block):
        owner, _, last = name.rpartition(".")
        one, other = (weights[name] for weights in others)
        with torch.no_grad():
            parametrize.register_parametrization(block.get_submodule(owner), last, Replacement(one, other), unsafe=True)


def kept_together(model: nn.Module) -> list[tuple[str, set[int]]]:
    """Layers with replaced weights by path, and the identities of the parameters that these are made of, and by."""
    found = []
    for path, part in model.named_modules():
        if isinstance(part, parametrize.ParametrizationList) and any(isinstance(p, Replacement) for p in part):
            found.append((path.partition(".parametrizations.")[0], {id(p) for p in part.parameters()}))
    return found
