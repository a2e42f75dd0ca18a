"""What is replaced in torch, and on the shadow, while a thread records."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from glcan_fx.capture.source_lines import Uncapturable


class Recording(threading.local):
    """Who records what modules do in this thread, as a graph (``recorder.py``)."""

    recorder: Any = None

    def now(self) -> Any:
        """The recorder, unless it looks away."""
        return None if self.recorder is None or self.recorder._paused else self.recorder


recording = Recording()


def _with_hooks(module: nn.Module, args: Any, kwargs: Any, recorder: Any) -> Any:
    """Call a module of the shadow, and the hooks on it: a shadow has none but those that the model's forward registers
    while it runs, to collect what its layers return."""
    recorder.note_hooks([*module._forward_pre_hooks, *module._forward_hooks])
    for key, before in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            args, kwargs = before(module, args, kwargs) or (args, kwargs)
        elif (changed := before(module, args)) is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    out = recorder.call(module, args, kwargs)
    for key, after in list(module._forward_hooks.items()):
        with_kwargs = key in module._forward_hooks_with_kwargs
        changed = after(module, args, kwargs, out) if with_kwargs else after(module, args, out)
        out = out if changed is None else changed
    return out


_CHECKPOINTED = "activation checkpointing is left out: local modules take its place"
_DIVIDED = "activation checkpointing is left out where a cut divides the call: local modules take its place"
_CHECKPOINTS = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")


@contextmanager
def patched(recorder: Any) -> Iterator[None]:
    """Let the recorder see module calls, and refuse what hides operations from it.

    ``nn.Module.__call__`` calls what ``Module.compile()`` leaves in an instance instead of the module; here that is the
    recorder. So only the recorder's own modules change. What else is patched holds for the whole process: a thread
    that does not record gets what the original does.
    """
    def called(module: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: _with_hooks(module, args, kwargs, recorder)

    before, modules = recording.recorder, list(recorder.root.modules())
    kept = [vars(module).get("_compiled_call_impl") for module in modules]
    with _patches:
        recording.recorder = recorder
        for module in modules:
            vars(module)["_compiled_call_impl"] = called(module)
        try:
            yield
        finally:
            recording.recorder = before
            for module, call in zip(modules, kept, strict=True):
                if call is None:
                    vars(module).pop("_compiled_call_impl", None)
                else:
                    vars(module)["_compiled_call_impl"] = call


class _Patches:
    """What is patched in torch: put in when the first thread begins to record, taken out when the last one ends."""

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                autocast, checkpoint = torch.amp.autocast_mode.autocast, torch.utils.checkpoint
                self._replace(torch.autograd.Function, "apply", _applying)
                self._replace(autocast, "__enter__", _entering)
                for name in _CHECKPOINTS:
                    if hasattr(checkpoint, name):
                        self._replace(checkpoint, name, _checkpointing)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            while not self._users and self._undo:
                self._undo.pop()()

    def _replace(self, owner: Any, name: str, around: Callable[[Any], Any]) -> None:
        before = vars(owner)[name]
        setattr(owner, name, around(before))
        self._undo.append(partial(setattr, owner, name, before))


_patches = _Patches()


def _applying(apply: Any) -> Any:
    def function_apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        recorder = recording.now()
        if recorder is None:
            return apply.__get__(None, cls)(*args, **kwargs)
        if cls is torch.utils.checkpoint.CheckpointFunction:
            recorder.note(_CHECKPOINTED)
            for call in recorder.calls:  # no step may call these as a whole: this kind works in backward() only, and
                call.args = None  # without gradients where its inputs want none, as those of a local module do
            return args[0](*args[2:])
        raise Uncapturable(f"it calls the autograd function {cls.__name__}")
    return classmethod(function_apply)


def _entering(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def autocast_enter(self: Any) -> Any:
        if recording.now() is not None:
            raise Uncapturable("it enters torch.autocast")
        return enter(self)
    return autocast_enter


def _checkpointing(around: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
    def checkpointed(*args: Any, **kwargs: Any) -> Iterator[None]:
        recorder = recording.now()
        if recorder is None:
            return around(*args, **kwargs)
        recorder.note(_DIVIDED if recorder.stack[-1] else _CHECKPOINTED)
        return (None for _ in range(1))  # a generator that has nothing to do before and behind the call
    return checkpointed
