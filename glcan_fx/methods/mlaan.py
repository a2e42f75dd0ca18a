"""MLAAN: windows of local modules, and auxiliary networks that leap over blocks behind an averaged first one."""

from dataclasses import dataclass
from typing import Any, ClassVar

from glcan_fx.auxiliary.method import is_count
from glcan_fx.methods.auglocal import AugLocal
from glcan_fx.methods.man import MAN


@dataclass(frozen=True, kw_only=True)
class MLAAN(MAN):
    """Multilaminar leap augmented auxiliary networks (Zhang et al. 2025, arXiv 2406.16633): local losses train windows
    of local modules; an auxiliary network is a chain of copies of later blocks, the first of them once
    learned and once an average of the model's own weights.

    Args:
        base: the rest of the chain: by default three blocks that are sampled evenly. (The published lists are by hand.)
        window: local modules that a local loss trains, 2 or more. Published: 2 and 3.

    ``momentum`` and ``scaled`` are those of ``MAN``. (In the authors' code one average of fourteen moves, the last.)
    """

    name: ClassVar[str] = "mlaan"
    title: ClassVar[str] = "MLAAN: next block, learned + averaged"

    base: Any = AugLocal(depth=3)
    scaled: bool = False
    window: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(is_count(self.window, 2), "window", "a number of local modules, 2 or more")
