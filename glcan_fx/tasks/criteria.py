"""What a criterion returns: which of it is minimised, which of it is only reported.

- A tensor is the loss.
- Named values (a dict, nested or not, a named tuple, a dataclass) with an entry "total_loss", "loss_total", "total" or
  "loss" that has a gradient: this entry is the loss, the others are reported. The others that have a gradient must be
  counted in it: it is computed from them, or equals their sum.
- Other named values: the loss is the sum of the entries that have a gradient; the others (an accuracy) are reported.
- Anything else is refused.
"""

import dataclasses
import numbers
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge

from glcan_fx.errors import CriterionError, StatefulCriterionWarning
from glcan_fx.pytree import tensors_in

TOTALS = ("total_loss", "loss_total", "total", "loss")  # the names of a total, in this order

_TOLERANCE = 1e-4  # relative, between a total and the sum of its parts


class Parts(dict[str, Any]):
    """Named values of a criterion, of which only ``counted`` are minimised."""

    def __init__(self, values: Mapping[str, Any], counted: Collection[str]) -> None:
        super().__init__(values)
        self.counted = tuple(counted)


class NamedLoss(Tensor):
    """A scalar loss that knows the parts it was made of: ``loss["ce"]``, ``set(loss)``, ``dict(loss)``.

    Otherwise a tensor; what is computed from it is an ordinary one.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    parts: dict[str, Tensor]

    def keys(self) -> Any:
        return self.parts.keys()

    def items(self) -> Any:
        return self.parts.items()

    def __getitem__(self, name: Any) -> Any:
        return self.parts[name] if isinstance(name, str) else super().__getitem__(name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)

    def __contains__(self, name: Any) -> bool:
        return name in self.parts

    def __format__(self, how: str) -> str:
        return format(self.as_subclass(Tensor), how)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"NamedLoss({self.item():.6g}; {', '.join(self.parts)})"


def named(scalar: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """A scalar that knows its parts. Fake tensors stay as they are."""
    if type(scalar) is not Tensor:
        return scalar
    made = scalar.as_subclass(NamedLoss)
    made.parts = parts
    return made


def scalar_of(loss: Any) -> Tensor:
    """What is minimised of a criterion's result, as one scalar."""
    if isinstance(loss, Tensor):
        return _scalar(loss)
    entries = entries_of(loss)
    if entries is None:
        raise CriterionError(_what_else(loss))
    if not any(isinstance(value, Tensor) for value in entries.values()):
        raise CriterionError(f"the criterion must return a scalar or a dict of scalars: this {type(loss).__name__} "
                             "holds no tensor" + (f" (its entries: {', '.join(entries)})" if entries else ""))
    counted = loss.counted if isinstance(loss, Parts) else counted_in(entries)
    terms = [_scalar(entries[name], name) for name in counted]
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def _scalar(tensor: Tensor, name: str = "") -> Tensor:
    if tensor.numel() != 1:
        what = f"'{name}' of the criterion's losses must be" if name else "the criterion must return"
        raise CriterionError(f"{what} a scalar, not a tensor of {tensor.numel()} values: reduce it, for example with "
                             ".mean()" + (", or detach it, if it is only to be reported" if name else ""))
    return tensor.reshape(())


def _what_else(loss: Any) -> str:
    """What is wrong with a result that is neither a tensor nor named values."""
    kind = type(loss).__name__
    start = f"the criterion must return a scalar or a dict of scalars, not {kind}"
    if loss is None:
        return f"{start}: a 'return' is missing"
    if isinstance(loss, numbers.Number) or hasattr(loss, "__array__"):
        return (f"{start}, through which no gradient flows: return the tensor itself (no .item(), float() or .numpy() "
                "on the way)")
    if isinstance(loss, list | tuple):
        return (f"{start}: which of its values count is not clear. Return one scalar, for example their sum, or a "
                "dict: {'loss': what is minimised, 'accuracy': what is only reported}")
    return start


def entries_of(loss: Any, path: str = "") -> dict[str, Any] | None:
    """Named values of a criterion by their path ("det.boxes", "aux.0"); None where the values have no names."""
    if isinstance(loss, Mapping):
        items: list[tuple[Any, Any]] = list(loss.items())
    elif hasattr(loss, "_fields"):
        items = list(zip(loss._fields, loss, strict=True))
    elif dataclasses.is_dataclass(loss) and not isinstance(loss, type):
        items = [(field.name, getattr(loss, field.name)) for field in dataclasses.fields(loss)]
    elif path and isinstance(loss, list | tuple):
        items = list(enumerate(loss))
    else:
        return None
    found: dict[str, Any] = {}
    for key, value in items:
        name = f"{path}{key}"
        inner = entries_of(value, f"{name}.")
        found.update({name: value} if inner is None else inner)
    return found


def counted_in(entries: Mapping[str, Any]) -> list[str]:
    """The names of the entries whose sum is minimised. Without any gradient: of a total, or of all scalars."""
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    trained = [name for name, value in tensors.items() if value.requires_grad]
    candidates = trained or [name for name, value in tensors.items() if value.numel() == 1] or list(tensors)
    total = next((name for name in TOTALS if name in candidates), None)
    if total is not None and (trained or total != "total"):  # without a gradient, a "total" may be a count
        return [total]
    return candidates


def reports_of(loss: Any) -> dict[str, Tensor] | None:
    """Named values of a criterion, detached; None for a plain tensor. What is not a number is left out."""
    entries = None if isinstance(loss, Tensor) else entries_of(loss)
    if entries is None:
        return None
    return {name: value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
            for name, value in entries.items() if isinstance(value, Tensor | numbers.Number)}


def check_total(loss: Any) -> None:
    """Raise CriterionError where a total is among the entries, and is not all that the others say is minimised.

    It may synchronise, so it is for the first steps.
    """
    entries = entries_of(loss) or {}
    trained = {name: value for name, value in entries.items() if isinstance(value, Tensor) and value.requires_grad}
    if not trained:
        return
    detached = next((name for name in TOTALS if name in entries and name not in trained and name != "total"), None)
    counted = counted_in(entries)
    if detached is not None and not (len(counted) == 1 and counted[0] in TOTALS):
        raise CriterionError(
            f"'{detached}' of the criterion's dict, which is what would be minimised, has no gradient, and "
            f"{', '.join(map(repr, trained))} of it have. Return '{detached}' as it was computed, without detach() or "
            "item(); or remove it, and the sum of the others is minimised.")
    if len(counted) != 1 or counted[0] not in TOTALS:
        return
    total = trained.pop(counted[0])
    if not (left := _uncounted(total, trained)):
        return
    values = [value for value in trained.values() if value.numel() == 1]
    if not isinstance(total, FakeTensor) and len(values) == len(trained) and total.numel() == 1:
        summed = sum(float(value.detach()) for value in values)
        here = float(total.detach())
        if not abs(here - summed) > _TOLERANCE * max(abs(here), abs(summed)):  # also where they are not finite
            return
    if isinstance(total, FakeTensor):
        return
    raise CriterionError(
        f"'{counted[0]}' of the criterion's dict is what is minimised, but {', '.join(map(repr, left))} of it have "
        f"gradients, too, and '{counted[0]}' is neither computed from them nor their sum. If they are only to be "
        f"reported, detach them ('{left[0]}': value.detach()). If they are to be minimised, too, add them to "
        f"'{counted[0]}', or call that another name than {', '.join(map(repr, TOTALS))}: then the sum of all is "
        "minimised.")


def _uncounted(total: Tensor, others: Mapping[str, Tensor]) -> list[str]:
    """Names of the others that a total is not computed from, and that are not computed from what it counts."""
    known = {_edge(total)}
    below = _reached(total)
    left = []
    for name, value in others.items():
        if _edge(value) in below or _edge(value) in known:
            known.add(_edge(value))
        else:
            left.append(name)
    return [name for name in left if not known & _reached(others[name])]


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _reached(tensor: Tensor) -> set[tuple[Any, int]]:
    """Every edge of the autograd graph behind a tensor."""
    stack = [get_gradient_edge(tensor).node]
    seen, nodes = set(), set(stack)
    while stack:
        for node, number in stack.pop().next_functions:
            if node is not None:
                seen.add((node, number))
                if node not in nodes:
                    nodes.add(node)
                    stack.append(node)
    return seen


def check_device(loss: Any, outputs: Any) -> None:
    """Raise CriterionError where a loss is on a device that none of the outputs is on."""
    devices: Sequence[torch.device] = [tensor.device for tensor in tensors_in(outputs)]
    wrong = next((tensor for tensor in tensors_in(loss) if tensor.requires_grad and tensor.device not in devices), None)
    if devices and wrong is not None:
        raise CriterionError(f"the criterion returns a loss on {wrong.device} for outputs on {devices[0]}: compute it "
                             f"there, or return it with .to('{devices[0]}')")


State = list[tuple[str, Any, int | None]]


def state_of(value: Any, path: str = "targets") -> State:
    """What tells whether a nested value is changed: (path, object, version) of everything in it."""
    found: State = []
    _walk(value, path, found)
    return found


def _walk(value: Any, path: str, found: State) -> None:
    if isinstance(value, Tensor):
        found.append((path, value, _version(value)))
        return
    if isinstance(value, dict):
        items: Any = [(f"{path}[{key!r}]", part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{index}]", part) for index, part in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f"{path}.{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    elif isinstance(value, Mapping):  # of another kind: it may make its values when it is asked for them
        found.extend((f"{path}[{key!r}]", None, _version(part)) for key, part in value.items())
        return
    else:
        found.append((path, value, None))
        return
    for name, part in items:
        _walk(part, name, found)


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def refuse_edits(before: State, value: Any, who: str = "the criterion") -> None:
    """Raise CriterionError where targets are not what they were."""
    after = state_of(value)
    if [path for path, _, _ in before] == [path for path, _, _ in after]:
        changed = [old[0] for old, new in zip(before, after, strict=True) if old[1] is not new[1] or old[2] != new[2]]
    else:
        old, new = {path for path, _, _ in before}, {path for path, _, _ in after}
        changed = [path for path, _, _ in [*after, *before] if (path in old) != (path in new)]
    if changed:
        raise CriterionError(
            f"{who} changes its targets: {changed[0]} is not what it was before the call. It is called once for each "
            "local loss, and every one must see the same targets. Work on a copy: y = y - 1, not y -= 1; "
            "targets = {**targets, 'new': ...}, not targets['new'] = ....")


def moving_state(owners: Iterable[Any]) -> dict[str, Any]:
    """What a criterion keeps from call to call, as far as one sees it: versions of buffers, counters."""
    found: dict[str, Any] = {}
    for owner in owners:
        for name, part in owner.named_modules() if isinstance(owner, nn.Module) else [("", owner)]:
            where = f"{name}." if name else ""
            for key, buffer in part._buffers.items() if isinstance(part, nn.Module) else ():
                if buffer is not None and not buffer.is_inference():
                    found[f"buffer '{where}{key}'"] = (id(buffer), buffer._version)
            for key, value in getattr(part, "__dict__", {}).items():
                if type(value) is int:
                    found[f"attribute '{where}{key}'"] = value
    return found


def warn_of_state(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Warn where a criterion's state has moved in a call; returns whether it has."""
    moved = next((name for name, value in after.items() if name in before and before[name] != value), None)
    if moved is not None:
        warnings.warn(
            f"the criterion's {moved} moves when it is called, and it is called once for each local loss, so several "
            "times a step. A queue, a centre or a counter moves as often. Move it in the loop, once a step, or make "
            "one criterion that treats the calls apart.", StatefulCriterionWarning, stacklevel=2)
    return moved is not None
