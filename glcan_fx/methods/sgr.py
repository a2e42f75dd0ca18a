"""SGR: local losses whose gradients agree on both sides of a cut."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from glcan_fx.auxiliary.builder import Builder
from glcan_fx.auxiliary.features import Feature
from glcan_fx.auxiliary.method import Extension
from glcan_fx.auxiliary.remainder import Remainder
from glcan_fx.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class SGR(Extension):
    """Successive gradient reconciliation (arXiv 2406.05222): the gradient of a local loss at what its module is given
    is to be that of the loss before, at the same cut: their squared distance, relative to their lengths, is a term of
    the loss. No gradient crosses the cut. It takes a second derivative, which all layers of the model have to have
    (attention is computed by single operations meanwhile, in the whole process), and keeps one more gradient of a cut.

    Args:
        base: the method whose auxiliary networks compute the loss.
        agreement: weight of the term. (The published one is not known.)

    Not for detectors, whose losses have no second derivative.
    """

    name: ClassVar[str] = "sgr"
    title: ClassVar[str] = "SGR: gradients agree at cuts"

    agreement: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(isinstance(self.agreement, int | float) and self.agreement > 0, "agreement", "a number above 0")
        self._check(self.window == 1 and not self.ahead, "base", "a method without window and ahead, whose losses "
                    "stay in their own modules")

    def predict(self, build: Builder, remainder: Remainder, features: Sequence[Feature]) -> None:
        if not remainder.predicts:
            raise PlanError("SGR needs second derivatives, which a detector's losses do not have: choose another "
                            "method.")
        super().predict(build, remainder, features)
