"""What a training step warns of, once: that its example was small, its head replaced, a loss not minimised."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glcan_fx.errors import InputGradientWarning, ModelChangedWarning, SmallExampleWarning, UnusedGradientsWarning
from glcan_fx.pytree import tensors_in
from glcan_fx.step.local_loss import LocalLoss
from glcan_fx.step.output import LocalOutput, shape_of

if TYPE_CHECKING:
    from glcan_fx.plans.plan import Plan

_MUCH = 4  # times the values of the example


def compare_sizes(plan: "Plan", first: Any) -> None:
    """Warn of a step much larger than the plan's example, which the choice of k and auxiliary networks rests on."""
    spec = next((leaf for leaf in tree_leaves(plan.inputs) if hasattr(leaf, "shape")), None)
    if spec is None or not spec.shape or not isinstance(first, Tensor | list | tuple):
        return
    if isinstance(first, Tensor) and first.dim() == 0:
        return
    planned, now = spec.shape[0], len(first)
    if isinstance(first, Tensor) and not plan.network and plan.around is None:
        planned, now = math.prod(spec.shape), first.numel()
    if now > _MUCH * planned:
        size = "x".join(map(str, first.shape)) if isinstance(first, Tensor) else f"{len(first)} images"
        warnings.warn(
            f"this training step ({size}) is {now / planned:.0f} times as large as the example that it was planned "
            f"for ({'x'.join(map(str, spec.shape))}): k and auxiliary networks suit the smaller one, and so does "
            "its memory. Give plan() or transform() example_inputs as large as your batches.",
            SmallExampleWarning, stacklevel=4)


def compare_shapes(plan: "Plan", aux: nn.Module, result: Any) -> None:
    """Warn, once, where the model returns other shapes than its auxiliary networks: a layer of its head was
    replaced."""
    if not isinstance(result, LocalOutput):
        return
    now = shape_of(result.output)
    for part in aux.children():
        made = part.__dict__.get("made")
        if isinstance(part, LocalLoss) and part.agrees and made is not None and made != now:
            part.agrees = False
            warnings.warn(
                f"{plan.model} returns {now} for each image, but auxiliary networks predict {made}, as it did "
                "when it was compiled: a layer of its head was replaced. Compile it again, so that local losses "
                "are those of the new head: glcan_fx.transform(local.original, ...).",
                ModelChangedWarning, stacklevel=4)
            return


def warn_of_input_gradients(plan: "Plan", given: Mapping[str, Any], inputs: Iterable[str]) -> bool:
    """Warn of an input that requires a gradient, of which it gets a part: no gradient crosses a cut. Whether that was
    said."""
    asked = [name for name in inputs if any(tensor.requires_grad for tensor in tensors_in(given.get(name)))]
    if asked and plan.k > 1:
        warnings.warn(
            f"'{asked[0]}' requires a gradient, and with {plan.k} local modules it gets that of the first local loss, "
            "not backpropagation's. Where it decides (adversarial images, a generator in front of this model) train "
            "with k=1, or call local.original; else detach the input.", InputGradientWarning, stacklevel=4)
    return bool(asked)


def warn_of_unused(reached: Mapping[str, list[bool]]) -> None:
    """Warn, before its gradients are lost, of a step in which only a part of the losses was minimised.

    reached: of each local module whether its loss reached backward(); nothing where there was no step.
    """
    flags = {name: step[0] for name, step in reached.items() if step}
    if any(flags.values()) and not all(flags.values()):
        missed = ", ".join(f"'{name}'" for name, flag in flags.items() if not flag)
        warnings.warn(
            f"only {sum(flags.values())} of {len(flags)} local losses of the last step reached backward(): the "
            f"local modules {missed} were not trained. Minimise the sum: out.loss, or sum(losses.values()) of a "
            "detector.",
            UnusedGradientsWarning, stacklevel=4,
        )
