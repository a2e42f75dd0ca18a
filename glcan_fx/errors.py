"""Errors and warnings: every message says what happened, where (module path) and what to do."""

from collections.abc import Callable


class GlcanFxError(Exception):
    """Base class of every error that glcan_fx raises on purpose."""


class TraceError(GlcanFxError):
    """The model, or the sub-module that the task compiles, cannot be captured as a graph.

    ``reason`` is the cause in short; ``replayable`` says whether the model's own forward may run as Python instead,
    more than once a step; ``reached()`` runs it once more on fake tensors and returns what it called until it failed,
    as lines (module path, class, sizes of the result).
    """

    def __init__(
        self, message: str, reason: str = "", *, replayable: bool = True,
        reached: Callable[[], list[tuple[str, str, str]]] = list,
    ) -> None:
        super().__init__(message)
        self.replayable = replayable
        self.reached = reached
        self.reason = reason or message.splitlines()[0]


class PlanError(GlcanFxError):
    """The model cannot be planned as asked: unknown task, k out of range, unknown split point, …"""


class BudgetError(PlanError):
    """No plan that was found keeps the memory, or the compute, that a training step may take."""


class TargetError(GlcanFxError):
    """A training step got no targets, or targets of the wrong form."""


class LoadError(GlcanFxError):
    """What a command line names is not a model, or a file does not hold what belongs to this one."""


class CriterionError(GlcanFxError):
    """A criterion returned something that is not a scalar loss, or is not a function of outputs and targets."""


class UnsupportedError(GlcanFxError):
    """The training set-up cannot work with local gradients (second-order gradients, sharded sub-modules)."""


class ModelChangedError(GlcanFxError):
    """Something that the compiled training step took for granted has changed since the model was compiled."""


class RankError(GlcanFxError):
    """Another process of a distributed run has ended, or does not answer."""


class NotLearningError(GlcanFxError):
    """A local module, or its auxiliary network, gets no gradients, or none that are finite."""


class ModelChangedWarning(UserWarning):
    """A layer of the model's head was replaced, and auxiliary networks still predict what the old one did."""


class SmallExampleWarning(UserWarning):
    """A training step is much larger than the example inputs that its plan was made for."""


class InputGradientWarning(UserWarning):
    """An input requires a gradient, and gets that of the first local loss, which is not backpropagation's."""


class UnusedGradientsWarning(UserWarning):
    """Gradients are computed for nothing: part of the last step's local losses never reached ``backward()``, or the
    optimizer steps no auxiliary network."""


class StatefulCriterionWarning(UserWarning):
    """A criterion keeps state that moves when it is called, and is called once for each local loss of a step."""
