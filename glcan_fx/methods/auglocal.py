"""AugLocal: auxiliary networks of blocks that are sampled evenly from what follows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.auxiliary.features import Feature
from glcan_fx.auxiliary.remainder import Remainder
from glcan_fx.auxiliary.tails import Ending
from glcan_fx.methods.glcan import GLCAN


@dataclass(frozen=True, kw_only=True)
class AugLocal(GLCAN):
    """AugLocal (Ma et al. 2024, arXiv 2402.17318): an auxiliary network keeps ``depth`` of the blocks that follow its
    local module, sampled evenly (section 3.2), with fresh weights, fewer of them the deeper it stands.

    Args:
        depth: blocks that the first auxiliary network keeps, 1 or more. Published: 2 to 9.
        taper: by which part of ``depth`` - 1 the last ones have fewer, 0 to 1. Published: 0.5.

    The published local modules are single blocks (``k="natural"``); its auxiliary networks end with global average
    pooling and a linear layer, these with a copy of the model's own tail. Here blocks that change the shape always
    leave one convolution, and ``depth`` counts those that keep it; ``head`` is "light" where no global average pooling
    ends the network. The published networks merge the last ``depth``
    blocks into one local module: choose split points for that.
    """

    name: ClassVar[str] = "auglocal"

    depth: int = 2
    taper: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(self.depth >= 1, "depth", "a number of blocks, 1 or more")
        self._check(isinstance(self.taper, int | float) and 0 <= self.taper <= 1, "taper", "a part, 0 to 1")

    def choices(self, ending: Ending) -> list[Self]:
        head = self.head or ("full" if ending == "mean" else "light")
        return [replace(self, head=head, width=self.width or 1.0, hidden=self.hidden or 0,
                        stride=self.stride or 1)]

    def predict(self, build: Builder, remainder: Remainder, features: Sequence[Feature]) -> None:
        ends = [unit.end for unit in remainder.structure.units]
        place = ends.index(remainder.end) / max(1, len(ends) - 2) if remainder.end in ends else remainder.depth
        least = 1 - self.taper * min(1.0, place)
        depth = max(1, round(self.depth * least + (1 - least)))
        GLCAN.predict(replace(self, depth=depth), build, remainder, features)
