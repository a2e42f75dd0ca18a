"""The end of the last local module in slices of the batch."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from glcan_fx.errors import UnsupportedError
from glcan_fx.pytree import map_tensors, tensors_in

if TYPE_CHECKING:
    pass
from glcan_fx.step.gradients import HandOver, differentiate, parameters_of
from glcan_fx.step.output import detach, total
from glcan_fx.step.parts import OfModel


class SlicedHead(OfModel):
    """(values, *context) -> (loss, outputs): the end of the last module, run and differentiated slice by slice.

    For what treats every image alone and averages its losses: the gradients are those of the whole batch, and only a
    slice's activations are alive at a time. ``tail`` (*values) -> outputs is what follows the values in the network,
    ``head`` (outputs, *context) -> loss; ``part`` takes images from a context. behind: paths of the ``model``'s modules
    and parameters that both use; trains: what the loss itself trains, as for ``LocalBackward``. The first steps
    compare the loss of some images together with that of each alone.
    """

    def __init__(
        self, tail: Callable[..., Any] | None, head: nn.Module, slices: int,
        part: Callable[[Any, int, int, int], Any], model: nn.Module, behind: Sequence[str],
        trains: Sequence[tuple[nn.Module, str]], scale: nn.Module,
    ) -> None:
        super().__init__()
        self.slices = slices
        self.checks = 5  # steps that are still to be checked
        self.__dict__.update(tail=tail, head=head, part=part, model=model, behind=tuple(behind), trains=tuple(trains),
                             scaler=scale)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, values: Any, *context: Any) -> Any:
        images = max((t.shape[0] for t in tensors_in(values) if t.dim() > 1), default=1)
        if self.checks and len(self._bounds(images)) > 1:
            self._check(values, context, images)
        given = [t for t in tensors_in(values) if t.requires_grad]
        behind = [(self.__dict__["model"], path) for path in self.__dict__["behind"]]
        trained = {id(p): p for p in parameters_of([*behind, *self.__dict__["trains"]]) if p.requires_grad}
        sources = [*given, *trained.values()] if torch.is_grad_enabled() else []
        stashes: dict[str, list[Tensor | None]] = {}
        losses: dict[str, Tensor] = {}
        outputs = []
        single = True
        for start, stop in self._bounds(images):
            piece = _fresh(self._slice(values, start, stop, images))
            with torch.enable_grad() if sources else nullcontext():
                loss, out = self._run(piece, self._slice(context, start, stop, images))
            single = not isinstance(loss, dict)
            terms = {"": total(loss)} if single else {key: total(term) for key, term in loss.items()}
            outputs.append(detach(out))
            own = [t for t in tensors_in(piece) if t.requires_grad]
            share = (stop - start) / images
            for index, (name, term) in enumerate(terms.items()):
                losses[name] = losses.get(name, 0) + term.detach() * share
                if sources and term.requires_grad:
                    stash = stashes.setdefault(name, [None] * len(sources))
                    self._add(stash, term * share, own, given, list(trained.values()), start, stop,
                              index < len(terms) - 1)
        made = {name: HandOver.apply(value, stashes[name], [], None, *sources) if name in stashes else value
                for name, value in losses.items()}
        return made[""] if single else made, _joined(outputs)

    def _run(self, values: Any, context: Any) -> tuple[Any, Any]:
        tail, head = self.__dict__["tail"], self.__dict__["head"]
        outputs = values if tail is None else tail(*values)
        return head(outputs, *context), outputs

    def _bounds(self, images: int) -> list[tuple[int, int]]:
        size = -(-images // min(self.slices, images))
        return [(start, min(start + size, images)) for start in range(0, images, size)]

    def _slice(self, value: Any, start: int, stop: int, images: int) -> Any:
        return self.__dict__["part"](value, start, stop, images)

    def _add(
        self, stash: list[Tensor | None], loss: Tensor, own: Sequence[Tensor], given: Sequence[Tensor],
        trained: Sequence[Tensor], start: int, stop: int, retain: bool,
    ) -> None:
        """Differentiate a slice's loss and add to the stash: rows of the values' gradients, the parameters'."""
        # features are half themselves under float16: their gradients would vanish without the scale
        grads = differentiate(loss, [*own, *trained], self.__dict__["scaler"], retain=retain, widen=True)
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            if index >= len(given):
                before = stash[index]
                stash[index] = grad if before is None else before.add_(grad)
                continue
            whole = stash[index]
            if whole is None:
                whole = stash[index] = grad.new_zeros(given[index].shape)
            if whole.shape == grad.shape:
                whole.add_(grad)
            else:
                whole[start:stop].copy_(grad)

    @torch.no_grad()
    def _check(self, values: Any, context: Any, images: int) -> None:
        """Raise UnsupportedError unless the loss of a batch is the mean of its images' losses."""
        self.checks -= 1
        modules = dict(self.__dict__["model"].named_modules())
        layers = [part for path in self.__dict__["behind"] if path in modules for part in modules[path].modules()]
        random = [(part, part.training) for part in layers if isinstance(part, nn.modules.dropout._DropoutNd)]
        statistics = next((part for part in layers if part.training and "running_mean" in part._buffers), None)
        if statistics is not None:
            raise UnsupportedError(f"slices={self.slices}: behind the last block stands a {type(statistics).__name__}, "
                                   "whose statistics are those of the whole batch. Use slices=1.")
        start, stop = self._bounds(images)[0]
        some = min(images, max(2, stop - start))  # no more than a slice, so that the check needs no more than a step

        def loss(first: int, last: int) -> Tensor:
            return total(self._run(self._slice(values, first, last, images),
                                   self._slice(context, first, last, images))[0])

        for part, _ in random:
            part.training = False
        try:
            whole, alone = loss(0, some), torch.stack([loss(index, index + 1) for index in range(some)]).mean()
        finally:
            for part, mode in random:
                part.training = mode
        if not torch.allclose(alone, whole, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise UnsupportedError(
                f"slices={self.slices}: the loss of a batch ({whole.item():.6g}) is not the mean of its images' losses "
                f"({alone.item():.6g}): it counts over the whole batch. Use slices=1.")


def _fresh(value: Any) -> Any:
    """The same tensors as leaves."""
    return map_tensors(value, lambda t: t.detach().requires_grad_() if t.requires_grad else t)


def _joined(outputs: Sequence[Any]) -> Any:
    """The outputs of all slices as those of one batch."""
    columns = zip(*map(tensors_in, outputs), strict=True)
    return map_tensors(outputs[0], lambda tensor: torch.cat(next(columns)) if tensor.dim() else next(columns)[0])


def in_patches(loss: Callable[[Tensor], Any], value: Tensor, patches: int, trained: Sequence[Tensor]) -> Tensor:
    """The mean of a loss over ``patches`` x ``patches`` parts of a map (N, C, H, W), each differentiated before the
    next one is run, with the gradients of the map and of what the loss trains (HPFF, arXiv 2407.05638)."""
    def cut(map_: Tensor) -> list[Tensor]:
        return [part for rows in map_.tensor_split(patches, -2) for part in rows.tensor_split(patches, -1)]

    wanted = [tensor for tensor in (value, *trained) if tensor.requires_grad]
    stash: list[Tensor | None] = [None] * len(wanted)
    parts = cut(value.detach())
    whole = torch.zeros_like(value) if value.requires_grad else None
    places = [] if whole is None else cut(whole)
    result = torch.zeros((), device=value.device)
    for index, part in enumerate(parts):
        leaf = part.clone().requires_grad_(value.requires_grad)
        term = total(loss(leaf)) / len(parts)
        result = result + term.detach()
        own = [leaf if source is value else source for source in wanted]
        grads = torch.autograd.grad(term, own, allow_unused=True)
        for place, (source, grad) in enumerate(zip(wanted, grads, strict=True)):
            if grad is None:
                continue
            if source is value:
                places[index].copy_(grad)
            else:
                before = stash[place]
                stash[place] = grad if before is None else before + grad
    if whole is not None:
        stash[0] = whole
    made: Tensor = HandOver.apply(result, stash, [], None, *wanted)
    return made
