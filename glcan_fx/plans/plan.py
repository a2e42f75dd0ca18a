"""The Plan: every decision of the compiler as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glcan_fx.auxiliary.features import Feature
from glcan_fx.auxiliary.method import Method
from glcan_fx.capture.replay import Segments, Surroundings
from glcan_fx.capture.trace import Report
from glcan_fx.plans.serialize import plan_from_json, plan_from_state, plan_to_json


@dataclass(frozen=True)
class Block:
    """A block of the trunk, the smallest part that may become a local module: its module path, its output's shape,
    its own parameters, and the bytes that it keeps for backward at the example size."""

    name: str
    shape: tuple[int, ...]
    stride: int
    channels: int
    parameters: int
    saved: int


@dataclass(frozen=True)
class Run:
    """Neighbouring blocks that run again in backward together: until then only what they are given is kept.

    blocks: their names, in order. inside: runs of some of them, which run again once more inside.
    """

    blocks: tuple[str, ...]
    inside: "tuple[Run, ...]" = ()


@dataclass(frozen=True)
class Reach:
    """What a local loss trains: local modules ``first`` to ``last``. It is computed in module ``until``; those behind
    ``last`` are read and not trained."""

    first: int
    last: int
    until: int


def reaches_of(window: int, untils: Sequence[int]) -> tuple[Reach, ...]:
    """What local losses train, in order, the last module's included. untils: of the others, the local modules that they
    are computed in."""
    return tuple(Reach(max(0, index - window + 1), index, until)
                 for index, until in enumerate((*untils, len(untils))))


@dataclass(frozen=True)
class LocalModule:
    """One gradient-isolated local module, as planned.

    cut: the split point that it ends with (None: the last, which owns neck and head). blocks: what it is made of, neck
    and head aside. shape, stride, channels: of its output; of the last module, of the trunk's end.
    makes: the taps (what neck and head read) that are made in it, and go to the cache where a later module reads them.
    parameters: a parameter that several modules use is counted in the first of them. features: V_m, the taps its loss
    reads, those of the last module's neck and head included. levels: output levels kept, sigma: their weights (eq. 8);
    both empty where the network has no levels. saved, aux_saved: bytes kept for backward at the example size by the
    module and by its auxiliary network, which takes aux_flops floating-point operations forward. ahead: blocks of later
    local modules that its loss passes through. behind: of the last module, the parts of neck and head. recompute: which
    of its blocks, and of these parts, run again in backward.
    """

    name: str
    cut: str | None
    blocks: tuple[Block, ...]
    shape: tuple[int, ...]
    stride: int
    channels: int
    makes: tuple[str, ...]
    parameters: int
    aux_parameters: int
    saved: int
    aux_saved: int
    aux_flops: int
    features: tuple[Feature, ...]
    levels: tuple[int, ...]
    sigma: tuple[float, ...]
    ahead: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    recompute: tuple[Run, ...] = ()

    @property
    def each(self) -> tuple[Run, ...]:
        """Every block, and every part of neck and head, as a run of its own."""
        return tuple(Run((name,)) for name in (*(block.name for block in self.blocks), *self.behind))

    @property
    def again(self) -> tuple[str, ...]:
        """The blocks and parts that run again in backward."""
        return tuple(name for run in self.recompute for name in run.blocks)

    def headline(self, index: int) -> str:
        """What the generated code says above this module's lines."""
        parts = [f"local module {index}: {self.name}"]
        if self.stride:
            parts.append(f"stride {self.stride}, {self.channels} channels")
        for source, label in (("cache", "P"), ("own", "own"), ("synthesised", "S")):
            names = [feature.tap for feature in self.features if feature.source == source]
            if names:
                parts.append(f"{label}: {', '.join(names)}")
        parts += [f"loss behind {name}" for name in self.ahead[-1:]]
        return " | ".join(parts) if self.cut else f"{parts[0]}, neck and head"


@dataclass(frozen=True)
class Plan:
    """What ``transform`` does, before anything is built; edit it with ``dataclasses.replace``.

    model: the class's name. network: path of the compiled part. natural: the finest split points. inputs: sizes of the
    example inputs of the compiled part, positional or by name. method: what auxiliary networks are, with no option left
    open. fused_loss: whether the last module computes dense losses from class ids; slices: how many slices of the batch
    its end runs in. report: how the model was captured. around: what runs as Python around the compiled part, where the
    whole model could not be captured. optimizer: that memory was simulated with, "sgd", "adam" or a class's name.
    ranks: how many local modules each rank of a pipeline runs; empty for one device.
    """

    model: str
    task: str
    network: str
    modules: tuple[LocalModule, ...]
    natural: tuple[str, ...]
    inputs: Any
    method: Method
    fused_loss: bool = False
    slices: int = 1
    notes: tuple[str, ...] = ()
    report: Report = Report()
    around: Surroundings | Segments | None = None
    optimizer: str | None = "sgd"
    ranks: tuple[int, ...] = ()
    reads: tuple[tuple[str | None, ...], ...] = field(default=(), compare=False, repr=False)

    @property
    def k(self) -> int:
        """Number of local modules."""
        return len(self.modules)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The split points, in order."""
        return tuple(module.cut for module in self.modules if module.cut is not None)

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """What each local loss trains."""
        place = {block.name: index for index, module in enumerate(self.modules) for block in module.blocks}
        return reaches_of(self.method.window, [place[module.ahead[-1]] if module.ahead else index
                                               for index, module in enumerate(self.modules[:-1])])

    @property
    def rank_of(self) -> tuple[int, ...]:
        """The rank that runs each local module; empty for one device."""
        return tuple(rank for rank, size in enumerate(self.ranks) for _ in range(size))

    def __str__(self) -> str:
        lines = [module.headline(index) for index, module in enumerate(self.modules)]
        return "\n".join([f"{self.model}, task {self.task}: {self.k} of {len(self.natural) + 1} local modules", *lines])

    def to_json(self) -> str:
        """The plan as JSON text; ``from_json`` reads it back."""
        return plan_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read ``to_json``'s text. Raises PlanError for text that is not a plan, with what is wrong and where."""
        return plan_from_json(text, cls)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "Plan":
        """Read the plan from a compiled model's state dict, or that of a wrapper around it. Raises PlanError where it
        has none: that of a plain model, or of a single local module."""
        return plan_from_state(state, cls)
