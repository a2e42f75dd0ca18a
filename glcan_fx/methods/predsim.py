"""PredSim: local losses that also compare how alike samples are with how alike their classes are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from glcan_fx.auxiliary.builder import Builder, Term
from glcan_fx.auxiliary.features import Feature
from glcan_fx.auxiliary.method import Extension
from glcan_fx.auxiliary.remainder import Remainder
from glcan_fx.errors import CriterionError, PlanError
from glcan_fx.layers import KINDS
from glcan_fx.structure.nodes import tensor_of


@dataclass(frozen=True, kw_only=True)
class PredSim(Extension):
    """Similarity matching (Nøkland and Eidnes 2019, arXiv 1901.06656): the cosine similarities between
    the samples of a batch, by the local module's output behind one convolution, are to be those of their classes.

    Args:
        base: the method whose auxiliary networks compute the task's loss.
        beta: weight of the similarity loss, 0 to 1; the task's loss has 1 - beta. Published: 0.99.

    For classification. The published classifier is one linear layer on a pooled map, and every layer is a local module;
    the last local module's loss has the weight 1 here, 1 - beta there.
    """

    name: ClassVar[str] = "predsim"
    title: ClassVar[str] = "PredSim: similarities"

    beta: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(isinstance(self.beta, int | float) and 0 < self.beta <= 1, "beta",
                    "a weight, above 0 and at most 1")

    def share(self, remainder: Remainder) -> float:
        return super().share(remainder) * (1 - self.beta)

    def predict(self, build: Builder, remainder: Remainder, features: Sequence[Feature]) -> None:
        structure, end = remainder.structure, remainder.end
        outputs = structure.trace.output.all_input_nodes
        if len(outputs) != 1 or len(structure.shape(outputs[0])) != 2 or not remainder.predicts:
            raise PlanError("PredSim compares samples by their classes: it is for models that return logits (N, C), "
                            "one row for each sample. Choose another method.")
        own = build.input(end)
        super().predict(build, remainder, features)
        channels, rank = structure.channels(end), len(structure.spatial(end))
        dtype = tensor_of(end).dtype
        with build.making():
            layer: nn.Module = nn.Linear(channels, channels, bias=False, dtype=dtype)
            if rank and end not in structure.channels_last:
                layer = KINDS[rank].conv(channels, channels, 3, padding=1, bias=False, dtype=dtype)
        build.full.add("similar")
        build.terms["similarity"] = (
            Term(Similarity(structure.shape(outputs[0])[1], end in structure.channels_last), self.beta),
            build.add("similar", layer, own))


class Similarity(nn.Module):
    """(features, class ids (N,) or probabilities (N, C)) -> the mean squared difference of cosine similarities."""

    def __init__(self, classes: int, channels_last: bool) -> None:
        super().__init__()
        self.classes, self.channels_last = classes, channels_last

    def forward(self, features: Tensor, *context: Any) -> Tensor:
        target = context[0] if context else None
        if not isinstance(target, Tensor) or target.dim() not in (1, 2) or target.shape[0] != features.shape[0]:
            raise CriterionError("PredSim needs targets that say each sample's class: ids (N,), or probabilities "
                                 "(N, C).")
        if target.dim() == 1:
            known = (target >= 0) & (target < self.classes)  # ignored ones are of no class
            target = F.one_hot(target.long().clamp(0, self.classes - 1), self.classes) * known[:, None]
        if features.dim() > 2:
            axes = list(range(1, features.dim() - 1)) if self.channels_last else list(range(2, features.dim()))
            features = features.float().std(axes)
        return F.mse_loss(_similarities(features), _similarities(target))


def _similarities(values: Tensor) -> Tensor:
    values = values.float()
    values = F.normalize(values - values.mean(1, keepdim=True), dim=1)
    return values @ values.T
