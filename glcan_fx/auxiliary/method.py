"""What a local-learning method decides: the slots that a file in ``glcan_fx/methods`` fills."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from glcan_fx.auxiliary.builder import Auxiliary, Builder
from glcan_fx.auxiliary.features import Feature, FeatureInfo, Rules
from glcan_fx.auxiliary.remainder import Remainder, check_levels, image_size, remainder_of
from glcan_fx.auxiliary.tails import Ending
from glcan_fx.errors import PlanError
from glcan_fx.structure.structure import Structure, Unit
from glcan_fx.tasks import Task

Head = Literal["full", "light", "lean"]
Predictors = Literal["own", "model"]

OPEN: Any = None
"""Default of an option that the planner chooses."""


METHODS: dict[str, "type[Method]"] = {}
"""Methods by name: all that were defined."""


class Method(ABC):
    """A local-learning method: the slots in which methods differ. What a method leaves out is the default.

    | slot | default |
    |---|---|
    | ``levels``, ``features``: what a local loss reads (the rules Γ) | GLCAN's |
    | ``predict``: the auxiliary network | none: every ``BaseMethod`` has one |
    | ``Builder.terms``, written by ``predict``: loss terms beside the task's | none |
    | ``share``: the weight of the task's loss, by depth | 1 |
    | ``window``: how many local modules a local loss trains | 1, its own |
    | ``ahead``: the number of blocks behind its module through which a local loss passes without training them | 0 |
    | ``Builder.averages``, written by ``predict``: what follows the model's own weights without gradients | nothing |
    | ``patches``: parts a side of the module's output that the auxiliary network reads one after the other | 1 |
    | ``agreement``: the weight with which the gradients on both sides of a cut are to agree | 0 |

    A new method is one file, and a frozen dataclass: a ``BaseMethod``, which has auxiliary networks of its own, or an
    ``Extension`` of another one.
    """

    name: ClassVar[str]

    head: Head
    width: float
    predictors: Predictors
    rules: Rules
    window: int
    ahead: int
    agreement: float = 0.0
    patches: int = 1

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if isinstance(cls.__dict__.get("name"), str):
            METHODS[cls.name] = cls

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

    def share(self, remainder: Remainder) -> float:
        """The weight of the task's loss in the loss of a local module."""
        return 1.0

    @property
    def depends_on_blocks(self) -> bool:
        """Whether auxiliary networks depend on which blocks follow, and not on the trunk's shapes alone."""
        return False

    def description(self, levels: Sequence[int]) -> str:
        """The method in sentences; ``levels``: those of the first local module."""
        return f"Auxiliary networks: {', '.join(self.in_words(levels))}.{self._reach_in_words()}"

    def in_words(self, levels: Sequence[int]) -> list[str]:
        """What the auxiliary networks are."""
        own = [f"head {self.head}", f"width {self.width:g}"]
        return [*own, *["the model's predictors"] * (self.predictors == "model")]

    @property
    def parts(self) -> tuple[str, ...]:
        """What is added to a base's auxiliary networks, in words."""
        return ()

    @property
    def core(self) -> "Method":
        """The method that others were added to: its auxiliary networks are what a planner may choose."""
        return self

    def _reach_in_words(self) -> str:
        window = f" Local losses train windows of {self.window} local modules." if self.window > 1 else ""
        blocks = "the next block" if self.ahead == 1 else f"the next {self.ahead} blocks"
        return window + (f" Local losses are taken behind {blocks}." if self.ahead else "")


@dataclass(frozen=True, kw_only=True)
class BaseMethod(Method):
    """A method that has auxiliary networks of its own.

    Args:
        head: "full" copies neck and head as they are (GLCAN's), "light" without their shape-keeping towers, "lean" with
            one prediction at each position, from the module's own output.
        width: channels relative to the model's, above 0 and at most 1.
        predictors: "own": each auxiliary network has its own last layer. "model": it ends with the model's own last
            layer, on its present weights, detached, so that what is in front of it learns to suit that layer (the
            readout of SOLO, arXiv 2609.35440).
        window: local modules that a local loss trains, its own the last of them; all are alive together. 1: its own
            alone. 2 are the windows of ``HPFF``. No block runs twice for it.
        ahead: blocks of the next local modules that a local loss passes through, read and not trained by it; their
            forward is the one that they run anyway. A local module then learns to suit what follows it.
        rules: which features a local loss reads, and the weights of output levels.

    Raises PlanError for values that are not possible.
    """

    head: Head = OPEN
    width: float = OPEN
    predictors: Predictors = "own"
    window: int = 1
    ahead: int = 0
    rules: Rules = field(default=Rules(), compare=False, repr=False)

    def __post_init__(self) -> None:
        self._check(self.head in (OPEN, "full", "light", "lean"), "head", "choose 'full', 'light' or 'lean'")
        self._check(self.width is OPEN or _is_number(self.width) and 0 < self.width <= 1, "width",
                    "relative channels, above 0 and at most 1")
        self._check(self.predictors in ("own", "model"), "predictors", "choose 'own' or 'model'")
        self._check(is_count(self.window, 1), "window", "a number of local modules, 1 or more")
        self._check(is_count(self.ahead), "ahead", "a number of blocks, 0 or more")
        self._check(isinstance(self.rules, Rules), "rules", "an instance of glcan_fx.Rules")


@dataclass(frozen=True, kw_only=True)
class Extension(Method):
    """A method that adds to another one, its ``base``: an object, or a name. What it does not override is the base's.
    """

    base: Any = "glcan"

    def __post_init__(self) -> None:
        if isinstance(self.base, str) and self.base in METHODS:
            object.__setattr__(self, "base", METHODS[self.base]())
        names = ", ".join(map(repr, METHODS))
        self._check(isinstance(self.base, Method), "base", f"one of {names}, or an object, such as DGL(ahead=1)")

    head = property(lambda self: self.base.head)
    width = property(lambda self: self.base.width)
    predictors = property(lambda self: self.base.predictors)
    rules = property(lambda self: self.base.rules)
    window = property(lambda self: self.base.window)
    ahead = property(lambda self: self.base.ahead)
    agreement = property(lambda self: self.base.agreement)
    patches = property(lambda self: self.base.patches)

    def choices(self, ending: Ending) -> list[Self]:
        return [replace(self, base=base) for base in self.base.choices(ending)]

    def predict(self, build: Builder, remainder: Remainder, features: Sequence[Feature]) -> None:
        self.base.predict(build, remainder, features)

    def levels(self, module: FeatureInfo, levels: Sequence[FeatureInfo]) -> Sequence[int]:
        chosen: Sequence[int] = self.base.levels(module, levels)
        return chosen

    def features(self, remainder: Remainder) -> tuple[Feature, ...]:
        chosen: tuple[Feature, ...] = self.base.features(remainder)
        return chosen

    def share(self, remainder: Remainder) -> float:
        return float(self.base.share(remainder))

    @property
    def depends_on_blocks(self) -> bool:
        return bool(self.base.depends_on_blocks)

    def in_words(self, levels: Sequence[int]) -> list[str]:
        return [*self.base.in_words(levels), self.title]

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.base.parts, self.title)

    @property
    def core(self) -> Method:
        core: Method = self.base.core
        return core

    @property
    def title(self) -> str:
        """What is added, in words."""
        return type(self).__name__


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether an option is a whole number, ``least`` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def remainder_behind(
    structure: Structure, task: Task, unit: Unit, cuts: Sequence[Unit], method: Method,
    planned: tuple[tuple[int, ...], tuple[float, ...]] | None = None,
) -> Remainder:
    """What a method's auxiliary network simplifies, for the local module that ends with ``unit``, one of ``cuts``.
    planned: output levels and their weights that are decided already."""
    return remainder_of(structure, task, unit, cuts, method.levels, method.rules, planned, method.ahead)


def head_request(remainder: Remainder, auxiliary: Auxiliary, method: Method) -> dict[str, Any]:
    """What a task's ``head`` and ``head_cost`` are asked for: the head behind an auxiliary network."""
    structure = remainder.structure
    source = None if remainder.predicts else {key: node.meta["value"] for key, node in remainder.outputs.items()}
    return {"outputs": auxiliary.outputs, "source": source, "levels": remainder.levels, "style": method.head,
            "width": method.width, "image": image_size(structure)}
