"""Features: which taps a local loss is computed from, and where it takes them from (GLCAN section 3, eq. 4, 7, 8)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Source = Literal["cache", "own", "synthesised"]
State = Literal["past", "own", "future"]


@dataclass(frozen=True)
class FeatureInfo:
    """A feature map as the rules see it: the module that it is named by, its reduction (input size over its size; 0
    where it has no spatial size), and its number of channels."""

    module: str
    reduction: int
    num_chs: int


@dataclass(frozen=True)
class Feature:
    """One member of V_m: a tap, and where the local loss of module m takes it from.

    "cache": a focal feature P, produced by an earlier module and read, detached, from the feature cache;
    "own": produced inside this module, gradients flow; "synthesised": an analog feature S, made by the auxiliary
    network from the module's output.
    """

    tap: str
    source: Source


@dataclass(frozen=True)
class Rules:
    """The selection rules Γ: subclass them, and pass an instance as ``GLCAN(rules=...)``.

    The defaults hold for every task: a tap that an earlier module produced is read from the cache, one that this
    module produced is used directly, one that is still to come is synthesised, so that n = all levels and o = those
    already seen (eq. 4). For detection that is a local feature pyramid at every depth; for super-resolution the focal
    feature is whatever the long skip carries; for classification V_m is the one synthesised (or own) last map.

    own_level: the weight sigma_j of the level whose reduction is the module's own (eq. 8; the paper amplifies it but
        gives no value, 1 keeps the detector's own balance).
    """

    own_level: float = 1.0

    def source(self, tap: FeatureInfo, module: FeatureInfo, state: State) -> Source:
        """Where module m takes a tap from, given when it is produced relative to m. The future cannot be cached."""
        return "cache" if state == "past" else "own" if state == "own" else "synthesised"

    def levels(self, module: FeatureInfo, levels: Sequence[FeatureInfo]) -> Sequence[int]:
        """Indices of the network's output levels that the local loss of this module is computed on: all."""
        return range(len(levels))

    def sigma(self, module: FeatureInfo, level: FeatureInfo) -> float:
        """Weight sigma_j of a level in this module's gradient (eq. 8)."""
        return self.own_level if level.reduction == module.reduction else 1.0
