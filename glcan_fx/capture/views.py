"""A model seen with some of its sub-modules answered by others, so that its own forward runs around them."""

import copy
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.hooks import RemovableHandle

_OF_ALL_MODULES = {*vars(nn.Module()), "forward", "_compiled_call_impl"}
_ABSENT = object()


def _shallow(module: nn.Module) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):  # one that calls nothing of its own in Python
        return nn.Module().train(module.training)
    new: nn.Module = object.__new__(type(module))
    new.__dict__ = {**vars(module), "_modules": dict(module._modules)}
    new.__dict__.pop("_compiled_call_impl", None)  # it would call the module itself
    for name, value in vars(module).items():
        if "_hooks" in name and isinstance(value, dict):  # those that a forward registers while it runs stay here
            new.__dict__[name] = value.copy()
        elif isinstance(value, MethodType) and value.__self__ is module:  # self.block = self.fused_block
            new.__dict__[name] = MethodType(value.__func__, new)
    return new


def _keeping_its_state(view: nn.Module) -> nn.Module:
    """A shallow copy whose buffers, and attributes that can be changed, are its own."""
    view.__dict__["_buffers"] = {name: None if b is None else b.clone() for name, b in view._buffers.items()}
    for name, value in list(vars(view).items()):
        if name not in _OF_ALL_MODULES and isinstance(value, Tensor | list | dict | set):
            view.__dict__[name] = value.clone() if isinstance(value, Tensor) else copy.copy(value)
    return view


def substituted(
    model: nn.Module, answer: Callable[[str, nn.Module], Callable[..., Any] | None], *, again: bool = False
) -> nn.Module:
    """A view of ``model`` in which the sub-modules that ``answer`` knows are called otherwise.

    ``answer(path, module)`` returns what is called instead, or None to look inside. Parameters are shared, methods and
    attributes stay. again: the forward will run again, from the same state, so that what it changes stays in the view.
    """
    def view(module: nn.Module, path: str) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return module
        new = _keeping_its_state(_shallow(module)) if again else _shallow(module)
        for name, child in module._modules.items():
            if child is None:
                continue
            inner = f"{path}.{name}" if path else name
            instead = answer(inner, child)
            if instead is None:
                new._modules[name] = view(child, inner)
            elif instead is not child:
                stand_in = _shallow(child.get_submodule("_orig_mod") if isinstance(child, OptimizedModule) else child)
                stand_in.__dict__.update(forward=instead, _stands_in=True)
                for key, value in vars(stand_in).items():
                    if key.endswith("_hooks") and isinstance(value, dict):
                        value.clear()
                new._modules[name] = stand_in
        if isinstance(module, OptimizedModule):  # its own forward calls the module itself
            new.__dict__["forward"] = new._modules["_orig_mod"]
        return new

    return view(model, "")


def run_to_the_end(model: nn.Module, view: nn.Module, arguments: dict[str, Any]) -> Any:
    """Call the forward of a ``view`` of a model; the model's modules get the attributes that it has set, unless it has
    registered hooks, which stay in the view, as does then what it notes of them."""
    before = [(module, seen, dict(vars(seen))) for module, seen in _looked_into(model, view)]
    hooks = RemovableHandle.next_id
    result = view.forward(**arguments)
    for module, seen, attributes in before if hooks == RemovableHandle.next_id else ():
        module.__dict__.update({name: value for name, value in vars(seen).items()
                                if name not in _OF_ALL_MODULES and attributes.get(name, _ABSENT) is not value})
    return result


def _looked_into(module: nn.Module, view: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The modules of a model that a view of it has copies of, and these."""
    yield module, view
    for name, seen in view._modules.items():
        child = module._modules[name]
        if child is not None and seen is not None and seen is not child and "_stands_in" not in vars(seen):
            yield from _looked_into(child, seen)


def empty_stand_ins(view: nn.Module) -> None:
    """Take the parameters out of what ``substituted`` put in: a copy shall not hold them. Its methods stay."""
    for part in [part for part in view.modules() if "_stands_in" in vars(part)]:
        part.__dict__.update(_modules={}, _parameters={}, _buffers={}, extra_repr=str)
