"""Losses for dense classification by sigmoids, from class ids: no one-hot targets, no temporaries of the logits' size.

A detector's class logits are among its largest tensors, and the textbook focal loss keeps eight of that size for
backward. Here autograd keeps the logits and the ids; both passes compute what they need, a piece at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glcan_fx.errors import UnsupportedError

BACKGROUND = -1  # all targets of the row are 0
IGNORED = -2  # the row contributes nothing

_CHUNK = 2**22  # elements a piece: enough to fill a GPU, 16 MiB a temporary


def focal_loss(
    logits: Tensor, classes: Tensor, *, weight: Tensor | None = None, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Sigmoid focal loss, weighted and summed over all rows and classes (Lin et al. 2017, arXiv 1708.02002, section 3).

    logits: (..., C), any float dtype. classes: (...), int64, each row's positive class in [0, C), ``BACKGROUND`` or
    ``IGNORED``. weight: broadcastable to ``classes``, for example (B, 1), one weight per image; gets no gradient.
    alpha: weight of positives, 1 - alpha that of the rest; negative for none. gamma: focusing; with 0 and no alpha
    this is binary cross entropy. Returns a scalar, float32 for half-precision logits, which are computed in float32.

    Equals ``torchvision.ops.sigmoid_focal_loss`` on one-hot targets. Raises ValueError for shapes that do not fit and
    for alpha or gamma out of range, UnsupportedError in a backward with create_graph=True; ids of C and above raise
    the device's own indexing error.
    """
    if logits.dim() == 0 or logits.shape[-1] == 0 or logits.shape[:-1] != classes.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and classes {tuple(classes.shape)} do not fit: expected "
                         "(..., C) with C > 0 and (...)")
    if alpha > 1 or gamma < 0:
        raise ValueError(f"alpha={alpha}, gamma={gamma}: expected alpha <= 1 and gamma >= 0")
    if weight is not None:
        try:
            weight.expand(classes.shape)
        except RuntimeError:
            message = f"weight {tuple(weight.shape)} does not broadcast to classes {tuple(classes.shape)}"
            raise ValueError(message) from None
    loss: Tensor = _FocalLoss.apply(logits, classes, weight, alpha, gamma)
    return loss


class _FocalLoss(torch.autograd.Function):
    """Background costs f(x) = sigmoid(x)^gamma softplus(x); a positive of logit x costs what background of -x does.

    Hence the positives' signs are turned, f or f' is taken of everything, and the positives get their own factors.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, classes: Tensor, weight: Tensor | None, alpha: float, gamma: float
    ) -> Tensor:
        ctx.save_for_backward(logits, classes, weight)
        ctx.alpha, ctx.gamma = alpha, gamma
        sums = []
        for x, ids, factor in _pieces(logits, classes, _factors(logits, classes, weight)):
            sums.append(_weighted(_cost(_turned(x, ids), gamma), ids, factor, alpha, 1).sum())
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():  # once_differentiable would return a constant without a word
            raise UnsupportedError("focal_loss has no second derivatives: backward(create_graph=True) needs "
                                   "torchvision.ops.sigmoid_focal_loss")
        logits, classes, weight = ctx.saved_tensors
        result = torch.empty_like(logits)
        for x, ids, factor, out in _pieces(logits, classes, _factors(logits, classes, weight), result):
            out.copy_(_weighted(_slope(_turned(x, ids), ctx.gamma), ids, factor * grads[0], ctx.alpha, -1))
        return result, None, None, None, None


def _factors(logits: Tensor, classes: Tensor, weight: Tensor | None) -> Tensor:
    """Each row's weight, in the dtype to compute in, expanded without a copy."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    factors = torch.ones((), dtype=dtype, device=logits.device) if weight is None else weight.to(dtype)
    return factors.expand(classes.shape)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the same rows of each tensor, logits first, by halving the longest dimension.

    Flattening the rows instead would copy logits that are not contiguous.
    """
    rows = tensors[0].shape[:-1]
    if tensors[0].numel() <= _CHUNK or max(rows, default=1) == 1:
        yield tensors
        return
    longest = max(range(len(rows)), key=rows.__getitem__)
    for half in zip(*(tensor.tensor_split(2, longest) for tensor in tensors), strict=True):
        yield from _pieces(*half)


def _turned(logits: Tensor, ids: Tensor) -> Tensor:
    """A copy to compute in, positives negated; ignored rows 0, since not even a weight of 0 silences an infinity."""
    x = logits.masked_fill((ids == IGNORED)[..., None], 0)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    index = ids.clamp(min=0)[..., None]  # rows without a positive put back what they took
    chosen = x.gather(-1, index)
    return x.scatter_(-1, index, torch.where((ids >= 0)[..., None], -chosen, chosen))


def _cost(x: Tensor, gamma: float) -> Tensor:
    """f, in place."""
    softplus = F.softplus(x, threshold=40)  # the default, 20, costs float64 its last digits
    return x.sigmoid_().pow_(gamma).mul_(softplus)


def _slope(x: Tensor, gamma: float) -> Tensor:
    """f' = p^gamma (gamma (1 - p) softplus + p), p the sigmoid; destroys x."""
    softplus = F.softplus(x, threshold=40)
    p = x.sigmoid_()
    slope = softplus.neg().exp_().mul_(softplus).mul_(gamma)  # exp(-softplus) is 1 - p without cancellation
    return slope.add_(p).mul_(p.pow_(gamma))


def _weighted(values: Tensor, ids: Tensor, factor: Tensor, alpha: float, sign: int) -> Tensor:
    """Multiply by row and alpha weights, in place; sign: of the positives."""
    factor = (factor * (ids != IGNORED))[..., None]
    positive, background = (factor * (sign * alpha), factor * (1 - alpha)) if alpha >= 0 else (factor * sign, factor)
    index = ids.clamp(min=0)[..., None]
    chosen = values.gather(-1, index) * torch.where((ids >= 0)[..., None], positive, background)
    return values.mul_(background).scatter_(-1, index, chosen)
