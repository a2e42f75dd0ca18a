"""What a local-learning method decides: the slots that a file in ``glcan_fx/methods`` fills."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from glcan_fx.auxiliary.builder import Auxiliary, Builder
from glcan_fx.auxiliary.features import Feature, FeatureInfo, Rules
from glcan_fx.auxiliary.remainder import Remainder, check_levels, image_size
from glcan_fx.auxiliary.tails import Ending
from glcan_fx.errors import PlanError

Head = Literal["full", "light", "lean"]
Predictors = Literal["own", "model"]

OPEN: Any = None
"""Default of an option that the planner chooses."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A local-learning method: a frozen dataclass of its options, and the slots in which it differs from others.

    A new method is one file: a subclass that overrides ``predict`` (the auxiliary network) and, where it needs to,
    ``features`` and ``levels`` (what the local loss reads) and ``choices`` (values for options that are left open).

    Args:
        head: "full" copies neck and head as they are (GLCAN's), "light" without their shape-keeping towers, "lean" with
            one prediction at each position, from the module's own output.
        width: channels relative to the model's, above 0 and at most 1.
        predictors: "own": each auxiliary network has its own last layer. "model": it ends with the model's own last
            layer, on its present weights, detached, so that what is in front of it learns to suit that layer (the
            readout of SOLO, arXiv 2609.35440).
        rules: which features a local loss reads, and the weights of output levels.

    Raises PlanError for values that are not possible.
    """

    name: ClassVar[str]

    head: Head = OPEN
    width: float = OPEN
    predictors: Predictors = "own"
    rules: Rules = field(default=Rules(), compare=False, repr=False)

    def __post_init__(self) -> None:
        self._check(self.head in (OPEN, "full", "light", "lean"), "head", "choose 'full', 'light' or 'lean'")
        self._check(self.width is OPEN or _is_number(self.width) and 0 < self.width <= 1, "width",
                    "relative channels, above 0 and at most 1")
        self._check(self.predictors in ("own", "model"), "predictors", "choose 'own' or 'model'")
        self._check(isinstance(self.rules, Rules), "rules", "an instance of glcan_fx.Rules")

    def _check(self, right: bool, option: str, expected: str) -> None:
        if not right:
            raise PlanError(f"{type(self).__name__}({option}={getattr(self, option)!r}): {expected}")

    @abstractmethod
    def choices(self, ending: Ending) -> list[Self]:
        """The method with values for what is left open: all that the planner may choose from, the richest first."""

    @abstractmethod
    def predict(self, build: Builder, remainder: Remainder, features: Sequence[Feature]) -> None:
        """Write an auxiliary network: set ``build.values`` of the nodes of ``remainder.outputs``, from
        ``build.input(remainder.end)``, the module's output, and other taps. Raises PlanError
        where that is impossible."""

    def levels(self, module: FeatureInfo, levels: Sequence[FeatureInfo]) -> Sequence[int]:
        """Indices of the output levels that the local loss of a module is computed on."""
        chosen = tuple(self.rules.levels(module, levels))
        check_levels(chosen, module, levels)
        return chosen

    def features(self, remainder: Remainder) -> tuple[Feature, ...]:
        """The taps that the auxiliary network reads, or makes."""
        return remainder.selected(self.rules)

    def description(self, levels: Sequence[int]) -> str:
        """The auxiliary networks in a sentence; ``levels``: those of the first local module."""
        predictors = ", the model's predictors" if self.predictors == "model" else ""
        return f"Auxiliary networks: head {self.head}, width {self.width:g}{predictors}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether an option is a whole number, ``least`` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def head_request(remainder: Remainder, auxiliary: Auxiliary, method: Method) -> dict[str, Any]:
    """What a task's ``head`` and ``head_cost`` are asked for: the head behind an auxiliary network."""
    structure = remainder.structure
    source = None if remainder.predicts else {key: node.meta["value"] for key, node in remainder.outputs.items()}
    return {"outputs": auxiliary.outputs, "source": source, "levels": remainder.levels, "style": method.head,
            "width": method.width, "image": image_size(structure)}
