"""The training step is the model as it is now: what is written out is guarded, what is called whole may change."""

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import glcan_fx


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(i, o, 3, stride, 1), nn.GroupNorm(4, o)
        self.rate = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) * (1 - self.rate)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Block(3, 8)
        self.stages = nn.Sequential(nn.Sequential(Block(8, 8), Block(8, 8)),
                                    nn.Sequential(Block(8, 16, 2), Block(16, 16)))
        self.fc = nn.Linear(16, 5)
        self.tau, self.offset = 1.0, torch.zeros(())
        self.config = types.SimpleNamespace(scale=1.0, names=["a"], helper=object())

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.config.scale / self.tau

    def forward(self, x: Tensor, bias: float = 0.0) -> Tensor:
        x = self.stages(self.stem(x - self.offset))
        return self.scaled(self.fc(x.mean((2, 3)))) + bias


def images(seed: int = 1, size: int = 16) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(4)


def compiled(model: nn.Module, k: Any = "natural", **options: Any) -> glcan_fx.LocalModel:
    torch.manual_seed(0)
    options = {"criterion": F.cross_entropy, "example_inputs": images(), "head": "light", "width": 1.0,
               "hidden": 0, **options}
    return glcan_fx.transform(model, k=k, **options).train()


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


def assert_as_the_model(local: glcan_fx.LocalModel) -> None:
    torch.testing.assert_close(local(images(), LABELS).output, local.original.train()(images()).detach())


# ------------------------------------------------------------------------------------------------ written out


@pytest.mark.parametrize(("change", "said"), [
    (lambda net: setattr(net, "tau", 2.0), "'tau' was 1.0 .* is 2.0 now"),
    (lambda net: setattr(net.config, "scale", 2.0), "'config.scale' was 1.0 .* is 2.0 now"),
    (lambda net: setattr(net, "scaled", types.MethodType(lambda self, x: x, net)), "'scaled'"),
    (lambda net: setattr(net, "forward", types.MethodType(lambda self, x: x, net)), "the forward of"),
    (lambda net: net.stages.append(nn.Identity()), "the parts of 'stages'"),
    (lambda net: setattr(net, "stages", nn.Sequential(*net.stages)), "the module 'stages'"),
    (lambda net: net.stages[0].register_forward_hook(lambda *_: None), "'stages.0'.* has a hook"),
], ids=["number", "configuration", "method", "forward", "parts", "container", "hook"])
def test_what_is_written_out_may_not_change(model, change, said):
    local = compiled(model)
    local(images(), LABELS)
    change(model)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(glcan_fx.ModelChangedError, match=said):
        local(images(), LABELS)
    assert all(torch.equal(p, other) for p, other in zip(model.parameters(), before, strict=True))


def test_what_nobody_reads_may_change(model):
    local = compiled(model)
    model.epoch, model.config.helper = 3, object()
    model.history = [1.0]
    model.config.names, model.config.architectures = ["b"], ["Net"]
    assert_as_the_model(local)


def test_a_tensor_that_is_an_attribute_is_read_anew(model):
    local = compiled(model)
    before = local(images(), LABELS).output
    model.offset = torch.ones(())
    assert_as_the_model(local)
    assert not torch.equal(before, local(images(), LABELS).output)


def test_a_hook_on_a_container_that_is_cut_is_refused(model):
    model.stages.register_forward_hook(lambda *_: None)
    with pytest.raises(glcan_fx.PlanError, match="'stages'.* has a hook .* a local module ends inside it"):
        compiled(model, k=["stages.0"])
    compiled(model, k=["stem"])  # called whole
    assert not any(cut.startswith("stages.") for cut in compiled(model).plan.cuts)  # where the choice is ours


def test_with_one_local_module_everything_is_the_models_own(model):
    local = compiled(model, k=1, head=None, width=None, hidden=None)
    model.tau = 2.0
    model.stages[0].register_forward_hook(lambda module, args, out: out * 0.5)
    model.fc = nn.Linear(16, 7)
    assert_as_the_model(local)
    local(images(), LABELS).loss.backward()
    assert model.fc.weight.grad is not None


# ------------------------------------------------------------------------------------------------ called whole


@pytest.mark.parametrize("change", [
    lambda net: setattr(net.stages[1][0], "rate", 0.5),
    lambda net: net.stages[1].__setitem__(1, Block(16, 16)),
    lambda net: setattr(net.stages[0][0], "forward", lambda x: x * 2),
    lambda net: net.stages[0][1].register_forward_hook(lambda module, args, out: out * 0.5),
    lambda net: net.stages[0][1].register_forward_pre_hook(lambda module, args: (args[0] * 0.5,)),
    lambda net: net.stem.norm.eval(),
], ids=["rate", "replaced", "patched", "hook", "pre-hook", "mode"])
def test_blocks_may_change(model, change):
    local = compiled(model)
    change(model)
    assert_as_the_model(local)


def test_a_replaced_block_is_trained(model):
    local = compiled(model)
    local.stages[1][1] = nn.Sequential(Block(16, 16), nn.Conv2d(16, 16, 1))
    local(images(), LABELS).loss.backward()
    assert model.stages[1][1][1].weight.grad.abs().sum() > 0


def test_another_classifier_is_seen_in_both_modes_with_a_warning(model):
    local = compiled(model)
    model.fc = nn.Linear(16, 7)
    assert local.fc is model.fc and any(p is model.fc.weight for p in local.parameters())
    assert local.eval()(images()).shape == (4, 7)
    with pytest.warns(glcan_fx.ModelChangedWarning, match=r"returns \(7,\).* predict \(5,\)"):
        found = local.train()(images(), LABELS)
    assert found.output.shape == (4, 7)
    found.loss.backward()
    assert model.fc.weight.grad.abs().sum() > 0


def test_a_model_may_be_compiled_in_evaluation_mode(model):
    class Switches(Net):
        def forward(self, x: Tensor, bias: float = 0.0) -> Tensor:
            return super().forward(x, bias) * (2.0 if self.training else 1.0)

    local = compiled(Switches().eval())
    assert_as_the_model(local)


def test_hooks_on_the_model_itself_run_around_the_step(model):
    calls = []
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    model.register_forward_hook(lambda module, args, out: calls.append(out.shape))
    local = compiled(model)
    assert not calls
    found = local(images(), LABELS).output
    assert calls == [(4, 5)]
    torch.testing.assert_close(found, model(images()).detach())


def test_gradients_pass_hooks_on_blocks(model):
    local, seen = compiled(model), []
    model.stages[1][0].register_full_backward_hook(lambda module, given, got: seen.append(got[0].abs().sum().item()))
    local(images(), LABELS).loss.backward()
    assert len(seen) == 1 and seen[0] > 0


# ------------------------------------------------------------------------------------------------ arguments, sizes


def test_numbers_among_the_arguments_may_change(model):
    local = compiled(model, example_inputs={"x": images(), "bias": 0.0})
    found = local(x=images(), bias=3.0, targets=LABELS).output
    torch.testing.assert_close(found, model.train()(images(), 3.0).detach())


def test_an_argument_that_the_example_has_not(model):
    local = compiled(model)
    local(images(), LABELS, bias=0.0)
    with pytest.raises(glcan_fx.ModelChangedError, match="argument 'bias' .* was not among example_inputs="):
        local(images(), LABELS, bias=1.0)


class Asks(Net):
    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        if x.shape[-1] % 4:
            x = F.pad(x, (0, 2, 0, 2), value=1.0)
        x = self.stages(self.stem(x))
        return self.fc(x.mean((2, 3))) * (2 if twice else 1)


def test_another_branch_of_sizes_gets_a_step_of_its_own():
    torch.manual_seed(0)
    local = compiled(Asks())
    for size in (16, 18, 20, 22, 16):
        found = local(images(size=size), LABELS)
        torch.testing.assert_close(found.output, local.original.train()(images(size=size)).detach())
        local.zero_grad()
        found.loss.backward()
        assert all(p.grad is not None for p in local.parameters())


def test_at_the_example_sizes_nothing_is_recorded_again():
    calls = []

    class Counted(Asks):
        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            calls.append(x.shape)
            return super().forward(x, twice)

    planned = glcan_fx.plan(Counted(), k="natural", task="classification", example_inputs=images(size=18))
    local = planned.build()
    calls.clear()
    planned.simulate()
    for dtype in (torch.float32, torch.float64):
        local.to(dtype)(images(size=18).to(dtype), LABELS)
        assert len(calls) == (0 if dtype == torch.float32 else 2)  # two batch sizes
    local.to(torch.float32)(images(size=20), LABELS)
    assert calls


def test_a_truth_value_among_the_arguments_may_not_change():
    local = compiled(Asks(), example_inputs={"x": images(), "twice": True})
    local(x=images(), twice=True, targets=LABELS)
    with pytest.raises(glcan_fx.ModelChangedError, match="argument 'twice' .* was True .* is False now"):
        local(x=images(), twice=False, targets=LABELS)


# ------------------------------------------------------------------------------------------------ side losses


class Side(Block):
    """Leaves a loss on an attribute."""

    extra = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.extra = y.square().mean()
        return y


class Reports(Net):
    def __init__(self) -> None:
        super().__init__()
        self.stages[0][1], self.stages[1][0] = Side(8, 8), Side(8, 16, 2)


def test_losses_that_blocks_leave_behind_count_once():
    torch.manual_seed(0)
    model = Reports()
    sides = [part for part in model.modules() if isinstance(part, Side)]
    weight = [0.0]
    local = compiled(model, criterion=lambda out, y: F.cross_entropy(out, y) + weight[0] * sum(s.extra for s in sides))
    found = []
    for weight[0] in (0.0, 1.0, 1.0):
        local.zero_grad()
        local(images(), LABELS).loss.backward()
        found.append(sides[1].conv.weight.grad.clone())
    with torch.no_grad():
        before = model.stages[0](model.stem(images()))
    (expected,) = torch.autograd.grad(sides[1](before).square().mean(), [sides[1].conv.weight])
    for later in found[1:]:
        torch.testing.assert_close(later - found[0], expected, rtol=1e-3, atol=1e-5)


class Collects(Reports):
    """The root reads what blocks leave behind."""

    def forward(self, x: Tensor, bias: float = 0.0) -> Any:
        return super().forward(x, bias), self.stages[1][0].extra + self.stages[0][1].extra


def test_the_model_may_read_what_blocks_leave_behind():
    torch.manual_seed(0)
    local = compiled(Collects(), criterion=lambda out, y: F.cross_entropy(out[0], y) + out[1])
    found, expected = local(images(), LABELS).output, local.original.train()(images())
    assert torch.allclose(found[0], expected[0]) and torch.allclose(found[1], expected[1])
    assert "left_on" in local.code or "extra" in local.code


# ------------------------------------------------------------------------------------------------ configurations


class Config:
    """As libraries write them: shared by all modules, read by properties, with a note of what was called last."""

    def __init__(self) -> None:
        self.scale, self.kind, self._flag = 1.0, None, True

    @property
    def gain(self) -> float:
        return self.scale * 2

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class Configured(nn.Module):
    def __init__(self, read: Any, sets: bool = False) -> None:
        super().__init__()
        self.sets = sets
        self.first, self.second, self.head = Block(3, 8), Block(8, 8, 2), nn.Linear(8, 5)
        self.config, self.read = Config(), read

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        if self.sets and self.config.kind is None:
            self.config.kind = "classes"  # set by the first call
        return self.head(x.mean((2, 3))) * self.read(self.config)


GAIN = 1.0
SETTINGS = {"offset": 0.0, "names": ["a"]}
SEEN: dict[tuple[int, ...], Tensor] = {}


def cached(x: Tensor) -> Tensor:
    SEEN[tuple(x.shape)] = x.detach()
    return x


def adjusted(x: Tensor) -> Tensor:
    return cached(x) + SETTINGS["offset"]


class Outside(nn.Module):
    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(3, 8), Block(8, 8, 2), nn.Linear(8, 5)

        def shifted(x: Tensor) -> Tensor:
            return x + bias

        def move() -> None:
            nonlocal bias
            bias += 1

        self.shifted, self.move = shifted, move

    def forward(self, x: Tensor) -> Tensor:
        return self.shifted(adjusted(self.head(self.second(self.first(x)).mean((2, 3))) * GAIN))


@pytest.mark.parametrize(("change", "said"), [
    (lambda net: globals().update(GAIN=2.0), "the global 'GAIN' was 1.0"),
    (lambda net: SETTINGS.update(offset=1.0), "the global 'SETTINGS' was"),
    (lambda net: net.move(), "the variable 'bias' around Outside"),
], ids=["number", "in a function that is called", "around a function"])
def test_variables_outside_of_what_is_written_out_may_not_change(change: Any, said: str) -> None:
    torch.manual_seed(0)
    net = Outside()
    local = compiled(net)
    assert_as_the_model(local)
    try:
        change(net)
        with pytest.raises(glcan_fx.ModelChangedError, match=said):
            local(images(), LABELS)
    finally:
        globals().update(GAIN=1.0)
        SETTINGS.update(offset=0.0)


@pytest.mark.parametrize("read", [lambda config: config.scale, lambda config: config.gain,
                                  lambda config: getattr(config, "missing", config.scale),
                                  lambda config: config.to_dict()["scale"]],
                         ids=["attribute", "property", "default", "dict"])
def test_of_a_configuration_what_is_read_may_not_change(read: Any) -> None:
    torch.manual_seed(0)
    net = Configured(read)
    local = compiled(net)
    net.config._flag = False
    assert_as_the_model(local)
    net.config.scale = 3.0
    with pytest.raises(glcan_fx.ModelChangedError, match="'config"):
        local(images(), LABELS)
    net.config.scale = 1.0
    if read(types.SimpleNamespace(scale=1, gain=1, missing=5, to_dict=lambda: {"scale": 1})) == 5:
        net.config.missing = 5
        with pytest.raises(glcan_fx.ModelChangedError, match=r"'config\.missing'"):
            local(images(), LABELS)


def test_what_a_library_writes_to_a_configuration_changes_nothing() -> None:
    """transformers does when it saves, and its Trainer when it begins."""
    torch.manual_seed(0)
    net = Configured(lambda config: config.scale, sets=True)
    local = compiled(net)
    net.config.architectures, net.config.use_cache = ["Configured"], False
    net(images())  # sets what the forward itself sets
    assert net.config.kind == "classes"
    assert_as_the_model(local)
