"""GLCAN: auxiliary networks that are simplified copies of the remainder of the network (arXiv 2406.00446)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import fx

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.auxiliary.features import Feature, FeatureInfo
from glcan_fx.auxiliary.method import OPEN, BaseMethod, Head, is_count
from glcan_fx.auxiliary.remainder import Remainder
from glcan_fx.auxiliary.stage import hidden_layers
from glcan_fx.auxiliary.tail_copies import copy_tail, predict_directly
from glcan_fx.auxiliary.tails import Ending, direct_layers, is_averaged, is_map
from glcan_fx.auxiliary.trunk import synthesize_taps
from glcan_fx.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class GLCAN(BaseMethod):
    """Global-local collaborative auxiliary networks (arXiv 2406.00446, section 3): simplified copies of what follows
    the local module. Features that earlier modules made are read from the cache (focal ones), those that are still to
    come are made by a shortened trunk (analog ones), and a copy of the model's own neck and head computes its outputs
    of both.

    Options that are left open are chosen by the planner: the richest auxiliary networks that its budgets allow.

    Args:
        hidden: layers (convolution, norm, activation) in front of global average pooling, where the tail begins with
            it (classifiers); on half the size unless ``head`` is "full". 0 for none.
        depth: blocks of the trunk that each auxiliary network keeps, as copies, sampled evenly (AugLocal, arXiv
            2402.17318, section 3.2).
        stride: output levels of smaller strides are left out, where there are others; 1 keeps all.

    ``head``, ``width``, ``predictors``, ``window``, ``ahead`` and ``rules`` are those of every ``BaseMethod``. GLCAN's
    own settings are
    ``GLCAN(head="full", width=1, hidden=0, stride=1)``.
    """

    name: ClassVar[str] = "glcan"

    hidden: int = OPEN
    depth: int = 0
    stride: int = OPEN

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.hidden is OPEN or is_count(self.hidden), "hidden", "a number of layers, 0 or more")
        self._check(is_count(self.depth), "depth", "a number of blocks, 0 or more")
        self._check(self.stride is OPEN or is_count(self.stride, 1), "stride", "input pixels per position, 1 or more")

    def choices(self, ending: Ending) -> list[Self]:
        if self.hidden and ending != "mean":
            raise PlanError(f"GLCAN(hidden={self.hidden}): no global average pooling follows this network's trunk, so "
                            "there are no hidden layers in front of one. Remove it.")
        given = {name: value for name in ("head", "width", "hidden", "stride")
                 if (value := getattr(self, name)) is not OPEN}
        found = [replace(self, **{**choice, **given}) for choice in _CHOICES[ending]]
        if self.predictors == "model" and self.width is OPEN:
            found = [choice for choice in found if choice.width == 1]  # others do not fit the model's last layer
        return list(dict.fromkeys(found))

    def levels(self, module: FeatureInfo, levels: Sequence[FeatureInfo]) -> Sequence[int]:
        chosen = super().levels(module, levels)
        coarse = tuple(index for index in chosen if levels[index].reduction >= self.stride)
        return coarse or chosen[-1:]

    def features(self, remainder: Remainder) -> tuple[Feature, ...]:
        """Where predictions are made from the module's own output: the focal features of its shape alone (the long skip
        of a residual network)."""
        features = super().features(remainder)
        if self._direct(remainder) is None:
            return features
        structure, shape = remainder.structure, remainder.structure.shape(remainder.end)
        alike = {tap.name for tap in structure.taps if is_map(tap.node) and tap.node.op != "placeholder"
                 and structure.shape(tap.node) == shape}
        return tuple(feature for feature in features if feature.source != "synthesised" and feature.tap in alike)

    def predict(self, build: Builder, remainder: Remainder, features: Sequence[Feature]) -> None:
        sources = {feature.tap: feature.source for feature in features}
        taps = build.structure.taps
        own = build.input(remainder.end)
        direct = self._direct(remainder)
        if direct is not None:
            focal = [build.input(tap.node) for tap in taps if tap.name in sources and tap.node is not remainder.end]
            predict_directly(build, remainder.end, own, focal, *direct)
            return

        missing, learning = [], []
        for tap in taps:
            if tap.node not in remainder.tail.taps:
                continue
            to_come = "synthesised" if remainder.maker(tap) > remainder.index else "cache"  # read for its size alone
            source = sources.get(tap.name, to_come)
            if source == "synthesised":
                missing.append(tap.node)
            else:
                build.input(tap.node)
            if source != "cache":
                learning.append(tap.node)

        synthesize_taps(build, remainder.end, own, missing, self.width, self.depth, self.head == "lean",
                        remainder.predicts)
        for node in learning:
            first = build.structure.together(node)[0] is node
            if self.hidden and first and is_averaged(build.structure, node, remainder.tail):
                with build.each_stream(node):
                    build.values[node] = hidden_layers(
                        build, node, build.values[node], self.hidden, self.head != "full")
        copy_tail(build, remainder.tail, self.head != "full")

    def in_words(self, levels: Sequence[int]) -> list[str]:
        parts = [f"head {self.head}", f"width {self.width:g}"]
        parts += [f"{self.depth} blocks"] * bool(self.depth)
        parts += [f"{self.hidden} hidden layer{'s' * (self.hidden > 1)}"] * bool(self.hidden)
        parts += [f"levels of stride {self.stride} and more"] * (self.stride > 1 and bool(levels))
        return [*parts, *["the model's predictors"] * (self.predictors == "model")]

    @property
    def depends_on_blocks(self) -> bool:
        return self.depth > 0

    def _direct(self, remainder: Remainder) -> tuple[list[fx.Node], list[fx.Node]] | None:
        """The layers that make the network's maps, and what follows them, where a lean head stands for them."""
        if self.head != "lean" or not remainder.predicts or len(remainder.structure.together(remainder.end)) > 1:
            return None
        return direct_layers(remainder.structure, remainder.end, remainder.tail)


def _choice(head: Head, width: float = 1.0, hidden: int = 0, stride: int = 1) -> dict[str, Head | float | int]:
    return {"head": head, "width": width, "hidden": hidden, "stride": stride}


# From the richest to the leanest, by measured accuracy (docs/results.md). In front of global average pooling, depth
# pays more than dense layers do; a decoder is worth having however narrow; elsewhere a narrower network costs less than
# fewer predictions or fewer levels.
_CHOICES: dict[Ending, Sequence[dict[str, Head | float | int]]] = {
    "mean": (
        _choice("full", hidden=4), _choice("full", hidden=3), _choice("light", hidden=4), _choice("light", hidden=3),
        _choice("lean", hidden=4), _choice("lean", hidden=3), _choice("lean", hidden=2),
        _choice("lean", 0.5, hidden=3), _choice("lean", 0.5, hidden=2),
        _choice("lean", 0.25, hidden=3), _choice("lean", 0.25, hidden=2),
        _choice("light"), _choice("lean"), _choice("lean", 0.5), _choice("lean", 0.25), _choice("lean", 0.125),
    ),
    "decoder": (
        _choice("light"), _choice("light", 0.5), _choice("light", 0.25), _choice("light", 0.125),
        _choice("lean", 0.25),
    ),
    "maps": (
        _choice("light"), _choice("light", 0.5), _choice("light", 0.25), _choice("lean", 0.25),
        _choice("lean", 0.25, stride=16), _choice("lean", 0.125, stride=16), _choice("lean", 0.125, stride=32),
    ),
}
