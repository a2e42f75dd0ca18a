"""HPFF: local losses that train windows of two local modules, on parts of the map one after the other."""

from dataclasses import dataclass
from typing import ClassVar

from glcan_fx.auxiliary.method import Extension, is_count


@dataclass(frozen=True, kw_only=True)
class HPFF(Extension):
    """Hierarchical locally supervised learning with patch feature fusion (Su et al. 2024, arXiv 2407.05638): each local
    loss trains a window of two local modules, and auxiliary networks read the module's output in
    ``patches`` x ``patches`` parts, each differentiated before the next one is run.

    Args:
        base: the method whose auxiliary networks compute the loss.
        window: local modules that a local loss trains, 2 or more.
        patches: parts a side, 1 for the whole map. Where a network predicts maps, or reads more than its module's
            output, it reads the whole, as it does where its layers take one size only.

    The published cascade runs every block three times, moves its batch statistics as often, and gives an interior
    module a loss of its own with the weight 0.001 beside the window's 0.999, by a classifier of its own. Here every
    block runs once, and the window's auxiliary network is its last module's own. (The authors' code keeps the graphs of
    all patches until one backward pass, and averages their losses, not their outputs; here losses are averaged.)
    """

    name: ClassVar[str] = "hpff"

    window: int = 2
    patches: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(is_count(self.window, 2), "window", "a number of local modules, 2 or more")
        self._check(is_count(self.patches, 1), "patches", "a number of parts a side, 1 or more")

    @property
    def title(self) -> str:
        return f"HPFF: in {self.patches} x {self.patches} parts" if self.patches > 1 else "HPFF: windows"
