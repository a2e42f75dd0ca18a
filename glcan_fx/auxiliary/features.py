"""Pass 4, select: the rules Γ decide from which features each local loss is computed (GLCAN section 3, eq. 4, 7)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Source = Literal["cache", "own", "synthesised"]
State = Literal["past", "own", "future"]


@dataclass(frozen=True)
class Place:
    """A value as the rules see it. ``stride``: input size over its size; 0 where it has no places."""

    name: str
    stride: int
    channels: int


@dataclass(frozen=True)
class Feature:
    """One member of V_m: a tap and where the local loss of module m takes it from.

    "cache": a focal feature P, produced by an earlier module and read, detached, from the feature cache;
    "own": produced inside this module, gradient flows; "synthesised": an analog feature S, made by the auxiliary
    network from the module's output.
    """

    tap: str
    source: Source


@dataclass(frozen=True)
class Rules:
    """The selection rules Γ. Replace what you need by a subclass; pass an instance as ``rules=``.

    The defaults hold for every task: a tap that an earlier module produced is read from the cache, one that this
    module produced is used directly, one that is still to come is synthesised, so that n = all levels and o = those
    already seen (eq. 4). For detection that is a local feature pyramid at every depth; for super-resolution the focal
    feature is whatever the long skip carries; for classification V_m is the one synthesised (or own) last map.

    own_level: the weight sigma_j of the level whose stride is the module's own (eq. 8; the paper amplifies it but
        gives no value, 1 keeps the detector's own balance).
    """

    own_level: float = 1.0

    def source(self, tap: Place, module: Place, state: State) -> Source:
        """Where module m takes a tap from, given when it is produced relative to m. The future cannot be cached."""
        return "cache" if state == "past" else "own" if state == "own" else "synthesised"

    def levels(self, module: Place, levels: Sequence[Place]) -> Sequence[int]:
        """Indices of the network's output levels that the local loss of this module is computed on: all."""
        return range(len(levels))

    def sigma(self, module: Place, level: Place) -> float:
        """Weight sigma_j of a level in this module's gradient (eq. 8)."""
        return self.own_level if level.stride == module.stride else 1.0
