"""Fake tensors whose operators are run once for each kind of arguments, and answered from memory afterwards."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves


class _Like(NamedTuple):
    """A tensor that an operator returns; offset: in the memory of its first argument, or None for memory of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int | None


_CPU = torch.device("cpu")
_DEVICE = torch.ops.prim.device.default
_Key = tuple[Any, ...]
_NOTHING, _FIRST = "nothing", "first argument"  # what operators return that make no tensor
_Answer = list[_Like | None] | tuple[_Like | None, ...] | _Like | str
_MOST = 2**18  # answers: more are of many models, and of no use to the next one
_answers: dict[_Key, _Answer] = {}  # they hold in every mode


class Fakes(FakeTensorMode):
    """A ``FakeTensorMode`` that takes real tensors, too, and knows what it was asked before.

    Planning runs the same few hundred operators tens of thousands of times. What is remembered, by the metadata of
    tensors and all other arguments: operators that return new tensors, views of their first argument or that argument
    itself, and those that write into it and leave its metadata as it was. Constants take torch's own way.

    exact: what depends on values of fake tensors is an error, also where ``PeakMemory`` would answer for the largest
    case.
    """

    def __init__(self, *, exact: bool = False) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.exact = exact
        self.cache_enabled = False  # torch's own, whose keys take longer than most operators
        self._states: dict[torch.device, dict[str, Any]] = {}  # what fake tensors know beside their metadata

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator."""
        if func is _DEVICE:
            return args[0].fake_device
        kwargs = kwargs or {}
        kind = kind_of(func)
        usual = kind == "new" or kind is not None and _is_fake(args[0]) and not (kind == "indexed" and _masks(args[1]))
        key = self._key(func, args, kwargs) if usual else None
        if key is None:
            return super().dispatch(func, types, args, kwargs)
        answer = _answers.get(key)
        if answer is None:
            out = super().dispatch(func, types, args, kwargs)
            if out is not NotImplemented and (answer := _answer(kind, out, args, kwargs, key, self)) is not None:
                if len(_answers) >= _MOST:
                    _answers.clear()
                _answers[key] = answer
            return out
        if isinstance(answer, _Like):
            return self._made(answer, args)
        if isinstance(answer, str):
            return args[0] if answer is _FIRST else None
        made = [None if like is None else self._made(like, args) for like in answer]
        return made if isinstance(answer, list) else tuple(made)

    def empty(self, like: Tensor, dtype: torch.dtype | None = None) -> FakeTensor:
        """A new fake tensor on the CPU with the sizes and strides of ``like``."""
        return self._made(_Like(like.shape, like.stride(), dtype or like.dtype, _CPU, None))

    def _made(self, like: _Like, args: Sequence[Any] = ()) -> FakeTensor:
        """A fake tensor, as ``FakeTensor`` makes it, in a fraction of the time; args: of the operator."""
        shape, stride, dtype, device, offset = like
        with torch._C._DisableTorchDispatch():
            if offset is None:
                made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                made = torch.empty(0, dtype=dtype, device="meta")
                made.set_(args[0].untyped_storage(), offset, shape, stride)
        state = self._states.get(device)
        if state is None:
            state = self._states[device] = dict(FakeTensor(self, made, device).__dict__)
        fake: FakeTensor = Tensor._make_subclass(
            FakeTensor, made, dispatch_device=True, device_for_backend_keys=device)
        _warn_of_values(fake)
        fake.__dict__.update(state)
        return fake

    def _key(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Key | None:
        """What the answer depends on; None where there is more than can be told."""
        key: list[Any] = [func, torch.get_default_dtype()]
        if not self._add(key, args):
            return None
        if kwargs:
            key.extend(kwargs)
            if not self._add(key, kwargs.values()):
                return None
        return tuple(key)

    def _add(self, key: list[Any], args: Any) -> bool:
        for arg in args:
            kind = type(arg)
            if kind is FakeTensor:
                dtype = arg.dtype
                if arg.constant is not None or arg.fake_mode is not self or dtype.is_complex or (
                        _layout(arg) is not torch.strided):  # complex numbers may be conjugated
                    return False
                key += (arg.shape, arg.stride(), arg.storage_offset(), dtype, arg.fake_device)
            elif kind is Tensor and arg.dim():  # a number of its own may make results of another type
                if arg.dtype.is_complex or arg.layout is not torch.strided:
                    return False
                key += (kind, arg.shape, arg.stride(), arg.dtype, arg.device)
            elif kind in _PLAIN:
                key += (kind, arg)  # 1 and 1.0 are equal, and do not make the same
            elif kind is list or kind is tuple:
                key += (kind, len(arg))
                if not self._add(key, arg):
                    return False
            else:
                return False
        return True


_layout = Tensor.layout.__get__  # type: ignore[attr-defined] # a fake tensor's own takes a while
_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.memory_format, torch.layout))


_warn_of_values = torch._C._set_warn_deprecated_on_mutable_data_ptr


def _is_fake(value: Any) -> bool:
    """Whether an argument is a fake tensor, or a list of them."""
    return all(type(part) is FakeTensor for part in (value if type(value) is list else (value,)))


def _masks(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


@cache
def kind_of(func: Any) -> str | None:
    """What an operator returns that can be remembered: "new" tensors, a "view" of its first argument, or several;
    "indexed": a new one whose size depends on the values of masks alone; "written": that argument itself, or nothing.
    """
    if func is torch.ops.aten.index.Tensor:
        return "indexed"
    if not isinstance(func, OpOverload) or func.namespace not in _NAMESPACES or _OTHERS & set(func.tags):
        return None
    schema = func._schema
    aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
    returned = [value.alias_info for value in schema.returns if value.alias_info is not None]
    if not aliases and not returned:
        return "new"
    first = schema.arguments[0].alias_info
    if first is None or len(aliases) > 1 or len(schema.returns) > 1:
        return None
    return "written" if first.is_write else "view" if func.is_view else None


_NAMESPACES = ("aten", "prims", "torchvision")
_OTHERS = {torch.Tag.inplace_view, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


def _answer(
    kind: str | None, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any], key: _Key, mode: Fakes
) -> _Answer | None:
    """What to return the next time; None where that cannot be told."""
    if kind == "written":
        unchanged = mode._add(after := list(key[:2]), args[:1]) and tuple(after) == key[:len(after)]
        return None if not unchanged else _FIRST if out is args[0] else _NOTHING if out is None else None
    if args and out is args[0]:
        return _FIRST if kind == "view" else None
    base, made = None, _memory(out)
    if not made.isdisjoint(_memory((args, kwargs))):  # also that of _unsafe_view, whose schema does not tell
        base = args[0]
        if made != _memory(base):
            return None
    if isinstance(out, Tensor):
        return _like(out, base)
    if not isinstance(out, list | tuple):
        return None
    several = list if isinstance(out, list) else tuple  # decompositions return named ones
    likes = several(_like(part, base) if isinstance(part, Tensor) else None for part in out)
    known = all(like is not None or part is None for like, part in zip(likes, out, strict=True))
    apart = base is not None or len(made) == sum(part is not None for part in out)
    return likes if known and apart else None


def _like(out: Tensor, base: Any) -> _Like | None:
    if type(out) is not FakeTensor or out.constant is not None or out.dtype.is_complex or (
            _layout(out) is not torch.strided):
        return None
    memory = out.untyped_storage()
    if base is not None:
        same = type(base) is FakeTensor and base is not out and memory._cdata == base.untyped_storage()._cdata
        return _Like(out.shape, out.stride(), out.dtype, out.fake_device, int(out.storage_offset())) if same else None
    alone = memory.nbytes() == _spanned(out) * out.element_size() and not out.storage_offset()
    return _Like(out.shape, out.stride(), out.dtype, out.fake_device, None) if alone else None


def _memory(value: Any) -> set[int]:
    """The storages of nested tensors."""
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}


def _spanned(out: Tensor) -> int:
    """Elements between the first and the last one."""
    if out.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(out.shape, out.stride(), strict=True))


def fake_mode_of(*values: Any) -> FakeTensorMode | None:
    """The mode of the first fake tensor among nested arguments."""
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            mode: FakeTensorMode = value.fake_mode
            return mode
        if kind is list or kind is tuple or kind is dict:
            found = fake_mode_of(*(value.values() if kind is dict else value))
            if found is not None:
                return found
        elif isinstance(value, FakeTensor):
            return value.fake_mode
    return None
