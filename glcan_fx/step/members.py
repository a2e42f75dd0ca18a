"""A module that is another one with something added: they have the same members, whichever of them is changed."""

from typing import Any

from torch import nn


class SharedMembers(nn.Module):
    """Shares parameters, buffers, sub-modules, attributes and methods with ``original``, and has ``aux`` beside them.

    What is set, replaced, moved or deleted on either is seen by both. Names that begin with an underscore, and those
    that the class itself has, are its own.
    """

    aux: nn.Module

    @property
    def original(self) -> nn.Module:
        """The model that this one was compiled from; same parameters."""
        model: nn.Module = self.__dict__["_original"]
        return model

    def _share(self, model: nn.Module, aux: nn.Module) -> None:
        """Hold the model's own tensors and modules. The dicts of direct tensors are the same objects, so that a
        conversion (``.to()``) of one is seen by the other."""
        self.__dict__.update(
            _parameters=model._parameters, _buffers=model._buffers,
            _non_persistent_buffers_set=model._non_persistent_buffers_set, _modules={**model._modules, "aux": aux},
            _original=model)

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("_original")
        if model is not None and name in model._modules:
            return model._modules[name]  # as it is now
        try:
            return super().__getattr__(name)
        except AttributeError:
            if model is None or name.startswith("__"):
                raise
            return getattr(model, name)  # the model's own methods and attributes

    def __setattr__(self, name: str, value: Any) -> None:
        model = self.__dict__.get("_original")
        own = model is None or name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        if own or name == "aux" or not (isinstance(value, nn.Module | nn.Parameter) or hasattr(model, name)):
            super().__setattr__(name, value)
            return
        setattr(model, name, value)
        self._sync()

    def __delattr__(self, name: str) -> None:
        if "_original" in self.__dict__ and name not in self.__dict__ and name != "aux":
            delattr(self.original, name)
            self._sync()
        else:
            super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if "_original" not in self.__dict__ or name == "aux":
            super().add_module(name, module)
            return
        self.original.add_module(name, module)
        self._sync()

    def _sync(self) -> None:
        """See the modules that the model has now: they may have been replaced in it."""
        own, model = self._modules, self.original._modules
        if len(own) != len(model) + 1 or any(own.get(name) is not part for name, part in model.items()):
            aux = own["aux"]
            own.clear()
            own.update({**model, "aux": aux})

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self._sync_if_made()
        return super().named_modules(*args, **kwargs)

    def named_children(self) -> Any:
        self._sync_if_made()
        return super().named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._sync_if_made()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._sync_if_made()
        return super().load_state_dict(*args, **kwargs)

    def _sync_if_made(self) -> None:
        if "_original" in self.__dict__:
            self._sync()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        move = self.original._apply  # the model's own way of moving, if it has one
        move(fn) if recurse else move(fn, recurse)
        self.aux._apply(fn, recurse)
        self._sync()
        return self
