"""MAN: auxiliary networks that begin with the next block, by a branch that learns and an average of its weights."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.auxiliary.features import Feature
from glcan_fx.auxiliary.method import Extension
from glcan_fx.auxiliary.remainder import Remainder
from glcan_fx.auxiliary.trunk import Regions
from glcan_fx.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class MAN(Extension):
    """Momentum auxiliary networks (Su et al. 2024, arXiv 2407.05623; MAN++, arXiv 2507.16279): in front of the base's
    auxiliary network stand two copies of the block that follows the local module. One learns; the other's weights are
    an exponential moving average of the block's own, so that a local module is told how the next one changes.

    Args:
        base: the method whose auxiliary network reads the sum of both copies.
        momentum: of the moving average, which moves once after each step of the optimizer, 0 to 1. Published: 0.995.
        scaled: a learnable scale s weighs the copies, s and 2 - s, as in MAN++; without it their sum, as in MAN.

    Both copies begin with the block's own weights. (In the authors' code they begin as other random blocks, as it
    initialises them afterwards, and the average stands still unless its momentum is passed.) The average's weights
    are buffers; its batch norm has statistics of its own.
    """

    name: ClassVar[str] = "man"
    title: ClassVar[str] = "MAN: next block, learned + averaged"

    momentum: float = 0.995
    scaled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(isinstance(self.momentum, int | float) and 0 <= self.momentum < 1, "momentum",
                    "a number, 0 or more and below 1")
        self._check(isinstance(self.scaled, bool), "scaled", "True or False")

    @property
    def depends_on_blocks(self) -> bool:
        return True

    def predict(self, build: Builder, remainder: Remainder, features: Sequence[Feature]) -> None:
        structure = remainder.structure
        own = build.input(remainder.end)
        place = {node: position for position, node in enumerate(structure.chain)}
        block = next(unit for unit in structure.units if place[unit.end] > place[remainder.end])
        if len(structure.together(block.end)) > 1 and not structure.shares_layers:
            raise PlanError(f"MAN: '{block.name}' is one of several blocks side by side, with weights of their own. "
                            "Choose another method.")
        with build.each_stream(block.end):
            learned = _copy(build, remainder.end, block.end, own, _LEARNED)
            averaged = _copy(build, remainder.end, block.end, own, _AVERAGED)
            with build.making():
                both = Both(self.scaled)
            build.values[block.end] = build.add("both", both, learned, averaged)
        if not any(path.startswith(f"{_AVERAGED}.") for path in build.twins):
            raise PlanError(f"MAN: the block '{block.name}', which follows '{remainder.unit.name}', has no weights to "
                            "follow. Choose other split points, or another method.")
        build.average, build.momentum = _AVERAGED, self.momentum
        before = structure.above(block.end)  # which the local module is taken to make, the block's values included
        behind = replace(remainder, unit=block, owner={
            node: min(module, remainder.index) if node in before else module
            for node, module in remainder.owner.items()})
        super().predict(build, behind, features)
        known = structure.known_by(remainder.end)
        beyond = [node for node in build.inputs if node in structure.dependent and node not in known]
        if beyond:
            raise PlanError(f"MAN: the auxiliary network behind '{remainder.unit.name}' would read '{beyond[0].name}', "
                            "which the next block makes. Choose other split points, or another base.")


_LEARNED, _AVERAGED = "learned", "averaged"


def _copy(build: Builder, start: fx.Node, end: fx.Node, own: fx.Node, prefix: str) -> fx.Node:
    """A copy of what lies between two values, that begins with the model's own weights."""
    build.full.add(prefix)
    result = Regions(build, start, 1.0, False, build.side_by_side(start, own)).copy(start, end, prefix)
    for path in [path for path in build.copies if path.startswith(f"{prefix}.")]:
        owner, _, last = path.rpartition(".")
        parent = build.root.get_submodule(owner)
        copied = parent._modules.get(last)  # else a parameter, or a buffer, that a forward reads
        names = [path] * (last in parent._parameters) if copied is None else [
            f"{path}.{name}" for name, _ in copied.named_parameters()]
        build.twins.update({name: name.removeprefix(f"{prefix}.") for name in names})
    return result


class Both(nn.Module):
    """(learned, averaged) -> their sum; or, scaled, s of the one and 2 - s of the other."""

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        if scaled:
            self.scale = nn.Parameter(torch.ones(1))  # (a scalar could not be sharded)

    def forward(self, learned: Tensor, averaged: Tensor) -> Tensor:
        if "scale" not in self._parameters:
            return learned + averaged
        return self.scale * learned + (2 - self.scale) * averaged
