"""Shadows: recording a model changes nothing of it, nor of what other threads do; parts of special kinds are copied."""

import copy
import functools
import logging
import random
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import glcan_fx
from glcan_fx.capture.ladder import trace
from glcan_fx.capture.patches import patched as patching
from glcan_fx.capture.patches import recording
from glcan_fx.capture.recorder import Recorder
from glcan_fx.capture.shadow import fake_copy, real_copy, replicate
from glcan_fx.fakes import Fakes

IMAGES, LABELS = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))


def block(inputs: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())


class Net(nn.Module):
    """Four blocks, of which the third is often of a special kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = block(3), block(), block(), block()
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(self.stem(x)))).mean((2, 3)))


def compiled(model: nn.Module, **options: Any) -> glcan_fx.LocalModel:
    defaults = {"k": "natural", "criterion": F.cross_entropy, "example_inputs": torch.empty(4, 3, 16, 16)}
    return glcan_fx.transform(model, **(defaults | options))


# ---------------------------------------------------------------------------------------------- threads


class Twice(torch.autograd.Function):
    """Its gradient is another one than that of what it computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 5


def patched() -> list[Any]:
    """What is patched while somebody records."""
    return [vars(nn.Module)["__call__"], vars(torch.autograd.Function)["apply"], torch.autocast.__enter__,
            *(value for name, value in vars(torch.utils.checkpoint).items() if "generator" in name)]


def train_one_step() -> None:
    """A step with all that a recording refuses, and its gradients."""
    x = torch.ones(2, 4, requires_grad=True)
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(torch.autograd.grad(Twice.apply(x).sum(), x)[0], torch.full_like(x, 5))
    for reentrant in (False, True):
        calls: list[Tensor] = []

        def counted(y: Tensor, calls: list[Tensor] = calls) -> Tensor:
            calls.append(y)
            return layer(y)

        checkpoint(counted, x, use_reentrant=reentrant).sum().backward()
        assert len(calls) == 2, "a checkpointed part runs again in backward"


def test_two_threads_record_while_a_third_trains() -> None:
    before, failed, stop = patched(), [], threading.Event()
    expected = [str(node) for node in trace(Net(), [IMAGES]).graph.nodes]

    def guarded(run: Callable[[], None]) -> Callable[[], None]:
        def target() -> None:
            try:
                run()
            except BaseException as error:  # noqa: BLE001 - a thread of its own would swallow it
                failed.append(repr(error))
        return target

    def record() -> None:
        for _ in range(8):
            assert [str(node) for node in trace(Net(), [IMAGES]).graph.nodes] == expected

    def train() -> None:
        while not stop.is_set():
            train_one_step()

    recorders = [threading.Thread(target=guarded(record)) for _ in range(2)]
    trainer = threading.Thread(target=guarded(train))
    for thread in (*recorders, trainer):
        thread.start()
    for thread in recorders:
        thread.join()
    stop.set()
    trainer.join()
    assert not failed
    assert all(now is then for now, then in zip(patched(), before, strict=True))


def recorder() -> Recorder:
    mode = Fakes()
    return Recorder(replicate(Net(), fake_copy(mode)), mode, Net(), {})


def test_the_patches_end_with_the_last_thread_that_records() -> None:
    """The thread that began first ends first: the other one's recording still refuses autocast, and sees calls."""
    before, inside, ended = patched(), threading.Event(), threading.Event()
    found = []

    def second() -> None:
        with patching(recorder()):
            inside.set()
            ended.wait()
            try:
                torch.autocast("cpu").__enter__()
            except Exception as error:  # noqa: BLE001
                found.append(str(error))

    thread = threading.Thread(target=second)
    with patching(recorder()):
        thread.start()
        inside.wait()
    ended.set()
    thread.join()
    assert found == ["it enters torch.autocast"]
    assert all(now is then for now, then in zip(patched(), before, strict=True))


def test_a_recording_inside_another_one() -> None:
    before, outer, inner = patched(), recorder(), recorder()
    with patching(outer):
        with suppress(ZeroDivisionError), patching(inner):
            assert recording.recorder is inner
            raise ZeroDivisionError
        assert recording.recorder is outer
        assert all("_compiled_call_impl" in vars(module) for module in outer.root.modules())
        assert not any("_compiled_call_impl" in vars(module) for module in inner.root.modules())
        with patching(outer):
            pass
        assert all("_compiled_call_impl" in vars(module) for module in outer.root.modules())
    assert recording.recorder is None
    assert not any("_compiled_call_impl" in vars(module) for module in outer.root.modules())
    assert all(now is then for now, then in zip(patched(), before, strict=True))


class CallsForward(nn.Module):
    """Calls a layer's forward, not the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers.forward(x)


def test_a_direct_call_of_a_forward_is_no_call_of_the_module() -> None:
    net = Net()
    net.b = CallsForward()
    returned = trace(net, [IMAGES]).returns
    assert "b" in returned and "b.layers.0" in returned and "b.layers" not in returned


# ---------------------------------------------------------------------------------------------- references


class Referring(nn.Module):
    """Calls its layers by something that it keeps beside them."""

    def __init__(self, keep: Callable[["Referring"], Callable[[Tensor], Tensor]]) -> None:
        super().__init__()
        self.layers = block()
        self.__dict__["run"] = keep(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def through(self: nn.Module, x: Tensor) -> Tensor:
    return self.layers(x)


def closure(module: Referring) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor, times: int = 1) -> Tensor:
        return run(x, times - 1) if times else module.layers(x)  # it refers to itself, too
    return run


def held(hold: Callable[[nn.Module], Any], find: Callable[[Any], nn.Module]) -> Callable[[Referring], Any]:
    def keep(module: Referring) -> Any:
        module.__dict__["kept"] = hold(module.layers)
        return lambda x: find(module.kept)(x)
    return keep


class Registry(dict):
    """A container of a class of its own."""


def unwanted(graph: nn.Module, inputs: Any) -> Callable[..., Any]:
    raise AssertionError("a copy calls what was compiled as it was written")


REFERENCES: dict[str, Callable[[Referring], Callable[[Tensor], Tensor]]] = {
    "the module": lambda module: module.layers,
    "a method": lambda module: types.MethodType(through, module),
    "a partial": lambda module: functools.partial(through, module),
    "a partial by name": lambda module: functools.partial(lambda x, layers: layers(x), layers=module.layers),
    "a closure": closure,
    "a default": lambda module: lambda x, layers=module.layers: layers(x),
    "a wrapped method": lambda module: functools.wraps(through)(functools.partial(through, module)),
    "a compiled function": lambda module: torch.compile(functools.partial(through, module), backend=unwanted),
    "a list": held(lambda layers: [layers], lambda kept: kept[0]),
    "a dict in a tuple": held(lambda layers: ({"layers": layers},), lambda kept: kept[0]["layers"]),
    "a key": held(lambda layers: {layers: 1}, lambda kept: next(iter(kept))),
    "a set": held(lambda layers: {layers}, lambda kept: next(iter(kept))),
    "a deque": held(lambda layers: deque([layers], 3), lambda kept: kept[0]),
    "a dict of its own class": held(lambda layers: Registry(layers=layers), lambda kept: kept["layers"]),
    "a weak reference": held(weakref.ref, lambda kept: kept()),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("fake", [False, True])
def test_what_refers_to_a_module_refers_to_its_copy(name: str, fake: bool) -> None:
    net = Referring(REFERENCES[name]).train()
    mode = Fakes()
    new = replicate(net, fake_copy(mode) if fake else real_copy)
    called = []
    new.layers.register_forward_hook(lambda *_: called.append(1))
    with mode if fake else nullcontext():
        new(torch.ones(2, 8, 4, 4))
    assert called
    assert net.layers[1].num_batches_tracked == 0
    assert not fake or isinstance(new.layers[1].running_mean, FakeTensor)


def test_copies_share_what_the_modules_share_and_nothing_else() -> None:
    net, shared = Net(), {"seen": [1]}
    net.a.store = net.b.store = shared
    net.a._private, net.a.position, net.a.rng = [shared], torch.zeros(2), random.Random(0)
    net.a.weights = [net.b[0].weight]
    net.c.compile(backend="eager")
    new = replicate(net, real_copy)
    assert "_compiled_call_impl" not in vars(new.c)
    assert new.a.store is new.b.store is new.a._private[0]
    assert new.a.weights[0] is new.b[0].weight
    new.a.store["seen"].append(2)
    new.a.position += 1
    new.a.rng.random()
    new.a._forward_hooks_with_kwargs[0] = True
    assert shared == {"seen": [1]} and not net.a.position.any() and not net.a._forward_hooks_with_kwargs
    assert net.a.rng.getstate() == random.Random(0).getstate()


def test_a_module_that_hides_in_a_list_is_neither_changed_nor_trained() -> None:
    """A frozen teacher, kept out of the state dict: its tensors are constants in a shadow."""
    net = Net()
    net.teacher = [block(3).train()]
    fake = replicate(net, fake_copy(Fakes()))
    assert fake.teacher[0] is not net.teacher[0] and fake.teacher[0][0].weight is net.teacher[0][0].weight
    replicate(net, real_copy).teacher[0](IMAGES)
    assert net.teacher[0][1].num_batches_tracked == 0


# ---------------------------------------------------------------------------------------------- special kinds


class CompiledForward(nn.Module):
    """Its class's forward is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers, self.reentrant = block(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=self.reentrant)


class Replaces(nn.Module):
    """Moves its buffer to the type of its input, at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, 1, 1))
        self.conv = nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        return self.conv(x - self.mean)


class Recurrent(nn.Module):
    """A layer that keeps a list of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(x.shape)


def with_forward_of_its_own(module: nn.Sequential) -> nn.Sequential:
    module.forward = types.MethodType(lambda self, x: self[2](self[1](self[0](x))), module)
    return module


def compiled_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def averaging(module: nn.Sequential) -> nn.Sequential:
    module[1].momentum = None
    return module


def first(change: Callable[..., Any], *args: Any) -> Callable[[nn.Sequential], nn.Sequential]:
    """Change a block's convolution."""
    def changed(module: nn.Sequential) -> nn.Sequential:
        change(module[0], *args)
        return module
    return changed


KINDS: dict[str, tuple[Callable[[nn.Sequential], nn.Module], str]] = {  # and why it is opaque
    "compiled": (lambda module: torch.compile(module, backend="eager"), ""),
    "a compiled layer": (lambda module: nn.Sequential(torch.compile(module[0], backend="eager"), *module[1:]), ""),
    "compiled in place": (compiled_in_place, ""),
    "compiled forward": (lambda _: CompiledForward(), ""),
    "forward of its own": (with_forward_of_its_own, ""),
    "scripted": (torch.jit.script, "it is scripted"),
    "traced": (lambda module: torch.jit.trace(module, torch.randn(2, 8, 16, 16)), "it is scripted"),
    "averaged statistics": (averaging, ""),
    "weight_norm": (first(parametrizations.weight_norm), ""),
    "spectral_norm": (first(parametrizations.spectral_norm), ""),
    "orthogonal": (first(parametrizations.orthogonal), ""),
    "pruned": (first(prune.l1_unstructured, "weight", 0.3), ""),
    "old weight_norm": (first(weight_norm), ""),
    "old spectral_norm": (first(spectral_norm), ""),
    "checkpointed": (lambda _: Checkpointed(False), ""),
    "checkpointed, reentrant": (lambda _: Checkpointed(True), ""),
    "replaces a buffer": (lambda _: Replaces(), "it replaces its own 'mean'"),
    "recurrent": (lambda _: Recurrent(), ""),
}


def special(kind: str) -> Net:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old, but in use
        net.b = KINDS[kind][0](net.b)
    net.train()(IMAGES)  # torch.compile compiles now, and statistics are no longer those of a new layer
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_a_special_kind_is_trained_and_compiling_changes_nothing(kind: str) -> None:
    net = special(kind)
    kept = Kept(net)
    local = compiled(net)
    kept.compare()
    assert [o.reason.startswith(KINDS[kind][1]) for o in local.plan.report.opaque] == [True] * bool(KINDS[kind][1])
    assert local.plan.k >= 2 and local.plan.memory.plan.peak > 0
    before = statistics(net)
    local.train()(IMAGES, LABELS).loss.backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    twice = kind == "checkpointed"  # torch runs it again in backward, and its statistics move again
    assert {name: count - before[name] for name, count in statistics(net).items()} == {
        name: 2 if twice and name.startswith("b.") else 1 for name in before}


def statistics(net: nn.Module) -> dict[str, int]:
    """How often the statistics have moved, by layer."""
    return {name: int(buffer) for name, buffer in net.named_buffers() if name.endswith("num_batches_tracked")}


def test_a_scripted_part_has_its_names_in_a_shadow_and_runs_there() -> None:
    """Under another type, in evaluation mode, and copied again."""
    class Own(nn.Sequential):  # torch optimises the code of a class once for all
        pass

    net = Net()
    net.b = copy.deepcopy(torch.jit.script(Own(Own(*block()), nn.Dropout(0.5))))  # which leaves plain tensors
    mode = Fakes()
    new = replicate(replicate(net, fake_copy(mode)), fake_copy(mode, torch.float64)).train()
    assert list(new.state_dict()) == list(net.state_dict())
    assert [name for name, _ in new.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert all(isinstance(p, nn.Parameter) for p in new.b.parameters())
    new.b.eval()
    versions = [buffer._version for buffer in new.b.buffers()]
    for _ in range(3):  # torch writes scripted code anew in the second call, with operations that nobody sees
        with mode:
            out = new.b(torch.empty(2, 8, 4, 4, dtype=torch.float64))
            grads = torch.autograd.grad(out.sum(), list(new.b.parameters()))
        assert "Relu" in out.grad_fn.name()
    assert [buffer._version for buffer in new.b.buffers()] == versions, "it is in evaluation mode"
    assert out.shape == (2, 8, 4, 4) and out.dtype == torch.float64
    assert all(isinstance(grad, FakeTensor) for grad in grads)
    assert not isinstance(next(net.b.parameters()), FakeTensor)
    real = replicate(net.train(), real_copy)
    real(IMAGES)
    assert net.b.state_dict()["0.1.num_batches_tracked"] == 0 and real.b.state_dict()["0.1.num_batches_tracked"] == 1


# ---------------------------------------------------------------------------------------------- everything as it was


class Kept:
    """What ``transform`` must leave as it is: everything of a model, random states, and what is global."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = [(t, t.detach().clone(), t._version, t.grad, t.requires_grad) for t in self._tensors()]
        self.attributes = [(module, self._attributes(module)) for module in model.modules()]
        self.random = self._random()
        self.globals = self._globals()

    def _tensors(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def _attributes(self, module: nn.Module) -> dict[str, Any]:
        """By name: lists, dicts (hooks and sub-modules among them) by what they hold, the rest by identity."""
        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(part) for key, part in value.items()}
            if isinstance(value, list | tuple):
                return [plain(part) for part in value]
            return value if isinstance(value, bool | int | float | str) else id(value)

        scripted = isinstance(module, torch.jit.ScriptModule)  # whose tables are made when they are asked for
        return {"training": module.training} if scripted else {k: plain(v) for k, v in vars(module).items()}

    def _random(self) -> list[Any]:
        numpy = np.random.get_state()
        return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]]

    def _globals(self) -> list[Any]:
        return [*patched(), torch.is_grad_enabled(), torch.get_default_dtype(), recording.recorder,
                torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(),
                logging.getLogger("torch._subclasses.fake_tensor").disabled]

    def compare(self) -> None:
        assert [id(t) for t in self._tensors()] == [id(t) for t, *_ in self.tensors]
        for tensor, value, version, grad, requires_grad in self.tensors:
            assert torch.equal(tensor, value) and tensor._version == version
            assert tensor.grad is grad and tensor.requires_grad == requires_grad
        for module, attributes in self.attributes:
            assert self._attributes(module) == attributes
        assert self._random() == self.random
        assert all(now is then or now == then for now, then in zip(self._globals(), self.globals, strict=True))


class Rich(Net):
    """Keeps things of many kinds, draws random numbers of all kinds, and changes what it keeps in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.by_name = {"last": [self.c]}
        self.count, self.position = 0, torch.zeros(1)
        self.register_buffer("scale", torch.ones(1))
        self.fail_at = 10**9

    def forward(self, x: Tensor) -> Tensor:
        self.by_name["last"].append(self.fc)
        self.seen.append(x.shape[0] + random.random() + float(np.random.rand()))
        self.position.add_(1)
        self.scale.mul_(1)
        self.count += 1
        self.fail(x + torch.rand(1))
        return super().forward(x * self.scale)

    def fail(self, x: Tensor) -> None:
        if x.shape[-1] > self.fail_at:
            raise ValueError("too large")


class Deep(Net):
    """The same in a block."""

    def __init__(self) -> None:
        super().__init__()
        self.b = Inner()


class Inner(Rich):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = block(8), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.by_name["last"].append(self.fc)
        self.seen.append(random.random() + float(np.random.rand()))
        self.position.add_(1)
        self.count += 1
        self.fail(x)
        return self.fc(self.c(self.stem(x * self.scale)))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", [Rich, Deep])
def test_transform_leaves_everything_as_it_was(kind: type[Net], fails: bool) -> None:
    net = kind()
    net(IMAGES).sum().backward()
    net.a.register_forward_hook(lambda *_: None)
    net.c[0].weight.requires_grad_(False)
    net.c.eval()
    for part in net.modules():
        if isinstance(part, Rich):
            part.fail_at = 10 if fails else 10**9
    kept = Kept(net)
    reason = "too large" if fails else "random numbers outside of torch" if kind is Rich else ""
    with pytest.raises(glcan_fx.GlcanFxError, match=reason) if reason else nullcontext():
        compiled(net)
    kept.compare()
