"""The hooks on the model itself, whose forward the training step writes out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from glcan_fx.errors import UnsupportedError


def within_hooks(
    model: nn.Module, run: Callable[[dict[str, Any]], Any], given: Mapping[str, Any], seen: Sequence[str],
    output_of: Callable[[Any], Any],
) -> Any:
    """``run`` a step on arguments by name, and around it the hooks on the model, as its own call would.

    seen: the arguments that hooks see, in order. output_of: what the model returns, of a step's result. Raises
    UnsupportedError for hooks that a step of local modules cannot honor.
    """
    if model._backward_hooks or model._backward_pre_hooks:
        raise UnsupportedError(f"{type(model).__name__} itself has a backward hook, but no gradient passes through it "
                               "as a whole. Put the hook on modules inside it.")
    if not model._forward_hooks and not model._forward_pre_hooks:
        return run(dict(given))
    args = tuple(given[name] for name in seen)
    for key, before in list(model._forward_pre_hooks.items()):
        if key in model._forward_pre_hooks_with_kwargs:
            args = (before(model, args, {}) or (args, {}))[0]
        elif (changed := before(model, args)) is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    result = run({**given, **dict(zip(seen, args, strict=True))})
    output = output_of(result)
    for key, after in list(model._forward_hooks.items()):
        with_kwargs = key in model._forward_hooks_with_kwargs
        changed = after(model, args, {}, output) if with_kwargs else after(model, args, output)
        if changed is not None and changed is not output:
            raise UnsupportedError(
                f"a forward hook on {type(model).__name__} itself changes its output, which the local losses do not "
                "see. Compute it in a module at the end of the model, or in the criterion.")
    return result
