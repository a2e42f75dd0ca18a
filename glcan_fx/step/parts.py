"""Parts of the model that a training step calls in ways of its own; they own nothing of it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from glcan_fx.pytree import tensors_in


class OfModel(nn.Module):
    """Runs parts of the model that it does not own; whoever copies or loads the compiled model makes it anew."""

    def __reduce__(self) -> Any:
        return nn.Identity, ()


class Whole(OfModel):
    """The model itself, called as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["model"](*args, **kwargs)


class Leave(OfModel):
    """Sets an attribute of the model, by its path, as the forward does that is written out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model

    def forward(self, path: str, value: Tensor) -> None:
        owner, _, name = path.rpartition(".")
        setattr(self.__dict__["model"].get_submodule(owner), name, value)


class WithAux:
    """A model's attributes, with ``aux`` beside them, for parts that call others."""

    def __init__(self, model: nn.Module, aux: nn.Module) -> None:
        self.__dict__.update(_model_itself=model, aux=aux)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model_itself"], name)


class ReadOnly(OfModel):
    """A layer of the model, by its path, on the weights that it has at the moment: gradients pass through to what is in
    front of it, and do not train it. ``bind`` says whose."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.__dict__.update(path=path, model=None)

    def __reduce__(self) -> Any:
        return ReadOnly, (self.__dict__["path"],)

    def bind(self, model: nn.Module) -> None:
        self.__dict__["model"] = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.__dict__["model"].get_submodule(self.__dict__["path"])
        weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        return functional_call(layer, weights, args, kwargs)


class Recomputed(OfModel):
    """A block of the model that keeps only its inputs, and runs again in backward (activation checkpointing).

    run: the block, on the model's own layers, whose paths are ``layers``. Buffers move once a step, and both runs begin
    with the same.
    """

    def __init__(self, run: Callable[..., Any], model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.__dict__.update(run=run, model=model, layers=tuple(layers))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *values: Any) -> Any:
        run = self.__dict__["run"]
        if not torch.is_grad_enabled():
            return run(*values)
        modules = dict(self.__dict__["model"].named_modules())
        parts = [part for path in self.__dict__["layers"] if path in modules for part in modules[path].modules()]
        first = [(part, {name: None if b is None else b.clone() for name, b in part._buffers.items()})
                 for part in parts if part._buffers]
        return checkpoint(run, *values, use_reentrant=False, context_fn=lambda: (nullcontext(), _Again(first)))


class _Again:
    """Lets what runs inside begin with, and change, these buffers, as often as a loss comes back."""

    def __init__(self, buffers: Sequence[tuple[nn.Module, dict[str, Tensor | None]]]) -> None:
        self.buffers = buffers
        self._kept: list[tuple[nn.Module, dict[str, Tensor | None]]] = []

    def __enter__(self) -> None:
        self._kept = [(part, dict(part._buffers)) for part, _ in self.buffers]
        for part, buffers in self.buffers:
            part._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *_: Any) -> None:
        for part, buffers in self._kept:
            part._buffers.update(buffers)


class SizeCheck(OfModel):
    """Sees the inputs of a compiled part whose own forward asks about sizes; ``bind`` says whose. Sizes that have not
    been seen are checked once: raises ModelChangedError where the part would go another way."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(check=None, known=set())

    def bind(self, check: Callable[[tuple[Any, ...]], None]) -> None:
        self.__dict__["check"] = check

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *values: Any) -> None:
        key = tuple((tuple(t.shape[1:]), t.dtype) for t in tensors_in(values))
        if key not in self.__dict__["known"] and not any(isinstance(t, FakeTensor) for t in tensors_in(values)):
            self.__dict__["check"](values)
            self.__dict__["known"].add(key)
